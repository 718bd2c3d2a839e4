"""The integer solver agrees with trying everything, in order, and names what conflicts when nothing fits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool_kernels.tiles.expressions import Constant, Order, Variable, ceil_div, maximum, minimum
from unspool_kernels.tiles.relations import any_of, at_most, equal, multiple_of
from unspool_kernels.tiles.solver import Constraint, Infeasible, Model, Search

Values = Mapping[str, int]


@dataclass(frozen=True)
class Meaning:
    """An expression or relation next to the plain Python that it must agree with."""

    solver: Any
    python: Callable[[Values], int | bool]


def domains() -> st.SearchStrategy[range | tuple[int, ...]]:
    intervals = st.builds(
        lambda first, count, step: range(first, first + count * step, step),
        st.integers(1, 9),
        st.integers(1, 12),
        st.integers(1, 3),
    )
    sets = st.sets(st.integers(1, 40), min_size=1, max_size=7).map(lambda values: tuple(sorted(values)))
    return st.one_of(intervals, sets)


def expressions(names: list[str]) -> st.SearchStrategy[Meaning]:
    leaves = st.one_of(
        st.integers(1, 30).map(lambda n: Meaning(Constant(n), lambda _: n)),
        # Only the name of a variable matters inside an expression.
        st.sampled_from(names).map(lambda name: Meaning(Variable(name, (1,), Order.SMALLEST), lambda v: v[name])),
    )

    def combine(children: st.SearchStrategy[Meaning]) -> st.SearchStrategy[Meaning]:
        return st.one_of(
            st.builds(
                lambda a, b: Meaning(a.solver + b.solver, lambda v: a.python(v) + b.python(v)), children, children
            ),
            st.builds(
                lambda a, b: Meaning(a.solver * b.solver, lambda v: a.python(v) * b.python(v)), children, children
            ),
            st.builds(
                lambda a, b: Meaning(ceil_div(a.solver, b.solver), lambda v: -(-a.python(v) // b.python(v))),
                children,
                children,
            ),
            st.builds(
                lambda a, b: Meaning(minimum(a.solver, b.solver), lambda v: min(a.python(v), b.python(v))),
                children,
                children,
            ),
            st.builds(
                lambda a, b: Meaning(maximum(a.solver, b.solver), lambda v: max(a.python(v), b.python(v))),
                children,
                children,
            ),
        )

    return st.recursive(leaves, combine, max_leaves=4)


def relations(names: list[str]) -> st.SearchStrategy[Meaning]:
    sides = expressions(names)
    plain = st.one_of(
        st.builds(
            lambda a, b: Meaning(at_most(a.solver, b.solver), lambda v: a.python(v) <= b.python(v)), sides, sides
        ),
        st.builds(lambda a, b: Meaning(equal(a.solver, b.solver), lambda v: a.python(v) == b.python(v)), sides, sides),
        st.builds(
            lambda a, b: Meaning(multiple_of(a.solver, b.solver), lambda v: a.python(v) % b.python(v) == 0),
            sides,
            sides,
        ),
    )
    either = st.builds(
        lambda a, b: Meaning(any_of(a.solver, b.solver), lambda v: a.python(v) or b.python(v)), plain, plain
    )
    return st.one_of(plain, either)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Model, list[Callable[[Values], int | bool]]]:
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    variables = tuple(Variable(name, draw(domains()), draw(st.sampled_from(Order))) for name in names)
    meanings = draw(st.lists(relations(names), max_size=4))
    constraints = tuple(Constraint(f"rule {i}", meaning.solver) for i, meaning in enumerate(meanings))
    return Model(variables, constraints), [meaning.python for meaning in meanings]


def try_everything(model: Model, predicates: list[Callable[[Values], int | bool]]) -> list[Values]:
    ordered = [reversed(v.domain) if v.first is Order.LARGEST else v.domain for v in model.variables]
    choices = (dict(zip((v.name for v in model.variables), values, strict=True)) for values in product(*ordered))
    return [choice for choice in choices if all(predicate(choice) for predicate in predicates)]


@settings(max_examples=200, deadline=None)
@given(problems())
def test_the_search_finds_what_trying_everything_finds_in_the_same_order(
    problem: tuple[Model, list[Callable[[Values], int | bool]]],
) -> None:
    model, predicates = problem
    assert list(Search(model).solutions()) == try_everything(model, predicates)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_an_infeasible_model_names_a_smallest_conflict(
    problem: tuple[Model, list[Callable[[Values], int | bool]]],
) -> None:
    model, predicates = problem
    if try_everything(model, predicates):
        return
    names = Infeasible("some kernel", model).constraints
    core = [(c, p) for c, p in zip(model.constraints, predicates, strict=True) if c.name in names]
    assert core
    assert not try_everything(model, [predicate for _, predicate in core])
    for left_out in names:
        assert try_everything(model, [predicate for constraint, predicate in core if constraint.name != left_out])


def test_the_message_tells_subject_constraint_values_and_limit() -> None:
    size = Variable("size", (8, 16), Order.LARGEST)
    harmless = Constraint("at least one", at_most(1, size))
    memory = Constraint("memory", at_most(size * 4, 31))
    error = Infeasible("some kernel", Model((size,), (harmless, memory)))
    assert error.constraints == ("memory",)
    assert "some kernel: no choice satisfies [memory: 32..64 <= 31 (size * 4 <= 31)]" in str(error)


def test_bounds_leave_few_values_of_large_intervals_to_try() -> None:
    width = Variable("width", range(1, 1_000_001), Order.LARGEST)
    height = Variable("height", range(1, 1_000_001), Order.LARGEST)
    area = Constraint("area", at_most(width * height, 123_456))
    wide = Constraint("wide", at_most(1_000 * height, width))
    search = Search(Model((height, width), (area, wide)))
    assert next(search.solutions()) == {"height": 11, "width": 11_223}
    assert search.nodes == 123 - 11 + 1 + 1  # the width follows from the first height that fits


def test_each_value_tried_is_counted() -> None:
    size = Variable("size", range(1, 8), Order.LARGEST)
    search = Search(Model((size,), (Constraint("third", multiple_of(size, 3)),)))
    assert [solution["size"] for solution in search.solutions()] == [6, 3]
    assert search.nodes == 4  # 6, 5, 4, 3: the ends that are no multiples never come up


@pytest.mark.parametrize("domain", [(), range(0), (-1, 2), (3, 3), (4, 2), range(5, 1, -1)])
def test_a_domain_that_is_empty_negative_or_unordered_is_refused(domain: range | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="domain of size"):
        Variable("size", domain, Order.LARGEST)


def test_a_negative_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        at_most(-1, 2)


def test_names_that_clash_or_are_unknown_are_refused() -> None:
    size = Variable("size", (1, 2), Order.LARGEST)
    model = Model((size,), (Constraint("limit", at_most(size, 1)),))
    with pytest.raises(ValueError, match="two variables"):
        replace(model, variables=(size, size))
    with pytest.raises(ValueError, match="two constraints"):
        replace(model, constraints=model.constraints * 2)
    with pytest.raises(ValueError, match=r"limit: uses \['size'\]"):
        replace(model, variables=())
