"""The eight laws: each takes a subject and a case and raises `LawBroken`.

A subject that is `exact` must give the same bits however its tokens are split, packed, placed and divided over threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from unspool_kernels.laws.case import Case, Op, Outcome
from unspool_kernels.laws.comparison import LawBroken, require_equal, require_same, require_same_bits


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An op on trial. random_splits: how many ways to cut the tokens are tried besides step by step. set_threads, if
    the op has threads, says how many it may use."""

    op: Op
    exact: bool = False
    random_splits: int = 2
    set_threads: Callable[[int], None] | None = None


def chunk_equals_steps(subject: Subject, case: Case) -> None:
    """L1: one call is the same as its tokens one at a time, and as any other split of them."""
    whole = case.run(subject.op)
    random = Random(len(case.name))
    splits = [[list(range(length + 1)) for length in case.lengths]]
    splits += [[_cut(length, random) for length in case.lengths] for _ in range(subject.random_splits)]
    for cuts in splits:
        require_same(case, _run_split(subject.op, case, cuts), whole, exact=subject.exact)


def packing_equals_separate_calls(subject: Subject, case: Case) -> None:
    """L2: sequences in one call do not see each other."""
    together = case.run(subject.op)
    apart = _run_parts(subject.op, case, [_only(case, s) for s in range(len(case.lengths))])
    require_same(case, apart, together, exact=subject.exact)


def slots_are_interchangeable(subject: Subject, case: Case) -> None:
    """L3: another place in the pool, and another order of the sequences, give the same."""
    expected = case.run(subject.op)
    slots = next(iter(case.states.values())).shape[0]
    moved_to = torch.tensor(Random(slots).sample(range(slots), slots), device=case.slots.device)
    moved = replace(
        case,
        slots=torch.where(case.slots >= 0, moved_to[case.slots.clamp(min=0).long()], -1).int(),
        states={name: torch.empty_like(s).index_copy_(0, moved_to, s) for name, s in case.states.items()},
    ).run(subject.op)
    back = {name: state[moved_to] for name, state in moved.states.items()}
    require_same(case, Outcome(moved.outputs, back), expected, exact=subject.exact)
    require_same(case, _run_reversed(subject.op, case), expected, exact=subject.exact)


def padding_gives_zeros(subject: Subject, case: Case) -> None:
    """L3: a sequence of slot -1 reads and writes no state, its outputs are zeros, whatever its tokens are."""
    plain = case.run(subject.op)
    for padded in [s for s, length in enumerate(case.lengths) if length]:
        outcome = _with_padding(case, padded).run(subject.op)
        inside = torch.zeros(int(case.cu_seqlens[-1]), dtype=torch.bool, device=case.slots.device)
        inside[int(case.cu_seqlens[padded]) : int(case.cu_seqlens[padded + 1])] = True
        for output in outcome.outputs:
            if not bool((output[inside] == 0).all()):
                raise LawBroken(f"{case.name}: the outputs of a padding sequence are not zeros")
        others = Outcome(tuple(o[~inside] for o in outcome.outputs), outcome.states)
        wanted = Outcome(tuple(o[~inside] for o in plain.outputs), plain.states)
        rows = case.used[case.used != case.slots[padded]]
        require_same(case, others, wanted, exact=subject.exact, rows=rows)
        left = case.slots[padded].long()
        for name, state in case.states.items():
            require_same_bits(case, f"{name} of a padding sequence", outcome.states[name][left], state[left])
    idle = replace(case, slots=torch.full_like(case.slots, -1)).run(subject.op)
    nobody, _ = case.part([0] * len(case.lengths), [0] * len(case.lengths))
    for outcome in (idle, nobody.run(subject.op)):
        if any(bool((output != 0).any()) for output in outcome.outputs):
            raise LawBroken(f"{case.name}: a call without live sequences has outputs that are not zeros")
        for name, state in case.states.items():
            require_same_bits(case, f"{name} after a call without live sequences", outcome.states[name], state)


def only_named_slots_are_touched(subject: Subject, case: Case) -> None:
    """L4: nothing is read or written beyond the named slots and the tokens: both lie amid NaN here."""
    expected = case.run(subject.op)
    surrounded = replace(case, tokens={name: _tokens_amid_nan(tensor) for name, tensor in case.tokens.items()})
    pools = {name: _Pool(state, case.used) for name, state in case.states.items()}
    before = {name: pool.memory.clone() for name, pool in pools.items()}
    outcome = surrounded.run_in_place(subject.op, {name: pool.slots for name, pool in pools.items()})
    require_same(case, outcome, expected, exact=subject.exact)
    for name, pool in pools.items():
        outside = pool.memory[pool.free]
        require_same_bits(case, f"{name} outside the named slots", outside, before[name][pool.free])


