"""`unspool bench decode`: time per token against the bytes that memory must move for it, and against other runtimes.

Everything is measured in one process, in rounds: the bandwidth, a few tokens alone, the bandwidth, a few steps of a
batch, a few tokens of the rival. A round's bound is the better bandwidth of the two.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from unspool import native
from unspool.bench.bandwidth import Bandwidth, BandwidthMeter
from unspool.bench.report import Bar, Column, Report, add_report_flags, check_report_flags, draw_bars, write_report
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
STRETCH = 32
"""Tokens that a runtime decodes in its turn; the first few are not timed."""
WARMING = 4
SETTLING_SECONDS = 0.2
BATCHES, PREFILLS = 8, 3
"""Steps of a batch in a round, and prompts that are read before the rounds."""


@dataclass(frozen=True)
class DecodeRow:
    """One format at one position. Seconds are medians; ratios are medians of those of each round, whose parts are
    measured one right after the other, so that they hold on a machine whose speed drifts. `bound` is the least that the
    bytes can take."""

    quant: str
    context: int
    weight_bytes: int
    state_bytes_read: int
    state_bytes_updated: int
    seconds: float
    bound: float
    share_of_bound: float
    batch_seconds: float
    batch_gain: float
    prefill_seconds: float
    rival_seconds: float | None = None
    rival_ratio: float | None = None
    rival_prefill_seconds: float | None = None
    rival_prefill_ratio: float | None = None

    @property
    def bytes_moved(self) -> int:
        return self.weight_bytes + self.state_bytes_read + 2 * self.state_bytes_updated

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"bytes_moved": self.bytes_moved}


@dataclass(frozen=True)
class _Round:
    """One turn of everybody: seconds per token alone, per step of a batch, and per token of the rival."""

    seconds: float
    batch_seconds: float
    bound: float
    rival_seconds: float | None


def add_decode(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    parser.add_argument("model", type=Path, help="directory that `unspool convert` wrote")
    parser.add_argument(
        "--quant", type=_quants, default=("none", "int8", "int4"), help="comma-separated formats (none,int8,int4)"
    )
    parser.add_argument("--contexts", type=_contexts, default=(64, 2048), help="comma-separated positions (64,2048)")
    parser.add_argument("--rounds", type=int, default=160, help="tokens timed at each position (default: %(default)s)")
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
    context = max(*arguments.contexts, PREFILL) + arguments.rounds + WARMING * -(-arguments.rounds // STRETCH) + 64
    rival = open_rival(arguments.against, model, quant, context) if arguments.against else None
    return [_measure(executor, quant, position, arguments.rounds, meter, rival) for position in arguments.contexts]


class _Runner:
    """One format's executor at one position, and the rival beside it."""

    def __init__(self, executor: NativeExecutor, context: int, meter: BandwidthMeter, rival: Rival | None) -> None:
        self._executor, self._meter, self._rival = executor, meter, rival
        self._context = context
        self._pool = executor.new_pool(BATCH)
        self._prompt = _random_tokens(executor, max(context, PREFILL))
        self.weights = executor.decoder.bytes_per_step
        self.read, self.updated = _state_traffic(executor, self._pool, context)

    def prefill(self) -> tuple[float, float | None]:
        """Seconds for a prompt of PREFILL tokens: ours, and the rival's."""
        tokens, rival = self._prompt[:PREFILL], self._rival
        self._pool.clear(0)
        time.sleep(SETTLING_SECONDS)
        ours = _seconds(lambda: self._executor.logits([tokens], self._pool, [0]))
        time.sleep(SETTLING_SECONDS)
        return ours, _seconds(lambda: rival.read(tokens)) if rival else None

    def rounds(self, tokens: Sequence[int]) -> list[_Round]:
        """Decodes the tokens from the position on, a stretch of them in each round."""
        prompt = self._prompt[: self._context]
        for slot in range(BATCH):
            self._pool.clear(slot)
            self._executor.logits([prompt], self._pool, [slot], "none")
        if self._rival:
            self._rival.read(prompt)
        rounds = []
        for start in range(0, len(tokens), STRETCH):
            stretch = tokens[start : start + STRETCH]
            before = self._meter.measure()
            seconds = _stretch(lambda token: self._executor.logits([[token]], self._pool, [0]), stretch)
            after = self._meter.measure()
            together = _stretch(
                lambda token: self._executor.logits([[token]] * BATCH, self._pool, range(BATCH)), stretch[:BATCHES]
            )
            theirs = _stretch(self._rival.step, stretch) if self._rival else None
            rounds.append(_Round(seconds, together, self._bound(before.better(after)), theirs))
        return rounds

    def _bound(self, bandwidth: Bandwidth) -> float:
        return (self.weights + self.read) / bandwidth.read + 2 * self.updated / bandwidth.update


