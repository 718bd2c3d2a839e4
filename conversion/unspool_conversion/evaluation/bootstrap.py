"""Intervals: the percentile bootstrap over documents (Efron 1979), and Wilson's for a share of independent trials."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 1000
CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959963984540054
"""Of CONFIDENCE, two-sided."""


class Interval(NamedTuple):
    """An estimate and the ends of its CONFIDENCE interval."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


class Bootstrap:
    """Resamples whole documents, so that what tokens of one document share widens the interval as it should.

    Every quantity is measured on the same resamples: the interval of a difference is a paired one.
    """

    def __init__(self, documents: Sequence[int], *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        """`documents` says which document each sequence belongs to."""
        _, self._unit = torch.tensor(documents).unique(return_inverse=True)
        self.num_units = int(self._unit.max()) + 1
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(self.num_units, (resamples, self.num_units), generator=generator)
        ones = torch.ones(drawn.shape, dtype=torch.float64)
        self._times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, ones)

    def ratio(self, numerators: Tensor, denominators: Tensor) -> Interval | None:
        """Of two sums over sequences, given what each sequence [S] adds: a mean a token, or a share.

        None where the denominators add up to nothing.
        """
        above, below = self._by_unit(numerators), self._by_unit(denominators)
        if float(below.sum()) == 0.0:
            return None
        divisor = self._times @ below
        values = (self._times @ above)[divisor != 0.0] / divisor[divisor != 0.0]
        tail = (1.0 - CONFIDENCE) / 2.0
        low, high = values.quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
        return Interval(float(above.sum() / below.sum()), low, high)

    def mean(self, values: Tensor, chosen: Tensor | None = None) -> Interval | None:
        """Of values [S, T], or of those where `chosen` [S, T] is set. None where there are none."""
        where = torch.ones_like(values, dtype=torch.bool) if chosen is None else chosen
        return self.ratio((values.double() * where).sum(1), where.double().sum(1))

    def _by_unit(self, values: Tensor) -> Tensor:
        return torch.zeros(self.num_units, dtype=torch.float64).index_add_(0, self._unit, values.double().cpu())


def wilson(successes: int, trials: int) -> Interval:
    """The interval of a share of independent trials (Wilson 1927), which is right at 0 and 1 too."""
    share, z = successes / trials, NORMAL_QUANTILE
    spread = z * math.sqrt(share * (1.0 - share) / trials + (z / (2.0 * trials)) ** 2)
    centre, scale = share + z * z / (2.0 * trials), 1.0 + z * z / trials
    return Interval(share, max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0))
