"""Checks a session against the model: its log link by link, and its state against a replay from nothing."""

import time
import uuid
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import torch

from unspool.engine import Engine
from unspool.requests import EngineEvent, FinishEvent, GenerationRequest
from unspool.sessions.errors import TurnFailed
from unspool.sessions.head import SessionHead
from unspool.sessions.log_digest import LogDigest
from unspool.sessions.sessions import Sessions
from unspool.sessions.state_tiers import Tier
from unspool.sessions.transfer import newest_state
from unspool.sessions.turn import Turn
from unspool.state import SlotSnapshot
from unspool.store import StoreCorrupt
from unspool.token_bytes import TOKEN_BYTES, unpack_tokens


class StateDifference(NamedTuple):
    same_bits: bool
    largest: float
    """Of all absolute differences."""
    relative: float
    """The largest, over all tensors, of a tensor's largest difference over its largest value."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What became of checking one session."""

    session: str
    position: int
    """Tokens of its log."""
    turns: int
    problems: tuple[str, ...]
    """What is wrong with the log; nothing is replayed then."""
    state_tier: Tier | None = None
    """Where the newest state was found; None when none is at hand, so that there was nothing to compare."""
    replayed_tokens: int = 0
    """The state's position."""
    difference: StateDifference | None = None
    seconds: float = 0.0
    """Of the replay."""

    def holds(self, tolerance: float = 0.0) -> bool:
        """Whether the log is sound and the state is the replayed one: the same bits or, with a tolerance, a relative
        difference of no more."""
        found = self.difference
        return not self.problems and (found is None or found.same_bits or found.relative <= tolerance)


def verify(sessions: Sessions, owner: str, session: str) -> Verification:
    """Checks every turn of a session's log, then reads the log again from its first token and compares the newest state
    at hand with what comes out.

    Where results do not depend on how a text is cut, as with the native kernels, a sound state has the same bits. A
    stored state whose file is damaged is put aside, as a turn would do, and an older one compared. Raises
    SessionNotFound, SessionMismatch, EngineBusy, EngineDead, TurnFailed, StoreUnavailable.
    """
    head = sessions.records.read(owner, session)
    position, turns = head.place.position, head.place.number
    try:
        log = list(sessions.log.back_from(head.place))[::-1]
    except StoreCorrupt as error:
        return Verification(session=session, position=position, turns=turns, problems=(str(error),))
    problems = _chain_problems(head, log)
    if not problems:
        tokens = b"".join(turn.tokens[: (end - turn.start) * TOKEN_BYTES] for turn, end in log)
        problems = _state_problems(head, tokens)
    found = newest_state(sessions.tiers, head) if not problems else None
    if found is None:
        return Verification(session=session, position=position, turns=turns, problems=tuple(problems))
    started = time.perf_counter()
    replayed = replay(sessions.engine, unpack_tokens(tokens[: found.state.position * TOKEN_BYTES]), owner)
    return Verification(
        session=session,
        position=position,
        turns=turns,
        problems=(),
        state_tier=found.tier,
        replayed_tokens=found.state.position,
        difference=difference(found.state, replayed),
        seconds=time.perf_counter() - started,
    )


def replay(engine: Engine, tokens: tuple[int, ...], owner: str) -> SlotSnapshot:
    """The state after these tokens, read from nothing. Waits; raises EngineBusy, EngineDead and TurnFailed."""
    last: Future[FinishEvent] = Future()

    def receive(event: EngineEvent) -> None:
        if isinstance(event, FinishEvent):
            last.set_result(event)

    request = GenerationRequest(
        request_id=f"verify_{uuid.uuid4().hex}",
        prompt=tokens,
        max_tokens=0,
        keep_state=True,
        use_cache=False,
        owner=owner,
    )
    engine.submit(request, receive)
    event = last.result()
    if event.state is None:
        raise TurnFailed(event.reason, event.error or f"the replay was {event.reason}; verify the session again")
    return event.state


def difference(state: SlotSnapshot, replayed: SlotSnapshot) -> StateDifference:
    """How far two states of one model and position are apart. Tensors are compared on the CPU in float64."""
    assert state.position == replayed.position
    same_bits, largest, relative = True, 0.0, 0.0
    for layer, other in zip(state.layers, replayed.layers, strict=True):
        for name, tensor in layer.items():
            mine, its = tensor.cpu().contiguous(), other[name].cpu().contiguous()
            if torch.equal(mine.reshape(-1).view(torch.uint8), its.reshape(-1).view(torch.uint8)):
                continue
            same_bits = False
            apart = (mine.double() - its.double()).abs().max().item()
            largest = max(largest, apart)
            relative = max(relative, apart / max(its.double().abs().max().item(), torch.finfo(torch.float32).tiny))
    return StateDifference(same_bits, largest, relative)


def _chain_problems(head: SessionHead, log: list[tuple[Turn, int]]) -> list[str]:
    """Each turn must go on from the very tokens before it, and count on from the turn before it."""
    problems = []
    before = LogDigest()
    for number, (turn, end) in enumerate(log, start=1):
        if turn.start != before.position or turn.before != before:
            problems.append(f"turn {number} ({turn.id}) goes on from other tokens than those of the turns before it")
            break
        if turn.number != number or turn.given > len(turn.tokens) // TOKEN_BYTES:
            problems.append(f"turn {number} ({turn.id}) has a wrong count")
        before = turn.digest_at(end)
    if not problems and (head.place.number, head.place.position) != (len(log), before.position):
        problems.append(f"the session's record says {head.place.number} turns and {head.place.position} tokens")
    return problems


def _state_problems(head: SessionHead, tokens: bytes) -> list[str]:
    """The record must name states by the digests of the log's own tokens."""
    problems, digest = [], LogDigest()
    for taken in sorted(head.states, key=lambda taken: taken.position):
        digest = digest.extend(tokens[digest.position * TOKEN_BYTES : taken.position * TOKEN_BYTES])
        if digest.position != taken.position or digest.hex() != taken.digest:
            problems.append(f"the state at {taken.position} is of other tokens than the log's")
    return problems
