"""The kernels in C++ for CPUs: one shared library with a plain C interface, instruction set chosen when it is loaded."""
