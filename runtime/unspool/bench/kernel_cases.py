"""One step of every kernel on operands of a given size, and the bytes that it must move."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unspool.bench.machines import Machine
from unspool_kernels.contract import RowKernel
from unspool_kernels.native.packed import FORMATS, Format, PackedMatrix, packed_bytes, padded
from unspool_kernels.ops.diagonal_scan import FRESH_EXPONENTIAL, diagonal_scan, exponential_scan
from unspool_kernels.ops.norms import rms_norm
from unspool_kernels.ops.recurrent_cell import recurrent_cell
from unspool_kernels.ops.ring_attention import ring_attention
from unspool_kernels.ops.row_state import row_state
from unspool_kernels.ops.short_conv import short_conv
from unspool_kernels.ops.softmax_scan import softmax_scan

HEADS = 16
FEATURES = 128
"""Keys and values of a head."""
CHANNELS = 2048
S6_STATES = 16
SINKS, WINDOW, RING_HEADS, RING_QUERIES = 4, 508, 2, 4
CELL_CHANNELS = 256
TAPS = 4
COLUMNS = 4096
WEIGHT_BYTE = 0x3C
"""Repeated, it is a normal number in every format."""

MIXERS = {
    "liger-gla": RowKernel(gate="key"),
    "retention": RowKernel(gate="constant"),
    "mamba2": RowKernel(gate="scalar"),
    "gated-deltanet": RowKernel(gate="scalar", erase="parallel"),
    "mlstm": RowKernel(gate="scalar", normalizer=True, stabilizer=True),
}


@dataclass(frozen=True)
class Step:
    """One token of every sequence. Tensors by what must happen to them: all of each is read, updated in place, or
    written without being read."""

    run: Callable[[], object]
    read: Sequence[Tensor]
    updated: Sequence[Tensor] = ()
    written_bytes: int = 0

    @property
    def read_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.read)

    @property
    def updated_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.updated)


@dataclass(frozen=True)
class KernelCase:
    """`module` is the backends' module that the kernel is in."""

    family: str
    kernel: str
    module: str
    build: Callable[[Machine], Step]


def kernel_cases() -> Iterator[KernelCase]:
    """Every kernel that is measured, family by family."""
    for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16")):
        for mixer in MIXERS:
            build = partial(row_step, mixer=mixer, dtype=dtype)
            yield KernelCase("row_state", f"{mixer} {name}", "row_state", build)
    yield KernelCase("diagonal_scan", "mamba", "diagonal_scan", _diagonal_step)
    yield KernelCase("exponential_scan", "rwkv4", "diagonal_scan", _exponential_step)
    yield KernelCase("softmax_scan", "aaren", "softmax_scan", _softmax_step)
    yield KernelCase("ring_attention", f"{SINKS} sinks, {WINDOW} tokens", "ring_attention", _ring_step)
    yield KernelCase("recurrent_cell", "lstm", "recurrent_cell", _cell_step)
    yield KernelCase("short_conv", f"{TAPS} taps", "short_conv", _conv_step)
    yield KernelCase("rms_norm", f"{COLUMNS} channels", "norms", _norm_step)
    for format in FORMATS:
        yield KernelCase("packed_matrix", format, "packed", partial(_product_step, format=format))


