"""The calls that the kernels are shipped for, as launches over tensors without memory: what `ahead_of_time` compiles.

Every kernel and every path through it is among them, at the sizes of published models and in the shapes of serving.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unspool_kernels.contract import RowKernel
from unspool_kernels.tiles import GpuLimits
from unspool_kernels.triton.diagonal_scan import plan_diagonal_scan, plan_exponential_scan
from unspool_kernels.triton.launch import Launch
from unspool_kernels.triton.norms import plan_norm, plan_rotate
from unspool_kernels.triton.ring_attention import plan_ring_attention
from unspool_kernels.triton.row_state import plan_row_state
from unspool_kernels.triton.short_conv import plan_short_conv, plan_token_shift
from unspool_kernels.triton.softmax_scan import plan_softmax_scan

SLOTS = 64


class ShippedCall(NamedTuple):
    """What the launches are for, and the launches."""

    name: str
    launches: list[Launch]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """How many tokens of how many sequences come in one call, and in which dtype."""

    tokens: int
    sequences: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        kind = "step" if self.tokens == self.sequences else "prefill"
        return f"{kind} of {self.sequences}, {str(self.dtype).removeprefix('torch.')}"

    def inputs(self, *shape: int) -> Tensor:
        return torch.empty(self.tokens, *shape, dtype=self.dtype, device="meta")

    def gates(self, *shape: int) -> Tensor:
        return torch.empty(self.tokens, *shape, device="meta")

    def packing(self) -> dict[str, Tensor]:
        return {"slots": indices(self.sequences), "cu_seqlens": indices(self.sequences + 1)}


ALONE = Traffic(tokens=1, sequences=1)
BATCH = Traffic(tokens=64, sequences=64)
PREFILL = Traffic(tokens=4096, sequences=2)
PREFILL_FLOAT32 = Traffic(tokens=4096, sequences=2, dtype=torch.float32)


def state(*shape: int) -> Tensor:
    return torch.empty(SLOTS, *shape, device="meta")


def indices(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int32, device="meta")


def shipped_calls(limits: GpuLimits) -> Iterator[ShippedCall]:
    """All of them for a GPU of these limits, one at a time; none needs a GPU or memory."""
    for name, call in ROW_CALLS.items():
        for traffic in call.traffic:
            yield ShippedCall(f"{name}, {traffic}", row_launches(call, traffic, limits))
    for (groups, channels), every in RING_TRAFFIC.items():
        for traffic in every:
            yield ShippedCall(f"ring {groups}x{channels}, {traffic}", ring_launches(traffic, groups, channels, limits))
    for traffic in EVERY_TRAFFIC:
        yield ShippedCall(f"softmax scan, {traffic}", softmax_launches(traffic))
    for traffic in (ALONE, PREFILL):
        yield from pointwise_calls(traffic)


@dataclass(frozen=True, kw_only=True)
class RowCall:
    """One row kernel at one model's sizes: heads, query heads per head, K, V."""

    kernel: RowKernel
    sizes: tuple[int, int, int, int]
    traffic: tuple[Traffic, ...] = (ALONE, BATCH)


EVERY_TRAFFIC = (ALONE, BATCH, PREFILL, PREFILL_FLOAT32)
ROW_CALLS = {
    "linear attention": RowCall(kernel=RowKernel(normalizer=True), sizes=(3, 3, 64, 64), traffic=EVERY_TRAFFIC),
    "Based": RowCall(kernel=RowKernel(normalizer=True), sizes=(16, 1, 273, 64), traffic=(ALONE, PREFILL)),
    "RetNet": RowCall(kernel=RowKernel(gate="constant"), sizes=(8, 1, 256, 512), traffic=(BATCH, PREFILL)),
    "SSD": RowCall(kernel=RowKernel(gate="scalar"), sizes=(24, 1, 128, 64), traffic=EVERY_TRAFFIC),
    "GLA": RowCall(
        kernel=RowKernel(gate="key", normalizer=True), sizes=(3, 3, 64, 64), traffic=(ALONE, BATCH, PREFILL)
    ),
    "HGRN2": RowCall(kernel=RowKernel(gate="key"), sizes=(16, 1, 128, 128)),
    "GSA": RowCall(kernel=RowKernel(gate="value"), sizes=(4, 1, 128, 64)),
    "mLSTM": RowCall(
        kernel=RowKernel(gate="scalar", normalizer=True, stabilizer=True), sizes=(8, 1, 256, 512), traffic=EVERY_TRAFFIC
    ),
    "RWKV-6": RowCall(kernel=RowKernel(gate="key", read="before"), sizes=(32, 1, 64, 64)),
    "DeltaNet": RowCall(kernel=RowKernel(erase="parallel"), sizes=(16, 1, 64, 64), traffic=EVERY_TRAFFIC),
    "gated DeltaNet": RowCall(
        kernel=RowKernel(gate="scalar", erase="parallel"), sizes=(32, 1, 128, 128), traffic=(ALONE, BATCH, PREFILL)
    ),
    "wide gated DeltaNet": RowCall(
        kernel=RowKernel(gate="scalar", erase="parallel"), sizes=(6, 1, 256, 512), traffic=(BATCH, PREFILL)
    ),
    "KDA": RowCall(kernel=RowKernel(gate="key", erase="parallel"), sizes=(32, 1, 128, 128)),
    "RWKV-7": RowCall(kernel=RowKernel(gate="key", erase="general"), sizes=(32, 1, 64, 64)),
}


