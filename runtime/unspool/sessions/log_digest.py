"""A digest of a token log that depends on its tokens alone, and can be carried on from where it was."""

import hashlib
from dataclasses import dataclass

from unspool.token_bytes import TOKEN_BYTES

BLOCK_BYTES = 64 * TOKEN_BYTES


@dataclass(frozen=True)
class LogDigest:
    """After `position` tokens: a chain of sha256 over whole blocks of 64 tokens, and the tokens since the last block.

    However a log is cut into turns, the same tokens give the same digest.
    """

    position: int = 0
    chain: bytes = hashlib.sha256(b"unspool token log 1").digest()
    tail: bytes = b""

    def extend(self, tokens: bytes) -> "LogDigest":
        """With more tokens, four bytes each, little-endian."""
        data, chain = self.tail + tokens, self.chain
        whole = len(data) // BLOCK_BYTES * BLOCK_BYTES
        for start in range(0, whole, BLOCK_BYTES):
            chain = hashlib.sha256(chain + data[start : start + BLOCK_BYTES]).digest()
        return LogDigest(self.position + len(tokens) // TOKEN_BYTES, chain, data[whole:])

    def hex(self) -> str:
        return hashlib.sha256(self.chain + self.tail).hexdigest()
