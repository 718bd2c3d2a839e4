"""What every store promises, on each of the four: as a dictionary would do it, in any order, and with several hands."""

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from unspool.store import InvalidKey, Store, StoreFull
from unspool.store.interface import MAX_HEAD_BYTES, RESERVED_SHARE, SMALL_BYTES

OpenStore = Callable[[int], Store]

PLENTY = 1 << 26
OVERHEAD = 64
"""What an entry may count above its value."""

ALL_KEYS = [f"{folder}/{name}" for folder in ("a", "a.b", "b-c/d") for name in ("x", "y_1", "Z.z")]
KEYS = st.sampled_from(ALL_KEYS)
FILLS = st.integers(0, 255)
LENGTHS = st.sampled_from([0, 1, 40, SMALL_BYTES, SMALL_BYTES + 1])
HEADS = st.binary(max_size=40)
HOLDERS = st.sampled_from(["replica-1", "replica-2"])


class StoreAsDictionary(RuleBasedStateMachine):
    """The model: objects and heads by key, and who holds which lease since how many changes."""

    open_store: Callable[[], Store]

    def __init__(self) -> None:
        super().__init__()
        self.store = self.open_store()
        self.objects: dict[str, bytes] = {}
        self.heads: dict[str, tuple[bytes, int]] = {}
        self.leases: dict[str, tuple[str, str | None, int]] = {}
        """Last holder, present holder and epoch."""
        self.versions: set[int] = set()

    @rule(key=KEYS, fill=FILLS, length=LENGTHS)
    def put(self, key: str, fill: int, length: int) -> None:
        value = bytes([fill]) * length
        if key in self.heads:
            with pytest.raises(InvalidKey, match="names a head"):
                self.store.put(key, value)
        else:
            self.store.put(key, memoryview(value))
            self.objects.setdefault(key, value)

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.store.delete(key)
        self.objects.pop(key, None)
        self.heads.pop(key, None)
        self.leases.pop(key, None)

    @rule(key=KEYS, value=HEADS | st.none(), stale=st.booleans(), names=st.sets(KEYS, max_size=2), length=LENGTHS)
    def swap(self, key: str, value: bytes | None, stale: bool, names: set[str], length: int) -> None:
        names -= self.heads.keys() if stale else set()  # a swap with both wrong may say either
        objects = dict.fromkeys(names, bytes(length))
        version = self.heads[key][1] if key in self.heads else None
        expected = (1 if version is None else version + 1) if stale else version
        if key in self.objects or key in names or names & self.heads.keys():
            with pytest.raises(InvalidKey):
                self.store.swap_head(key, expected, value, objects)
            self._adopt(objects)
            return
        new = self.store.swap_head(key, expected, value, objects)
        if stale:
            assert new is None
            self._adopt(objects)
            return
        assert new is not None and new not in self.versions
        self.versions.add(new)
        for name in objects:
            self.objects.setdefault(name, bytes(length))
        self.heads.pop(key, None)
        if value is not None:
            self.heads[key] = (value, new)

    def _adopt(self, objects: dict[str, bytes]) -> None:
        """Of a swap that failed or came second, each object is there whole, or not at all."""
        for name, data in objects.items():
            if name not in self.objects and name not in self.heads and (found := self.store.get(name)) is not None:
                assert found == data
                self.objects[name] = found

    @rule(key=KEYS, holder=HOLDERS)
    def lease(self, key: str, holder: str) -> None:
        last, present, epoch = self.leases.get(key, ("", None, 0))
        if present not in (None, holder):
            assert self.store.lease(key, holder, 600.0) is None
            return
        epoch += last != holder
        assert self.store.lease(key, holder, 600.0) == epoch
        self.leases[key] = (holder, holder, epoch)

    @rule(key=KEYS, holder=HOLDERS)
    def release(self, key: str, holder: str) -> None:
        self.store.release(key, holder)
        last, present, epoch = self.leases.get(key, ("", None, 0))
        if present == holder:
            self.leases[key] = (last, None, epoch)

    def read(self, key: str) -> None:
        assert self.store.get(key) == self.objects.get(key)
        head = self.store.read_head(key)
        assert (tuple(head) if head else None) == self.heads.get(key)

    @rule(prefix=st.sampled_from(["", "a", "a/", "a.", "b-c/d/y", "nothing"]))
    def list(self, prefix: str) -> None:
        values = self.objects | {key: value for key, (value, _) in self.heads.items()}
        expected = sorted(key for key in values if key.startswith(prefix))
        found = [*self.store.list(prefix)]
        assert [entry.key for entry in found] == expected
        for entry in found:
            assert 0 <= entry.num_bytes - len(values[entry.key]) <= OVERHEAD
            assert entry.created > 1.7e9

    @invariant()
    def no_key_names_two_things(self) -> None:
        assert not self.objects.keys() & self.heads.keys()

    @rule()
    def read_everything(self) -> None:
        for key in ALL_KEYS:
            self.read(key)


