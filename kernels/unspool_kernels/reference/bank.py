"""A bank of M tokens that left the window and stay exact: a streaming top-M by priority, and attention over it.

A token that leaves the window enters while there is room, or in the place of the entry of least priority if its own is
higher; whichever does not stay is evicted, at most one token a step. Priorities never change, so what the bank holds at
any time follows from the tokens alone. An entry that has become `reach` tokens old is evicted first.
"""

import heapq
from typing import NamedTuple

import torch
from torch import Tensor

from unspool_kernels.reference.ring_window import NearOutput

BLOCK = 128


class Entries(NamedTuple):
    """M rows a head, filled in order: keys and values [B, H, M, D], priorities' scores [B, H, M] in float32, and
    positions [B, H, M]."""

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor


class Leaving(NamedTuple):
    """The tokens that leave the window: keys and values [B, T, H, D], scores [B, T, H] in float32, positions [B, T]
    and a mask [B, T] of where one leaves at all."""

    keys: Tensor
    values: Tensor
    scores: Tensor
    positions: Tensor
    mask: Tensor


class Evicted(NamedTuple):
    """What falls out of window and bank at each token: keys and values [B, T, H, D], positions [B, T, H]. Junk where
    nothing does."""

    keys: Tensor
    values: Tensor
    positions: Tensor


class Plan(NamedTuple):
    """Who stays. Candidates are the M rows at the start (0 .. M - 1) and then the T tokens that leave the window."""

    evicted: Tensor
    """Candidate evicted at each token [B, H, T], -1 where none is."""
    rows: Tensor
    """Candidates in the rows at the start of each block and at the end [B, H, blocks + 1, M]; -1 for an empty row."""


def priority(scores: Tensor, positions: Tensor, aging: Tensor) -> Tensor:
    """Score plus aging [H] times position, in float64: entries [B, H, M]. A later token is worth `aging` more."""
    return scores.double() + aging.double()[:, None] * positions.double()


def step(entries: Entries, leaving: Leaving, aging: Tensor, filled: Tensor, reach: int, window: int) -> Evicted:
    """One token per sequence: puts it into `entries`, in place, or evicts it. `filled` [B] counts the valid rows."""
    size = entries.keys.shape[2]
    new = Leaving(*(x[:, 0] for x in leaving))
    position = new.positions[:, None].expand(new.scores.shape)
    worth = priority(entries.scores, entries.positions, aging)
    too_old = entries.positions <= (new.positions + window - reach)[:, None, None]
    empty = torch.arange(size, device=filled.device) >= filled[:, None, None]
    worth = worth.masked_fill(too_old, -torch.inf).masked_fill(empty, torch.inf)
    full = (filled >= size)[:, None]
    row = torch.where(full, worth.argmin(-1), filled.clamp(max=size - 1)[:, None])
    least = worth.gather(2, row[..., None])[..., 0]
    own = priority(new.scores[..., None], position[..., None], aging)[..., 0]
    enters = new.mask[:, None] & (~full | (own > least))
    values = {"keys": new.keys, "values": new.values, "scores": new.scores, "positions": position}
    evicted = {name: _exchange(getattr(entries, name), row, value, enters) for name, value in values.items()}
    return Evicted(evicted["keys"][:, None], evicted["values"][:, None], evicted["positions"][:, None])


def _exchange(rows: Tensor, row: Tensor, value: Tensor, enters: Tensor) -> Tensor:
    """Writes value [B, H, ...] into its row where it enters; returns what was there, or else the value itself."""
    index = row.view(*row.shape, *[1] * (rows.dim() - 2)).expand(*row.shape, 1, *rows.shape[3:])
    old = rows.gather(2, index)[:, :, 0]
    enters = enters.view(*enters.shape, *[1] * (old.dim() - 2))
    rows.scatter_(2, index, torch.where(enters, value.to(rows.dtype), old)[:, :, None])
    return torch.where(enters, old, value.to(old.dtype))


