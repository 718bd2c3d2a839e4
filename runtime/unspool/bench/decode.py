"""`unspool bench decode`: time per token against the bytes that memory must move for it, and against other runtimes.

Everything is measured in one process. The bound is the bandwidth just before or just after, whichever is better.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from unspool import native
from unspool.bench.bandwidth import Bandwidth, BandwidthMeter
from unspool.bench.report import Bar, Column, Report, add_report_flags, check_report_flags, write_report
from unspool.bench.rivals import Rival, open_rival
from unspool.errors import UserError
from unspool.executor import DTYPE_FORMATS, NativeExecutor, Quant
from unspool.loading import load
from unspool.model import UnspoolForCausalLM
from unspool.quantization import PACKED_FORMATS
from unspool.state import StatePool
from unspool_kernels.native.library import NativeUnavailable, instruction_set, library

RIVALS = ("llama.cpp", "transformers")
BATCH = 8
PREFILL = 512
STRETCH = 8
"""Tokens that a runtime decodes in its turn; the one before them is not timed."""
SETTLING_SECONDS = 0.2


@dataclass(frozen=True)
class DecodeRow:
    """One format at one position. Seconds are medians; `bound` is the least that the bytes can take."""

    quant: str
    context: int
    seconds: float
    weight_bytes: int
    state_bytes_read: int
    state_bytes_updated: int
    bound: float
    batch_seconds: float
    prefill_seconds: float
    rival_seconds: float | None = None
    rival_prefill_seconds: float | None = None

    @property
    def bytes_moved(self) -> int:
        return self.weight_bytes + self.state_bytes_read + 2 * self.state_bytes_updated

    @property
    def share_of_bound(self) -> float:
        return self.bound / self.seconds

    @property
    def batch_gain(self) -> float:
        return BATCH * self.seconds / self.batch_seconds

    def record(self) -> dict[str, Any]:
        return asdict(self) | {
            "bytes_moved": self.bytes_moved,
            "share_of_bound": self.share_of_bound,
            "batch_gain": self.batch_gain,
        }


def add_decode(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("model", type=Path, help="directory that `unspool convert` wrote")
    parser.add_argument(
        "--quant", type=_quants, default=("none", "int8", "int4"), help="comma-separated formats (none,int8,int4)"
    )
    parser.add_argument("--contexts", type=_contexts, default=(64, 2048), help="comma-separated positions (64,2048)")
    parser.add_argument("--rounds", type=int, default=40, help="tokens timed at each position (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--state-dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--against", choices=RIVALS, help="another runtime, timed in turns with ours")
    add_report_flags(parser, plot=True)
    return run_decode


def run_decode(arguments: argparse.Namespace) -> int:
    """Raises UserError without the native kernels, and for models and counts that cannot be."""
    if arguments.rounds < 1 or (arguments.threads is not None and arguments.threads < 1):
        raise UserError("--rounds and --threads must be at least 1")
    check_report_flags(arguments)
    try:
        library()
    except NativeUnavailable as error:
        raise UserError(f"bench decode measures the native kernels: {error}") from error
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load(arguments.model).model
    if reason := native.unsupported(model.config):
        raise UserError(f"bench decode measures the native kernels: {reason}")
    meter = BandwidthMeter()
    rows: list[DecodeRow] = []
    for quant in arguments.quant:
        rows += measure_decode(model, quant, arguments, meter)
    write_report(_report(rows, meter.measure(), arguments.against), arguments)
    return 0


def measure_decode(
    model: UnspoolForCausalLM, quant: Quant, arguments: argparse.Namespace, meter: BandwidthMeter
) -> list[DecodeRow]:
    """One row a context, of one format."""
    format = DTYPE_FORMATS[model.dtype] if quant == "none" else PACKED_FORMATS[quant]
    executor = NativeExecutor(model.config, native.pack(model, format), getattr(torch, arguments.state_dtype))
    context = max(*arguments.contexts, PREFILL) + arguments.rounds + -(-arguments.rounds // STRETCH) + 64
    rival = open_rival(arguments.against, model, quant, context) if arguments.against else None
    return [_measure(executor, quant, position, arguments.rounds, meter, rival) for position in arguments.contexts]


def _measure(
    executor: NativeExecutor, quant: str, context: int, rounds: int, meter: BandwidthMeter, rival: Rival | None
) -> DecodeRow:
    pool = executor.new_pool(BATCH)
    prompt = _random_tokens(executor, max(context, PREFILL))
    prefill = _seconds(lambda: _read(executor, pool, prompt[:PREFILL]))
    rival_prefill = _seconds(lambda: rival.read(prompt[:PREFILL])) if rival else None
    for slot in range(BATCH):
        pool.clear(slot)
        executor.logits([prompt[:context]], pool, [slot], "none")
    if rival:
        rival.read(prompt[:context])
    before, times, rival_times = meter.measure(), [], []
    tokens = _random_tokens(executor, rounds)
    for start in range(0, rounds, STRETCH):
        stretch = tokens[start : start + STRETCH]
        times += _stretch(lambda token: executor.logits([[token]], pool, [0]), stretch)
        if rival:
            rival_times += _stretch(rival.step, stretch)
    slots = list(range(BATCH))
    batch = [_seconds(lambda: executor.logits([[1]] * BATCH, pool, slots)) for _ in range(max(rounds // 4, 3))]
    bandwidth = before.better(meter.measure())
    read, updated = _state_traffic(executor, pool, context)
    weights = executor.decoder.bytes_per_step
    return DecodeRow(
        quant=quant,
        context=context,
        seconds=statistics.median(times),
        weight_bytes=weights,
        state_bytes_read=read,
        state_bytes_updated=updated,
        bound=(weights + read) / bandwidth.read + 2 * updated / bandwidth.update,
        batch_seconds=statistics.median(batch),
        prefill_seconds=prefill,
        rival_seconds=statistics.median(rival_times) if rival else None,
        rival_prefill_seconds=rival_prefill,
    )


def _state_traffic(executor: NativeExecutor, pool: StatePool, context: int) -> tuple[int, int]:
    """Bytes of one sequence's state that a token reads, and that it reads and writes back."""
    read = updated = 0
    for spec, layer in zip(executor.config.mixer_specs(), pool.layers, strict=True):
        near = layer["near_keys"]
        rows = min(context + 1, near.shape[2])
        read += 2 * near.shape[1] * rows * near.shape[3] * near.element_size()
        if "far" in layer and (spec.join == "mixed" or context - spec.window >= spec.sinks):
            updated += layer["far"][0].nbytes
    return read, updated


