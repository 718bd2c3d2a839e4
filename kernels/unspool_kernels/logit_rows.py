"""Which tokens of a packed batch get logits."""

from collections.abc import Sequence
from typing import Literal

LogitRows = Literal["none", "last", "every"]
"""Logits of no token, of a sequence's last one, or of every token."""


def each_wish(want: LogitRows | Sequence[LogitRows], sequences: int) -> Sequence[LogitRows]:
    """One wish a sequence. Raises ValueError when there are more or fewer."""
    wishes = [want] * sequences if isinstance(want, str) else want
    if len(wishes) != sequences:
        raise ValueError(f"want: must name one of none, last, every for each of {sequences} sequences")
    return wishes


def logit_rows(lengths: Sequence[int], want: LogitRows | Sequence[LogitRows]) -> list[int]:
    """Indices of the tokens that get logits, of sequences of these lengths laid one behind the other."""
    rows: list[int] = []
    start = 0
    for length, wish in zip(lengths, each_wish(want, len(lengths)), strict=True):
        end = start + length
        first = {"none": end, "last": end - 1, "every": start}[wish]
        rows.extend(range(first, end))
        start = end
    return rows