RING_TRAFFIC = {(3, 64): EVERY_TRAFFIC, (8, 128): EVERY_TRAFFIC, (4, 256): (ALONE, BATCH, PREFILL)}
"""By query heads per state head, and their channels."""


def row_launches(call: RowCall, traffic: Traffic, limits: GpuLimits) -> list[Launch]:
    kernel, (heads, groups, keys, values) = call.kernel, call.sizes
    rows = values + kernel.normalizer
    decay = {"scalar": (heads,), "key": (heads, keys), "value": (heads, values)}
    tensors: dict[str, Tensor | None] = {
        "q": traffic.inputs(heads, groups, keys),
        "k": traffic.inputs(heads, keys),
        "v": traffic.inputs(heads, values),
        "state": state(heads, rows, keys),
        **traffic.packing(),
    }
    if kernel.gate != "none":
        constant = kernel.gate == "constant"
        tensors["log_decay"] = torch.empty(heads, device="meta") if constant else traffic.gates(*decay[kernel.gate])
    if kernel.erase == "parallel":
        tensors["beta"] = traffic.gates(heads)
    elif kernel.erase == "general":
        tensors |= {"erase_read": traffic.inputs(heads, keys), "erase_write": traffic.inputs(heads, keys)}
    if kernel.read == "before":
        tensors["bonus"] = torch.empty(heads, keys, device="meta")
    if kernel.stabilizer:
        tensors |= {"log_input": traffic.gates(heads), "max_state": state(heads)}
    m = traffic.gates(heads) if kernel.stabilizer else None
    return plan_row_state(kernel, tensors, traffic.inputs(heads, groups, rows), m, limits)


def softmax_launches(traffic: Traffic) -> list[Launch]:
    heads, channels = 16, 64
    tensors = {
        "scores": traffic.gates(heads),
        "v": traffic.inputs(heads, channels),
        "state": state(heads, channels + 2),
    }
    outputs = {"o": traffic.inputs(heads, channels), "log_mass": traffic.gates(heads)}
    return plan_softmax_scan({**tensors, **outputs, **traffic.packing()})


def ring_launches(traffic: Traffic, groups: int, channels: int, limits: GpuLimits) -> list[Launch]:
    heads, sinks, window = 4, 4, 256
    tensors = {name: traffic.inputs(heads, groups, channels) for name in ("q", "sink_q", "o")}
    tensors |= {name: traffic.inputs(heads, channels) for name in ("k", "v")}
    tensors |= {name: traffic.gates(heads, groups) for name in ("log_mass", "row_max")}
    tensors |= {name: state(heads, sinks + window, channels).to(traffic.dtype) for name in ("keys", "values")}
    return plan_ring_attention({**tensors, "positions": indices(traffic.sequences), **traffic.packing()}, sinks, limits)


def pointwise_calls(traffic: Traffic) -> Iterator[ShippedCall]:
    channels, features = 1536, 16
    packing, inputs = traffic.packing(), traffic.inputs
    scan = {"x": inputs(channels, features), "decay": traffic.gates(channels, features), **packing}
    scan |= {"state": state(channels, features), "h": inputs(channels)}
    yield ShippedCall(f"S6, {traffic}", plan_diagonal_scan(scan, inputs(1, features)))
    gated = {"x": inputs(channels, 1), "decay": traffic.gates(channels, 1), "h": inputs(channels, 1), **packing}
    yield ShippedCall(f"RG-LRU, {traffic}", plan_diagonal_scan({**gated, "state": state(channels, 1)}, None))
    pair = {"x": inputs(channels, 32, 2), "decay": torch.empty(channels, 32, 2, device="meta"), "h": inputs(channels)}
    weights = torch.empty(channels, 32, 2, dtype=traffic.dtype, device="meta")
    yield ShippedCall(
        f"S4D, {traffic}", plan_diagonal_scan({**pair, **packing, "state": state(channels, 32, 2)}, weights)
    )
    gates = {name: torch.empty(channels, device="meta") for name in ("decay", "bonus")}
    rwkv = {"k": inputs(channels), "v": inputs(channels), "y": inputs(channels), "state": state(channels, 3)}
    yield ShippedCall(f"RWKV-4, {traffic}", plan_exponential_scan({**rwkv, **gates, **packing}))
    weight = torch.empty(channels, 4, dtype=traffic.dtype, device="meta")
    conv = {"x": inputs(channels), "weight": weight, "state": state(3, channels), "cursor": indices(SLOTS), **packing}
    launches = plan_short_conv({**conv, "y": inputs(channels)}, weight[:, 0].contiguous(), "silu")
    yield ShippedCall(f"short convolution, {traffic}", launches)
    shift = {"x": inputs(channels), "state": state(channels), "previous": inputs(channels), **packing}
    yield ShippedCall(f"token shift, {traffic}", plan_token_shift(shift))
    rows = inputs(channels)
    yield ShippedCall(f"RMS norm, {traffic}", plan_norm(rows, weight[:, 0].contiguous(), 1e-6, rows))
    heads = inputs(16, 64)
    yield ShippedCall(f"L2 norm, {traffic}", plan_norm(heads.reshape(-1, 64), None, 1e-6, heads))
    angles = traffic.gates(32)
    yield ShippedCall(f"rotary embedding, {traffic}", plan_rotate(heads, angles, angles, heads))