def _read(executor: NativeExecutor, pool: StatePool, tokens: list[int]) -> None:
    pool.clear(0)
    executor.logits([tokens], pool, [0])


def _random_tokens(executor: NativeExecutor, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    tokens: list[int] = torch.randint(executor.config.vocab_size, (count,), generator=generator).tolist()
    return tokens


def _stretch(step: Callable[[int], object], tokens: Sequence[int]) -> list[float]:
    """Seconds of each token of one runtime's turn, once the threads of the other have gone to sleep."""
    time.sleep(SETTLING_SECONDS)
    step(tokens[0])
    return [_seconds(lambda token=token: step(token)) for token in tokens]  # type: ignore[misc]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _quants(text: str) -> tuple[Quant, ...]:
    known = get_args(Quant)
    values = tuple(text.split(","))
    if unknown := [value for value in values if value not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
    return values  # type: ignore[return-value]  # just checked


def _contexts(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positions such as 64,2048") from error
    if not values or not all(1 <= value <= 1 << 20 for value in values):
        raise argparse.ArgumentTypeError("contexts must be between 1 and 1048576")
    return values


def _report(rows: Sequence[DecodeRow], bandwidth: Bandwidth, against: str | None) -> Report:
    facts = {
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "bandwidth": asdict(bandwidth),
    }
    heading = (
        f"{facts['threads']} threads, {facts['instruction_set']}; memory reads {bandwidth.read / 1e9:.1f} GB/s, "
        f"updates {bandwidth.update / 1e9:.1f} GB/s"
    )
    bars = [Bar(f"{row.quant}, position {row.context:,}", row.bytes_moved, row.bound, row.seconds) for row in rows]
    return Report(_columns(against), [row.record() for row in rows], facts, heading=[heading], bars=bars)


def _columns(against: str | None) -> list[Column]:
    columns = [
        Column("quant", 6, lambda row: row["quant"]),
        Column("context", 8, lambda row: f"{row['context']:,}"),
        Column("ms/token", 9, lambda row: f"{row['seconds'] * 1e3:.2f}"),
        Column("MB/token", 9, lambda row: f"{row['bytes_moved'] / 1e6:.1f}"),
        Column("of bound", 9, lambda row: f"{row['share_of_bound']:.2f}"),
        Column(f"batch {BATCH}", 8, lambda row: f"{row['batch_gain']:.1f}x"),
        Column("prefill/s", 10, lambda row: f"{PREFILL / row['prefill_seconds']:,.0f}"),
    ]
    if against:
        columns += [
            Column(f"vs {against}", 16, lambda row: f"{row['rival_seconds'] / row['seconds']:.2f}x"),
            Column("prefill", 8, lambda row: f"{row['rival_prefill_seconds'] / row['prefill_seconds']:.2f}x"),
        ]
    return columns
