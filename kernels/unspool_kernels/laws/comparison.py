"""How two results are compared: to the bit, or by the root mean square of the error over that of the reference."""

import torch
from torch import Tensor

from unspool_kernels.laws.case import Case, Outcome

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EXPONENTIAL_FACTOR = 10.0
"""Exponential gates amplify rounding where their denominator cancels."""

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class LawBroken(AssertionError):
    """A law does not hold; the message names the case, the tensor and by how much."""


def tolerance_of(case: Case) -> float:
    """By the widest rounding among inputs and states."""
    tensors = [*case.tokens.values(), *case.states.values()]
    worst = max(TOLERANCE[tensor.dtype] for tensor in tensors if tensor.is_floating_point())
    precise = worst <= TOLERANCE[torch.float32]
    return worst * EXPONENTIAL_FACTOR if case.exponential and precise else worst


def require_equal(case: Case, what: str, actual: Tensor, expected: Tensor, *, exact: bool) -> None:
    """The same bits, or equal within the tolerance of the case; infinities and NaN (rows never written) in place."""
    if actual.shape != expected.shape:
        raise LawBroken(f"{case.name}: {what} has shape {list(actual.shape)}, not {list(expected.shape)}")
    if exact or not actual.is_floating_point():
        require_same_bits(case, what, actual, expected)
        return
    wide, wanted = actual.double(), expected.double()
    finite = wanted.isfinite()
    if not torch.equal(wide[~finite].nan_to_num(), wanted[~finite].nan_to_num()):
        raise LawBroken(f"{case.name}: {what} is infinite or NaN elsewhere than it should be")
    error = _root_mean_square(wide[finite] - wanted[finite])
    limit = tolerance_of(case) * _root_mean_square(wanted[finite])
    if not error <= limit:
        raise LawBroken(f"{case.name}: {what} is off by {error:.2e} where {limit:.2e} is allowed (root mean squares)")


def require_same_bits(case: Case, what: str, actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(_bits(actual), _bits(expected)):
        raise LawBroken(f"{case.name}: {what} has other bits")


def require_same(case: Case, actual: Outcome, expected: Outcome, *, exact: bool, rows: Tensor | None = None) -> None:
    """Outputs and the states of `rows` (default: of the slots in use), within the tolerance or to the bit."""
    for i, (output, wanted) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        require_equal(case, f"output {i}", output, wanted, exact=exact)
    rows = case.used if rows is None else rows
    for name, state in expected.states.items():
        require_equal(case, name, actual.states[name][rows], state[rows], exact=exact)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.element_size()])


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
