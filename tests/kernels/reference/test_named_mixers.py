"""Each published mixer, written as its paper writes it, is the row kernel with one descriptor."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unspool_kernels.contract import RowKernel
from unspool_kernels.laws.rows import NAMED
from unspool_kernels.ops.row_state import row_state

Words = Callable[[int], dict[str, Tensor]]
Normal = Callable[..., Tensor]
Run = Callable[..., Tensor]

T, K, V = 40, 6, 5


@pytest.fixture
def run(one_sequence: Words) -> Run:
    """The row kernel on one sequence of one head from an empty state: o [T, R]."""

    def call(kernel: RowKernel, q: Tensor, k: Tensor, v: Tensor, **options: Tensor) -> Tensor:
        state = torch.zeros(1, 1, v.shape[-1] + kernel.normalizer, k.shape[-1], dtype=torch.float64)
        tokens = {name: option[:, None] for name, option in options.items() if name != "bonus"}
        bonus = {"bonus": options["bonus"][None]} if "bonus" in options else {}
        words = one_sequence(len(q))
        return row_state(
            q[:, None, None], k[:, None], v[:, None], kernel=kernel, state=state, **tokens, **bonus, **words
        )[:, 0, 0]

    return call


def close(actual: Tensor, expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_linear_attention_with_its_normaliser(run: Run, normal: Normal) -> None:
    q, k, v = F.elu(normal(T, K)) + 1, F.elu(normal(T, K)) + 1, normal(T, V)
    expected = [
        sum((q[t] @ k[j]) * v[j] for j in range(t + 1)) / sum(q[t] @ k[j] for j in range(t + 1)) for t in range(T)
    ]
    rows = run(NAMED["linear"], q, k, v)
    close(rows[:, :-1] / rows[:, -1:], expected)


def test_based_polynomial_features(run: Run, normal: Normal) -> None:
    """1 + z + z^2 / 2 with z = q . k / sqrt(d), as features 1, x and all products."""

    def features(x: Tensor) -> Tensor:
        x = x * K**-0.25
        products = (x[:, :, None] * x[:, None]).flatten(1) / math.sqrt(2)
        return torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x, products], dim=-1)

    q, k, v = normal(T, K), normal(T, K), normal(T, V)
    z = (q @ k.T / math.sqrt(K)).tril()
    weights = (1 + z + z.square() / 2).tril()
    rows = run(NAMED["linear"], features(q), features(k), v)
    torch.testing.assert_close(rows[:, :-1] / rows[:, -1:], weights @ v / weights.sum(-1, keepdim=True))


def test_retnet(normal: Normal, one_sequence: Words) -> None:
    """Retention as a sum over gamma^(t - j), two heads of their own gamma."""
    q, k, v = normal(T, 2, K), normal(T, 2, K), normal(T, 2, V)
    gamma = 1 - torch.tensor([2.0**-5, 2.0**-6], dtype=torch.float64)
    state = torch.zeros(1, 2, V, K, dtype=torch.float64)
    o = row_state(q[:, :, None], k, v, kernel=NAMED["retnet"], state=state, log_decay=gamma.log(), **one_sequence(T))[
        :, :, 0
    ]
    for h in range(2):
        expected = [sum(gamma[h] ** (t - j) * (q[t, h] @ k[j, h]) * v[j, h] for j in range(t + 1)) for t in range(T)]
        close(o[:, h], expected)


def test_gla(run: Run, normal: Normal) -> None:
    q, k, v, alpha = normal(T, K), normal(T, K), normal(T, V), normal(T, K).sigmoid() ** (1 / 16)
    s, expected = torch.zeros(K, V, dtype=torch.float64), []
    for t in range(T):
        s = alpha[t][:, None] * s + torch.outer(k[t], v[t])
        expected.append(q[t] @ s * K**-0.5)
    close(run(NAMED["gla"], q * K**-0.5, k, v, log_decay=alpha.log()), expected)


def test_hgrn2(run: Run, normal: Normal) -> None:
    """The forget gate ties the key: k = 1 - f."""
    q, v, f = normal(T, K), normal(T, V), 0.3 + 0.7 * normal(T, K).sigmoid()
    h, expected = torch.zeros(K, V, dtype=torch.float64), []
    for t in range(T):
        h = f[t][:, None] * h + torch.outer(1 - f[t], v[t])
        expected.append(q[t] @ h)
    close(run(NAMED["gla"], q, 1 - f, v, log_decay=f.log()), expected)


def test_ssd(run: Run, normal: Normal) -> None:
    """Mamba-2: a scalar gate exp(A dt), keys B, queries C, values dt x."""
    c, b, x, dt, a = normal(T, K), normal(T, K), normal(T, V), F.softplus(normal(T)), torch.tensor(-1.3).double()
    h, expected = torch.zeros(V, K, dtype=torch.float64), []
    for t in range(T):
        h = (a * dt[t]).exp() * h + torch.outer(dt[t] * x[t], b[t])
        expected.append(h @ c[t])
    close(run(NAMED["ssd"], c, b, dt[:, None] * x, log_decay=a * dt), expected)


def test_mamba3_with_a_delayed_write(run: Run, normal: Normal) -> None:
    """The trapezoid S = alpha S + beta v' k'^T + gamma v k^T writes two tokens; delayed by one token it writes one."""
    q, k, v, dt = normal(T, K), normal(T, K), normal(T, V), F.softplus(normal(T))
    alpha, share = (-dt).exp(), normal(T).sigmoid()
    beta, gamma = (1 - share) * dt * alpha, share * dt
    s, expected = torch.zeros(V, K, dtype=torch.float64), []
    previous = torch.zeros(V, K, dtype=torch.float64)
    for t in range(T):
        written = torch.outer(v[t], k[t])
        s = alpha[t] * s + beta[t] * previous + gamma[t] * written
        previous = written
        expected.append(s @ q[t])
    delayed_k, delayed_v = (torch.cat([torch.zeros_like(x[:1]), x[:-1]]) for x in (k, v))
    delayed_gamma = torch.cat([torch.zeros_like(gamma[:1]), gamma[:-1]])
    rows = run(NAMED["ssd"], q, delayed_k, (alpha * delayed_gamma + beta)[:, None] * delayed_v, log_decay=alpha.log())
    close(rows + (gamma * (k * q).sum(-1))[:, None] * v, expected)


def test_mlstm(one_sequence: Words, normal: Normal) -> None:
    """Without a stabiliser, in gates small enough to exponentiate: C, n, and the bound max(|n . q|, 1)."""
    q, k, v, i, f = normal(T, K), normal(T, K) * K**-0.5, normal(T, V), normal(T), F.logsigmoid(normal(T))
    c, n, expected = torch.zeros(V, K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64), []
    for t in range(T):
        c = f[t].exp() * c + i[t].exp() * torch.outer(v[t], k[t])
        n = f[t].exp() * n + i[t].exp() * k[t]
        expected.append(c @ q[t] / (n @ q[t]).abs().clamp(min=1.0))
    rows, m = row_state(
        q[:, None, None],
        k[:, None],
        v[:, None],
        kernel=NAMED["mlstm"],
        state=torch.zeros(1, 1, V + 1, K, dtype=torch.float64),
        max_state=torch.full((1, 1), -torch.inf, dtype=torch.float64),
        log_decay=f[:, None],
        log_input=i[:, None],
        **one_sequence(T),
    )
    bound = torch.maximum(rows[:, 0, 0, -1:].abs(), (-m).exp())
    close(rows[:, 0, 0, :-1] / bound, expected)


def test_rwkv6(run: Run, normal: Normal) -> None:
    r, k, v, w, u = normal(T, K), normal(T, K), normal(T, V), (-normal(T, K).exp()).exp(), normal(K)
    s, expected = torch.zeros(K, V, dtype=torch.float64), []
    for t in range(T):
        kv = torch.outer(k[t], v[t])
        expected.append(r[t] @ (s + u[:, None] * kv))
        s = w[t][:, None] * s + kv
    close(run(NAMED["rwkv6"], r, k, v, log_decay=w.log(), bonus=u), expected)


def test_deltanet(run: Run, normal: Normal) -> None:
    """Strengths in (0, 2): an eigenvalue 1 - beta may be negative."""
    q, k, v, beta = normal(T, K), F.normalize(normal(T, K), dim=-1), normal(T, V), 2 * normal(T).sigmoid()
    s, expected = torch.zeros(V, K, dtype=torch.float64), []
    for t in range(T):
        s = s @ (torch.eye(K) - beta[t] * torch.outer(k[t], k[t])) + beta[t] * torch.outer(v[t], k[t])
        expected.append(s @ q[t])
    close(run(NAMED["deltanet"], q, k, v, beta=beta), expected)


def test_gated_deltanet(run: Run, normal: Normal) -> None:
    q, k, v = normal(T, K), F.normalize(normal(T, K), dim=-1), normal(T, V)
    beta, alpha = normal(T).sigmoid(), normal(T).sigmoid()
    s, expected = torch.zeros(V, K, dtype=torch.float64), []
    for t in range(T):
        s = alpha[t] * s @ (torch.eye(K) - beta[t] * torch.outer(k[t], k[t])) + beta[t] * torch.outer(v[t], k[t])
        expected.append(s @ q[t])
    close(run(NAMED["gated-deltanet"], q, k, v, beta=beta, log_decay=alpha.log()), expected)


def test_kda(run: Run, normal: Normal) -> None:
    """Decays first, then erases along the key from the decayed state."""
    q, k, v = normal(T, K), F.normalize(normal(T, K), dim=-1), normal(T, V)
    beta, a = normal(T).sigmoid(), normal(T, K).sigmoid()
    s, expected = torch.zeros(K, V, dtype=torch.float64), []
    for t in range(T):
        s = (torch.eye(K) - beta[t] * torch.outer(k[t], k[t])) @ torch.diag(a[t]) @ s + beta[t] * torch.outer(
            k[t], v[t]
        )
        expected.append(q[t] @ s)
    close(run(NAMED["kda"], q, k, v, beta=beta, log_decay=a.log()), expected)


def test_gdn2_with_separate_erase_and_write_gates(run: Run, normal: Normal) -> None:
    q, k, v = normal(T, K), F.normalize(normal(T, K), dim=-1), normal(T, V)
    a, erase, write = normal(T, K).sigmoid(), normal(T, K).sigmoid(), normal(T, V).sigmoid()
    s, expected = torch.zeros(V, K, dtype=torch.float64), []
    for t in range(T):
        decayed = s @ torch.diag(a[t])
        s = decayed + torch.outer(write[t] * v[t] - decayed @ (erase[t] * k[t]), k[t])
        expected.append(s @ q[t])
    options = {"log_decay": a.log(), "erase_read": a * erase * k, "erase_write": -k}
    close(run(NAMED["rwkv7"], q, k, write * v, **options), expected)


def test_comba_with_a_separate_erase_key(run: Run, normal: Normal) -> None:
    q, k, p, v = normal(T, K), F.normalize(normal(T, K), dim=-1), F.normalize(normal(T, K), dim=-1), normal(T, V)
    beta, g = normal(T).sigmoid(), normal(T).sigmoid()
    s, expected = torch.zeros(V, K, dtype=torch.float64), []
    for t in range(T):
        s = g[t] * s + beta[t] * torch.outer(v[t] - g[t] * s @ p[t], k[t])
        expected.append(s @ q[t])
    kernel = RowKernel(gate="scalar", erase="general")
    options = {"log_decay": g.log(), "erase_read": g[:, None] * p, "erase_write": -beta[:, None] * k}
    close(run(kernel, q, k, beta[:, None] * v, **options), expected)


def test_rwkv7(run: Run, normal: Normal) -> None:
    r, k, v, kk = normal(T, K), normal(T, K), normal(T, V), F.normalize(normal(T, K), dim=-1)
    a, w = normal(T, K).sigmoid(), (-0.606531 * normal(T, K).sigmoid()).exp()
    s, expected = torch.zeros(V, K, dtype=torch.float64), []
    for t in range(T):
        s = s @ (torch.diag(w[t]) - torch.outer(kk[t], kk[t] * a[t])) + torch.outer(v[t], k[t])
        expected.append(s @ r[t])
    close(run(NAMED["rwkv7"], r, k, v, log_decay=w.log(), erase_read=-kk, erase_write=kk * a), expected)


def test_deltaproduct_is_the_delta_rule_on_an_expanded_sequence(run: Run, normal: Normal) -> None:
    """Two Householder steps a token, the gate on the first, read after the last."""
    q, v, alpha = normal(T, K), normal(T, 2, V), normal(T).sigmoid()
    k, beta = F.normalize(normal(T, 2, K), dim=-1), 2 * normal(T, 2).sigmoid()
    s, expected = torch.zeros(V, K, dtype=torch.float64), []
    for t in range(T):
        s = alpha[t] * s
        for i in range(2):
            s = s + beta[t, i] * torch.outer(v[t, i] - s @ k[t, i], k[t, i])
        expected.append(s @ q[t])
    log_decay = torch.stack([alpha.log(), torch.zeros_like(alpha)], dim=1).flatten()
    options = {"beta": beta.flatten(), "log_decay": log_decay}
    rows = run(NAMED["gated-deltanet"], q.repeat_interleave(2, 0), k.flatten(0, 1), v.flatten(0, 1), **options)
    close(rows[1::2], expected)


def test_gsa_is_two_calls_with_a_softmax_between(run: Run, normal: Normal) -> None:
    slots = 3
    q, k, v, alpha = normal(T, K), normal(T, K), normal(T, V), normal(T, slots).sigmoid()
    keys, values, expected = torch.zeros(slots, K).double(), torch.zeros(slots, V).double(), []
    for t in range(T):
        keys = alpha[t][:, None] * keys + torch.outer(1 - alpha[t], k[t])
        values = alpha[t][:, None] * values + torch.outer(1 - alpha[t], v[t])
        expected.append((keys @ q[t]).softmax(-1) @ values)
    scores = run(NAMED["gsa-keys"], q, k, 1 - alpha, log_decay=alpha.log())
    close(run(NAMED["gla"], scores.softmax(-1), 1 - alpha, v, log_decay=alpha.log()), expected)
