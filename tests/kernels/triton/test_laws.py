"""The laws for the triton backend: on a GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when triton is imported, so `test_interpreter` runs this file in a process of its own.
"""

import pytest
import torch

from unspool_kernels.contract import why_missing
from unspool_kernels.laws.case import Case
from unspool_kernels.laws.catalogue import every_case, with_backend
from unspool_kernels.laws.rows import NAMED, row_cases
from unspool_kernels.laws.samples import Sizes
from unspool_kernels.laws.verdicts import (
    LAWS,
    Law,
    Subject,
    chunk_equals_steps,
    fresh_slot_starts_a_text,
    packing_equals_separate_calls,
    reference_agrees,
    threads_do_not_matter,
)

MISSING = why_missing("triton", "row_state")
if MISSING is not None:
    pytest.skip(MISSING, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes in numpy, which warns about what a tl.where then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")

TINY = Sizes(lengths=(2, 0, 1, 3), heads=2, group=2)
STEPS = Sizes(lengths=(3, 0, 1, 5))
AWKWARD = Sizes(lengths=(2, 1), heads=1, group=3, features=33, channels=60)
CHUNKS = Sizes(lengths=(67, 0, 17), heads=1, group=2, features=17, channels=33)
SPLIT = Sizes(lengths=(19, 17), heads=1, group=1)
PUBLISHED = Sizes(lengths=(300, 0, 1, 64), heads=4, group=3, features=64, channels=128)
OTHER_DTYPES = {
    "float32-float16-state": (torch.float32, torch.float16),
    "float16": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
}
LAWS_OF_CALLS = [law for law in LAWS if law is not threads_do_not_matter]
WITHOUT_KERNELS = ("elman", "lstm", "gru", "slstm")
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="these sizes need a CUDA GPU, and torch finds none")


def cases(sizes: Sizes, *names: str) -> list[Case]:
    """All, or those whose names begin with one of these."""
    found = [case for case in every_case(sizes) if not case.name.startswith(WITHOUT_KERNELS)]
    return [case for case in found if case.name.startswith(names)] if names else found


def each(found: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


def subject(case: Case) -> Subject:
    return Subject(op=with_backend(case, "triton"), random_splits=1)


def in_chunks(sizes: Sizes) -> list[Case]:
    """The cases that have a kernel for chunks, where sequences are as long as in CHUNKS."""
    names = [f"row-{gate}-{erase}-after" for gate in ("none", "constant", "scalar") for erase in ("none", "parallel")]
    return cases(sizes, *names, "softmax", "ring", "conv", "token-shift")


MULTIPLIED = ("linear", "mlstm", "gated-deltanet")
"""A mixer for each kind of chunk."""
NAMED_CASES = row_cases(TINY, NAMED)
OTHERS = cases(
    TINY, "diagonal-real-varying-read-token", "diagonal-complex-constant-read-none", "exponential", "softmax"
)
RINGS = cases(TINY, "ring-2", "conv-4", "conv-2", "token-shift")


@pytest.mark.parametrize("law", LAWS_OF_CALLS, ids=lambda law: law.__name__)
@each([*NAMED_CASES, *OTHERS, *RINGS])
def test_law_holds(law: Law, case: Case) -> None:
    case = case.cast(torch.float32, torch.float32, DEVICE)
    law(subject(case), case)


@each(cases(STEPS))
def test_every_descriptor_agrees_with_the_reference(case: Case) -> None:
    case = case.cast(torch.float32, torch.float32, DEVICE)
    reference_agrees(subject(case), case)
    fresh_slot_starts_a_text(subject(case), case)


@each(in_chunks(CHUNKS))
def test_chunks_agree_with_the_reference(case: Case) -> None:
    case = case.cast(torch.float32, torch.float32, DEVICE)
    reference_agrees(subject(case), case)


@each([*row_cases(SPLIT, {name: NAMED[name] for name in MULTIPLIED}), *cases(SPLIT, "ring-2")])
def test_chunks_equal_steps_and_do_not_see_each_other(case: Case) -> None:
    case = case.cast(torch.float32, torch.float32, DEVICE)
    chunk_equals_steps(subject(case), case)
    packing_equals_separate_calls(subject(case), case)


@pytest.mark.parametrize("dtypes", OTHER_DTYPES.values(), ids=OTHER_DTYPES.keys())
@each(
    [
        *NAMED_CASES,
        *OTHERS,
        *RINGS,
        *row_cases(CHUNKS, {"mlstm-chunk": NAMED["mlstm"]}),
        *cases(CHUNKS, "ring-2", "soft"),
    ]
)
def test_the_reference_agrees_in_other_dtypes(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    case = case.cast(*dtypes, DEVICE)
    reference_agrees(subject(case), case)


@each(cases(AWKWARD))
def test_the_reference_agrees_at_awkward_sizes(case: Case) -> None:
    case = case.cast(torch.float32, torch.float32, DEVICE)
    reference_agrees(subject(case), case)


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each([*row_cases(PUBLISHED, NAMED), *cases(PUBLISHED, "diagonal", "exponential", "softmax", "ring", "conv", "token")])
def test_the_reference_agrees_at_published_sizes(case: Case, dtype: torch.dtype) -> None:
    case = case.cast(dtype, torch.float32, DEVICE)
    reference_agrees(subject(case), case)
