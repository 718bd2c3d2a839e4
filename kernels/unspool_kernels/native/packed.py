"""Weights packed for streaming: float32, bfloat16, float16, or integers with a scale for every 32 columns."""

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unspool_kernels.native.library import Arguments, address, allocate, call

Format = Literal["float32", "bfloat16", "float16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "float16", "int8", "int4")

BLOCK_ROWS = 32
GROUP = 32
_GROUP_BYTES = {"int8": 2 * BLOCK_ROWS + BLOCK_ROWS * GROUP, "int4": 4 * BLOCK_ROWS + BLOCK_ROWS * GROUP // 2}
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class MatrixArgument(ctypes.Structure):
    """`Matrix` of arguments.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("data", "rows", "columns", "format")]


class _Pack(Arguments):
    function = "pack"
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "format")),
    ]


class _Unpack(Arguments):
    function = "unpack"
    _fields_ = [("matrix", MatrixArgument), ("weight", ctypes.c_void_p)]


class _Product(Arguments):
    function = "product"
    _fields_ = [
        ("matrix", MatrixArgument),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
    ]


def padded(rows: int) -> int:
    """Rows rounded up to whole blocks."""
    return -(-rows // BLOCK_ROWS) * BLOCK_ROWS


def packed_bytes(rows: int, columns: int, format: Format) -> int:
    """Bytes that a weight [rows, columns] takes, which is also what one product with it reads."""
    if format in _ELEMENT_BYTES:
        return padded(rows) * columns * _ELEMENT_BYTES[format]
    return padded(rows) // BLOCK_ROWS * -(-columns // GROUP) * _GROUP_BYTES[format]


@dataclass(frozen=True)
class PackedMatrix:
    """A weight [rows, columns] in the layout of arguments.h: blocks of 32 rows, each one stream over the columns.

    int8 is symmetric, with a float16 scale for each row's 32 neighbouring columns; int4 has a scale and a minimum.
    Products with either round the other factor, to two bytes beside int8 and to one beside int4, with a scale for each
    token's 32 columns.
    """

    data: Tensor
    rows: int
    columns: int
    format: Format

    @classmethod
    def pack(cls, weight: Tensor, format: Format) -> "PackedMatrix":
        """Packs weight [rows, columns], of any float dtype. Raises ValueError for another shape or format."""
        if format not in FORMATS:
            raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"weight must be a float matrix, not {weight.dtype} {tuple(weight.shape)}")
        rows, columns = weight.shape
        source = weight.detach().float().contiguous()
        data = allocate(packed_bytes(rows, columns, format))
        call(_Pack(address(source), address(data), rows, columns, FORMATS.index(format)))
        return cls(data, rows, columns, format)

    @property
    def num_bytes(self) -> int:
        return self.data.numel()

    @property
    def argument(self) -> MatrixArgument:
        return MatrixArgument(self.data.data_ptr(), self.rows, self.columns, FORMATS.index(self.format))

    def unpack(self) -> Tensor:
        """The float32 weight [rows, columns] that products use."""
        weight = torch.empty(self.rows, self.columns)
        call(_Unpack(self.argument, address(weight)))
        return weight

    def product(self, x: Tensor, threads: int | None = None) -> Tensor:
        """x W^T: float32 x [tokens, columns] to [tokens, rows], the same bits for a token alone and in any batch.

        Raises ValueError for another dtype or shape.
        """
        if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != self.columns:
            raise ValueError(f"x must be float32 [tokens, {self.columns}], not {x.dtype} {tuple(x.shape)}")
        x = x.contiguous()
        tokens, width = x.shape[0], -(-self.columns // GROUP) * GROUP
        y = torch.empty(tokens, padded(self.rows))
        workspace = torch.empty(tokens * (6 * width + 12 * width // GROUP) + 64, dtype=torch.uint8)
        call(_Product(self.argument, address(x), address(y), tokens, y.shape[1], address(workspace)), threads)
        return y[:, : self.rows]
