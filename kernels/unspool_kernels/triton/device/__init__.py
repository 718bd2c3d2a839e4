"""Device code, in Triton's language: compiled from its source for a GPU, never called as Python."""

from importlib.util import find_spec

from unspool_kernels.triton import NOT_INSTALLED

if find_spec("triton") is None:
    raise ImportError(NOT_INSTALLED)
