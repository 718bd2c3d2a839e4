"""Writes tensors as safetensors shards, holding one shard in memory at a time."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from unspool_conversion.plan import PlannedTensor
from unspool_conversion.safetensors_source import INDEX, WEIGHTS


def split_into_shards(tensors: Sequence[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    """Cuts the tensors, in order, into shards of at most that size; a larger tensor is a shard of its own."""
    shards: list[list[PlannedTensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def write_shards(
    directory: Path,
    shards: Sequence[Sequence[PlannedTensor]],
    load: Callable[[str], Tensor],
    progress: Callable[[int, int], None],
) -> None:
    """Writes `model.safetensors`, or numbered shards and their index, telling progress of bytes done and all bytes."""
    total, done = sum(tensor.num_bytes for shard in shards for tensor in shard), 0
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(i + 1, len(shards)) for i in range(len(shards))]
    for file_name, shard in zip(names, shards, strict=True):
        tensors = {tensor.name: load(tensor.name) for tensor in shard}
        _save(tensors, directory / file_name)
        del tensors  # before the next shard is read
        done += sum(tensor.num_bytes for tensor in shard)
        progress(done, total)
    if len(shards) > 1:
        _write_index(directory / INDEX, names, shards, total)


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors makes files that only their owner can read


def _write_index(path: Path, names: Sequence[str], shards: Sequence[Sequence[PlannedTensor]], total: int) -> None:
    weight_map = {tensor.name: file_name for file_name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