def row_tensors(machine: Machine, mixer: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a call of `row_state` by argument, for one token of every sequence."""
    kernel = MIXERS[mixer]
    rows = FEATURES + kernel.normalizer
    count = _sequences(machine, HEADS * rows * FEATURES * dtype.itemsize)
    tensors = {
        "q": _drawn(machine, count, HEADS, 1, FEATURES),
        "k": torch.nn.functional.normalize(_drawn(machine, count, HEADS, FEATURES), dim=-1),
        "v": _drawn(machine, count, HEADS, FEATURES),
        "state": _drawn(machine, count, HEADS, rows, FEATURES, dtype=dtype),
        **_packing(machine, count),
    }
    gates = {"constant": (HEADS,), "scalar": (count, HEADS), "key": (count, HEADS, FEATURES)}
    tensors["log_decay"] = -_drawn(machine, *gates[kernel.gate]).abs()
    if kernel.erase == "parallel":
        tensors["beta"] = _drawn(machine, count, HEADS).abs()
    if kernel.stabilizer:
        tensors["log_input"] = _drawn(machine, count, HEADS)
        tensors["max_state"] = _drawn(machine, count, HEADS)
    return tensors


def row_step(machine: Machine, mixer: str, dtype: torch.dtype) -> Step:
    tensors = row_tensors(machine, mixer, dtype)
    states = [tensors[name] for name in ("state", "max_state") if name in tensors]
    inputs = [tensor for name, tensor in tensors.items() if name not in ("state", "max_state", "slots", "cu_seqlens")]
    run = partial(row_state, kernel=MIXERS[mixer], backend=machine.backend, check=False, **tensors)
    return Step(run, read=inputs, updated=states, written_bytes=tensors["q"].nbytes)


def _diagonal_step(machine: Machine) -> Step:
    count = _sequences(machine, 3 * CHANNELS * S6_STATES * 4)
    x, decay, state = (_drawn(machine, count, CHANNELS, S6_STATES) for _ in range(3))
    read = _drawn(machine, count, 1, S6_STATES)
    options = {"read": read, "state": state, **_packing(machine, count)}
    run = partial(diagonal_scan, x, decay, backend=machine.backend, check=False, **options)
    return Step(run, read=[x, decay, read], updated=[state], written_bytes=count * CHANNELS * 4)


def _exponential_step(machine: Machine) -> Step:
    count = _sequences(machine, 6 * CHANNELS * 4)
    k, v = (_drawn(machine, count, CHANNELS) for _ in range(2))
    decay, bonus = -_drawn(machine, CHANNELS).abs(), _drawn(machine, CHANNELS)
    state = machine.allocate(count, CHANNELS, len(FRESH_EXPONENTIAL))
    state.copy_(torch.tensor(FRESH_EXPONENTIAL))
    run = partial(exponential_scan, decay=decay, bonus=bonus, state=state, backend=machine.backend, check=False)
    return _batched(machine, run, [k, v], constants=[decay, bonus], updated=[state], written_bytes=v.nbytes)


def _softmax_step(machine: Machine) -> Step:
    count = _sequences(machine, HEADS * (3 * FEATURES + 2) * 4)
    scores, v = _drawn(machine, count, HEADS), _drawn(machine, count, HEADS, FEATURES)
    state = _drawn(machine, count, HEADS, FEATURES + 2)
    run = partial(softmax_scan, state=state, backend=machine.backend, check=False)
    return _batched(machine, run, [scores, v], updated=[state], written_bytes=v.nbytes + scores.nbytes)


def _ring_step(machine: Machine) -> Step:
    count = _sequences(machine, 2 * RING_HEADS * (SINKS + WINDOW) * FEATURES * 4)
    q, sink_q = (_drawn(machine, count, RING_HEADS, RING_QUERIES, FEATURES) for _ in range(2))
    k, v = (_drawn(machine, count, RING_HEADS, FEATURES) for _ in range(2))
    keys, values = (_drawn(machine, count, RING_HEADS, SINKS + WINDOW, FEATURES) for _ in range(2))
    positions = torch.full((count,), 4 * WINDOW, dtype=torch.int32, device=machine.device)
    options = {"keys": keys, "values": values, "positions": positions, **_packing(machine, count)}
    run = partial(ring_attention, q, sink_q, k, v, sinks=SINKS, backend=machine.backend, check=False, **options)
    written = q.nbytes + 2 * q[..., 0].nbytes + k.nbytes + v.nbytes
    return Step(run, read=[q, sink_q, k, v, keys, values], written_bytes=written)


def _cell_step(machine: Machine) -> Step:
    heads = _sequences(machine, 4 * CELL_CHANNELS * CELL_CHANNELS * 4)
    x, weight = _drawn(machine, 1, heads, 4, CELL_CHANNELS), _drawn(machine, heads, 4, CELL_CHANNELS, CELL_CHANNELS)
    state = _drawn(machine, 1, heads, 2, CELL_CHANNELS)
    options = {"state": state, **_packing(machine, 1)}
    run = partial(recurrent_cell, x, weight, cell="lstm", backend=machine.backend, check=False, **options)
    return Step(run, read=[x, weight], updated=[state], written_bytes=state.nbytes // 2)


def _conv_step(machine: Machine) -> Step:
    count = _sequences(machine, (TAPS + 1) * CHANNELS * 4)
    x, weight = _drawn(machine, count, CHANNELS), _drawn(machine, CHANNELS, TAPS)
    state = _drawn(machine, count, TAPS - 1, CHANNELS)
    cursor = torch.zeros(count, dtype=torch.int32, device=machine.device)
    run = partial(
        short_conv,
        weight=weight,
        activation="silu",
        state=state,
        cursor=cursor,
        backend=machine.backend,
        check=False,
    )
    # The token takes the place of the oldest one.
    constants, updated = [weight, state[:, 1:]], [state[:, :1], cursor]
    return _batched(machine, run, [x], constants=constants, updated=updated, written_bytes=x.nbytes)


def _norm_step(machine: Machine) -> Step:
    x = _drawn(machine, _sequences(machine, 2 * COLUMNS * 4), COLUMNS)
    weight = _drawn(machine, COLUMNS)
    return _batched(
        machine,
        lambda part, **_: rms_norm(part, weight, 1e-6, backend=machine.backend),
        [x],
        constants=[weight],
        written_bytes=x.nbytes,
    )


def _product_step(machine: Machine, format: Format) -> Step:
    rows = padded(machine.num_bytes * padded(1) // packed_bytes(1, COLUMNS, format) or 1)
    data = machine.allocate(packed_bytes(rows, COLUMNS, format), dtype=torch.uint8).fill_(WEIGHT_BYTE)
    matrix, x = PackedMatrix(data, rows, COLUMNS, format), _drawn(machine, 1, COLUMNS)
    return Step(partial(matrix.product, x), read=[data, x], written_bytes=rows * 4)


def _sequences(machine: Machine, bytes_of_one: int) -> int:
    return max(1, machine.num_bytes // bytes_of_one)


def _drawn(machine: Machine, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return machine.allocate(*shape, dtype=dtype).uniform_(-1.0, 1.0)


def _packing(machine: Machine, count: int, first: int = 0) -> dict[str, Tensor]:
    """One token for each of so many sequences, whose states lie in order from slot `first` on."""
    slots = torch.arange(first, first + count, dtype=torch.int32, device=machine.device)
    return {"slots": slots, "cu_seqlens": torch.arange(count + 1, dtype=torch.int32, device=machine.device)}


def _batched(
    machine: Machine,
    call: Callable[..., object],
    inputs: Sequence[Tensor],
    *,
    constants: Sequence[Tensor] = (),
    updated: Sequence[Tensor] = (),
    written_bytes: int,
) -> Step:
    """A step of the machine's batches. Outputs of several lie in memory that is still cached: they need not move."""
    starts = range(0, inputs[0].shape[0], machine.batch)
    parts = [[tensor[start : start + machine.batch] for tensor in inputs] for start in starts]
    packings = [_packing(machine, part[0].shape[0], start) for part, start in zip(parts, starts, strict=True)]

    def run() -> None:
        for part, packing in zip(parts, packings, strict=True):
            call(*part, **packing)

    written = written_bytes if len(parts) == 1 else 0
    return Step(run, read=[*inputs, *constants], updated=updated, written_bytes=written)
