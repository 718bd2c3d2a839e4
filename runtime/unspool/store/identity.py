"""What a state may be used under: fingerprints of everything that decides what its numbers mean."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unspool.config import UnspoolConfig
from unspool.errors import UserError

PIECE_BYTES = 16 << 20
HASH_THREADS = 4

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

NOT_COMPUTED_WITH = frozenset({"_name_or_path", "architectures", "transformers_version"})
"""Fields of config.json that say who wrote it, not what the model computes."""


@dataclass(frozen=True)
class StateIdentity:
    """What made a state; another one must be equal in every field to use it. Fingerprints are sha256 in hex.

    An adapter that was applied at conversion is in the weights.
    """

    weights: str
    config: str
    tokenizer: str
    template: str
    weight_format: str
    """What the executor computes with: "float32", "int8", ... The same checkpoint can be run in several."""
    state_dtype: str
    depth: int
    """Layers."""

    def difference(self, other: "StateIdentity") -> list[str]:
        """Names of the fields that differ."""
        mine, its = asdict(self), asdict(other)
        return [name for name in mine if mine[name] != its[name]]


def identity_of(path: Path, config: UnspoolConfig, *, weight_format: str, state_dtype: torch.dtype) -> StateIdentity:
    """The identity of states that a converted checkpoint's directory makes; reads every weight file once.

    The configuration's fingerprint is over config.json as it was written, not over `config`, to which another release
    of transformers would add fields that say nothing new. Raises UserError when a file is missing or unreadable.
    """
    try:
        return StateIdentity(
            weights=_weights_fingerprint(path),
            config=_config_fingerprint(path),
            tokenizer=_fingerprint((name, file.read_bytes()) for name, file in _present(path, TOKENIZER_FILES)),
            template=_template_fingerprint(path),
            weight_format=weight_format,
            state_dtype=str(state_dtype).removeprefix("torch."),
            depth=config.num_hidden_layers,
        )
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}; make it readable or convert again") from error
    except ValueError as error:
        raise UserError(f"{path}: a .json file is damaged ({error}); correct it or convert again") from error


def _weights_fingerprint(path: Path) -> str:
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{path} has no model*.safetensors; pass a directory that `unspool convert` wrote")
    pieces = [(file, offset) for file in files for offset in range(0, file.stat().st_size, PIECE_BYTES)]
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashlib and reading release the interpreter's lock
        digests = pool.map(_piece_digest, pieces)
        sizes = ((file.name, str(file.stat().st_size).encode()) for file in files)
        return _fingerprint([*sizes, ("pieces", b"".join(digests))])


def _piece_digest(piece: tuple[Path, int]) -> bytes:
    file, offset = piece
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        data = memoryview(bytearray(min(PIECE_BYTES, os.fstat(stream.fileno()).st_size - offset)))
        filled = 0
        while filled < len(data) and (count := stream.readinto(data[filled:])):
            filled += count
    return hashlib.sha256(data[:filled]).digest()


def _config_fingerprint(path: Path) -> str:
    values = _json_object(path / "config.json")
    computed_with = {name: value for name, value in values.items() if name not in NOT_COMPUTED_WITH}
    return _fingerprint([("config", json.dumps(computed_with, sort_keys=True).encode())])


def _template_fingerprint(path: Path) -> str:
    file = path / "chat_template.jinja"
    if file.exists():
        return _fingerprint([("template", file.read_bytes())])
    settings = path / "tokenizer_config.json"
    template = _json_object(settings).get("chat_template") if settings.exists() else None
    if template is None:
        return _fingerprint([])
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return _fingerprint([("template", text.encode())])


def _json_object(file: Path) -> dict[str, Any]:
    values = json.loads(file.read_bytes())
    if not isinstance(values, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return values


def _present(path: Path, names: Iterable[str]) -> list[tuple[str, Path]]:
    return [(name, path / name) for name in names if (path / name).exists()]


def _fingerprint(parts: Iterable[tuple[str, bytes]]) -> str:
    """sha256 over named parts, each with its length, so that no two lists of parts read alike."""
    digest = hashlib.sha256()
    for name, data in parts:
        digest.update(f"{name}:{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
