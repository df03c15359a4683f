"""Rows of cells: a table where it fits into the width, and a block of lines for each row where it does not."""

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_GAP = 2
_LAST_COLUMN = 32
"""The last column may be wrapped, down to this width."""

STYLES = {
    "ok": "green",
    "loads": "green",
    "there": "green",
    "warning": "yellow",
    "held": "yellow",
    "rescheduled": "yellow",
    "retry-requested": "yellow",
    "missing": "yellow",
    "error": "bold red",
    "parked": "red",
    "broken": "red",
    "conflict": "red",
}


class Listing:
    """Columns that are empty in every row are left out.

    Args:
        columns: Their names.
        rows: One cell per column.
        empty: What to say when there are no rows.
    """

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
        used = [n for n in range(len(columns)) if any(row[n] for row in rows)]
        self._columns = [columns[n] for n in used]
        self._rows = [[row[n] for n in used] for row in rows]
        self._empty = empty

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if not self._rows:
            yield Text(self._empty)
        elif self._narrowest() <= options.max_width:
            yield self._table()
        else:
            for number, row in enumerate(self._rows):
                yield from self._block(row, first=number == 0)

    def _narrowest(self) -> int:
        widths = [max(cell_len(cell) for cell in column) for column in zip(self._columns, *self._rows, strict=True)]
        return sum(widths[:-1]) + min(widths[-1], _LAST_COLUMN) + _GAP * (len(widths) - 1)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="bold", pad_edge=False)
        for column in self._columns[:-1]:
            table.add_column(column, no_wrap=True)
        table.add_column(self._columns[-1], overflow="fold")
        for row in self._rows:
            table.add_row(*map(_cell, row))
        return table

    def _block(self, row: Sequence[str], *, first: bool) -> Iterator[RenderableType]:
        if not first:
            yield Text("")
        title = Text("  ").join(_cell(cell) for cell in row[:2] if cell)
        title.stylize("bold")
        yield title
        yield Padding(facts([*zip(self._columns[2:], row[2:], strict=True)]), (0, 0, 0, 2), expand=False)


def facts(pairs: Sequence[tuple[str, str]]) -> Table:
    """Names and values, one pair a line; a long value is wrapped under itself. Empty values are left out."""
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            grid.add_row(name, _cell(value))
    return grid


def _cell(text: str) -> Text:
    return Text(text, style=STYLES.get(text, ""))
