"""Bytes as people write them."""

import re
from typing import NewType

ByteSize = NewType("ByteSize", int)
"""A count of bytes; as a flag it is written like 500MB or 2GiB."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?I?)B?", re.IGNORECASE)


def parse_size(text: str) -> ByteSize:
    """`500MB`, `2 GiB`, `1.5G`, `4096`. Raises ValueError for what is no size."""
    match = _SIZE.fullmatch(text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size like 500MB or 2GiB")
    return ByteSize(int(float(match[1]) * unit))


def format_size(num_bytes: float) -> str:
    """Three digits and a unit: `15.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
