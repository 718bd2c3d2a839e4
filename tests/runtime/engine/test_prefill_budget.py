"""Prompt tokens beside decode steps, from simulated costs."""

import pytest

from unspool.engine.prefill_budget import SMALLEST, PrefillBudget


def settle(budget: PrefillBudget, step: float, token: float) -> int:
    """The budget after many steps on a machine with these costs."""
    for _ in range(100):
        budget.observe(4, 0, step)
        read = budget.tokens(4)
        budget.observe(4, read, step + token * read)
    return budget.tokens(4)


@pytest.mark.parametrize(("step", "token"), [(0.01, 0.001), (0.03, 0.002), (0.0, 0.0005)])
def test_a_step_with_its_prompt_tokens_takes_about_the_interval(step: float, token: float) -> None:
    read = settle(PrefillBudget(512, 0.1), step, token)
    assert 0.9 * 0.1 - 8 * token <= step + token * read <= 1.1 * 0.1


def test_prompts_get_on_however_slow_the_machine_is() -> None:
    assert settle(PrefillBudget(512, 0.1), 1.0, 0.1) == SMALLEST


def test_a_fast_machine_reads_whole_chunks() -> None:
    assert settle(PrefillBudget(256, 0.1), 0.001, 0.00001) == 256


def test_nobody_who_decodes_is_no_reason_to_hold_back() -> None:
    budget = PrefillBudget(256, 0.1)
    settle(budget, 1.0, 0.1)
    assert budget.tokens(0) == 256


def test_it_follows_a_machine_that_changes() -> None:
    budget = PrefillBudget(512, 0.1)
    assert settle(budget, 0.01, 0.01) < 24
    assert settle(budget, 0.01, 0.0005) > 150
