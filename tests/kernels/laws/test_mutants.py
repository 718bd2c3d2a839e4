"""The laws notice what they are for: each mutant is an op with one flipped gate or mask, and a law that must see it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool_kernels.laws import verdicts
from unspool_kernels.laws.case import Op
from unspool_kernels.laws.catalogue import every_case
from unspool_kernels.laws.comparison import LawBroken
from unspool_kernels.laws.verdicts import LAWS, Law, Subject

CASES = {case.name: case.cast(torch.float32, torch.float32) for case in every_case()}
Mutation = Callable[[Op], Op]


def changed(**changes: Callable[[Any], Any]) -> Mutation:
    """Passes some arguments on changed."""

    def mutate(op: Op) -> Op:
        return lambda **given: op(**{**given, **{name: change(given[name]) for name, change in changes.items()}})

    return mutate


def without(name: str) -> Mutation:
    """Forgets an argument."""
    return lambda op: lambda **given: op(**{key: value for key, value in given.items() if key != name})


def last_token_changed(**changes: Callable[[Tensor], Tensor]) -> Mutation:
    """Changes arguments of the last token of a call only: wrong at the end of a chunk."""

    def change_last(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda tensor: torch.cat([tensor[:-1], change(tensor[-1:])])

    return changed(**{name: change_last(change) for name, change in changes.items()})


def closed_gates_left_open(decay: Tensor) -> Tensor:
    return decay.masked_fill(decay == -torch.inf, 0.0)


WRONG_VALUES: list[tuple[str, str, Mutation]] = [
    ("row-scalar-none-after", "one gate is open", last_token_changed(log_decay=torch.zeros_like)),
    ("row-scalar-none-after", "a closed gate stays open", changed(log_decay=closed_gates_left_open)),
    ("row-key-none-after", "the gate is off by a thousandth", changed(log_decay=lambda x: x * 1.001)),
    ("row-key-parallel-after", "the decay comes a token late", changed(log_decay=lambda x: x.roll(1, 0))),
    ("row-scalar-parallel-after", "the erase is off for one token", last_token_changed(beta=torch.zeros_like)),
    ("row-none-parallel-after", "the strength is rounded to bfloat16", changed(beta=lambda x: x.bfloat16().float())),
    ("row-key-general-after", "erase and write are swapped", changed(erase_write=lambda x: -x)),
    ("row-key-none-before", "the bonus is forgotten", without("bonus")),
    ("row-value-none-after", "one gate is open", last_token_changed(log_decay=torch.zeros_like)),
    ("row-scalar-none-after-stabilizer", "the input gate of one token", last_token_changed(log_input=lambda x: -x)),
    ("diagonal-real-varying-read-none", "the sign of a decay", last_token_changed(decay=torch.abs)),
    ("diagonal-complex-constant-read-token", "the conjugate", changed(decay=lambda x: x * torch.tensor([1.0, -1.0]))),
    ("exponential", "the bonus is forgotten", changed(bonus=torch.zeros_like)),
    ("softmax", "a masked score is seen", changed(scores=closed_gates_left_open)),
    ("ring-2-sinks-window-5", "one sink too few", changed(sinks=lambda sinks: sinks - 1)),
    ("ring-2-sinks-window-5", "sinks see the rotated query", changed(sink_q=torch.zeros_like)),
    ("ring-0-sinks-window-4", "the window starts a token late", changed(positions=lambda start: start + 1)),
    ("slstm", "a gate is saturated", changed(x=lambda x: x.clamp(max=2.0))),
    ("gru-bias", "the bias is forgotten", without("bias")),
    ("lstm", "the recurrent matrix is transposed", changed(weight=lambda w: w.transpose(-1, -2).contiguous())),
    ("conv-4-taps-bias-silu", "the taps are turned around", changed(weight=lambda w: w.flip(-1))),
    ("conv-3-taps-none", "the cursor is off by one", changed(cursor=lambda cursor: (cursor + 1) % 2)),
    ("token-shift", "a token is shifted onto itself", changed(x=lambda x: x.roll(-1, 0))),
]


@pytest.mark.parametrize(
    ("name", "mutation"), [(n, m) for n, _, m in WRONG_VALUES], ids=[f"{n}: {w}" for n, w, _ in WRONG_VALUES]
)
def test_a_wrong_value_is_noticed(name: str, mutation: Mutation) -> None:
    case = CASES[name]
    with pytest.raises(LawBroken):
        verdicts.reference_agrees(Subject(op=mutation(case.oracle)), case)


def sequences_run_together(op: Op) -> Op:
    """The last token of each sequence is taken for the first of the next."""

    def run(*, cu_seqlens: Tensor, **given: Any) -> Any:
        moved = torch.cat([cu_seqlens[:1], (cu_seqlens[1:-1] - 1).clamp(min=0), cu_seqlens[-1:]])
        return op(cu_seqlens=moved.cummax(0).values, **given)

    return run


def decays_by_chunk(op: Op) -> Op:
    """Chunks lose the decay of their first token."""

    def run(*, log_decay: Tensor, cu_seqlens: Tensor, **given: Any) -> Any:
        firsts = cu_seqlens[:-1][cu_seqlens.diff() > 1].long()
        return op(log_decay=log_decay.index_fill(0, firsts, 0.0), cu_seqlens=cu_seqlens, **given)

    return run


def slot_leaks_into_output(op: Op) -> Op:
    def run(*, slots: Tensor, **given: Any) -> Any:
        return op(slots=slots, **given) + slots.sum() + slots[:1] * 0.01

    return run


def padding_uses_a_free_slot(op: Op) -> Op:
    def run(*, slots: Tensor, state: Tensor, **given: Any) -> Any:
        free = [slot for slot in range(state.shape[0]) if slot not in slots.tolist()]
        replaced = torch.tensor([slot if slot >= 0 else free.pop() for slot in slots.tolist()], dtype=torch.int32)
        return op(slots=replaced, state=state, **given)

    return run


def clears_free_slots(op: Op) -> Op:
    def run(*, slots: Tensor, state: Tensor, **given: Any) -> Any:
        state[[slot for slot in range(state.shape[0]) if slot not in slots.tolist()]] = 0.0
        return op(slots=slots, state=state, **given)

    return run


def reads_all_slots(op: Op) -> Op:
    def run(*, state: Tensor, **given: Any) -> Any:
        return op(state=state, **given) + 0.0 * state.sum()

    return run


def remembers_calls(op: Op) -> Op:
    calls: list[int] = []

    def run(**given: Any) -> Any:
        calls.append(1)
        return op(**given) * (1.0 + 1e-7 * len(calls))

    return run


def depends_on_threads(op: Op) -> Op:
    return lambda **given: op(**given) * (1.0 + 1e-7 * torch.get_num_threads())


def takes_zero_for_fresh(op: Op) -> Op:
    def run(*, max_state: Tensor, **given: Any) -> Any:
        max_state.masked_fill_(max_state == -torch.inf, 0.0)
        return op(max_state=max_state, **given)

    return run


WRONG_HANDLING: list[tuple[Law, str, Mutation]] = [
    (verdicts.chunk_equals_steps, "row-scalar-none-after", decays_by_chunk),
    (verdicts.packing_equals_separate_calls, "row-key-parallel-after", sequences_run_together),
    (verdicts.slots_are_interchangeable, "diagonal-real-varying-read-none", slot_leaks_into_output),
    (verdicts.padding_gives_zeros, "row-none-none-after", padding_uses_a_free_slot),
    (verdicts.only_named_slots_are_touched, "row-none-none-after", clears_free_slots),
    (verdicts.only_named_slots_are_touched, "row-none-none-after", reads_all_slots),
    (verdicts.restoring_a_snapshot_undoes_tokens, "row-none-none-after", remembers_calls),
    (verdicts.threads_do_not_matter, "row-none-none-after", depends_on_threads),
    (verdicts.reference_agrees, "row-key-none-after", sequences_run_together),
    (verdicts.fresh_slot_starts_a_text, "row-scalar-none-after-normalizer-stabilizer", takes_zero_for_fresh),
]


@pytest.mark.parametrize(
    ("law", "name", "mutation"), WRONG_HANDLING, ids=[f"{law.__name__}-{m.__name__}" for law, _, m in WRONG_HANDLING]
)
def test_wrong_handling_is_noticed_by_its_law(law: Law, name: str, mutation: Mutation) -> None:
    case, threads = CASES[name], torch.get_num_threads()
    law(Subject(op=case.oracle, set_threads=torch.set_num_threads), case)
    try:
        with pytest.raises(LawBroken):
            law(Subject(op=mutation(case.oracle), set_threads=torch.set_num_threads), case)
    finally:
        torch.set_num_threads(threads)


def test_every_law_has_a_mutant() -> None:
    assert {law for law, _, _ in WRONG_HANDLING} == set(LAWS)
