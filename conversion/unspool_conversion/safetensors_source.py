"""A HuggingFace directory as a source: `config.json`, one or several safetensors files, tokenizer files."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unspool.errors import UserError
from unspool_conversion.tensor_source import TensorInfo, TensorSource, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
TOKENIZER_FILES = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"})

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsSource(TensorSource):
    """A directory that `save_pretrained` writes. `origin` says where the directory itself came from.

    Raises UserError when files are missing, damaged, disagree with the index, or hold quantised tensors.
    """

    format = "safetensors"

    def __init__(self, directory: Path, origin: dict[str, Any]) -> None:
        self._directory = directory
        self._origin = origin
        self.config = read_json(directory / "config.json")
        self._files, self.tensors = _stored_tensors(directory)

    def load(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def write_side_files(self, directory: Path) -> None:
        present = [name for name in SIDE_FILES if (self._directory / name).is_file()]
        if TOKENIZER_FILES.isdisjoint(present):
            raise UserError(f"{self._directory} has no tokenizer.json; save the model's tokenizer into it first")
        for name in present:
            shutil.copyfile(self._directory / name, directory / name)

    def weight_files(self) -> list[Path]:
        return sorted(set(self._files.values()))

    def origin(self) -> dict[str, Any]:
        return {"format": self.format} | self._origin


class StoredTensors(NamedTuple):
    """Each tensor's file, and what the file's header says of it."""

    files: dict[str, Path]
    infos: dict[str, TensorInfo]


def _stored_tensors(directory: Path) -> StoredTensors:
    if (directory / WEIGHTS).is_file():
        infos = _header(directory / WEIGHTS)
        return StoredTensors(dict.fromkeys(infos, directory / WEIGHTS), infos)
    if not (directory / INDEX).is_file():
        raise UserError(_why_no_weights(directory))
    files = _indexed_files(directory)
    infos = {}
    for path in sorted(set(files.values())):
        stored = _header(path)
        _check_index({name for name, file in files.items() if file == path}, set(stored), path)
        infos |= stored
    return StoredTensors(files, infos)


def _indexed_files(directory: Path) -> dict[str, Path]:
    listed = read_json(directory / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{directory / INDEX} has no weight_map; download it again")
    return {str(name): _shard(directory, file) for name, file in listed.items()}


def _shard(directory: Path, file: object) -> Path:
    if not isinstance(file, str) or Path(file).name != file:
        raise UserError(f"{directory / INDEX} names {file!r}, which is not a file of this directory")
    if not (directory / file).is_file():
        raise UserError(f"{directory / file} is missing though {INDEX} names it; download it again")
    return directory / file


def _check_index(listed: set[str], stored: set[str], path: Path) -> None:
    if absent := sorted(listed - stored):
        raise UserError(f"{path} does not hold {absent[0]}, though {INDEX} says so; download both again")
    if unlisted := sorted(stored - listed):
        raise UserError(f"{path} holds {unlisted[0]}, which {INDEX} does not list; download both again")


def _header(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            shapes = {name: (tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in stored.items()}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise UserError(f"{path} ({size} bytes) is truncated or damaged ({error}); download it again") from error
    for name, (_, dtype) in shapes.items():
        if dtype not in _DTYPES:
            raise UserError(f"{path}: {name} is stored as {dtype}; convert from an unquantised checkpoint or a GGUF")
    return {name: TensorInfo(shape, _DTYPES[dtype]) for name, (shape, dtype) in shapes.items()}


def _why_no_weights(directory: Path) -> str:
    if list(directory.glob("pytorch_model*.bin")) or list(directory.glob("*.pt")) or list(directory.glob("*.pth")):
        return (
            f"{directory} has pickled weights only, and those are never loaded: "
            "re-save the model with save_pretrained, which writes safetensors"
        )
    if (directory / "adapter_model.safetensors").is_file():
        return f"{directory} is an adapter; merge it into its base model (merge_and_unload) and save that"
    return f"{directory} has neither {WEIGHTS} nor {INDEX}; pass a checkpoint directory, a hub id or a .gguf file"
