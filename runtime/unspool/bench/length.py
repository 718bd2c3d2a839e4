"""`unspool bench length`: time per token and memory at several positions of a text."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from unspool.bench.report import Column, Report, Row, add_report_flags, check_report_flags, write_report
from unspool.errors import UserError
from unspool.executor import Executor
from unspool.flags import add_flags, from_flags
from unspool.local import LocalOptions, open_executor
from unspool.state import StatePool, kv_cache_bytes

PREFILL_CHUNK = 512


def _resident(row: Row) -> str:
    return "-" if row["resident_bytes"] is None else f"{row['resident_bytes'] / 1e6:.1f}"


_COLUMNS = (
    Column("position", 10, lambda row: f"{row['position']:,}"),
    Column("ms/token", 9, lambda row: f"{row['seconds_per_token'] * 1e3:.2f}"),
    Column("ratio", 6, lambda row: f"{row['ratio']:.2f}"),
    Column("state MB", 9, lambda row: f"{row['state_bytes'] / 1e6:.2f}"),
    Column("process MB", 11, _resident),
    Column("KV cache MB", 12, lambda row: f"{row['kv_cache_bytes'] / 1e6:.2f}"),
)


def add_length(length: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    length.add_argument("model", type=Path, help="directory that `unspool convert` wrote")
    length.add_argument(
        "--positions", type=_positions, default=(300, 30_000), help="comma-separated (default: 300,30000)"
    )
    length.add_argument("--rounds", type=int, default=50, help="tokens timed at each position (default: %(default)s)")
    add_report_flags(length, plot=False)
    add_flags(length, LocalOptions)
    return run_length


def run_length(arguments: argparse.Namespace) -> int:
    """Raises UserError for a model that cannot be loaded and counts that make no sense."""
    if arguments.rounds < 1:
        raise UserError("--rounds must be at least 1")
    check_report_flags(arguments)
    executor = open_executor(arguments.model, from_flags(arguments, LocalOptions))[1]
    rows = measure_length(executor, arguments.positions, arguments.rounds)
    write_report(Report(_COLUMNS, rows, {"threads": torch.get_num_threads()}), arguments)
    return 0


@torch.inference_mode()
def measure_length(executor: Executor, positions: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Decodes from every position in turn, one token each a round, so that a busy machine slows all of them alike.

    Returns one row a position: median seconds per token, its ratio to the first row's, bytes of state, resident bytes
    of the process after its text was read (None where the system does not tell), and what a key-value cache would take.
    """
    pool = executor.new_pool(len(positions))
    resident = []
    for slot, position in enumerate(positions):
        _read_random_text(executor, pool, slot, position)
        resident.append(_resident_bytes())
    seconds: list[list[float]] = [[] for _ in positions]
    for _ in range(rounds):
        for slot, times in enumerate(seconds):
            start = time.perf_counter()
            executor.logits([[0]], pool, [slot]).argmax().item()
            times.append(time.perf_counter() - start)
    medians = [statistics.median(times) for times in seconds]
    return [
        {
            "position": position,
            "seconds_per_token": median,
            "ratio": median / medians[0],
            "state_bytes": pool.num_bytes // pool.num_slots,
            "resident_bytes": bytes_,
            "kv_cache_bytes": kv_cache_bytes(executor.config, position, pool.layers[0]["near_keys"].dtype),
        }
        for position, median, bytes_ in zip(positions, medians, resident, strict=True)
    ]


def _read_random_text(executor: Executor, pool: StatePool, slot: int, length: int) -> None:
    generator = torch.Generator().manual_seed(slot)
    for start in range(0, length, PREFILL_CHUNK):
        count = min(PREFILL_CHUNK, length - start)
        tokens = torch.randint(executor.config.vocab_size, (count,), generator=generator).tolist()
        executor.logits([tokens], pool, [slot], "none")


def _resident_bytes() -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _positions(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positions such as 300,30000") from error
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError("positions must be at least 1")
    return values
