"""The row kernel's block form against its definition, token by token in float64, for every descriptor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool_kernels.contract import RowKernel
from unspool_kernels.laws.rows import every_kernel, row_case
from unspool_kernels.laws.samples import Sizes
from unspool_kernels.ops.row_state import row_state
from unspool_kernels.reference import gated_state
from unspool_kernels.reference.row_state import row_state as reference

Words = Callable[[int], dict[str, Tensor]]
Normal = Callable[..., Tensor]


def definition(given: dict[str, Any], state: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sequence, one head: o [T, G, R], m [T], the state and m after the last token, as the contract writes them."""
    kernel: RowKernel = given["kernel"]
    outputs, maxima = [], []
    for t in range(len(given["k"])):
        q, k, v = given["q"][t], given["k"][t], given["v"][t]
        if kernel.normalizer:
            v = torch.cat([v, torch.ones(1, dtype=v.dtype)])
        a = torch.ones_like(k)
        if kernel.gate != "none":
            log_decay = given["log_decay"] if kernel.gate == "constant" else given["log_decay"][t]
            a = log_decay.exp() if kernel.gate == "value" else log_decay.exp().expand_as(k)
        old, enter = state, 1.0
        if kernel.stabilizer:
            new_m = torch.maximum(given["log_decay"][t] + m, given["log_input"][t])
            a, enter, m = (
                (given["log_decay"][t] + m - new_m).exp().expand_as(k),
                (given["log_input"][t] - new_m).exp(),
                new_m,
            )
        if kernel.gate == "value":
            state = torch.diag(a) @ state + torch.outer(v, k)
        elif kernel.erase == "none":
            state = state @ torch.diag(a) + enter * torch.outer(v, k)
        elif kernel.erase == "parallel":
            decayed = state @ torch.diag(a)
            state = decayed + given["beta"][t] * torch.outer(v - decayed @ k, k)
        else:
            p, b = given["erase_read"][t], given["erase_write"][t]
            state = state @ (torch.diag(a) + torch.outer(p, b)) + torch.outer(v, k)
        output = q @ (state if kernel.read == "after" else old).T
        if given.get("bonus") is not None:
            output = output + (q @ (given["bonus"] * k))[:, None] * v
        outputs.append(output)
        maxima.append(m)
    return torch.stack(outputs), torch.stack(maxima), state, m


def of_head(given: dict[str, Any], h: int) -> dict[str, Any]:
    """The arguments of one head: everything has its heads second, what is constant has them first."""
    first = ("bonus", *(["log_decay"] if given["kernel"].gate == "constant" else []))
    return {
        name: value if not isinstance(value, Tensor) else value[h] if name in first else value[:, h]
        for name, value in given.items()
    }


