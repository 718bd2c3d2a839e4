"""The monoids are monoids, their tree is their sequence, and their scan is the op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool_kernels.laws.rows import NAMED, row_case
from unspool_kernels.laws.samples import Sizes
from unspool_kernels.laws.scans import scan_cases
from unspool_kernels.reference.scan import (
    Affine,
    Diagonal,
    Element,
    Exponential,
    LogMax,
    MlstmStabilised,
    Monoid,
    scan,
)

MONOIDS: list[Monoid] = [Diagonal(), Affine(), LogMax(), MlstmStabilised(), Exponential()]


def elements(monoid: Monoid, count: int, seed: int) -> Element:
    """Of small vectors, with logs from far below to far above zero, some of them -inf."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator, dtype=torch.float64)

    log = (40 * normal(2)).masked_fill(normal(2) > 1, -torch.inf)
    if isinstance(monoid, Diagonal):
        return normal(2, 3), normal(2, 3)
    if isinstance(monoid, Affine):
        return normal(2, 3, 3), normal(2, 4, 3)
    some = log > -torch.inf  # what is scaled by e^inf is nothing
    if isinstance(monoid, LogMax):
        return log, normal(2).abs() * some, normal(2, 3) * some[..., None]
    if isinstance(monoid, MlstmStabilised):
        return -normal(2).abs(), log, normal(2, 4, 3) * some[..., None, None]
    return -normal(2).abs(), log, normal(2) * some, normal(2).abs() * some


def close(actual: Element, expected: Element) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


any_monoid = pytest.mark.parametrize("monoid", MONOIDS, ids=lambda monoid: type(monoid).__name__)


@any_monoid
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_combine_is_associative(monoid: Monoid, seed: int) -> None:
    first, second, third = (elements(monoid, 1, seed + i) for i in range(3))
    left = monoid.combine(monoid.combine(first, second), third)
    close(monoid.combine(first, monoid.combine(second, third)), left)


@any_monoid
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_identity_is_neutral_on_both_sides(monoid: Monoid, seed: int) -> None:
    element = elements(monoid, 3, seed)
    close(monoid.combine(monoid.identity(element), element), element)
    close(monoid.combine(element, monoid.identity(element)), element)


@any_monoid
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(0, 35))
def test_tree_equals_sequence(monoid: Monoid, seed: int, count: int) -> None:
    series = elements(monoid, count, seed)
    close(scan(monoid, series, "tree"), scan(monoid, series, "sequential"))


def test_no_token_leaves_no_nan() -> None:
    """Two empty prefixes together are empty: no -inf minus -inf."""
    for monoid in (LogMax(), MlstmStabilised(), Exponential()):
        nothing = monoid.identity(elements(monoid, 1, 0))
        close(monoid.combine(nothing, nothing), nothing)


def test_the_affine_scan_is_the_row_kernel() -> None:
    """M = diag(a) + p b^T and N = v k^T, for a mixer that erases."""
    case = row_case("rwkv7", NAMED["rwkv7"], Sizes(lengths=(21,), group=1))
    tokens = case.tokens
    m = torch.diag_embed(tokens["log_decay"].exp())
    m = m + tokens["erase_read"][..., :, None] * tokens["erase_write"][..., None, :]
    n = tokens["v"][..., :, None] * tokens["k"][..., None, :]
    total, states = scan(Affine(), (m, n))
    states = states + case.states["state"][int(case.slots)] @ total
    output = (states @ tokens["q"][:, :, 0, :, None])[..., 0]
    outcome = case.run(case.oracle)
    torch.testing.assert_close(outcome.outputs[0][:, :, 0], output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outcome.states["state"][int(case.slots)], states[-1], rtol=1e-9, atol=1e-9)


def test_the_mlstm_scan_is_the_row_kernel() -> None:
    case = row_case("mlstm", NAMED["mlstm"], Sizes(lengths=(21,), group=1))
    tokens, slot = case.tokens, int(case.slots)
    v = torch.cat([tokens["v"], torch.ones_like(tokens["v"][..., :1])], dim=-1)
    series = (tokens["log_decay"], tokens["log_input"], v[..., :, None] * tokens["k"][..., None, :])
    start = (
        torch.zeros(1, 2, dtype=torch.float64),
        case.states["max_state"][slot][None],
        case.states["state"][slot][None],
    )
    _, m, states = scan(MlstmStabilised(), tuple(torch.cat(parts) for parts in zip(start, series, strict=True)))
    outcome = case.run(case.oracle)
    torch.testing.assert_close(outcome.outputs[1], m[1:])
    rows = (states[1:] @ tokens["q"][:, :, 0, :, None])[..., 0]
    torch.testing.assert_close(outcome.outputs[0][:, :, 0], rows, rtol=1e-9, atol=1e-9)


def test_the_sequential_scan_is_the_diagonal_op() -> None:
    case = next(c for c in scan_cases(Sizes(lengths=(21,))) if c.name == "diagonal-real-varying-read-none")
    a, h = scan(Diagonal(), (case.tokens["decay"], case.tokens["x"]), "sequential")
    outcome = case.run(case.oracle)
    torch.testing.assert_close(outcome.outputs[0], h + a * case.states["state"][int(case.slots)])


def test_the_sequential_scan_is_the_softmax_op() -> None:
    case = next(c for c in scan_cases(Sizes(lengths=(21,))) if c.name == "softmax")
    row = case.states["state"][int(case.slots)][None]
    series = (case.tokens["scores"], torch.ones_like(case.tokens["scores"]), case.tokens["v"])
    joined = (torch.cat(p) for p in zip((row[..., 0], row[..., 1], row[..., 2:]), series, strict=True))
    m, u, w = (part[1:] for part in scan(LogMax(), tuple(joined), "sequential"))
    output, log_mass = case.run(case.oracle).outputs
    torch.testing.assert_close(output, w / u[..., None])
    torch.testing.assert_close(log_mass, m + u.log())
