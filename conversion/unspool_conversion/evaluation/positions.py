"""Ranges of positions by which every measurement is told apart."""

from collections.abc import Iterator

POSITION_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def position_ranges(length: int) -> Iterator[tuple[int, int]]:
    """The ranges of positions that a text of that many tokens fills, the last one perhaps in part."""
    for low, high in zip(POSITION_EDGES, POSITION_EDGES[1:], strict=False):
        if low < length - 1:
            yield low, min(high, length)