@torch.no_grad()
def plan(entries: Entries, leaving: Leaving, aging: Tensor, filled: Tensor, reach: int, window: int) -> Plan:
    """Decides for T tokens per sequence, on the host; equals T steps."""
    new = priority(leaving.scores.transpose(1, 2), leaving.positions[:, None], aging).tolist()
    old = priority(entries.scores, entries.positions, aging).tolist()
    old_positions, new_positions = entries.positions.tolist(), leaving.positions.tolist()
    counts, left = filled.tolist(), leaving.mask.tolist()
    evicted, rows = [], []
    for sequence in range(len(new)):
        for head in range(len(new[sequence])):
            worth = [*old[sequence][head], *new[sequence][head]]
            positions = [*old_positions[sequence][head], *new_positions[sequence]]
            bank = _Bank(worth, positions, len(old[sequence][head]), counts[sequence])
            gone, held = _replay(bank, left[sequence], new_positions[sequence], window - reach)
            evicted.append(gone)
            rows.append(held)
    shape, device = leaving.scores.transpose(1, 2).shape[:2], leaving.keys.device
    return Plan(
        torch.tensor(evicted, device=device).unflatten(0, shape), torch.tensor(rows, device=device).unflatten(0, shape)
    )


class _Bank:
    """One head's rows as candidate numbers, with a heap of them by worth and, among equals, by row: so does `step`."""

    def __init__(self, worth: list[float], positions: list[int], size: int, filled: int) -> None:
        self._worth, self._positions, self._size = worth, positions, size
        self.rows: list[int] = [*range(filled), *[-1] * (size - filled)]
        self._filled = filled
        self._row_at = {positions[candidate]: candidate for candidate in range(filled)}
        self._heap = [(worth[row], row, row) for row in range(filled)]
        heapq.heapify(self._heap)

    def offer(self, candidate: int, too_old: int) -> int:
        """Takes a candidate or not; returns who is evicted, -1 for nobody. The entry at position `too_old` goes."""
        if self._filled < self._size:
            self._put(candidate, self._filled)
            self._filled += 1
            return -1
        row = self._row_at.get(too_old, -1)
        if row < 0:
            row = self._weakest_row()
            if self._worth[candidate] <= self._worth[self.rows[row]]:
                return candidate
        old = self.rows[row]
        del self._row_at[self._positions[old]]
        self._put(candidate, row)
        return old

    def _weakest_row(self) -> int:
        _, row, candidate = self._heap[0]
        while self.rows[row] != candidate:
            heapq.heappop(self._heap)
            _, row, candidate = self._heap[0]
        return row

    def _put(self, candidate: int, row: int) -> None:
        self.rows[row] = candidate
        self._row_at[self._positions[candidate]] = row
        heapq.heappush(self._heap, (self._worth[candidate], row, candidate))


def _replay(bank: _Bank, left: list[bool], positions: list[int], offset: int) -> tuple[list[int], list[list[int]]]:
    size = len(bank.rows)
    evicted, rows = [], []
    for token, leaves in enumerate(left):
        if token % BLOCK == 0:
            rows.append(list(bank.rows))
        evicted.append(bank.offer(size + token, positions[token] + offset) if leaves else -1)
    return evicted, [*rows, list(bank.rows)]


def chunk(q: Tensor, entries: Entries, leaving: Leaving, decided: Plan) -> tuple[NearOutput, Evicted]:
    """Attention of T rotated queries [B, T, H, G, D] over the bank as it is at each of them; log-mass -inf where it is
    empty. Equals T steps, and their evictions."""
    size, tokens = entries.keys.shape[2], q.shape[1]
    keys = torch.cat([entries.keys, leaving.keys.transpose(1, 2)], 2)
    values = torch.cat([entries.values, leaving.values.transpose(1, 2)], 2)
    leaves_at = _times_of_leaving(decided.evicted, size)
    blocks = []
    for block, first in enumerate(range(0, tokens, BLOCK)):
        last = min(first + BLOCK, tokens)
        new = torch.arange(size + first, size + last, device=q.device).expand(*keys.shape[:2], -1)
        candidates = torch.cat([decided.rows[:, :, block], new], -1)
        entered = (candidates - size).clamp_min(first)
        time = torch.arange(first, last, device=q.device)[:, None]
        until = leaves_at.gather(2, candidates.clamp_min(0))
        seen = (entered[:, :, None] <= time) & (time < until[:, :, None]) & (candidates >= 0)[:, :, None]
        seen &= _has_left(leaving.mask, candidates, size)[:, :, None]
        rows = candidates.clamp_min(0)
        blocks.append(_attend(q[:, first:last], _take(keys, rows), _take(values, rows), seen))
    output = NearOutput(*(torch.cat(parts, 1) for parts in zip(*blocks, strict=True)))
    return output, evictions(keys, values, entries, leaving, decided)


