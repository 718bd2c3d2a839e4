"""Token ids as bytes: what is compared, hashed and stored."""

import sys
from array import array
from collections.abc import Sequence

TOKEN_BYTES = 4


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Four bytes a token, little-endian on every machine."""
    packed = array("i", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """Raises ValueError for bytes that are no whole tokens."""
    tokens = array("i")
    tokens.frombytes(data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tuple(tokens)
