"""A process that serves sessions holds no more memory after a million tokens of one, or ten thousand of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
GROWTH = 0.02

SERVE = """
import ctypes, sys
from pathlib import Path

import torch
from tiny_model import IDENTITY, tiny_executor

from unspool.engine import Engine, EngineOptions
from unspool.sessions import SessionOptions, Sessions, TurnRequest
from unspool.sizes import ByteSize
from unspool.store.local import LocalStore

torch.set_num_threads(1)
engine = Engine(tiny_executor(), EngineOptions(max_slots=2, prefix_cache=ByteSize(2_000_000)))
engine.start()
store = LocalStore(Path(sys.argv[1]), 1 << 27, fsync=False)
sessions = Sessions(engine, store, IDENTITY, SessionOptions(state_memory=ByteSize(1_000_000)))
random = torch.Generator().manual_seed(0)
give_back_what_is_free = ctypes.CDLL(None).malloc_trim

def report(position):
    sessions.flush()
    give_back_what_is_free(0)
    kilobytes = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS:"))
    stored = sum(entry.num_bytes for entry in store.list(""))
    print(position, kilobytes, stored, flush=True)

def one_session(tokens):
    sessions.create("me", "long")
    for turn in range(tokens // 1000):
        text = tuple(torch.randint(64, (992,), generator=random).tolist())
        position = sessions.generate("me", "long", TurnRequest(tokens=text, max_tokens=8)).position
        if turn + 1 in (tokens // 10_000, tokens // 1000):
            report(position)

def many_sessions(count):
    for number in range(count):
        name = sessions.create("me").id
        text = tuple(torch.randint(64, (40,), generator=random).tolist())
        sessions.generate("me", name, TurnRequest(tokens=text, max_tokens=2))
        fork = sessions.fork("me", name).id
        sessions.generate("me", fork, TurnRequest(tokens=text[:3], max_tokens=2))
        sessions.delete("me", fork)
        sessions.delete("me", name)
        if number + 1 in (count // 10, count):
            report(number + 1)

{"one": one_session, "many": many_sessions}[sys.argv[2]](int(sys.argv[3]))
sessions.close()
store.close()
engine.shutdown()
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's account of a process")
@pytest.mark.parametrize(("what", "count"), [("one", 1_000_000), ("many", 10_000)])
def test_memory_is_flat(tmp_path: Path, what: str, count: int) -> None:
    """From a tenth of the way to its end."""
    result = subprocess.run(
        [sys.executable, "-c", SERVE, str(tmp_path / "store"), what, str(count)],
        capture_output=True,
        text=True,
        timeout=800,
        check=True,
        env={**os.environ, "PYTHONPATH": str(SUPPORT)},
    )
    (_, warm, _), (end, last, stored) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert end == count
    assert last <= (1 + GROWTH) * warm, f"{warm} kB, then {last} kB"
    # A log takes four bytes a token, and deleted sessions leave nothing.
    assert stored < (8 * count if what == "one" else 1)