def evictions(keys: Tensor, values: Tensor, entries: Entries, leaving: Leaving, decided: Plan) -> Evicted:
    """What `decided` evicts, of all candidates' keys and values [B, H, M + T, D]."""
    rows = decided.evicted.clamp_min(0)
    new = leaving.positions[:, None].expand(-1, keys.shape[1], -1)
    positions = torch.cat([entries.positions.to(new.dtype), new], 2).gather(2, rows)
    return Evicted(_take(keys, rows).transpose(1, 2), _take(values, rows).transpose(1, 2), positions.transpose(1, 2))


def write(entries: Entries, leaving: Leaving, decided: Plan) -> None:
    """Stores in `entries`, in place, what the bank holds after the chunk."""
    rows = decided.rows[:, :, -1]
    held, rows = rows >= 0, rows.clamp_min(0)
    new = leaving.positions[:, None].expand(-1, rows.shape[1], -1)
    for old, added in zip(
        entries,
        (leaving.keys.transpose(1, 2), leaving.values.transpose(1, 2), leaving.scores.transpose(1, 2), new),
        strict=True,
    ):
        candidates = torch.cat([old, added.to(old.dtype)], 2)
        kept = _take(candidates, rows) if old.dim() == 4 else candidates.gather(2, rows)
        old.copy_(torch.where(held.view(*held.shape, *[1] * (old.dim() - 3)), kept, old))


def _times_of_leaving(evicted: Tensor, size: int) -> Tensor:
    """When each candidate is evicted [B, H, M + T]; T if it stays."""
    tokens = evicted.shape[2]
    times = torch.full((*evicted.shape[:2], size + tokens + 1), tokens, device=evicted.device)
    index = torch.where(evicted < 0, size + tokens, evicted)
    times.scatter_(2, index, torch.arange(tokens, device=evicted.device).expand_as(index))
    return times[..., :-1]


def _has_left(mask: Tensor, candidates: Tensor, size: int) -> Tensor:
    old = torch.ones(mask.shape[0], size, dtype=torch.bool, device=mask.device)
    known = torch.cat([old, mask], 1)[:, None].expand(-1, candidates.shape[1], -1)
    return known.gather(2, candidates.clamp_min(0))


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(2, index[..., None].expand(*index.shape, rows.shape[-1]))


def _attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> NearOutput:
    """q [B, T, H, G, D] over rows [B, H, N, D] where seen [B, H, T, N]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.permute(0, 2, 3, 1, 4) @ keys[:, :, None].transpose(-1, -2)).to(wide) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    row_max = scores.amax(-1)
    shift = row_max.detach().clamp_min(torch.finfo(wide).min)
    weights = (scores - shift[..., None]).exp()
    mass = weights.sum(-1)
    output = (weights.to(values.dtype) @ values[:, :, None]).to(wide) / mass.clamp_min(torch.finfo(wide).tiny)[
        ..., None
    ]
    # Clamped before the logarithm, filled after it: an empty bank must not have a NaN gradient.
    log_mass = (shift + mass.clamp_min(torch.finfo(wide).tiny).log()).masked_fill(mass == 0, -torch.inf)
    return NearOutput(*(x.movedim(3, 1) for x in (output, log_mass, row_max)))
