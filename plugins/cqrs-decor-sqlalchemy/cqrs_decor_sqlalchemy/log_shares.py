"""How the readers of a group share the lanes of a topic: pure arithmetic, the same wherever it is done."""

import zlib
from collections.abc import Collection, Mapping
from itertools import islice
from typing import TypeAlias

Lane: TypeAlias = tuple[str, int]
"""Topic and number of a lane."""


def share_of(reader: str, readers: Collection[str], topic: str, lanes: int) -> int:
    """How many of a topic's lanes are this reader's.

    All readers that see the same group come to the same result, and the shares add up to all lanes. Who gets one more
    than others differs from topic to topic, so that many topics with few lanes are spread as well.
    """
    if reader not in readers:
        return 0
    fair, over = divmod(lanes, len(readers))
    rank = sorted(readers).index(reader)
    return fair + ((rank + zlib.crc32(topic.encode())) % len(readers) < over)


def fair_counts(waiting: Mapping[Lane, int], limit: int) -> dict[Lane, int]:
    """Divide `limit` between lanes in which records wait: all the same, and what one does not need goes to the others.

    Where there is not one for each, the first ones get one each.
    """
    counts = dict.fromkeys(islice(waiting, limit), 0)
    for nth, lane in enumerate(sorted(counts, key=waiting.__getitem__)):
        counts[lane] = min(waiting[lane], limit // (len(counts) - nth))
        limit -= counts[lane]
    return counts
