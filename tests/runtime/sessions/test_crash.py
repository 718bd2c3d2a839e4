"""A server of sessions that is killed at random instants under load, and started again."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unspool.engine import Engine
from unspool.requests import FinishEvent, GenerationRequest
from unspool.sessions import Sessions
from unspool.sessions.state_memory import StateKey
from unspool.state import SlotSnapshot
from unspool.store import StateIdentity
from unspool.store.local import LocalStore
from unspool.token_bytes import unpack_tokens

KILLS = 50
SUPPORT = Path(__file__).parents[2] / "support"
Reported = dict[str, tuple[int, str]]


class Zygote:
    """Forks servers, which is quicker than starting Python for each."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("crash_server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)},
        )

    def kill_a_server(self, directory: Path, seed: int, after: float) -> Reported:
        """Lets one serve for so many seconds and kills it; returns what it last reported of each session."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{directory} {seed}\n")
        pid, reported = 0, {}
        timer: threading.Timer | None = None
        for line in self._process.stdout:
            words = line.split()
            if words[0] == "gone":
                assert words[1] == str(-signal.SIGKILL), f"the server ended by itself with {words[1]}"
                break
            if words[0] == "pid":
                pid = int(words[1])
            elif words[0] == "open":
                timer = threading.Timer(after, os.kill, (pid, signal.SIGKILL))
                timer.start()
            else:
                name, generation, digest = words
                reported[name] = max(reported.get(name, (-1, "")), (int(generation), digest))
        assert timer is not None
        timer.join()
        return reported

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=30) == 0


@pytest.fixture
def zygote() -> Zygote:
    zygote = Zygote()
    yield zygote
    zygote.close()


def replay(engine: Engine, tokens: tuple[int, ...]) -> SlotSnapshot:
    done, states = threading.Event(), []

    def sink(event: object) -> None:
        if isinstance(event, FinishEvent):
            states.append(event.state)
            done.set()

    engine.submit(
        GenerationRequest(request_id="replay", prompt=tokens, max_tokens=0, keep_state=True, use_cache=False), sink
    )
    assert done.wait(60)
    return states[0]


def check_states(sessions: Sessions, engine: Engine, name: str) -> int:
    """Compares every state that is left of a session with its log; returns how many there were."""
    log, found_states = unpack_tokens(sessions.tokens("me", name)), 0
    for taken in sessions.records.read("me", name).states:
        found = sessions.tiers.find(StateKey("me", taken.digest), taken.position)
        if found is None:
            continue
        found_states += 1
        for layer, expected in zip(found.state.layers, replay(engine, log[: taken.position]).layers, strict=True):
            assert all(torch.equal(layer[tensor], expected[tensor]) for tensor in expected)
    return found_states


def test_no_kill_loses_or_halves_what_was_committed(
    tmp_path: Path, zygote: Zygote, engine: Engine, identity: StateIdentity, open_sessions: Callable[..., Sessions]
) -> None:
    directory, chance = tmp_path / "store", random.Random(0)
    reported: Reported = {}
    states_found = 0
    for kill in range(KILLS):
        for name, last in zygote.kill_a_server(directory, kill, chance.uniform(0.02, 0.3)).items():
            reported[name] = max(reported.get(name, (-1, "")), last)
        store = LocalStore(directory, 1 << 26)
        sessions = open_sessions(store)
        for name, (generation, digest) in reported.items():
            info = sessions.info("me", name)
            log = sessions.tokens("me", name)
            assert info.position == len(log) // 4
            # What was committed but not yet reported may have come after.
            assert info.generation >= generation
            if info.generation == generation:
                assert hashlib.sha256(log).hexdigest() == digest
        for name in chance.sample(sorted(reported), min(2, len(reported))):
            states_found += check_states(sessions, engine, name)
        assert sessions.statistics().rejected == 0
        sessions.close()
        store.close()
    assert len(reported) >= 8 and states_found > KILLS // 2
    assert sum(generation for generation, _ in reported.values()) > 20 * KILLS
