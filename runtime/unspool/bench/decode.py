"""`unspool bench decode`: time per token against the bytes that memory must move for it, and against other runtimes.

Everything is measured in one process. The bound is the bandwidth just before or just after, whichever is better.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch

from unspool import native
from unspool.bench.bandwidth import Bandwidth, BandwidthMeter
from unspool.bench.rivals import Rival, open_rival
from unspool.errors import UserError
from unspool.executor import DTYPE_FORMATS, QUANT_FORMATS, NativeExecutor, Quant
from unspool.loading import load
from unspool.model import UnspoolForCausalLM
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
    def share_of_bound(self) -> float:
        return self.bound / self.seconds

    @property
    def batch_gain(self) -> float:
        return BATCH * self.seconds / self.batch_seconds


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
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return run_decode


def run_decode(arguments: argparse.Namespace) -> int:
    """Raises UserError without the native kernels, and for models and counts that cannot be."""
    if arguments.rounds < 1 or (arguments.threads is not None and arguments.threads < 1):
        raise UserError("--rounds and --threads must be at least 1")
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
    bandwidth = meter.measure()
    sys.stdout.write(_json(rows, bandwidth) if arguments.json else _table(rows, bandwidth, arguments.against))
    return 0


def measure_decode(
    model: UnspoolForCausalLM, quant: Quant, arguments: argparse.Namespace, meter: BandwidthMeter
) -> list[DecodeRow]:
    """One row a context, of one format."""
    format = DTYPE_FORMATS[model.dtype] if quant == "none" else QUANT_FORMATS[quant]
    executor = NativeExecutor(model.config, native.pack(model, format), getattr(torch, arguments.state_dtype))
    context = max(*arguments.contexts, PREFILL) + arguments.rounds + 64
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


def _json(rows: Sequence[DecodeRow], bandwidth: Bandwidth) -> str:
    record = {
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "bandwidth": asdict(bandwidth),
        "rows": [asdict(row) | {"share_of_bound": row.share_of_bound, "batch_gain": row.batch_gain} for row in rows],
    }
    return json.dumps(record) + "\n"


def _table(rows: Sequence[DecodeRow], bandwidth: Bandwidth, against: str | None) -> str:
    lines = [
        f"{torch.get_num_threads()} threads, {instruction_set()}; memory reads {bandwidth.read / 1e9:.1f} GB/s, "
        f"updates {bandwidth.update / 1e9:.1f} GB/s",
        f"{'quant':>6} {'context':>8} {'ms/token':>9} {'MB/token':>9} {'of bound':>9} {f'batch {BATCH}':>8} "
        f"{'prefill/s':>10}" + (f" {f'vs {against}':>16} {'prefill':>8}" if against else ""),
    ]
    for row in rows:
        moved = (row.weight_bytes + row.state_bytes_read + 2 * row.state_bytes_updated) / 1e6
        line = (
            f"{row.quant:>6} {row.context:>8,} {row.seconds * 1e3:>9.2f} {moved:>9.1f} {row.share_of_bound:>9.2f} "
            f"{row.batch_gain:>7.1f}x {PREFILL / row.prefill_seconds:>10,.0f}"
        )
        if row.rival_seconds is not None and row.rival_prefill_seconds is not None:
            line += (
                f" {row.rival_seconds / row.seconds:>15.2f}x {row.rival_prefill_seconds / row.prefill_seconds:>7.2f}x"
            )
        lines.append(line)
    return "\n".join(lines) + "\n"
