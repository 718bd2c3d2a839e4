"""The kernels in Triton, for CUDA tensors; for CPU tensors too, slowly, where TRITON_INTERPRET=1 is set at import.

Each module has the ops of `unspool_kernels.ops` of the same name, without their checks. Importing this package does
not import triton; importing its modules does.
"""

import os
from importlib.util import find_spec

import torch

NOT_INSTALLED = "the triton backend needs triton: pip install 'unspool[gpu]'"


def missing() -> str | None:
    """Why the kernels cannot run here, with the remedy; None when they can."""
    if find_spec("triton") is None:
        return NOT_INSTALLED
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "the triton backend needs a CUDA GPU, and torch finds none: use backend='native' or 'reference'"
