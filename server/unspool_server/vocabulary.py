"""Single tokens as bytes and as the strings that log-probability replies name them by. Knows no request."""

import codecs
import json
import re
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
WORD_BOUNDARY = "\u2581"  # SentencePiece writes a blank so
LOWEST_LOGPROB = -9999.0  # OpenAI's value for a token that cannot be; JSON has no infinity
VISIBLE_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


class Vocabulary:
    """What bytes each token of a tokenizer stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._kinds = _decoder_kinds(tokenizer)
        self._added = {token: str(content) for token, content in tokenizer.added_tokens_decoder.items()}
        self._special: Collection[int] = frozenset(tokenizer.all_special_ids)
        self._byte_of = _byte_alphabet() if "ByteLevel" in self._kinds else {}
        self.longest_token = max(map(len, tokenizer.get_vocab()), default=0)
        """Characters of a text that one token can stand for, at most: a byte-level piece has a letter for each byte."""

    def is_special(self, token: int) -> bool:
        return token in self._special

    def token_bytes(self, token: int) -> bytes:
        """Empty for a row of the embedding that no token uses."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if self._byte_of:
            return b"".join(self._byte_of.get(letter, letter.encode()) for letter in piece)
        if "ByteFallback" in self._kinds and (match := BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return piece.replace(WORD_BOUNDARY, " ").encode()

    def token_text(self, token: int) -> str:
        """The token as OpenAI's API names it: its text, or its escaped bytes where they are no whole characters."""
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class TextOffsets:
    """Where each token begins, in characters of the text that its sequence reads as."""

    def __init__(self, vocabulary: Vocabulary, known_text: str = "") -> None:
        """`known_text` is a beginning that is given as text, and may lack what the tokenizer added to it."""
        self._vocabulary = vocabulary
        self._known_text = known_text
        self._position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def advance(self, token: int) -> int:
        """The offset of `token`, which is the next one."""
        offset = self._position
        characters = self._decoder.decode(self._vocabulary.token_bytes(token))
        if offset < len(self._known_text):
            shown = characters if self._known_text.startswith(characters, offset) else characters.lstrip(" ")
            self._position += len(shown) if self._known_text.startswith(shown, offset) else 0
        elif not self._vocabulary.is_special(token):
            self._position += len(characters)
        return offset


def finite(logprob: float) -> float:
    """The log-probability as JSON can carry it."""
    return max(logprob, LOWEST_LOGPROB)


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The names of the steps by which the tokenizer turns tokens into text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return frozenset()
    description: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return frozenset(step["type"] for step in [description, *description.get("decoders", [])])


def _byte_alphabet() -> dict[str, bytes]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2)."""
    letters = {chr(byte): bytes([byte]) for byte in VISIBLE_BYTES}
    hidden = [byte for byte in range(256) if byte not in VISIBLE_BYTES]
    return letters | {chr(256 + index): bytes([byte]) for index, byte in enumerate(hidden)}
