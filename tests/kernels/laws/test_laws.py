"""The eight laws for the reference and the native backend, case by case; triton's are in tests/kernels/triton."""

from dataclasses import replace

import pytest
import torch

from unspool_kernels.contract import Backend, why_missing
from unspool_kernels.laws.case import Case
from unspool_kernels.laws.catalogue import every_case, with_backend
from unspool_kernels.laws.samples import Sizes
from unspool_kernels.laws.verdicts import (
    LAWS,
    Law,
    Subject,
    chunk_equals_steps,
    fresh_slot_starts_a_text,
    reference_agrees,
)

FAMILY = {
    "row_state": "row_state",
    "diagonal_scan": "diagonal_scan",
    "exponential_scan": "diagonal_scan",
    "softmax_scan": "softmax_scan",
    "ring_attention": "ring_attention",
    "recurrent_cell": "recurrent_cell",
    "short_conv": "short_conv",
    "token_shift": "short_conv",
}
SMALL = Sizes()
AWKWARD = Sizes(lengths=(65, 2, 17), heads=1, group=1, features=33, channels=60)
LONG = Sizes(lengths=(257, 0, 64), heads=1, group=3, features=4, channels=3)
OTHER_DTYPES = {
    "float32-float16-state": (torch.float32, torch.float16),
    "float16": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "native"])
EVERY_LAW = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
LAWS_OF_VALUES = pytest.mark.parametrize(
    "law", [chunk_equals_steps, reference_agrees, fresh_slot_starts_a_text], ids=lambda law: law.__name__
)


def every(sizes: Sizes) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", every_case(sizes), ids=lambda case: case.name)


def subject(case: Case, backend: Backend) -> Subject:
    op = with_backend(case, backend)
    reason = why_missing(backend, FAMILY[op.func.__name__]) if backend != "reference" else None
    if reason is not None:
        pytest.skip(reason)
    # A float16 state is rounded once a call, so only a float32 one can be exact however the tokens are split.
    wide_states = all(state.dtype != torch.float16 for state in case.states.values())
    native = backend == "native"
    return Subject(op=op, exact=native and wide_states, set_threads=torch.set_num_threads if native else None)


@BACKENDS
@EVERY_LAW
@every(SMALL)
def test_law_holds(law: Law, case: Case, backend: Backend) -> None:
    case = case.cast(torch.float32, torch.float32)
    law(subject(case, backend), case)


@BACKENDS
@LAWS_OF_VALUES
@every(SMALL)
@pytest.mark.parametrize("dtypes", OTHER_DTYPES.values(), ids=OTHER_DTYPES.keys())
def test_law_holds_in_other_dtypes(
    law: Law, case: Case, dtypes: tuple[torch.dtype, torch.dtype], backend: Backend
) -> None:
    case = case.cast(*dtypes)
    law(subject(case, backend), case)


@LAWS_OF_VALUES
@every(SMALL)
def test_law_holds_to_the_last_digits_in_float64(law: Law, case: Case) -> None:
    case = case.cast(torch.float64, torch.float64)
    law(subject(case, "reference"), case)


@BACKENDS
@every(AWKWARD)
def test_laws_of_values_hold_at_awkward_sizes(case: Case, backend: Backend) -> None:
    case = case.cast(torch.float32, torch.float32)
    chunk_equals_steps(replace(subject(case, backend), random_splits=1), case)
    reference_agrees(subject(case, backend), case)


@BACKENDS
@every(LONG)
def test_the_reference_agrees_over_many_blocks(case: Case, backend: Backend) -> None:
    case = case.cast(torch.float32, torch.float32)
    reference_agrees(subject(case, backend), case)
