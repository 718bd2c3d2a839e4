"""Verification finds what is wrong with a log or a state, and finds nothing where nothing is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from unspool.engine import Engine
from unspool.requests import EngineDead, SamplingParams
from unspool.sessions import Place, SessionMismatch, SessionNotFound, Sessions, TurnRequest, verify
from unspool.sessions.head import SessionHead
from unspool.sessions.state_memory import StateKey
from unspool.sessions.turn import Turn
from unspool.sessions.turn_log import turn_key
from unspool.sessions.verification import StateDifference, difference, replay
from unspool.state import SlotSnapshot
from unspool.store import StateIdentity, StateProvenance, Store, write_state
from unspool.token_bytes import pack_tokens, unpack_tokens

Open = Callable[..., Sessions]

GREEDY = SamplingParams(temperature=0.0)


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def turn(tokens: tuple[int, ...] = (), max_tokens: int = 8) -> TurnRequest:
    return TurnRequest(tokens=tokens, max_tokens=max_tokens, sampling=GREEDY)


@pytest.fixture
def spoken(sessions: Sessions) -> Sessions:
    """With a session of three turns, whose states are in the store alone."""
    sessions.create("me", "s")
    for number in range(3):
        sessions.generate("me", "s", turn(text(20, number)))
        sessions.flush()
    sessions.tiers.drop_memory()
    return sessions


def turns_of(sessions: Sessions) -> list[Turn]:
    """The last first."""
    return [turn for turn, _ in sessions.log.back_from(sessions.records.read("me", "s").place)]


def rewrite(store: Store, turn: Turn) -> None:
    """Puts another record, whole by its own account, in a turn's place."""
    store.delete(turn_key(turn.id))
    store.put(turn_key(turn.id), turn.encode())


def change_head(sessions: Sessions, change: Callable[[SessionHead], SessionHead]) -> None:
    sessions.records.change("me", "s", change)


def newest_key(sessions: Sessions, store: Store) -> tuple[str, StateKey, int]:
    taken = sessions.records.read("me", "s").states[-1]
    (name,) = [entry.key for entry in store.list("states/") if entry.key.endswith(taken.digest)]
    return name, StateKey("me", taken.digest), taken.position


def test_a_sound_session_has_the_bits_of_its_replay(spoken: Sessions, engine: Engine) -> None:
    for tier in ("store", "memory"):  # where it is again once it was read
        before = engine.statistics()
        found = verify(spoken, "me", "s")
        after = engine.statistics()
        assert after.cached_tokens == before.cached_tokens
        assert after.prompt_tokens == before.prompt_tokens + 83
        assert found.holds()
        assert (found.position, found.turns, found.problems) == (84, 3, ())
        assert (found.state_tier, found.replayed_tokens) == (tier, 83)
        assert found.difference == StateDifference(True, 0.0, 0.0)


def test_forks_and_sessions_that_went_back_are_sound(spoken: Sessions) -> None:
    spoken.fork("me", "s", Place(position=30), new="fork")
    spoken.generate("me", "fork", turn(text(5), 3))
    spoken.rollback("me", "s", Place(position=45))
    assert verify(spoken, "me", "s").replayed_tokens == 27  # where the first turn ended
    spoken.append("me", "s", text(1))
    for session, position in (("fork", 38), ("s", 46)):
        found = verify(spoken, "me", session)
        assert found.holds() and found.position == position and found.replayed_tokens == position - 1


def test_without_a_state_there_is_nothing_to_replay(spoken: Sessions, store: Store) -> None:
    for entry in list(store.list("states/")):
        store.delete(entry.key)
    found = verify(spoken, "me", "s")
    assert found.holds()
    assert (found.state_tier, found.replayed_tokens, found.difference) == (None, 0, None)
    spoken.create("me", "empty")
    assert verify(spoken, "me", "empty").position == 0


def test_a_state_that_is_not_the_logs_is_found(spoken: Sessions, store: Store, identity: StateIdentity) -> None:
    """One value of the state is another, and the file is whole by its own account."""
    name, key, position = newest_key(spoken, store)
    found = spoken.tiers.find(key, position)
    assert found is not None
    layers = tuple({tensor: values.clone() for tensor, values in layer.items()} for layer in found.state.layers)
    tensor = next(values for values in layers[1].values() if values.is_floating_point())
    tensor.view(-1)[3] += 0.25
    store.delete(name)
    provenance = StateProvenance(log_digest=key.digest, owner="me")
    store.put(name, write_state(SlotSnapshot(position, layers), identity, provenance))
    spoken.tiers.drop_memory()
    checked = verify(spoken, "me", "s")
    assert checked.difference is not None and not checked.difference.same_bits
    assert checked.difference.largest == pytest.approx(0.25, rel=1e-5)
    assert not checked.holds()
    assert not checked.holds(checked.difference.relative * 0.99)
    assert checked.holds(checked.difference.relative)