@pytest.mark.parametrize("name", every_kernel())
def test_every_descriptor_follows_its_definition(name: str) -> None:
    """70 tokens: two blocks of a scalar gate, five of a vector gate; closed and open gates, strengths of 0, 1 and 2."""
    case = row_case(name, every_kernel()[name], Sizes(lengths=(70,)))
    outcome = case.run(case.oracle)
    slot = int(case.slots[0])
    m = case.states.get("max_state", torch.zeros(case.states["state"].shape[:2], dtype=torch.float64))
    for h in range(2):
        given = of_head({**case.tokens, **case.constants}, h)
        o, maxima, state, last = definition(given, case.states["state"][slot, h], m[slot, h])
        torch.testing.assert_close(outcome.outputs[0][:, h], o, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(outcome.states["state"][slot, h], state, rtol=1e-10, atol=1e-10)
        if "max_state" in outcome.states:
            torch.testing.assert_close(outcome.outputs[1][:, h], maxima)
            torch.testing.assert_close(outcome.states["max_state"][slot, h], last)


@pytest.mark.parametrize("gate", ["scalar", "key"])
def test_equals_the_gated_state_of_the_decoder(gate: Any, one_sequence: Words, normal: Normal) -> None:
    q, k, v, state = normal(1, 70, 2, 3, 5), normal(1, 70, 2, 5), normal(1, 70, 2, 4), normal(1, 2, 4, 5)
    log_decay = -normal(1, 70, 2, 1 if gate == "scalar" else 5).abs()
    expected, expected_state = gated_state.chunk(q, k, v, log_decay, state)
    gates = log_decay[0, ..., 0] if gate == "scalar" else log_decay[0]
    o = row_state(q[0], k[0], v[0], kernel=RowKernel(gate=gate), state=state, log_decay=gates, **one_sequence(70))
    torch.testing.assert_close(o, expected[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, expected_state, rtol=1e-11, atol=1e-11)


def test_mlstm_starts_from_nothing_and_survives_closed_gates(one_sequence: Words, normal: Normal) -> None:
    """With m = -inf and the first input gate closed there is nothing to divide by, and still no NaN."""
    q, k, v = normal(3, 1, 1, 4), normal(3, 1, 4), normal(3, 1, 2)
    state, m = torch.zeros(1, 1, 3, 4, dtype=torch.float64), torch.full((1, 1), -torch.inf, dtype=torch.float64)
    log_input = torch.tensor([[-torch.inf], [50.0], [-50.0]], dtype=torch.float64)
    o, maxima = row_state(
        q,
        k,
        v,
        kernel=RowKernel(gate="scalar", normalizer=True, stabilizer=True),
        state=state,
        max_state=m,
        log_decay=torch.tensor([[-torch.inf], [0.0], [-1.0]], dtype=torch.float64),
        log_input=log_input,
        **one_sequence(3),
    )
    assert bool((o[0] == 0).all()) and maxima[:, 0].tolist() == [-torch.inf, 50.0, 49.0]
    torch.testing.assert_close(o[1, 0, 0, :2], v[1, 0] * (k[1, 0] @ q[1, 0, 0]))
    assert bool(o.isfinite().all()) and bool(state.isfinite().all())


@pytest.mark.parametrize(
    "name", ["row-key-general-before", "row-scalar-parallel-after-normalizer", "row-value-none-before"]
)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    check_gradients(name)


def test_gradients_pass_through_the_stabilizer() -> None:
    check_gradients("row-scalar-none-after-normalizer-stabilizer")


def check_gradients(name: str) -> None:
    case = row_case(name, every_kernel()[name], Sizes(lengths=(18,), heads=1))
    rows = {name: state[case.slots.long()] for name, state in case.states.items()}
    given = {**case.tokens, **case.constants, **rows}
    leaves = {name: value.clone().requires_grad_() for name, value in given.items() if isinstance(value, Tensor)}
    words = {"slots": torch.zeros(1, dtype=torch.int32), "cu_seqlens": case.cu_seqlens}
    (o, *m), (end, *_) = reference(**{**given, **leaves}, **words)
    head = of_head({name: leaf for name, leaf in {**given, **leaves}.items() if name not in ("state", "max_state")}, 0)
    start = leaves.get("max_state", torch.zeros(1, 1, dtype=torch.float64))[0, 0]
    wanted_o, wanted_m, wanted_end, _ = definition(head, leaves["state"][0, 0], start)
    weights = torch.linspace(-1, 1, o.numel(), dtype=torch.float64)
    actual = (o.flatten() * weights).sum() + end.square().sum() + sum((x.sum() for x in m), torch.zeros(()))
    wanted = (wanted_o.flatten() * weights).sum() + wanted_end.square().sum() + (wanted_m.sum() if m else 0.0)
    pairs = zip(
        torch.autograd.grad(actual, list(leaves.values())),
        torch.autograd.grad(wanted, list(leaves.values())),
        strict=True,
    )
    for name, (gradient, expected) in zip(leaves, pairs, strict=True):
        # The definition's exp(-inf) has gradient 0 times inf at a closed gate, the block form a plain 0.
        torch.testing.assert_close(gradient, expected.nan_to_num(0.0), rtol=1e-9, atol=1e-9, msg=name)
