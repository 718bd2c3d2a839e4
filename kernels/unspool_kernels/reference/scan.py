"""Associative scans: a monoid of token effects, combined left to right one by one or as a tree.

An element is a tuple of tensors with time as its first axis; a combined element has the effect of its tokens in order.
Where a maximum is -inf there is nothing: what is scaled by it must be 0 there.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

Element = tuple[Tensor, ...]


class Monoid(Protocol):
    """combine is associative and identity is neutral on both sides; both work on stacks of elements."""

    def identity(self, like: Element) -> Element:
        """The effect of no token, one for each element of the stack."""
        ...

    def combine(self, left: Element, right: Element) -> Element:
        """The effect of left, then right."""
        ...


def scan(monoid: Monoid, elements: Element, form: Literal["tree", "sequential"] = "tree") -> Element:
    """Inclusive scan over the first axis: entry t combines the elements 0 .. t. The tree takes O(log T) steps."""
    return _tree(monoid, elements) if form == "tree" else _sequential(monoid, elements)


def _sequential(monoid: Monoid, elements: Element) -> Element:
    total = monoid.identity(tuple(part[:1] for part in elements))
    totals = []
    for t in range(elements[0].shape[0]):
        total = monoid.combine(total, tuple(part[t : t + 1] for part in elements))
        totals.append(total)
    return tuple(torch.cat(parts) for parts in zip(*totals, strict=True)) if totals else elements


def _tree(monoid: Monoid, elements: Element) -> Element:
    length = elements[0].shape[0]
    if length < 2:
        return elements
    pairs = monoid.combine(tuple(part[0 : length - 1 : 2] for part in elements), tuple(part[1::2] for part in elements))
    odd = _tree(monoid, pairs)  # totals up to tokens 1, 3, 5, ...
    even = monoid.combine(tuple(part[: (length - 1) // 2] for part in odd), tuple(part[2::2] for part in elements))
    return tuple(
        _interleave(torch.cat([first[:1], evens]), odds) for first, evens, odds in zip(elements, even, odd, strict=True)
    )


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    whole = torch.stack([even[: odd.shape[0]], odd], dim=1).flatten(0, 1)
    return torch.cat([whole, even[odd.shape[0] :]])


class Diagonal:
    """(a, x): h -> a h + x, elementwise, real or complex."""

    def identity(self, like: Element) -> Element:
        a, x = like
        return torch.ones_like(a), torch.zeros_like(x)

    def combine(self, left: Element, right: Element) -> Element:
        (a1, x1), (a2, x2) = left, right
        return a1 * a2, a2 * x1 + x2


class Affine:
    """(M, N): S -> S M + N, with M [..., K, K] dense and N [..., V, K]: the row kernel with any erase."""

    def identity(self, like: Element) -> Element:
        m, n = like
        return torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand_as(m), torch.zeros_like(n)

    def combine(self, left: Element, right: Element) -> Element:
        (m1, n1), (m2, n2) = left, right
        return m1 @ m2, n1 @ m2 + n2


class LogMax:
    """(m, u, w): a softmax's maximum [...], and mass [...] and weighted sum [..., V] scaled by e^-m."""

    def identity(self, like: Element) -> Element:
        m, u, w = like
        return torch.full_like(m, -torch.inf), torch.zeros_like(u), torch.zeros_like(w)

    def combine(self, left: Element, right: Element) -> Element:
        (m1, u1, w1), (m2, u2, w2) = left, right
        m = torch.maximum(m1, m2)
        first, second = _scale(m1, m), _scale(m2, m)
        return m, first * u1 + second * u2, first[..., None] * w1 + second[..., None] * w2


class MlstmStabilised:
    """(F, m, X): a total log-decay F [...], a maximum m [...] and a state X [..., R, K] scaled by e^-m."""

    def identity(self, like: Element) -> Element:
        f, m, x = like
        return torch.zeros_like(f), torch.full_like(m, -torch.inf), torch.zeros_like(x)

    def combine(self, left: Element, right: Element) -> Element:
        (f1, m1, x1), (f2, m2, x2) = left, right
        m = torch.maximum(m1 + f2, m2)
        first, second = _scale(m1 + f2, m), _scale(m2, m)
        return f1 + f2, m, first[..., None, None] * x1 + second[..., None, None] * x2


class Exponential:
    """(F, m, A, B): RWKV-4's total log-decay, maximum, and numerator and denominator scaled by e^-m, all [...]."""

    def identity(self, like: Element) -> Element:
        f, m, a, b = like
        return torch.zeros_like(f), torch.full_like(m, -torch.inf), torch.zeros_like(a), torch.zeros_like(b)

    def combine(self, left: Element, right: Element) -> Element:
        (f1, m1, a1, b1), (f2, m2, a2, b2) = left, right
        m = torch.maximum(m1 + f2, m2)
        first, second = _scale(m1 + f2, m), _scale(m2, m)
        return f1 + f2, m, first * a1 + second * a2, first * b1 + second * b2


def _scale(log: Tensor, maximum: Tensor) -> Tensor:
    """exp(log - maximum), and 0 when both are -inf."""
    return (log - maximum.masked_fill(maximum == -torch.inf, 0.0)).exp()
