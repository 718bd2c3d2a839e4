"""Which sequences have slots, which tokens are computed next, and where checkpoints are left."""

import collections

from torch import Tensor

from unspool.engine.options import EngineOptions
from unspool.engine.prefill import next_chunk, next_pieces
from unspool.engine.prefill_budget import PrefillBudget
from unspool.engine.prefix_cache import MIN_TOKENS, Checkpoint, PrefixCache, PrefixMatch
from unspool.engine.sequence import EngineSequence, Piece
from unspool.engine.slots import Slots
from unspool.engine.token_tree import common_bytes
from unspool.engine.waiting_line import WaitingLine
from unspool.state import SlotSnapshot, StatePool
from unspool.token_bytes import TOKEN_BYTES, pack_tokens


class Scheduler:
    """Only the engine's thread uses it. A sequence waits, then reads its prompt in a slot, then decodes there."""

    def __init__(self, pool: StatePool, shared_chunk: int, options: EngineOptions) -> None:
        """`shared_chunk` as the executor has it: without one, texts are always cut at the same places."""
        self.cache = PrefixCache(options.prefix_cache, alignment=1 if shared_chunk else options.prefill_chunk)
        self.reading: collections.deque[EngineSequence] = collections.deque()
        self.decoding: list[EngineSequence] = []
        self.num_preempted = 0
        """Since the beginning."""
        self._slots = Slots(pool)
        self._waiting = WaitingLine(options.ageing_seconds)
        self._budget = PrefillBudget(options.prefill_chunk, options.decode_interval_ms / 1000)
        self._chunk = options.prefill_chunk
        # A cache that holds no state is no reason to copy one, or to wait for one.
        self._is_caching = options.prefix_cache >= pool.num_bytes // pool.num_slots
        self._shared_chunk = shared_chunk

    @property
    def num_active(self) -> int:
        """Sequences that have a slot."""
        return len(self.reading) + len(self.decoding)

    def add(self, sequence: EngineSequence) -> None:
        owners = {other.request.owner for other in (*self._waiting, *self.reading, *self.decoding)}
        self._waiting.add(sequence, owners)

    def expired(self, now: float) -> list[EngineSequence]:
        """Those whose deadline has passed before they had a slot."""
        return [sequence for sequence in self._waiting if sequence.deadline < now and sequence.parked is None]

    def admit(self, now: float) -> list[tuple[EngineSequence, Tensor]]:
        """Lends slots, and moves out who must make room. Returns those whose whole prompt was in the cache, with the
        logits of its last token."""
        known = []
        while sequence := self._next(now):
            match = self._match(sequence)
            if match is not None and self._follow(sequence, match):
                continue
            if not self._slots.num_free:
                self._make_room(now)
            sequence.level = self._waiting.level(sequence, now)
            logits = self._admit(sequence, match)
            if logits is not None:
                known.append((sequence, logits))
        return known

    def _next(self, now: float) -> EngineSequence | None:
        """Whose turn it is: anyone's if there is a free slot, else one's that may take the slot of another."""
        if self._slots.num_free:
            return self._waiting.first(now, _is_ready)
        victim = self._victim()
        if victim is None:
            return None
        return self._waiting.first(now, lambda one: _is_ready(one) and one.request.priority < victim.level)

    def _victim(self) -> EngineSequence | None:
        """The least important of those that have slots, the latest of several. None when as many are moved out as there
        are slots: they take memory too."""
        active = [*self.reading, *self.decoding]
        if sum(sequence.parked is not None for sequence in self._waiting) >= len(active):
            return None
        return max(active, key=lambda sequence: (sequence.level, sequence.number))

    def _make_room(self, now: float) -> None:
        victim = self._victim()
        assert victim is not None, "`_next` has found one"
        self._leave(victim)
        self._slots.park(victim)
        self._waiting.put_back(victim, now)
        self.num_preempted += 1

    def calls(self) -> list[list[Piece]]:
        """What to compute in this turn, each list in one call of the executor."""
        steps = [Piece(sequence, (sequence.generated[-1],), "last") for sequence in self.decoding]
        if not self._shared_chunk:
            return [call for call in (steps, next_chunk(self.reading, self._chunk)) if call]
        budget = self._budget.tokens(len(steps))
        pieces = [*steps, *next_pieces(self.reading, budget, self._shared_chunk)]
        # In the order of their slots, which some executors can then view in place.
        return [sorted(pieces, key=lambda piece: piece.sequence.slot)] if pieces else []

    def computed(self, pieces: list[Piece], seconds: float) -> None:
        """Learns what a call cost, and whom to charge for it."""
        for piece in pieces:
            self._waiting.charge(piece.sequence.request.owner, len(piece.tokens))
        steps = sum(piece.sequence.is_read for piece in pieces)
        read = sum(len(piece.tokens) for piece in pieces if not piece.sequence.is_read)
        self._budget.observe(steps, read, seconds)

    def advance(self, piece: Piece, logits: Tensor | None) -> None:
        """Notes that tokens of a prompt were read; `logits` [vocabulary] of the last one where there are any."""
        sequence = piece.sequence
        sequence.consumed += len(piece.tokens)
        if sequence.cuts[-1:] == [sequence.consumed]:
            sequence.cuts.pop()
            self._keep(sequence, sequence.tokens[: sequence.consumed * TOKEN_BYTES], self._slots.copy(sequence), logits)
        if sequence.is_read:
            self.reading.remove(sequence)

    def begin_decoding(self, sequence: EngineSequence) -> None:
        self.decoding.append(sequence)

    def remove(self, sequence: EngineSequence, *, has_ended: bool) -> SlotSnapshot | None:
        """Frees whatever a sequence holds. Returns its state if it has ended well and its request asks for it."""
        state = None
        if has_ended and sequence.slot >= 0:
            leaves_checkpoint = self._leaves_checkpoint(sequence)
            if sequence.request.keep_state or leaves_checkpoint:
                state = self._slots.copy(sequence)
            if state is not None and leaves_checkpoint:
                self._keep(sequence, sequence.tokens + pack_tokens(sequence.generated[:-1]), state, None)
        self._waiting.remove(sequence)
        self._leave(sequence)
        self._slots.take_back(sequence)
        sequence.parked = sequence.follows = None
        return state if sequence.request.keep_state else None

    def _leaves_checkpoint(self, sequence: EngineSequence) -> bool:
        """Whether a next turn that repeats this one's text could start from its end."""
        return self._may_cache(sequence) and bool(self._shared_chunk) and len(sequence.generated) > MIN_TOKENS

    def _keep(self, sequence: EngineSequence, tokens: bytes, state: SlotSnapshot, logits: Tensor | None) -> None:
        own = logits.clone() if logits is not None else None  # not a view of what the whole call computed
        self.cache.add(sequence.request.owner, tokens, Checkpoint(state, own))

    def _leave(self, sequence: EngineSequence) -> None:
        for stage in (self.reading, self.decoding):
            if sequence in stage:
                stage.remove(sequence)

    def _match(self, sequence: EngineSequence) -> PrefixMatch | None:
        """What the cache has for its prompt; None when it is not to be asked."""
        if sequence.parked is not None or not self._may_cache(sequence):
            return None
        return self.cache.match(sequence.request.owner, sequence.tokens)

    def _may_cache(self, sequence: EngineSequence) -> bool:
        return sequence.uses_cache and self._is_caching

    def _admit(self, sequence: EngineSequence, match: PrefixMatch | None) -> Tensor | None:
        """Gives a sequence a slot. Returns the logits of the last token if its whole prompt was known."""
        if sequence.parked is not None:
            self._enter(sequence, sequence.parked)
            sequence.parked = None
            return None
        if match is None:
            sequence.cache_miss = "disabled"
            self._enter(sequence, sequence.request.start)
            return None
        length = len(sequence.request.prompt)
        sequence.consumed = sequence.cached = match.position
        sequence.cache_miss = match.miss
        sequence.cuts = self.cache.places(match, length, sequence.request.checkpoints)[::-1]
        self._enter(sequence, match.checkpoint.state if match.checkpoint else None)
        return match.checkpoint.logits if match.checkpoint and sequence.is_read else None

    def _enter(self, sequence: EngineSequence, state: SlotSnapshot | None) -> None:
        self._waiting.remove(sequence)
        sequence.follows = None
        self._slots.lend(sequence, state)
        if sequence.generated:
            self.decoding.append(sequence)
        elif not sequence.is_read:
            self.reading.append(sequence)

    def _follow(self, sequence: EngineSequence, match: PrefixMatch) -> bool:
        """Makes it wait for a sequence that is reading a prefix of its prompt, which then leaves a checkpoint there."""
        for leader in self.reading:
            if not self._may_cache(leader) or leader.request.owner != sequence.request.owner:
                continue
            place = self._meeting_point(sequence, leader)
            if place >= match.position + MIN_TOKENS and place > leader.consumed:
                leader.cuts = sorted({*leader.cuts, place}, reverse=True)
                sequence.follows = (leader, place)
                return True
        return False

    def _meeting_point(self, sequence: EngineSequence, leader: EngineSequence) -> int:
        """How far two prompts are the same, as far as the one may go on from the other's state."""
        if sequence.tokens == leader.tokens:
            return len(sequence.request.prompt)
        shared = common_bytes(sequence.tokens, leader.tokens) // TOKEN_BYTES
        # Logits are kept at a prompt's end only, so that at least one token must be left to read.
        return self.cache.meeting_point(min(shared, len(sequence.request.prompt) - 1))


def _is_ready(sequence: EngineSequence) -> bool:
    """Whether nobody whom it follows is still on the way to where they part."""
    if sequence.follows is None:
        return True
    leader, place = sequence.follows
    return leader.slot < 0 or leader.consumed >= place
