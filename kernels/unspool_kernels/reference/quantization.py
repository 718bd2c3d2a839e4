"""Weights on the grids of the packed integer formats: a float16 scale for every 32 columns, int4 with a minimum.

The arithmetic is that of packing.h, operation by operation, so that both give a weight the same code.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

IntegerFormat = Literal["int8", "int4"]

GROUP = 32
CODES_A_BYTE = 2
MOST_INT8, MOST_INT4 = 127.0, 15.0
SHRINKS, SHRINK_STEP = 7, 0.025
_WEIGHTS_AT_ONCE = 1 << 18


class QuantizedMatrix(NamedTuple):
    """A weight [rows, columns] as codes, and the float16 factors [rows, ceil(columns / 32)] of its groups.

    int8: codes int8 [rows, columns], w = scale * code. int4: codes uint8 [rows, ceil(columns / 2)], the even column in
    the low four bits, w = minimum + scale * code.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None


class Part(NamedTuple):
    """One of the tensors that a quantised matrix is stored as."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def parts(rows: int, columns: int, format: IntegerFormat) -> dict[str, Part]:
    """What a weight [rows, columns] is stored as, by the fields of QuantizedMatrix."""
    factors = Part((rows, -(-columns // GROUP)), torch.float16)
    if format == "int8":
        return {"codes": Part((rows, columns), torch.int8), "scale": factors}
    codes = Part((rows, -(-columns // CODES_A_BYTE)), torch.uint8)
    return {"codes": codes, "scale": factors, "minimum": factors}


def quantize(weight: Tensor, format: IntegerFormat) -> QuantizedMatrix:
    """Rounds a float weight [rows, columns] to the grid that the native packer would choose for it.

    What is dequantised in float32 gets the same codes again, but for groups that float16 is too coarse for: in int8
    those of weights all below 2^-10, in int4 those whose range is below 2^-15 or a 32nd of their largest weight.

    Raises ValueError for values that are not finite or so large that float16 has no scale for them.
    """
    rows, columns = weight.shape
    result = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in parts(rows, columns, format).items()}
    rounded = _round_int8 if format == "int8" else _round_int4
    for block in _row_blocks(rows, columns):
        for first, last, groups in _groups(weight[block].float()):
            for name, values in zip(result, rounded(groups), strict=True):
                span = (
                    slice(first // CODES_A_BYTE, -(-last // CODES_A_BYTE)) if format == "int4" else slice(first, last)
                )
                span = span if name == "codes" else slice(first // GROUP, -(-last // GROUP))
                result[name][block, span] = values
    if not all(bool(part.isfinite().all()) for name, part in result.items() if name != "codes"):
        raise ValueError(f"holds values that {format} cannot keep: not finite, or too large for a float16 scale")
    return QuantizedMatrix(**result)


def dequantize(matrix: QuantizedMatrix, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] that the codes stand for, on their device."""
    rows = matrix.codes.shape[0]
    weight = torch.empty(rows, columns, dtype=dtype, device=matrix.codes.device)
    for block in _row_blocks(rows, columns):
        scale = _spread(matrix.scale[block], columns)
        if matrix.minimum is None:
            weight[block] = (scale * matrix.codes[block].float()).to(dtype)
            continue
        levels = torch.stack([matrix.codes[block] & 15, matrix.codes[block] >> 4], dim=-1).flatten(1)[:, :columns]
        minimum = _spread(matrix.minimum[block], columns)
        # Level 0 is the minimum itself, also where that is -0.
        weight[block] = torch.where(levels == 0, minimum, minimum + scale * levels.float()).to(dtype)
    return weight


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, _WEIGHTS_AT_ONCE // max(columns, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _groups(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """First and last column, and the groups [width, rows, groups], of the whole groups and of the one that is left."""
    rows, columns = weight.shape
    whole = columns // GROUP * GROUP
    for first, last in ((0, whole), (whole, columns)):
        if last > first:
            width = min(GROUP, last - first)
            yield first, last, weight[:, first:last].reshape(rows, -1, width).permute(2, 0, 1).contiguous()


def _round_int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    scale = (groups.abs().amax(0) / MOST_INT8).half()
    levels = (groups * _inverse(scale.float()) + MOST_INT8).round().clamp(0.0, 2.0 * MOST_INT8)
    return _in_columns(levels - MOST_INT8).to(torch.int8), scale


def _round_int4(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of several shrunken ranges, that of least squared error."""
    low, high = _extremes(groups)
    best = torch.full_like(low, torch.inf)
    levels, scale, minimum = torch.zeros_like(groups), torch.zeros_like(low), torch.zeros_like(low)
    for shrink in range(SHRINKS):
        cut = torch.tensor(SHRINK_STEP) * shrink * (high - low) * 0.5
        start, step = (low + cut).half().float(), ((high - low - 2.0 * cut) / MOST_INT4).half().float()
        candidate = ((groups - start) * _inverse(step)).round().clamp(0.0, MOST_INT4)
        error = _squared_error(groups - (start + step * candidate))
        better = error < best
        best, scale, minimum = (
            torch.where(better, new, old) for new, old in ((error, best), (step, scale), (start, minimum))
        )
        levels = torch.where(better, candidate, levels)
    # A range that float16 cannot hold has no error below infinity.
    failed = torch.where(best.isfinite(), 0.0, torch.nan)
    return _two_a_byte(_in_columns(levels)), (scale + failed).half(), (minimum + failed).half()


def _extremes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each group; of 0 and -0 the first, which a reduction leaves open."""
    low = high = groups[0]
    for values in groups[1:]:
        low, high = torch.where(values < low, values, low), torch.where(values > high, values, high)
    return low, high


def _squared_error(differences: Tensor) -> Tensor:
    """Added up one by one, in the packer's order."""
    error = torch.zeros_like(differences[0])
    for difference in differences:
        error = error + difference * difference
    return error


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0.0, 1.0 / scale, 0.0)


def _in_columns(groups: Tensor) -> Tensor:
    """[width, rows, groups] to [rows, columns]."""
    return groups.permute(1, 2, 0).flatten(1)


def _two_a_byte(levels: Tensor) -> Tensor:
    low, high = levels[:, ::2].to(torch.uint8), levels[:, 1::2].to(torch.uint8)
    low[:, : high.shape[1]] |= high << 4
    return low


def _spread(factors: Tensor, columns: int) -> Tensor:
    """A group's factor for each of its columns."""
    return factors.float().repeat_interleave(GROUP, dim=1)[:, :columns]
