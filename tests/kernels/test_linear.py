"""A row of a product has the same bits however many rows come with it, at any thread count."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from unspool_kernels.reference.linear import linear

SIZES = [(576, 576), (576, 192), (1536, 576), (33, 17), (24, 48)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_a_row_has_the_same_bits_in_any_batch(inputs: int, outputs: int, dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    x = torch.randn(40, inputs, generator=generator).to(dtype)
    expected = linear(x, weight)
    for rows in range(1, 40):
        assert torch.equal(linear(x[:rows], weight), expected[:rows]), rows
        assert torch.equal(linear(x[-rows:], weight), expected[-rows:]), rows


def test_the_product_and_its_gradients_are_those_of_torch() -> None:
    x = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.autograd.gradcheck(linear, (x, weight, bias))