def test_a_damaged_state_is_put_aside_and_an_older_one_compared(spoken: Sessions, store: Store) -> None:
    name, _, _ = newest_key(spoken, store)
    data = bytearray(store.get(name) or b"")
    data[-5] ^= 1
    store.delete(name)
    store.put(name, data)
    found = verify(spoken, "me", "s")
    assert found.holds() and found.replayed_tokens == 55
    assert [entry.key for entry in store.list("quarantine/")] == [f"quarantine/{name}"]


def test_tokens_that_were_changed_are_found(spoken: Sessions, store: Store) -> None:
    first = turns_of(spoken)[-1]
    tokens = list(unpack_tokens(first.tokens))
    tokens[0] = (tokens[0] + 1) % 64
    rewrite(store, replace(first, tokens=pack_tokens(tokens)))
    found = verify(spoken, "me", "s")
    assert not found.holds() and not found.holds(1.0)
    assert "turn 2 (turn_" in found.problems[0] and "goes on from other tokens" in found.problems[0]
    assert found.difference is None


def test_tokens_of_the_last_turn_that_were_changed_are_found(spoken: Sessions, store: Store) -> None:
    last = turns_of(spoken)[0]
    rewrite(store, replace(last, tokens=pack_tokens((1,)) + last.tokens[4:]))
    assert verify(spoken, "me", "s").problems == ("the state at 83 is of other tokens than the log's",)


@pytest.mark.parametrize(("field", "value"), [("number", 7), ("given", 29)])
def test_a_wrong_count_is_found(spoken: Sessions, store: Store, field: str, value: int) -> None:
    rewrite(store, replace(turns_of(spoken)[1], **{field: value}))  # type: ignore[arg-type]
    assert "turn 2" in verify(spoken, "me", "s").problems[0]
    assert "has a wrong count" in verify(spoken, "me", "s").problems[0]


def test_a_turn_that_is_missing_or_damaged_is_found(spoken: Sessions, store: Store) -> None:
    middle = turns_of(spoken)[1]
    store.delete(turn_key(middle.id))
    assert f"{turn_key(middle.id)}: the record of a turn is missing" in verify(spoken, "me", "s").problems[0]
    store.put(turn_key(middle.id), middle.encode()[:-1])
    assert "it has changed since it was written" in verify(spoken, "me", "s").problems[0]


def test_a_record_that_does_not_fit_its_log_is_found(spoken: Sessions) -> None:
    change_head(spoken, lambda head: replace(head, place=replace(head.place, number=4)))
    assert verify(spoken, "me", "s").problems == ("the session's record says 4 turns and 84 tokens",)
    change_head(spoken, lambda head: replace(head, place=replace(head.place, number=3)))
    change_head(spoken, lambda head: replace(head, states=(replace(head.states[0], digest="0" * 64),)))
    assert "the state at 27 is of other tokens" in verify(spoken, "me", "s").problems[0]


def test_only_ones_own_sessions_of_this_tokenizer_are_verified(
    spoken: Sessions, open_sessions: Open, identity: StateIdentity
) -> None:
    with pytest.raises(SessionNotFound):
        verify(spoken, "you", "s")
    stranger = open_sessions(spoken.store, replace(identity, tokenizer="y" * 64))
    with pytest.raises(SessionMismatch):
        verify(stranger, "me", "s")


def test_another_models_states_are_not_compared(spoken: Sessions, open_sessions: Open, identity: StateIdentity) -> None:
    other = open_sessions(spoken.store, replace(identity, weights="x" * 64))
    assert verify(other, "me", "s").state_tier is None


def test_differences_are_of_bits_first() -> None:
    def snapshot(*values: float) -> SlotSnapshot:
        return SlotSnapshot(1, ({"a": torch.tensor(values), "n": torch.tensor(3, dtype=torch.int32)},))

    assert difference(snapshot(0.0, 2.0), snapshot(0.0, 2.0)) == StateDifference(True, 0.0, 0.0)
    assert difference(snapshot(-0.0, 2.0), snapshot(0.0, 2.0)) == StateDifference(False, 0.0, 0.0)
    assert difference(snapshot(1.0, 2.0), snapshot(0.0, 4.0)) == StateDifference(False, 2.0, 0.5)
    other = SlotSnapshot(1, ({"a": torch.tensor([0.0, 2.0]), "n": torch.tensor(4, dtype=torch.int32)},))
    assert difference(snapshot(0.0, 2.0), other) == StateDifference(False, 1.0, 0.25)


def test_a_replay_says_why_it_cannot_be(executor: object, engine: Engine) -> None:
    dead = Engine(engine._executor)
    with pytest.raises(EngineDead):
        replay(dead, (1, 2), "me")
