"""The kernels in C++ for CPUs: one shared library with a plain C interface, which picks its instruction set."""