def _measure(
    executor: NativeExecutor, quant: str, context: int, rounds: int, meter: BandwidthMeter, rival: Rival | None
) -> DecodeRow:
    runner = _Runner(executor, context, meter, rival)
    prefills = [runner.prefill() for _ in range(PREFILLS)]
    measured = runner.rounds(_random_tokens(executor, rounds))
    row = DecodeRow(
        quant=quant,
        context=context,
        weight_bytes=runner.weights,
        state_bytes_read=runner.read,
        state_bytes_updated=runner.updated,
        seconds=_median(round.seconds for round in measured),
        bound=_median(round.bound for round in measured),
        share_of_bound=_median(round.bound / round.seconds for round in measured),
        batch_seconds=_median(round.batch_seconds for round in measured),
        batch_gain=_median(BATCH * round.seconds / round.batch_seconds for round in measured),
        prefill_seconds=_median(ours for ours, _ in prefills),
    )
    if rival is None:
        return row
    return replace(
        row,
        rival_seconds=_median(round.rival_seconds or 0 for round in measured),
        rival_ratio=_median((round.rival_seconds or 0) / round.seconds for round in measured),
        rival_prefill_seconds=_median(theirs or 0 for _, theirs in prefills),
        rival_prefill_ratio=_median((theirs or 0) / ours for ours, theirs in prefills),
    )


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _state_traffic(executor: NativeExecutor, pool: StatePool, context: int) -> tuple[int, int]:
    """Bytes of one sequence's state that a token reads, and that it reads and writes back."""
    read = updated = 0
    for spec, layer in zip(executor.config.mixer_specs(), pool.layers, strict=True):
        near = layer["near_keys"]
        rows = min(context + 1, near.shape[2])
        read += 2 * near.shape[1] * rows * near.shape[3] * near.element_size()
        if "far" in layer and (spec.join == "mixed" or context >= spec.near_tokens):
            updated += layer["far"][0].nbytes
    return read, updated


def _random_tokens(executor: NativeExecutor, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    tokens: list[int] = torch.randint(executor.config.vocab_size, (count,), generator=generator).tolist()
    return tokens


def _stretch(step: Callable[[int], object], tokens: Sequence[int]) -> float:
    """Median seconds of the tokens of one turn, once the threads of the one before have gone to sleep."""
    time.sleep(SETTLING_SECONDS)
    for token in tokens[:WARMING]:
        step(token)
    return _median(_seconds(lambda token=token: step(token)) for token in tokens)  # type: ignore[misc]


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
    bars = [
        Bar(f"{row.quant}, position {row.context:,}", row.bytes_moved, row.share_of_bound * row.seconds, row.seconds)
        for row in rows
    ]
    return Report(
        _columns(against), [row.record() for row in rows], facts, heading=[heading], draw=partial(draw_bars, bars)
    )


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
            Column(f"vs {against}", 16, lambda row: f"{row['rival_ratio']:.2f}x"),
            Column("prefill", 8, lambda row: f"{row['rival_prefill_ratio']:.2f}x"),
        ]
    return columns
