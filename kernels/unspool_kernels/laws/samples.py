"""Random inputs in float64 for cases: sizes, packings, gates with their extremes."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """lengths: the tokens of each sequence. The other names are the ops' own sizes."""

    lengths: tuple[int, ...] = (3, 0, 1, 18)
    heads: int = 2
    group: int = 2
    features: int = 5
    channels: int = 7

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def pool(self) -> int:
        return len(self.lengths) + 2


class Samples:
    """Draws the tensors of one case; the same name and sizes give the same ones."""

    def __init__(self, name: str, sizes: Sizes) -> None:
        self.generator = torch.Generator().manual_seed(prod(map(ord, name)) % 2**31 + sizes.tokens)
        self.slots = torch.randperm(sizes.pool, generator=self.generator)[: len(sizes.lengths)].int()
        self.cu_seqlens = torch.tensor([0, *sizes.lengths]).cumsum(0).int()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, dtype=torch.int32)

    def unit(self, *shape: int) -> Tensor:
        """Vectors of length 1 along the last axis."""
        vectors = self.normal(*shape)
        return vectors / vectors.square().sum(-1, keepdim=True).sqrt()

    def log_decay(self, *shape: int) -> Tensor:
        """Log-decays of the first axis' tokens, some fully open (0), the fourth fully closed (-inf)."""
        decay = -self.normal(*shape).square() * (self.uniform(*shape) > 0.2)
        decay[3:4] = -torch.inf
        return decay

    def strength(self, *shape: int) -> Tensor:
        """Delta-rule strengths in (0, 2), with 0, 1 and 2 among them."""
        strength = 2.0 * self.uniform(*shape)
        for token, extreme in enumerate((0.0, 1.0, 2.0)):
            strength[token : token + 1] = extreme
        return strength
