"""Intervals on data whose answer is known."""

import pytest
import torch

from unspool_conversion.evaluation.bootstrap import RESAMPLES, Bootstrap, Interval, wilson


def test_the_bootstrap_of_a_mean_has_the_normal_theorys_width() -> None:
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    interval = Bootstrap(range(400)).mean(values)
    assert interval is not None
    error = float(values.std()) / 20.0
    assert interval.value == pytest.approx(float(values.mean()))
    assert interval.value - interval.low == pytest.approx(1.96 * error, rel=0.12)
    assert interval.high - interval.value == pytest.approx(1.96 * error, rel=0.12)


def test_its_interval_holds_the_truth_about_95_times_in_100() -> None:
    generator = torch.Generator().manual_seed(2)
    samples = torch.randn(200, 40, 1, generator=generator, dtype=torch.float64)
    bootstrap = Bootstrap(range(40))
    intervals = [bootstrap.mean(sample) for sample in samples]
    held = sum(interval is not None and interval.holds_zero for interval in intervals)
    assert 0.88 <= held / len(samples) <= 0.98


def test_documents_are_resampled_whole() -> None:
    """Ten copies of a sequence tell no more than one."""
    values = torch.randn(12, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    once = Bootstrap(range(12)).mean(values)
    copied = values.repeat_interleave(10, dim=0)
    documents = [number for number in range(12) for _ in range(10)]
    assert Bootstrap(documents).mean(copied) == pytest.approx(once)
    alone = Bootstrap(range(120)).mean(copied)
    assert once is not None and alone is not None
    assert alone.high - alone.low < 0.5 * (once.high - once.low)


def test_a_difference_is_paired() -> None:
    """A constant gap between two noisy rows has no noise left."""
    noise = torch.randn(8, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    interval = Bootstrap(range(8)).mean((noise + 0.25) - noise)
    assert interval == pytest.approx(Interval(0.25, 0.25, 0.25))
    assert interval is not None and not interval.holds_zero


def test_chosen_tokens_alone_count_and_none_give_no_interval() -> None:
    values = torch.arange(6.0).view(2, 3)
    bootstrap = Bootstrap(range(2))
    chosen = torch.tensor([[True, False, False], [True, False, True]])
    interval = bootstrap.mean(values, chosen)
    assert interval is not None and interval.value == pytest.approx((0.0 + 3.0 + 5.0) / 3)
    assert interval.low == 0.0 and interval.high == pytest.approx(4.0)
    assert bootstrap.mean(values, torch.zeros_like(chosen)) is None


def test_resamples_in_which_nothing_was_chosen_are_dropped() -> None:
    values = torch.ones(4, 1)
    chosen = torch.tensor([[True], [False], [False], [False]])
    assert Bootstrap(range(4)).mean(values, chosen) == Interval(1.0, 1.0, 1.0)


def test_seeds_decide_and_a_thousand_resamples_are_drawn() -> None:
    values = torch.randn(9, 2, generator=torch.Generator().manual_seed(5))
    assert Bootstrap(range(9)).mean(values) == Bootstrap(range(9)).mean(values)
    assert Bootstrap(range(9), seed=1).mean(values) != Bootstrap(range(9)).mean(values)
    assert RESAMPLES == 1000


def test_wilsons_interval_has_the_published_values() -> None:
    assert wilson(8, 10) == pytest.approx(Interval(0.8, 0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx(Interval(0.0, 0.0, 0.2775328), abs=1e-6)
    assert wilson(10, 10).high == pytest.approx(1.0) and wilson(10, 10).low == pytest.approx(1 - 0.2775328, abs=1e-6)
