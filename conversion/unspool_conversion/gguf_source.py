"""A GGUF file as a source: dequantised tensors, its metadata as a configuration, its tokenizer as tokenizer files."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoTokenizer

from unspool.errors import UserError
from unspool_conversion.gguf_metadata import config_from_metadata, end_of_text_ids, llama3_scaling
from unspool_conversion.tensor_source import TensorInfo, TensorSource

FREQUENCY_DIVISORS = "rope_freqs.weight"

_DTYPES = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
_DESCRIPTIONS = {"name": "general.name", "license": "general.license", "file_type": "general.file_type"}


class GGUFSource(TensorSource):
    """One GGUF file. Tensors keep GGUF's names and row order; the architecture map undoes both.

    Raises UserError when the file is damaged, split, or holds what cannot be represented.
    """

    format = "gguf"

    def __init__(self, path: Path, origin: dict[str, Any]) -> None:
        self._path = path
        self._origin = origin
        reader = _open(path)
        self._metadata = _metadata(reader, path)
        self._stored: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        self.tensors = {name: _info(tensor, path) for name, tensor in self._stored.items()}
        try:
            self.config = config_from_metadata(self._metadata, self.tensors.keys())
            if FREQUENCY_DIVISORS in self.tensors:
                divisors = self.load(FREQUENCY_DIVISORS).float().numpy()
                self.config["rope_parameters"] = llama3_scaling(divisors, self.config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def load(self, name: str) -> Tensor:
        stored = self._stored[name]
        values = dequantize(stored.data, stored.tensor_type)
        # A copy: float32 tensors come as views of the read-only file.
        return torch.from_numpy(np.array(values, dtype=np.float32)).to(self.tensors[name].dtype)

    def write_side_files(self, directory: Path) -> None:
        if "tokenizer.ggml.tokens" not in self._metadata:
            raise UserError(f"{self._path} has no tokenizer; convert from a checkpoint that has one")
        with tempfile.TemporaryDirectory() as alone:
            # Tokenizer files that lie beside the GGUF would be mixed with its own.
            (Path(alone) / self._path.name).symlink_to(self._path.resolve())
            try:
                tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=self._path.name)
            except (ValueError, LookupError, TypeError, NotImplementedError, ImportError) as error:
                raise UserError(f"{self._path}: transformers cannot read its tokenizer ({error})") from error
        tokenizer.save_pretrained(directory)
        generation = {
            key: self.config[key] for key in ("bos_token_id", "pad_token_id") if self.config.get(key) is not None
        }
        if ends := end_of_text_ids(self._metadata):
            generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")

    def weight_files(self) -> list[Path]:
        return [self._path]

    def origin(self) -> dict[str, Any]:
        described = {name: self._metadata[key] for name, key in _DESCRIPTIONS.items() if key in self._metadata}
        return {"format": self.format} | self._origin | described


def _open(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError, MemoryError) as error:
        size = path.stat().st_size
        raise UserError(
            f"{path} ({size} bytes) is no GGUF file, or truncated or damaged ({error}); download it again"
        ) from error


def _metadata(reader: GGUFReader, path: Path) -> Mapping[str, Any]:
    try:
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} has unreadable metadata ({error}); download it again") from error
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{path} is one part of a split file; join the parts first: llama-gguf-split --merge")
    return metadata


def _info(tensor: ReaderTensor, path: Path) -> TensorInfo:
    kind = tensor.tensor_type
    shape = tuple(int(size) for size in reversed(tensor.shape))
    try:
        dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
    except NotImplementedError as error:
        raise UserError(
            f"{path}: {tensor.name} is stored as {kind.name}, which the gguf package cannot read"
        ) from error
    return TensorInfo(shape, _DTYPES.get(kind, torch.float32))
