"""A process to be killed: forks one server of sessions for each line that it reads, which commits turns until it dies.

Run by test_crash.py. What is reported has been committed: a session's generation and the digest of its log.
"""

import hashlib
import os
import random
import sys
import threading
from pathlib import Path

from tiny_model import IDENTITY, tiny_executor

from unspool.engine import Engine, EngineOptions
from unspool.requests import SamplingParams
from unspool.sessions import Place, Sessions, TurnRequest
from unspool.store.local import LocalStore

WRITERS = 4


def say(line: str) -> None:
    """At once and in one piece: several threads and both processes write to the same pipe."""
    os.write(1, f"{line}\n".encode())


def live(sessions: Sessions, seed: int) -> None:
    """Does everything that changes a session, to its own ones and to forks of them."""
    chance = random.Random(seed)
    own = [info.id for info in sessions.list("me", limit=1000) if hash_of(info.id) % WRITERS == seed % WRITERS]
    while True:
        choice = chance.random()
        if not own or (choice < 0.05 and len(own) < 8):
            own.append(sessions.create("me", new_name(chance, seed)).id)
        elif choice < 0.1 and len(own) < 8:
            own.append(sessions.fork("me", chance.choice(own), new=new_name(chance, seed)).id)
        name = chance.choice(own)
        position = sessions.info("me", name).position
        if choice > 0.9 and position:
            sessions.rollback("me", name, Place(position=chance.randrange(position)))
        elif choice > 0.85:
            sessions.snapshot("me", name, "mark")
        else:
            tokens = tuple(chance.randrange(64) for _ in range(chance.randrange(1, 60)))
            request = TurnRequest(tokens=tokens, max_tokens=chance.randrange(4), sampling=SamplingParams(seed=seed))
            sessions.generate("me", name, request)
        log = sessions.tokens("me", name)
        say(f"{name} {sessions.info('me', name).generation} {hashlib.sha256(log).hexdigest()}")


def hash_of(name: str) -> int:
    """Which writer a session belongs to, in every process."""
    return int(name.split("-")[1])


def new_name(chance: random.Random, seed: int) -> str:
    return f"s-{seed % WRITERS}-{chance.getrandbits(60):x}"


def serve(directory: Path, seed: int) -> None:
    engine = Engine(tiny_executor(), EngineOptions(max_slots=4, prefill_chunk=32))
    engine.start()
    sessions = Sessions(engine, LocalStore(directory, 1 << 26), IDENTITY)
    say("open")
    writers = [threading.Thread(target=live, args=(sessions, seed * WRITERS + n)) for n in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()


for line in sys.stdin:
    words = line.split()
    if (pid := os.fork()) == 0:
        try:
            serve(Path(words[0]), int(words[1]))
        finally:  # a writer that failed: the test must see that it was not killed
            os._exit(3)
    say(f"pid {pid}")
    _, status = os.waitpid(pid, 0)
    say(f"gone {os.waitstatus_to_exitcode(status)}")
