"""All cases of the ops of this package, and a quick way to put a backend of theirs on trial."""

from functools import partial

from unspool_kernels.contract import Backend
from unspool_kernels.laws.attention import attention_cases
from unspool_kernels.laws.case import Case, Op
from unspool_kernels.laws.cells import cell_cases, conv_cases
from unspool_kernels.laws.rows import row_cases
from unspool_kernels.laws.samples import Sizes
from unspool_kernels.laws.scans import scan_cases

DEFAULT_SIZES = Sizes()


def every_case(sizes: Sizes = DEFAULT_SIZES) -> list[Case]:
    """In float64; `Case.cast` turns them into what a backend takes."""
    return [
        *row_cases(sizes),
        *scan_cases(sizes),
        *attention_cases(sizes),
        *cell_cases(sizes),
        *conv_cases(sizes),
    ]


def with_backend(case: Case, backend: Backend) -> Op:
    """The case's own op on that backend."""
    assert isinstance(case.oracle, partial)
    return partial(case.oracle.func, backend=backend)