def restoring_a_snapshot_undoes_tokens(subject: Subject, case: Case) -> None:
    """L5: restoring the rows of the slots is the same as never having taken the tokens since."""
    middle = [length // 2 for length in case.lengths]
    first, _ = case.part([0] * len(middle), middle)
    second, _ = case.part(middle, case.lengths)
    states = {name: state.clone() for name, state in case.states.items()}
    first.run_in_place(subject.op, states)
    snapshot = {name: state[case.used].clone() for name, state in states.items()}
    once = Outcome(second.run_in_place(subject.op, states).outputs, {name: s.clone() for name, s in states.items()})
    for name, rows in snapshot.items():
        states[name][case.used] = rows
    require_same(case, second.run_in_place(subject.op, states), once, exact=True)


def threads_do_not_matter(subject: Subject, case: Case) -> None:
    """L6: one thread and two give the same bits. Holds for what has no threads of its own."""
    if subject.set_threads is None:
        return
    subject.set_threads(1)
    alone = case.run(subject.op)
    subject.set_threads(2)
    require_same(case, case.run(subject.op), alone, exact=True)


def reference_agrees(subject: Subject, case: Case) -> None:
    """L7: the float64 reference gives the same, from the same rounded inputs, within the tolerance of the dtype."""
    exact = case.cast(torch.float64, torch.float64).run(case.oracle)
    outcome = case.run(subject.op)
    on_cpu = Outcome(tuple(o.cpu() for o in outcome.outputs), {name: s.cpu() for name, s in outcome.states.items()})
    require_same(case, on_cpu, exact, exact=False, rows=case.used.cpu())


def fresh_slot_starts_a_text(subject: Subject, case: Case) -> None:
    """L8: the first token of a fresh slot gives the formula without a state."""
    one, _ = case.part([0] * len(case.lengths), [min(length, 1) for length in case.lengths])
    states = {name: state.clone() for name, state in case.states.items()}
    for name, row in case.fresh.items():
        states[name][one.used] = row.to(states[name].dtype)
    positions = None if one.positions is None else torch.zeros_like(one.positions)
    outcome = replace(one, positions=positions).run_in_place(subject.op, states)
    wide = one.cast(torch.float64, torch.float64)
    expected = case.first({**wide.tokens, **wide.constants})
    for i, (output, wanted) in enumerate(zip(outcome.outputs, expected, strict=True)):
        require_equal(case, f"output {i} of a first token", output.cpu(), wanted, exact=False)


Law = Callable[[Subject, Case], None]
LAWS: tuple[Law, ...] = (
    chunk_equals_steps,
    packing_equals_separate_calls,
    slots_are_interchangeable,
    padding_gives_zeros,
    only_named_slots_are_touched,
    restoring_a_snapshot_undoes_tokens,
    threads_do_not_matter,
    reference_agrees,
    fresh_slot_starts_a_text,
)


def _cut(length: int, random: Random) -> list[int]:
    return sorted({0, length, *(random.randint(0, length) for _ in range(3))})


def _run_split(op: Op, case: Case, cuts: Sequence[Sequence[int]]) -> Outcome:
    """Piece i of every sequence lies between its cuts i and i + 1."""
    pieces = max(len(points) - 1 for points in cuts)
    spans = [
        (
            [points[min(i, len(points) - 1)] for points in cuts],
            [points[min(i + 1, len(points) - 1)] for points in cuts],
        )
        for i in range(pieces)
    ]
    return _run_parts(op, case, spans)


def _only(case: Case, sequence: int) -> tuple[list[int], list[int]]:
    return [0] * len(case.lengths), [length if s == sequence else 0 for s, length in enumerate(case.lengths)]


def _run_parts(op: Op, case: Case, spans: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Outcome:
    """Calls op on one part of the tokens after another, and puts the outputs together."""
    states = {name: state.clone() for name, state in case.states.items()}
    outputs, places = [], []
    for starts, ends in spans:
        smaller, index = case.part(starts, ends)
        if index.numel():
            outputs.append(smaller.run_in_place(op, states).outputs)
            places.append(index)
    order = torch.cat(places).argsort()
    return Outcome(tuple(torch.cat(parts)[order] for parts in zip(*outputs, strict=True)), states)


def _run_reversed(op: Op, case: Case) -> Outcome:
    """One call with the sequences in the opposite order."""
    order = list(range(len(case.lengths)))[::-1]
    offsets = case.cu_seqlens.tolist()
    index = [t for s in order for t in range(offsets[s], offsets[s + 1])]
    places = torch.tensor(index, dtype=torch.long, device=case.slots.device)
    lengths = torch.tensor([0, *(case.lengths[s] for s in order)], device=case.slots.device)
    turned = replace(
        case,
        tokens={name: tensor[places] for name, tensor in case.tokens.items()},
        slots=case.slots[order],
        cu_seqlens=lengths.cumsum(0).int(),
        positions=None if case.positions is None else case.positions[order],
    ).run(op)
    return Outcome(tuple(output[places.argsort()] for output in turned.outputs), turned.states)


def _with_padding(case: Case, sequence: int) -> Case:
    """The sequence loses its slot, and its tokens become NaN; gates, which are checked, become huge."""
    slots = case.slots.clone()
    slots[sequence] = -1
    begin, end = case.cu_seqlens.tolist()[sequence : sequence + 2]
    tokens = {name: tensor.clone() for name, tensor in case.tokens.items()}
    for name, tensor in tokens.items():
        tensor[begin:end] = 1e30 if name in case.gates else torch.nan
    return replace(case, slots=slots, tokens=tokens)


def _tokens_amid_nan(tensor: Tensor) -> Tensor:
    """A view into memory that holds NaN before, behind and between the tokens."""
    shape = list(tensor.shape)
    shape[0], shape[1] = shape[0] + 2, shape[1] + 1
    memory = tensor.new_full(shape, torch.nan)
    memory[1:-1, :-1] = tensor
    return memory[1:-1, :-1]


class _Pool:
    """A state in a larger memory, the used slots amid NaN: rows before, behind, and (but for mere numbers) between."""

    def __init__(self, state: Tensor, used: Tensor) -> None:
        step = min(state.dim(), 2)
        self.memory = state.new_zeros((2 + step * len(state), *state.shape[1:]))
        self.slots = self.memory[1 : 1 + step * len(state) : step]
        self.slots.copy_(state)
        self.free = torch.ones(len(self.memory), dtype=torch.bool, device=state.device)
        self.free[1 + step * used] = False
        if state.is_floating_point():
            self.memory[self.free] = torch.nan