def test_a_store_does_what_a_dictionary_does(open_empty: OpenStore, request: pytest.FixtureRequest) -> None:
    slow = request.node.callspec.params["open_empty"] == "s3"

    class Machine(StoreAsDictionary):
        open_store = staticmethod(lambda: open_empty(PLENTY))

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=20 if slow else 100,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_of_many_writers_one_swaps_a_head(open_empty: OpenStore) -> None:
    """Each adds one to a counter, reading again whenever another came first: none is lost."""
    store = open_empty(PLENTY)

    def add_ten() -> None:
        for _ in range(10):
            while True:
                head = store.read_head("counter")
                value, version = (int(head.value), head.version) if head is not None else (0, None)
                if store.swap_head("counter", version, str(value + 1).encode(), {f"log/{value}": b"turn"}) is not None:
                    break

    at_once([add_ten] * 4)
    head = store.read_head("counter")
    assert head is not None and head.value == b"40"
    assert sum(1 for _ in store.list("log/")) == 40


def test_of_many_holders_one_gets_a_lease(open_empty: OpenStore) -> None:
    store = open_empty(PLENTY)
    epochs: dict[str, int | None] = {}
    at_once([lambda name=f"replica-{i}": epochs.update({name: store.lease("session", name, 60.0)}) for i in range(6)])
    (holder,) = [name for name, epoch in epochs.items() if epoch is not None]
    assert epochs[holder] == 1
    store.release("session", holder)
    assert store.lease("session", "another", 60.0) == 2


