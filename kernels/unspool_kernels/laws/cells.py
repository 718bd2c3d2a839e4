"""Cases of `ops.recurrent_cell` and of the short convolution and the token shift."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unspool_kernels.laws.case import Case
from unspool_kernels.laws.samples import Samples, Sizes
from unspool_kernels.ops.recurrent_cell import FRESH, GATES, Cell, recurrent_cell
from unspool_kernels.ops.short_conv import Activation, short_conv, token_shift


def cell_cases(sizes: Sizes) -> list[Case]:
    return [_cell(sizes, cell, biased) for cell in GATES for biased in (False, True)]


def conv_cases(sizes: Sizes) -> list[Case]:
    kinds: list[tuple[int, bool, Activation]] = [(4, True, "silu"), (3, False, "none"), (2, True, "none")]
    return [*(_conv(sizes, *kind) for kind in kinds), _shift(sizes)]


def _cell(sizes: Sizes, cell: Cell, biased: bool) -> Case:
    name = f"{cell}{'-bias' if biased else ''}"
    draw = Samples(name, sizes)
    heads, gates, size = sizes.heads, int(GATES[cell]), sizes.channels
    state = draw.normal(sizes.pool, heads, len(FRESH[cell]), size)
    if cell == "slstm":
        state[:, :, 2] = 1.0 + state[:, :, 2].abs()
    constants: dict[str, Any] = {"cell": cell, "weight": draw.normal(heads, gates, size, size) * size**-0.5}
    if biased:
        constants["bias"] = draw.normal(heads, gates, size)
    return Case(
        name=name,
        oracle=partial(recurrent_cell, backend="reference"),
        tokens={"x": draw.normal(sizes.tokens, heads, gates, size)},
        constants=constants,
        states={"state": state},
        slots=draw.slots,
        cu_seqlens=draw.cu_seqlens,
        fresh={"state": torch.tensor(FRESH[cell])[:, None]},
        first=_first_of_cell,
        exponential=cell == "slstm",
    )


def _first_of_cell(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    x, cell = given["x"], given["cell"]
    bias = given.get("bias", torch.zeros(x.shape[1:]))
    gates = (x + bias).unbind(-2)
    if cell == "elman":
        return (gates[0].tanh(),)
    if cell == "lstm":
        return (gates[3].sigmoid() * (gates[0].sigmoid() * gates[2].tanh()).tanh(),)
    if cell == "slstm":
        return (gates[3].sigmoid() * gates[2].tanh(),)
    return ((1.0 - gates[1].sigmoid()) * (x[:, :, 2] + gates[0].sigmoid() * bias[:, 2]).tanh(),)


def _conv(sizes: Sizes, width: int, biased: bool, activation: Activation) -> Case:
    name = f"conv-{width}-taps{'-bias' if biased else ''}-{activation}"
    draw, channels = Samples(name, sizes), sizes.channels
    constants: dict[str, Any] = {"weight": draw.normal(channels, width), "activation": activation}
    if biased:
        constants["bias"] = draw.normal(channels)
    return Case(
        name=name,
        oracle=partial(short_conv, backend="reference"),
        tokens={"x": draw.normal(sizes.tokens, channels)},
        constants=constants,
        states={
            "state": draw.normal(sizes.pool, width - 1, channels),
            "cursor": draw.integers(width - 1, sizes.pool),
        },
        slots=draw.slots,
        cu_seqlens=draw.cu_seqlens,
        fresh={"state": torch.zeros(()), "cursor": torch.zeros((), dtype=torch.int32)},
        first=_first_of_conv,
    )


def _first_of_conv(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    output = given["x"] * given["weight"][:, -1] + given.get("bias", torch.zeros(()))
    return (output * output.sigmoid() if given["activation"] == "silu" else output,)


def _shift(sizes: Sizes) -> Case:
    draw = Samples("token-shift", sizes)
    return Case(
        name="token-shift",
        oracle=partial(token_shift, backend="reference"),
        tokens={"x": draw.normal(sizes.tokens, sizes.channels)},
        constants={},
        states={"state": draw.normal(sizes.pool, sizes.channels)},
        slots=draw.slots,
        cu_seqlens=draw.cu_seqlens,
        fresh={"state": torch.zeros(())},
        first=lambda given: (torch.zeros_like(given["x"]),),
    )
