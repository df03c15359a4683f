"""The code blocks of a page, and what is needed to run them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(
    r"^(?P<indent> *)```python(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of Python; `file` is its title, the name under which the page's other blocks import it."""

    page: Path
    number: int
    file: str | None
    code: str

    @property
    def lines(self) -> int:
        """Non-blank lines."""
        return sum(bool(line.strip()) for line in self.code.splitlines())


def pages() -> list[Path]:
    """README and every page that has Python in it."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
    return [page for page in found if "```python" in page.read_text()]


def blocks(page: Path) -> list[Block]:
    """The Python blocks of a page, in order."""
    return [
        Block(page, number, _title(match["info"]), _dedented(match["code"], match["indent"]))
        for number, match in enumerate(_FENCE.finditer(page.read_text()), start=1)
    ]


def _title(info: str) -> str | None:
    found = re.search(r'title="([^"]+)"', info)
    return found[1] if found else None


def _dedented(code: str, indent: str) -> str:
    return "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))
