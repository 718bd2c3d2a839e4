"""Anything that can be done to sessions, in any order, against a model that knows nothing but their tokens."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from unspool.engine import Engine
from unspool.requests import FinishEvent, GenerationRequest, SamplingParams, TokenEvent
from unspool.sessions import Place, SessionOptions, Sessions, TurnRequest
from unspool.sessions.state_memory import StateKey
from unspool.sizes import ByteSize
from unspool.state import SlotSnapshot
from unspool.store import StateIdentity
from unspool.store.local import LocalStore
from unspool.token_bytes import unpack_tokens

GREEDY = SamplingParams(temperature=0.0)
TOKENS = st.lists(st.integers(0, 63), min_size=1, max_size=12).map(tuple)
OWNER = "me"


def compute(engine: Engine, prompt: tuple[int, ...], count: int) -> tuple[tuple[int, ...], SlotSnapshot]:
    """What the engine makes of a text with no help: its next tokens, and the state that it leaves."""
    done, tokens, states = threading.Event(), [], []

    def sink(event: object) -> None:
        if isinstance(event, TokenEvent):
            tokens.append(event.token)
        if isinstance(event, FinishEvent):
            states.append(event.state)
            done.set()

    engine.submit(
        GenerationRequest(
            request_id="alone", prompt=prompt, max_tokens=count, sampling=GREEDY, use_cache=False, keep_state=True
        ),
        sink,
    )
    assert done.wait(60)
    return tuple(tokens), states[0]


class Life(RuleBasedStateMachine):
    """The model: each session's tokens after each of its turns, its generation."""

    engine: Engine
    identity: StateIdentity
    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        self.logs: dict[str, tuple[int, ...]] = {}
        self.ends: dict[str, list[int]] = {}
        self.generations: dict[str, int] = {}
        self.old_logs: dict[tuple[str, str], tuple[int, ...]] = {}
        self.count = 0

    @initialize(memory=st.sampled_from([0, 2, 40]), stored=st.sampled_from([3, 200]))
    def open(self, memory: int, stored: int) -> None:
        """Room for a few states only: most of what is asked for must be read or replayed."""
        self.path = Path(tempfile.mkdtemp())
        state_bytes = self.engine.state_bytes // self.engine.num_slots
        self.options = SessionOptions(state_memory=ByteSize(memory * state_bytes))
        self.max_bytes = stored * (state_bytes + 8192) + (1 << 20)
        self.start()

    def start(self) -> None:
        self.store = LocalStore(self.path / "store", self.max_bytes, fsync=False)
        self.sessions = Sessions(self.engine, self.store, self.identity, self.options)

    def teardown(self) -> None:
        if hasattr(self, "sessions"):
            self.sessions.close()
            self.store.close()
            shutil.rmtree(self.path)

    @rule(target=names, turns=st.lists(TOKENS, min_size=1, max_size=6))
    def create(self, turns: list[tuple[int, ...]]) -> str:
        self.count += 1
        name = f"s{self.count}"
        self.sessions.create(OWNER, name)
        self.logs[name], self.ends[name], self.generations[name] = (), [0], 0
        for tokens in turns:
            self.append(name, tokens)
        return name

    @rule(name=names, tokens=TOKENS)
    def append(self, name: str, tokens: tuple[int, ...]) -> None:
        self.committed(name, tokens, self.sessions.append(OWNER, name, tokens).generation)

    @rule(name=names, tokens=TOKENS | st.just(()), count=st.integers(1, 5))
    def generate(self, name: str, tokens: tuple[int, ...], count: int) -> None:
        text = self.logs[name] + tokens
        if not text:
            return
        result = self.sessions.generate(OWNER, name, TurnRequest(tokens=tokens, max_tokens=count, sampling=GREEDY))
        assert result.tokens == compute(self.engine, text, count)[0]
        self.committed(name, tokens + result.tokens, result.generation)

    def committed(self, name: str, tokens: tuple[int, ...], generation: int) -> None:
        self.logs[name] += tokens
        self.ends[name].append(len(self.logs[name]))
        self.generations[name] += 1
        assert generation == self.generations[name]

    @rule(target=names, name=names, data=st.data())
    def fork(self, name: str, data: st.DataObject) -> str:
        self.count += 1
        fork = f"s{self.count}"
        position = data.draw(st.integers(0, len(self.logs[name])))
        self.sessions.fork(OWNER, name, Place(position=position), new=fork)
        self.logs[fork] = self.logs[name][:position]
        self.ends[fork] = [*(end for end in self.ends[name] if end < position), position]
        self.generations[fork] = 0
        return fork

    @rule(target=names, name=names, restarts=st.booleans())
    def export_and_import(self, name: str, restarts: bool) -> str:
        exported = self.sessions.export(OWNER, name)
        if restarts:
            self.restart()
        self.count += 1
        copy = f"s{self.count}"
        self.sessions.import_session(OWNER, exported, copy)
        self.logs[copy], self.ends[copy] = self.logs[name], list(self.ends[name])
        self.generations[copy] = self.sessions.info(OWNER, copy).generation
        return copy

    @rule(name=names, data=st.data(), count=st.integers(1, 3))
    def go_back_and_try_again(self, name: str, data: st.DataObject, count: int) -> None:
        self.go_back_to_a_position(name, data)
        self.generate(name, (), count)

    @rule(name=names, data=st.data())
    def go_back_to_a_position(self, name: str, data: st.DataObject) -> None:
        position = data.draw(st.integers(0, len(self.logs[name])))
        rollback = self.sessions.rollback(OWNER, name, Place(position=position))
        self.ends[name] = [*(end for end in self.ends[name] if end < position), position]
        self.logs[name] = self.logs[name][:position]
        self.went_back(name, rollback.generation)

    @rule(name=names, data=st.data())
    def go_back_by_turns(self, name: str, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.ends[name]) - 1))
        rollback = self.sessions.rollback(OWNER, name, Place(turn=number))
        self.ends[name] = self.ends[name][: number + 1]
        self.logs[name] = self.logs[name][: self.ends[name][-1]]
        self.went_back(name, rollback.generation)

    def went_back(self, name: str, generation: int) -> None:
        self.generations[name] += 1
        assert generation == self.generations[name]

    @rule(name=names, label=st.sampled_from("abc"))
    def snapshot(self, name: str, label: str) -> None:
        self.sessions.snapshot(OWNER, name, label)
        self.old_logs[name, label] = self.logs[name]

    @rule(name=names, label=st.sampled_from("abc"))
    def go_back_to_a_snapshot(self, name: str, label: str) -> None:
        if (name, label) not in self.old_logs:
            return
        ends = self.sessions.records.read(OWNER, name).snapshots[label].place.number
        rollback = self.sessions.rollback(OWNER, name, Place(snapshot=label))
        self.logs[name] = self.old_logs[name, label]
        # What the turns were that led there only the log knows.
        head = self.sessions.records.read(OWNER, name)
        turns = [end for _, end in self.sessions.log.back_from(head.place)]
        self.ends[name] = [0, *reversed(turns)]
        assert len(turns) == ends
        self.went_back(name, rollback.generation)

    @precondition(lambda self: len(self.logs) > 3)
    @rule(name=consumes(names))
    def delete(self, name: str) -> None:
        self.sessions.delete(OWNER, name)
        for known in (self.logs, self.ends, self.generations):
            del known[name]
        self.old_logs = {key: log for key, log in self.old_logs.items() if key[0] != name}

    @rule()
    def evict(self) -> None:
        self.sessions.tiers.drop_memory()

    @rule()
    def lose_all_states(self) -> None:
        self.sessions.tiers.drop_memory()
        for entry in list(self.store.list("states/")):
            self.store.delete(entry.key)

    @rule()
    def restart(self) -> None:
        self.sessions.close()
        self.store.close()
        self.start()

    @rule(name=names)
    def every_state_at_hand_is_the_replayed_one(self, name: str) -> None:
        for taken in self.sessions.records.read(OWNER, name).states:
            found = self.sessions.tiers.find(StateKey(OWNER, taken.digest), taken.position)
            if found is None:
                continue
            replayed = compute(self.engine, self.logs[name][: taken.position], 0)[1]
            assert found.state.position == replayed.position == taken.position
            for layer, expected in zip(found.state.layers, replayed.layers, strict=True):
                assert all(torch.equal(layer[tensor], expected[tensor]) for tensor in expected)

    @invariant()
    def logs_are_what_was_committed(self) -> None:
        if not hasattr(self, "sessions"):
            return
        for name, log in self.logs.items():
            info = self.sessions.info(OWNER, name)
            assert (info.position, info.generation) == (len(log), self.generations[name])
            assert info.turns == len(self.ends[name]) - 1 or not log
            assert unpack_tokens(self.sessions.tokens(OWNER, name)) == log

    @invariant()
    def bytes_stay_within_their_caps(self) -> None:
        if not hasattr(self, "sessions"):
            return
        assert self.sessions.statistics().memory_bytes <= self.options.state_memory
        assert sum(entry.num_bytes for entry in self.store.list("")) <= self.max_bytes
        assert self.sessions.statistics().rejected == 0


def test_whatever_is_done_sessions_are_their_tokens(engine: Engine, identity: StateIdentity) -> None:
    class LifeOnThisEngine(Life):
        pass

    LifeOnThisEngine.engine, LifeOnThisEngine.identity = engine, identity
    case = LifeOnThisEngine.TestCase
    case.settings = settings(
        max_examples=120, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case("runTest").runTest()
