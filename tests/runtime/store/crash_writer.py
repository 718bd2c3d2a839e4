"""A process to be killed: forks one writer for each line that it reads, which commits turn after turn until it dies.

Run by test_local_store.py. A writer reports each turn once its commit has returned.
"""

import json
import os
import sys
from pathlib import Path

from unspool.store.local import LocalStore

STATE_BYTES = 100_000


def say(line: str) -> None:
    """At once and in one piece: both processes write to the same pipe."""
    os.write(1, f"{line}\n".encode())


def commit_turns(directory: Path) -> None:
    store = LocalStore(directory, 1 << 30)
    say("open")
    while True:
        head = store.read_head("sessions/one/head")
        turn, version = (json.loads(head.value)["turn"] + 1, head.version) if head is not None else (0, None)
        store.put(f"sessions/one/states/{turn}", bytes([turn % 251]) * STATE_BYTES)
        value = json.dumps({"turn": turn}).encode()
        swapped = store.swap_head("sessions/one/head", version, value, {f"sessions/one/turns/{turn}": b"t%d" % turn})
        assert swapped is not None
        if turn >= 3:
            store.delete(f"sessions/one/states/{turn - 3}")
        say(f"{turn}")


for line in sys.stdin:
    if (pid := os.fork()) == 0:
        commit_turns(Path(line.strip()))
    say(f"pid {pid}")
    os.waitpid(pid, 0)
    say("gone")
