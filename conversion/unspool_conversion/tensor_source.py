"""What a source checkpoint offers, whatever its file format: a configuration, tensors by name, and side files."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unspool.errors import UserError

MAX_JSON_BYTES = 256 * 1024 * 1024
_HASH_BLOCK = 1 << 22


class TensorInfo(NamedTuple):
    """A stored tensor. `dtype` is what `load` gives: for a quantised tensor that is float32."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class TensorSource(ABC):
    """A pretrained checkpoint opened for reading. Opening reads headers and metadata, never tensor data."""

    format: str
    """`safetensors` or `gguf`; with `config["model_type"]` it says how the tensors are named."""
    config: dict[str, Any]
    """The model's configuration as its `config.json` has it, or as its GGUF metadata translate to it."""
    tensors: Mapping[str, TensorInfo]

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """One tensor as the source names, lays out and stores it. The caller must not write to it."""

    @abstractmethod
    def write_side_files(self, directory: Path) -> None:
        """Writes tokenizer, chat template, generation configuration and licence files into a directory.

        Raises UserError when the source has no tokenizer.
        """

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files that hold the tensors."""

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """Where the checkpoint came from: `format`, `source` and what else identifies it. Reads no tensor data."""

    def provenance(self) -> dict[str, Any]:
        """`origin` and the size and SHA-256 of every weight file, which are read whole."""
        files = [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in self.weight_files()
        ]
        return self.origin() | {"files": files}


def file_sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises UserError when it is missing, too large or no JSON object."""
    if not path.is_file():
        raise UserError(f"{path} is missing; download the checkpoint again")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise UserError(f"{path} has {size} bytes, more than the {MAX_JSON_BYTES} that a configuration can need")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object; download it again")
    return value
