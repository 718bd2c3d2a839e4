"""The local store: killed at any instant, out of room, damaged, linked elsewhere, read beside its writer."""

import json
import os
import random
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from unspool.errors import UserError
from unspool.store import StoreCorrupt, StoreFull, StoreUnavailable
from unspool.store.interface import SMALL_BYTES
from unspool.store.local import LocalStore

PLENTY = 1 << 30
LARGE = SMALL_BYTES * 3
KILLS = 40
STATE_BYTES = 100_000


@contextmanager
def opened(directory: Path, max_bytes: int = PLENTY, **options: bool) -> Iterator[LocalStore]:
    store = LocalStore(directory, max_bytes, **options)
    try:
        yield store
    finally:
        store.close()


def blobs(directory: Path) -> list[Path]:
    return sorted((directory / "blobs").iterdir())


def test_what_was_written_is_there_after_reopening(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        store.put("small", b"s" * 10)
        store.put("large", b"l" * LARGE)
        first = store.swap_head("head", None, b"1", {"turn": b"t"})
        assert first is not None
    with opened(tmp_path / "store") as store:
        assert store.get("small") == b"s" * 10
        assert store.get("large") == b"l" * LARGE
        assert store.read_head("head") == (b"1", first)
        second = store.swap_head("head", first, None)
        assert second is not None and second > first
    with opened(tmp_path / "store") as store:
        third = store.swap_head("head", None, b"2")
        assert third is not None and third > second, "versions go on after a restart and a deletion"
        assert [entry.key for entry in store.list("")] == ["head", "large", "small", "turn"]


def test_the_cap_counts_what_was_there_before(tmp_path: Path) -> None:
    with opened(tmp_path / "store", 4 * LARGE) as store:
        for number in range(3):
            store.put(f"state/{number}", bytes(LARGE))
    with opened(tmp_path / "store", 4 * LARGE) as store, pytest.raises(StoreFull):
        store.put("state/3", bytes(LARGE))
    assert len(blobs(tmp_path / "store")) == 3


def test_a_restart_ends_leases_but_not_epochs(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        assert store.lease("session", "killed", 600.0) == 1
    with opened(tmp_path / "store") as store:
        assert store.lease("session", "next", 600.0) == 2


def test_only_the_owner_may_read(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        with opened(tmp_path / "store") as store:
            store.put("large", bytes(LARGE))
            store.put("small", b"s")
            paths = [tmp_path / "store", *(tmp_path / "store").rglob("*")]
            assert {path.name for path in paths} >= {"store", "blobs", "index.sqlite", "index.sqlite-wal", "lock"}
            for path in paths:
                assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    finally:
        os.umask(umask)
    (tmp_path / "store").chmod(0o755)
    with opened(tmp_path / "store"):
        assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700


def test_keys_never_become_file_names(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        for key in ("a/x", "lock", "index.sqlite", "blobs/x", "a" * 200, "CON"):
            store.put(key, bytes(LARGE))
            assert store.get(key) == bytes(LARGE)
    assert all(len(path.name) == 32 and int(path.name, 16) >= 0 for path in blobs(tmp_path / "store"))


@pytest.mark.parametrize("name", ["blobs", "index.sqlite", "index.sqlite-wal", "index.sqlite-shm", "lock"])
def test_links_in_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    with opened(tmp_path / "store") as store:
        store.put("large", bytes(LARGE))
    path, elsewhere = tmp_path / "store" / name, tmp_path / "elsewhere"
    if path.exists():
        path.rename(elsewhere)
    path.symlink_to(elsewhere)
    for read_only in (False, True):
        with pytest.raises(UserError, match=f"{name} is a symbolic link"):
            LocalStore(tmp_path / "store", PLENTY, read_only=read_only)


def test_a_value_that_became_a_link_is_not_followed(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        store.put("large", bytes(LARGE))
        (blob,) = blobs(tmp_path / "store")
        blob.unlink()
        secret = tmp_path / "secret"
        secret.write_bytes(b"x" * LARGE)
        blob.symlink_to(secret)
        with pytest.raises(StoreUnavailable, match="symbolic links"):
            store.get("large")


def test_a_directory_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    mode = stat.S_IMODE(tmp_path.stat().st_mode)
    with pytest.raises(UserError, match="holds other files"):
        LocalStore(tmp_path, PLENTY)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == mode and [*tmp_path.iterdir()] == [tmp_path / "thesis.tex"]
    with pytest.raises(UserError, match="Not a directory|File exists"):
        LocalStore(tmp_path / "thesis.tex", PLENTY)
    with pytest.raises(UserError, match="holds no store|No such file"):
        LocalStore(tmp_path / "nothing", PLENTY, read_only=True)
    assert not (tmp_path / "nothing").exists()


def test_one_process_writes(tmp_path: Path) -> None:
    with opened(tmp_path / "store"):
        with pytest.raises(UserError, match="being written to by another process"):
            LocalStore(tmp_path / "store", PLENTY)
        code = "import sys; from pathlib import Path; from unspool.store.local import LocalStore\n"
        code += "LocalStore(Path(sys.argv[1]), 1)"
        failed = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, check=False
        )
        assert failed.returncode and "being written to by another process" in failed.stderr
    with opened(tmp_path / "store"):
        pass


def test_readers_beside_a_writer(tmp_path: Path) -> None:
    """They see what is committed, change nothing, and neither hinder the writer nor each other."""
    with opened(tmp_path / "store") as writer:
        writer.put("large", bytes(LARGE))
        with opened(tmp_path / "store", read_only=True) as reader, opened(tmp_path / "store", read_only=True) as second:
            assert reader.get("large") == bytes(LARGE)
            version = writer.swap_head("head", None, b"1", {"turn": b"t"})
            assert reader.read_head("head") == second.read_head("head") == (b"1", version)
            assert [entry.key for entry in reader.list("")] == ["head", "large", "turn"]
            writes: list[Callable[[], object]] = [
                lambda: reader.put("new", b""),
                lambda: reader.put("new", bytes(LARGE)),
                lambda: reader.put("large", bytes(LARGE)),
                lambda: reader.delete("large"),
                lambda: reader.swap_head("head", version, b"2"),
                lambda: reader.lease("head", "me", 1.0),
                lambda: reader.release("head", "me"),
            ]
            for write in writes:
                with pytest.raises(UserError, match="open for reading only"):
                    write()
            writer.delete("large")
            assert reader.get("large") is None
        assert len(blobs(tmp_path / "store")) == 0
    with opened(tmp_path / "store", read_only=True) as reader:  # with no writer
        assert reader.read_head("head") == (b"1", version)


def test_reading_while_another_deletes_and_writes_again(tmp_path: Path) -> None:
    """A reader gets the whole value or none, never an error."""
    values = [bytes([fill]) * LARGE for fill in range(2)]
    with opened(tmp_path / "store", fsync=False) as writer, opened(tmp_path / "store", read_only=True) as reader:
        done = threading.Event()

        def rewrite() -> None:
            for number in range(200):
                writer.delete("state")
                writer.put("state", values[number % 2])
            done.set()

        thread = threading.Thread(target=rewrite)
        thread.start()
        found = {None: 0, values[0]: 0, values[1]: 0}
        while not done.is_set():
            found[reader.get("state")] += 1
        thread.join()
    assert sum(found.values()) > 0


def test_a_writer_that_comes_second_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another puts the same key while this one is writing its bytes."""
    with opened(tmp_path / "store", 3 * LARGE) as store:
        write = store._blobs.write

        def overtaken(value: memoryview) -> str:
            monkeypatch.undo()
            store.put("state", value)
            return write(value)

        monkeypatch.setattr(store._blobs, "write", overtaken)
        store.put("state", b"s" * LARGE)
        assert store.get("state") == b"s" * LARGE
        assert len(blobs(tmp_path / "store")) == 1 and store._used == LARGE


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        store.put("large", bytes(LARGE))
        kept = blobs(tmp_path / "store")
    folder = tmp_path / "store" / "blobs"
    (folder / ("0" * 32 + ".tmp")).write_bytes(b"half")
    (folder / ("f" * 32)).write_bytes(bytes(LARGE))
    with opened(tmp_path / "store", read_only=True) as store:
        assert len(blobs(tmp_path / "store")) == 3, "a reader cleans nothing: a writer may be at work"
    with opened(tmp_path / "store") as store:
        assert blobs(tmp_path / "store") == kept
        assert store.get("large") == bytes(LARGE)


class Zygote:
    """Starts writers quickly: a process that has imported everything already forks them."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("crash_writer.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def kill_a_writer(self, directory: Path, after: float) -> int:
        """Lets one commit turns for so many seconds and kills it; returns the last turn that it reported, or -1."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{directory}\n")
        pid, is_open, last = 0, False, -1
        timer: threading.Timer | None = None
        for line in self._process.stdout:
            word = line.strip()
            if word == "gone":
                break
            if word.startswith("pid"):
                pid = int(word.split()[1])
            elif word == "open":
                is_open = True
            else:
                last = int(word)
            if pid and timer is None:  # also while it opens the store
                timer = threading.Timer(after, os.kill, (pid, signal.SIGKILL))
                timer.start()
        assert timer is not None and (is_open or last == -1)
        timer.join()
        return last

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=30) == 0
        self._process.stdout.close()


def test_killed_at_any_instant(tmp_path: Path) -> None:
    """After each of many kills: the head is that of the last reported turn or the next, and all it names is whole."""
    directory, chance, zygote = tmp_path / "store", random.Random(0), Zygote()
    reported = -1
    for _ in range(KILLS):
        reported = max(reported, zygote.kill_a_writer(directory, chance.uniform(0.0, 0.06)))
        with opened(directory) as store:
            head = store.read_head("sessions/one/head")
            turn = json.loads(head.value)["turn"] if head is not None else -1
            assert turn in (reported, reported + 1), "the last reported turn, or one whose report was cut off"
            reported = turn
            for number in range(max(0, turn - 2), turn + 1):
                assert store.get(f"sessions/one/states/{number}") == bytes([number % 251]) * STATE_BYTES
            turns = [entry.key for entry in store.list("sessions/one/turns/")]
            assert len(turns) == turn + 1 and all(store.get(key) == b"t" + key.split("/")[-1].encode() for key in turns)
            for entry in store.list("sessions/one/states/"):
                assert len(store.get(entry.key) or b"") == STATE_BYTES
            assert len(blobs(directory)) == sum(1 for _ in store.list("sessions/one/states/")), "no orphans"
    zygote.close()
    assert reported >= KILLS // 2, "writers did get to commit"


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """Stands for a disk that is full: writing beyond fails, as the kernel does it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    """Large values stop first, then the index; nothing half-written stays, and with room again all goes on."""
    with opened(tmp_path / "store") as store:
        store.put("state/0", bytes(LARGE))
        version = store.swap_head("head", None, b"1")
        with files_no_larger_than(LARGE - 1):
            with pytest.raises(StoreFull, match="File too large|No space"):
                store.put("state/1", bytes(LARGE))
            assert len(blobs(tmp_path / "store")) == 1
            with pytest.raises(StoreFull):
                for number in range(100):
                    store.swap_head(f"other/{number}", None, bytes(SMALL_BYTES), {f"turn/{number}": bytes(SMALL_BYTES)})
            assert (store.read_head(f"other/{number}"), store.get(f"turn/{number}")) == (None, None)
            assert store.get("state/0") == bytes(LARGE)
            assert store.read_head("head") == (b"1", version)
        used = sum(entry.num_bytes for entry in store.list(""))
        assert store._used == used
        store.put("state/1", bytes(LARGE))
        assert store.swap_head("head", version, b"2", {f"turn/{number}": b"t"}) is not None
    with opened(tmp_path / "store") as store:
        assert store.get("state/1") == bytes(LARGE) and store.get(f"turn/{number}") == b"t"


@pytest.mark.parametrize("damage", ["text", "zeros", "empty", "middle", "missing"])
def test_a_damaged_index_is_named(tmp_path: Path, damage: str) -> None:
    directory, index = tmp_path / "store", tmp_path / "store" / "index.sqlite"
    with opened(directory) as store:
        for number in range(300):
            store.put(f"turn/{number}", bytes(1000))
    data = index.read_bytes()
    damaged = {
        "text": b"not a database, but long enough to be mistaken for one" * 100,
        "zeros": bytes(len(data)),
        "empty": b"",
        "middle": data[:8192] + bytes(len(data) - 8192),
    }
    index.unlink()
    if damage in damaged:
        index.write_bytes(damaged[damage])

    def use() -> None:
        with opened(directory) as store:
            assert all(store.get(f"turn/{number}") is not None for number in range(300))

    with pytest.raises(StoreCorrupt, match="index.sqlite is damaged .*restore the directory from a copy or delete it"):
        use()


def test_another_program_s_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    connection = sqlite3.connect(tmp_path / "store" / "index.sqlite")
    connection.execute("CREATE TABLE entries (a)")
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(UserError, match="no index of this release's"):
        LocalStore(tmp_path / "store", PLENTY)


def test_a_damaged_value_is_named(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        for key in ("short", "missing"):
            store.put(key, key.encode() * LARGE)
        for path in blobs(tmp_path / "store"):
            if path.stat().st_size == 5 * LARGE:
                path.write_bytes(b"short")
            else:
                path.unlink()
        with pytest.raises(StoreCorrupt, match=f"5 of {5 * LARGE} bytes are left; delete its key"):
            store.get("short")
        with pytest.raises(StoreCorrupt, match="is missing; delete the key missing"):
            store.get("missing")
        for key in ("short", "missing"):
            store.delete(key)
            assert store.get(key) is None
    (tmp_path / "store" / "blobs").rmdir()
    with pytest.raises(StoreCorrupt, match="blobs: No such file or directory; restore"):
        LocalStore(tmp_path / "store", PLENTY, read_only=True)


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    with opened(tmp_path / "store") as store:
        store.put("large", bytes(LARGE))
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.get("large")
    with pytest.raises(StoreUnavailable, match="closed"):
        store.swap_head("head", None, b"")
