"""Writes tensors as safetensors shards, rounding them to their format one by one; holds one shard at a time."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from unspool.errors import UserError
from unspool.quantization import FLOATS, integer_format, part_name, stored_format, stored_parts
from unspool_conversion.plan import PlannedTensor
from unspool_conversion.safetensors_source import INDEX, WEIGHTS
from unspool_kernels.reference.quantization import quantize


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
    """Writes `model.safetensors`, or numbered shards and their index, telling progress of bytes done and all bytes.

    Raises UserError for a tensor with values that its format cannot keep.
    """
    total, done = sum(tensor.num_bytes for shard in shards for tensor in shard), 0
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(i + 1, len(shards)) for i in range(len(shards))]
    for file_name, shard in zip(names, shards, strict=True):
        tensors: dict[str, Tensor] = {}
        for tensor in shard:
            tensors |= _stored(tensor, load(tensor.name))
        _save(tensors, directory / file_name)
        del tensors  # before the next shard is read
        done += sum(tensor.num_bytes for tensor in shard)
        progress(done, total)
    if len(shards) > 1:
        _write_index(directory / INDEX, names, shards, total)


def _stored(planned: PlannedTensor, values: Tensor) -> dict[str, Tensor]:
    """The tensors that the checkpoint holds for a planned one."""
    if planned.format is None:
        return {planned.name: values}
    kept = stored_format(planned.name, planned.shape, planned.format)
    try:
        if kept in FLOATS:
            return {planned.name: _cast(values, FLOATS[kept])}
        matrix = quantize(values, integer_format(kept))
    except ValueError as error:
        raise UserError(f"{planned.name} {error}; use --quant none") from error
    return {part_name(planned.name, name): part for name, part in matrix._asdict().items() if part is not None}


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    if not bool(values.isfinite().all()):
        raise ValueError("holds values that are not finite: the source is damaged")
    cast = values.to(dtype)
    if bool(cast.isinf().any()):
        raise ValueError(f"holds values beyond the range of {str(dtype).removeprefix('torch.')}")
    return cast.contiguous()


def _stored_names(planned: PlannedTensor) -> Iterable[str]:
    if planned.format is None:
        return (planned.name,)
    return stored_parts(planned.name, planned.shape, planned.format)


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors makes files that only their owner can read


def _write_index(path: Path, names: Sequence[str], shards: Sequence[Sequence[PlannedTensor]], total: int) -> None:
    weight_map = {
        name: file_name
        for file_name, shard in zip(names, shards, strict=True)
        for tensor in shard
        for name in _stored_names(tensor)
    }
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