def test_a_lease_ends_by_itself(open_empty: OpenStore) -> None:
    store = open_empty(PLENTY)
    assert store.lease("session", "stopped", 0.2) == 1
    assert store.lease("session", "stopped", 0.2) == 1, "renewed"
    deadline = time.monotonic() + 30
    while (epoch := store.lease("session", "next", 60.0)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert epoch == 2
    assert store.lease("session", "stopped", 60.0) is None


def test_an_object_written_by_many_at_once_is_there_once(open_empty: OpenStore) -> None:
    store = open_empty(PLENTY)
    value = bytes(range(256)) * 1024
    at_once([lambda: store.put("state", value)] * 4)
    assert store.get("state") == value
    assert [entry.key for entry in store.list("")] == ["state"]


def test_large_objects_are_whole(open_empty: OpenStore) -> None:
    """Larger than any piece that a store writes."""
    store = open_empty(PLENTY)
    for size in (SMALL_BYTES, SMALL_BYTES + 1, 9_000_001):
        value = random.Random(size).randbytes(size)
        store.put(f"state/{size}", bytearray(value))
        assert store.get(f"state/{size}") == value
    assert [entry.num_bytes for entry in store.list("state/65536")] == [SMALL_BYTES]
    store.delete("state/9000001")
    assert store.get("state/9000001") is None


def test_lists_are_paged(open_empty: OpenStore) -> None:
    store = open_empty(PLENTY)
    names = [f"turns/{number:04}" for number in range(1010)]  # S3's pages have 1000
    for start in range(0, len(names), 100):
        store.swap_head("head", None, b"", dict.fromkeys(names[start : start + 100], b"t"))
        store.delete("head")
    assert [entry.key for entry in store.list("turns/")] == names
    assert [entry.key for entry in store.list("turns/01")] == names[100:200]


def test_states_leave_room_for_turns(open_empty: OpenStore) -> None:
    """Large values stop at the reserve, small ones at the cap; what is deleted or replaced can be written again."""
    state, turn = bytes(1 << 17), bytes(1 << 10)
    cap = 32 * len(state)
    store = open_empty(cap)
    states = cap // len(state) * (RESERVED_SHARE - 1) // RESERVED_SHARE
    for number in range(states):
        store.put(f"state/{number}", state)
    with pytest.raises(StoreFull, match="no room for 131072 bytes"):
        store.put("state/more", state)
    assert store.get("state/more") is None
    store.put("state/0", state)  # there already

    version = store.swap_head("head", None, b"1" * 100, {"turn/0": turn})
    assert version is not None
    for number in itertools.count(1):
        try:
            store.put(f"turn/{number}", turn)
        except StoreFull:
            break
    assert cap - 4096 < sum(entry.num_bytes for entry in store.list("")) <= cap

    with pytest.raises(StoreFull):
        store.swap_head("head", version, b"2" * 5000)
    assert store.read_head("head") == (b"1" * 100, version)
    assert store.swap_head("head", version, b"3" * 99) is not None, "a full store takes what makes it no larger"
    for number in range(3):
        store.delete(f"state/{number}")
    store.put("state/more", state)


def test_deleting_frees_every_byte(open_empty: OpenStore) -> None:
    store = open_empty(1 << 20)
    for number in range(12):  # more than the cap in all
        store.put("state", bytes([number]) * 200_000)
        version = store.swap_head("head", None, bytes(1000), {"turn": bytes(30_000)})
        assert store.get("state") == bytes([number]) * 200_000
        for key in ("state", "turn"):
            store.delete(key)
        assert store.swap_head("head", version, None) is not None
    assert [*store.list("")] == []


@pytest.mark.parametrize(
    "key", ["", "/", "a/", "/a", "a//b", ".", "..", "a/../b", "a/.", "ä", "a b", "a\n", "a\n", "a" * 201]
)
def test_bad_keys_are_refused_everywhere(open_empty: OpenStore, key: str) -> None:
    store = open_empty(PLENTY)
    calls: list[Callable[[], object]] = [
        lambda: store.get(key),
        lambda: store.put(key, b""),
        lambda: store.delete(key),
        lambda: store.read_head(key),
        lambda: store.swap_head(key, None, b""),
        lambda: store.swap_head("head", None, b"", {key: b""}),
        lambda: store.lease(key, "me", 1.0),
        lambda: store.release(key, "me"),
    ]
    for call in calls:
        with pytest.raises(InvalidKey, match="key: must"):
            call()
    if key not in ("", ".", "..", "/", "a/", "/a", "a//b", "a/../b", "a/."):
        with pytest.raises(InvalidKey, match="prefix: must"):
            store.list(key)


def test_bad_values_are_refused(open_empty: OpenStore) -> None:
    store = open_empty(PLENTY)
    with pytest.raises(ValueError, match="put what is large into an object"):
        store.swap_head("head", None, bytes(MAX_HEAD_BYTES + 1))
    for seconds in (0.0, -1.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="seconds: must"):
            store.lease("head", "me", seconds)
    with pytest.raises(ValueError, match="holder: must"):
        store.lease("head", "", 1.0)
    with pytest.raises(ValueError, match="max_bytes"):
        open_empty(0)


def at_once(works: Sequence[Callable[[], object]]) -> None:
    """Runs them in threads that start together; raises what any of them raised."""
    start = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> None:
        start.wait(timeout=30)
        work()

    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(run, work) for work in works]:
            done.result()
