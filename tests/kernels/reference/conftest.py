from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Words = Callable[[int], dict[str, Tensor]]
Normal = Callable[..., Tensor]


@pytest.fixture
def one_sequence() -> Words:
    """slots and cu_seqlens of one sequence of n tokens in slot 0."""
    return lambda n: {
        "slots": torch.zeros(1, dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, n], dtype=torch.int32),
    }


@pytest.fixture
def normal() -> Normal:
    """Draws float64 tensors, the same ones in every run."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
