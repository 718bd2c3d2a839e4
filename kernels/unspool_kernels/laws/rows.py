"""Cases of `ops.row_state`: one for every descriptor, and the descriptors that named mixers use."""

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from unspool_kernels.contract import RowKernel
from unspool_kernels.laws.case import Case
from unspool_kernels.laws.samples import Samples, Sizes
from unspool_kernels.ops.row_state import row_state

NAMED: dict[str, RowKernel] = {
    "linear": RowKernel(normalizer=True),
    "retnet": RowKernel(gate="constant"),
    "ssd": RowKernel(gate="scalar"),
    "gla": RowKernel(gate="key"),
    "gsa-keys": RowKernel(gate="value"),
    "mlstm": RowKernel(gate="scalar", normalizer=True, stabilizer=True),
    "rwkv6": RowKernel(gate="key", read="before"),
    "deltanet": RowKernel(erase="parallel"),
    "gated-deltanet": RowKernel(gate="scalar", erase="parallel"),
    "kda": RowKernel(gate="key", erase="parallel"),
    "rwkv7": RowKernel(gate="key", erase="general"),
}

GATES: tuple[Literal["none", "constant", "scalar", "key"], ...] = ("none", "constant", "scalar", "key")
ERASES: tuple[Literal["none", "parallel", "general"], ...] = ("none", "parallel", "general")
READS: tuple[Literal["after", "before"], ...] = ("after", "before")


def every_kernel() -> dict[str, RowKernel]:
    """All descriptors that are not refused, by a name that spells them."""
    kernels = [
        RowKernel(gate=gate, erase=erase, read=read, normalizer=normalizer)
        for gate, erase, read, normalizer in product(GATES, ERASES, READS, (False, True))
    ]
    kernels += [RowKernel(gate="value", read=read) for read in READS]
    kernels += [RowKernel(gate="scalar", normalizer=normalizer, stabilizer=True) for normalizer in (False, True)]
    return {spelled(kernel): kernel for kernel in kernels}


def spelled(kernel: RowKernel) -> str:
    flags = [flag for flag in ("normalizer", "stabilizer") if getattr(kernel, flag)]
    return "-".join(["row", kernel.gate, kernel.erase, kernel.read, *flags])


def row_case(name: str, kernel: RowKernel, sizes: Sizes) -> Case:
    n, heads, features = sizes.tokens, sizes.heads, sizes.features
    draw = Samples(name, sizes)
    tokens = {
        "q": draw.normal(n, heads, sizes.group, features),
        "k": draw.normal(n, heads, features) if kernel.erase == "none" else draw.unit(n, heads, features),
        "v": draw.normal(n, heads, sizes.channels),
    }
    constants: dict[str, Any] = {"kernel": kernel}
    rows = sizes.channels + kernel.normalizer
    states = {"state": draw.normal(sizes.pool, heads, rows, features)}
    fresh = {"state": torch.zeros(())}
    if kernel.gate == "constant":
        constants["log_decay"] = -draw.uniform(heads)
    elif kernel.gate != "none":
        width = {"scalar": (), "key": (features,), "value": (sizes.channels,)}[kernel.gate]
        tokens["log_decay"] = draw.log_decay(n, heads, *width)
    if kernel.erase == "parallel":
        tokens["beta"] = draw.strength(n, heads)
    elif kernel.erase == "general":
        tokens["erase_read"] = -draw.unit(n, heads, features)
        tokens["erase_write"] = -tokens["erase_read"] * draw.uniform(n, heads, features)
    if kernel.read == "before":
        constants["bonus"] = draw.normal(heads, features)
    if kernel.stabilizer:
        tokens["log_input"] = 3.0 * draw.normal(n, heads)
        states["max_state"] = draw.normal(sizes.pool, heads)
        fresh["max_state"] = torch.tensor(-torch.inf)
    return Case(
        name=name,
        oracle=partial(row_state, backend="reference"),
        tokens=tokens,
        constants=constants,
        states=states,
        slots=draw.slots,
        cu_seqlens=draw.cu_seqlens,
        fresh=fresh,
        first=_first,
        gates=frozenset({"log_decay", "beta", "bonus", "log_input"}),
        log_states=frozenset({"max_state"}),
        exponential=kernel.stabilizer,
    )


def row_cases(sizes: Sizes, kernels: Mapping[str, RowKernel] | None = None) -> list[Case]:
    """By default one case for every descriptor."""
    return [row_case(name, kernel, sizes) for name, kernel in (kernels or every_kernel()).items()]


def _first(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """o = (k . q) v, or (q . (bonus k)) v where the state is read before it is written."""
    kernel: RowKernel = given["kernel"]
    k, v = given["k"], given["v"]
    if kernel.normalizer:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    if kernel.read == "before":
        k = k * given["bonus"]
    elif kernel.erase == "parallel":
        v = v * given["beta"][..., None]
    output = (given["q"] @ k[..., None]) * v[:, :, None]
    return (output, given["log_input"]) if kernel.stabilizer else (output,)
