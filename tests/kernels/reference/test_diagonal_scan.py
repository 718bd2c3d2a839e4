"""First-order scans and RWKV-4 against their definitions, and the coefficients that mixers feed them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unspool_kernels.ops.diagonal_scan import FRESH_EXPONENTIAL, diagonal_scan, exponential_scan
from unspool_kernels.reference.gates import rg_lru, s4d, s6

Words = Callable[[int], dict[str, Tensor]]
Normal = Callable[..., Tensor]
T, C, M = 37, 4, 3


@pytest.mark.parametrize("negative", [False, True])
def test_s6_is_the_published_recurrence(negative: bool, one_sequence: Words, normal: Normal) -> None:
    x, dt, a, b, c = normal(T, C), 3 * normal(T, C), -normal(C, M).exp(), normal(T, M), normal(T, M)
    dt[3] = 30.0  # above softplus' threshold
    h, expected = torch.zeros(C, M, dtype=torch.float64), []
    for t in range(T):
        step = torch.log1p(dt[t].exp())
        kept = (step[:, None] * a).exp()
        h = (2 * kept - 1 if negative else kept) * h + (step * x[t])[:, None] * b[t]
        expected.append(h @ c[t])
    coefficients = s6(x, dt, a, b, negative_eigenvalues=negative)
    state = torch.zeros(1, C, M, dtype=torch.float64)
    y = diagonal_scan(coefficients.x, coefficients.decay, read=c[:, None], state=state, **one_sequence(T))
    torch.testing.assert_close(y, torch.stack(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state[0], h, rtol=1e-9, atol=1e-9)


def test_rg_lru_is_the_published_recurrence(one_sequence: Words, normal: Normal) -> None:
    x, r, i, a_param = (normal(T, C) for _ in range(4))
    a_param, first = a_param[0], torch.arange(T) == 0
    h, expected = torch.zeros(C, dtype=torch.float64), []
    for t in range(T):
        a = (-8 * r[t].sigmoid() * F.softplus(a_param)).exp()
        entering = i[t].sigmoid() * x[t]
        h = entering if t == 0 else a * h + (1 - a.square()).sqrt() * entering
        expected.append(h)
    coefficients = rg_lru(x, r, i, a_param, first)
    state = normal(1, C, 1)  # what another text has left: the first token forgets it
    h = diagonal_scan(coefficients.x[..., None], coefficients.decay[..., None], state=state, **one_sequence(T))
    torch.testing.assert_close(h[..., 0], torch.stack(expected))


def test_rg_lru_keeps_its_digits_where_it_forgets_least() -> None:
    """log a near -1e-7: in float32, 1 - a^2 from a alone has no digit left."""
    gate, one, first = torch.full((1, 1), -18.0), torch.ones(1, 1), torch.zeros(1, dtype=torch.bool)
    narrow = rg_lru(one, gate, one, torch.ones(1), first).x
    wide = rg_lru(one.double(), gate.double(), one.double(), torch.ones(1).double(), first).x
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=0.0)


def test_s4d_is_the_exact_answer_to_a_held_input(one_sequence: Words, normal: Normal) -> None:
    """h' = a h + b x with x held over dt has a closed form; here it is integrated in 20,000 small steps instead."""
    a, b, c = normal(C, M, 2), normal(C, M, 2), normal(C, M, 2)
    a[..., 0] = -a[..., 0].abs() - 0.1
    dt, x = 0.05 + normal(C).sigmoid(), normal(3, C)
    pole, entering, read = map(torch.view_as_complex, (a, b, c))
    h, expected, parts = torch.zeros(C, M, dtype=torch.complex128), [], 20_000
    small = dt[:, None] / parts
    for t in range(3):
        push = entering * x[t][:, None]
        # Heun's rule on a linear equation multiplies by one number each step.
        grow, gain = 1 + small * pole + (small * pole) ** 2 / 2, small * (1 + small * pole / 2)
        h = grow**parts * h + gain * push * (1 - grow**parts) / (1 - grow)
        expected.append(2 * (read * h).sum(-1).real)
    coefficients = s4d(x, dt, a, b)
    state = torch.zeros(1, C, M, 2, dtype=torch.float64)
    y = diagonal_scan(coefficients.x, coefficients.decay, read=c, state=state, **one_sequence(3))
    torch.testing.assert_close(y, torch.stack(expected), rtol=1e-7, atol=1e-7)


def test_mega_moving_average(one_sequence: Words, normal: Normal) -> None:
    """h = q h + p beta x, y = sum gamma h / sqrt(M), as a convolution with the powers of q."""
    p, alpha, beta, gamma = normal(C, M).sigmoid(), normal(C, M).sigmoid(), normal(C, M), normal(C, M)
    q, x = 1 - p * alpha, normal(T, C)
    expected = [sum((gamma * q ** (t - j) * p * beta).sum(-1) * x[j] for j in range(t + 1)) * M**-0.5 for t in range(T)]
    state = torch.zeros(1, C, M, dtype=torch.float64)
    y = diagonal_scan(x[..., None] * p * beta, q, read=gamma * M**-0.5, state=state, **one_sequence(T))
    torch.testing.assert_close(y, torch.stack(expected))


def test_rwkv4_is_the_quotient_of_its_sums(one_sequence: Words, normal: Normal) -> None:
    """wkv_t = (sum_{j<t} e^{(t-1-j) w + k_j} v_j + e^{u+k_t} v_t) / (the same without v)."""
    k, v, w, u = normal(T, C), normal(T, C), -normal(C).exp(), normal(C)
    expected = []
    for t in range(T):
        weights = torch.stack([((t - 1 - j) * w + k[j]).exp() for j in range(t)] + [(u + k[t]).exp()])
        expected.append((weights * v[: t + 1]).sum(0) / weights.sum(0))
    state = torch.tensor(FRESH_EXPONENTIAL, dtype=torch.float64).repeat(1, C, 1)
    y = exponential_scan(k, v, decay=w, bonus=u, state=state, **one_sequence(T))
    torch.testing.assert_close(y, torch.stack(expected))


def test_rwkv4_survives_keys_beyond_the_exponential(one_sequence: Words, normal: Normal) -> None:
    k = torch.tensor([[-200.0], [200.0], [-200.0]])
    v, zero = normal(3, 1).float(), torch.zeros(1)
    state = torch.tensor(FRESH_EXPONENTIAL).repeat(1, 1, 1)
    y = exponential_scan(k, v, decay=zero - 1.0, bonus=zero, state=state, backend="reference", **one_sequence(3))
    torch.testing.assert_close(y, v[[0, 1, 1]])


def test_gradients_pass_through_both_scans(one_sequence: Words, normal: Normal) -> None:
    words, state = one_sequence(5), normal(1, 2, 3)
    x, decay = normal(5, 2, 3).requires_grad_(), normal(5, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: diagonal_scan(*given, state=state.clone(), **words), (x, decay))
    k, v, w, u = (y.requires_grad_() for y in (normal(5, 2), normal(5, 2), -normal(2).exp(), normal(2)))
    fresh = torch.tensor(FRESH_EXPONENTIAL, dtype=torch.float64).repeat(1, 2, 1)
    assert torch.autograd.gradcheck(
        lambda k, v, w, u: exponential_scan(k, v, decay=w, bonus=u, state=fresh.clone(), **words), (k, v, w, u)
    )
