"""The kernels in Triton, for CUDA tensors; for CPU tensors too, slowly, where TRITON_INTERPRET=1 is set at import.

Each module has the ops of `unspool_kernels.ops` of the same name, without their checks. Importing this package does
not import triton; importing its modules does.
"""

import os
from importlib.metadata import version
from importlib.util import find_spec

import torch

NOT_INSTALLED = "the triton backend needs triton: pip install 'unspool[gpu]'"


def missing() -> str | None:
    """Why the kernels cannot run here, with the remedy; None when they can."""
    if find_spec("triton") is None:
        return NOT_INSTALLED
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _why_not_interpreted()
    if torch.cuda.is_available():
        return None
    return "the triton backend needs a CUDA GPU, and torch finds none: use backend='native' or 'reference'"


def _why_not_interpreted() -> str | None:
    """Before 3.7 Triton's interpreter relies on a conversion that NumPy 2.4 took away; later ones want other masks."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton == (3, 7) or (triton < (3, 7) and numpy < (2, 4)):
        return None
    found = f"triton {version('triton')} cannot interpret kernels with numpy {version('numpy')}"
    return f"{found}: pip install 'triton>=3.7,<3.8', or unset TRITON_INTERPRET"
