"""The cells against torch.nn on copied weights, values and gradients, and sLSTM against its unstabilised definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unspool_kernels.ops.recurrent_cell import FRESH, GATES, recurrent_cell
from unspool_kernels.reference.recurrent_cell import recurrent_cell as reference

Words = Callable[[int], dict[str, Tensor]]
Normal = Callable[..., Tensor]
T, D = 11, 6
MODULES: dict[str, type[nn.RNNBase]] = {"elman": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@pytest.mark.parametrize("cell", MODULES)
def test_cell_equals_torch_in_values_and_gradients(cell: Any, one_sequence: Words, normal: Normal) -> None:
    torch.manual_seed(0)
    module = MODULES[cell](4, D).double()
    inputs, start = normal(T, 4), [normal(1, D) for _ in FRESH[cell]]
    expected, ends = module(inputs, tuple(start) if cell == "lstm" else start[0])

    gates = int(GATES[cell])
    projected = (inputs @ module.weight_ih_l0.T + module.bias_ih_l0).unflatten(-1, (1, gates, D))
    (h,), (state,) = reference(
        projected,
        module.weight_hh_l0.unflatten(0, (1, gates, D)),
        cell=cell,
        bias=module.bias_hh_l0.unflatten(0, (1, gates, D)),
        state=torch.stack(start, dim=1)[:, None],
        **one_sequence(T),
    )
    torch.testing.assert_close(h[:, 0], expected)
    torch.testing.assert_close(state[0, 0], torch.cat(ends if cell == "lstm" else [ends]))

    weights = normal(T, D)
    wanted = torch.autograd.grad((expected * weights).sum(), list(module.parameters()))
    actual = torch.autograd.grad((h[:, 0] * weights).sum(), list(module.parameters()))
    for ours, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_slstm_equals_its_unstabilised_definition(one_sequence: Words, normal: Normal) -> None:
    """c = f c + e^i tanh(z), n = f n + e^i, h = o c / n with f = sigmoid(f~), two heads of their own matrices."""
    x, weight, bias = normal(T, 2, 4, D), normal(2, 4, D, D) * 0.3, normal(2, 4, D)
    h, c, n = (torch.zeros(2, D, dtype=torch.float64) for _ in range(3))
    expected = []
    for t in range(T):
        i, f, z, o = (x[t] + torch.einsum("hgoi,hi->hgo", weight, h) + bias).unbind(1)
        c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        expected.append(h)
    state = torch.tensor(FRESH["slstm"], dtype=torch.float64)[:, None].repeat(1, 2, 1, D)
    outputs = recurrent_cell(x, weight, cell="slstm", bias=bias, state=state, **one_sequence(T))
    torch.testing.assert_close(outputs, torch.stack(expected))


def test_slstm_holds_at_extreme_gates(one_sequence: Words, normal: Normal) -> None:
    """Input gates that no exponential holds: the largest one takes all."""
    x = torch.zeros(3, 1, 4, D, dtype=torch.float32)
    x[:, 0, 2] = normal(3, D).float()
    x[:, 0, 0] = torch.tensor([500.0, 1000.0, -1000.0])[:, None]
    x[:, 0, 1] = torch.tensor([-500.0, 500.0, 500.0])[:, None]
    x[:, 0, 3] = 500.0
    state = torch.tensor(FRESH["slstm"])[:, None].repeat(1, 1, 1, D)
    outputs = recurrent_cell(
        x, torch.zeros(1, 4, D, D), cell="slstm", state=state, backend="reference", **one_sequence(3)
    )
    torch.testing.assert_close(outputs[:, 0], x[[0, 1, 1], 0, 2].tanh())
