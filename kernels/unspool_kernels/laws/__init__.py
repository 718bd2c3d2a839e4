"""The laws every (op, backend) keeps, as checks that anyone who adds a mixer or a backend can run on theirs.

`catalogue` has cases for the ops of this package, `verdicts.LAWS` the laws by name; a third party writes a `Case` of
their own. A broken law raises `LawBroken`, an AssertionError that names the law's case and the tensor.
"""
