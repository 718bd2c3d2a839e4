"""The verb `unspool bench`: speed and memory as ratios measured in one run. Each benchmark is a sub-verb."""

import argparse
from collections.abc import Callable

from unspool.bench.decode import add_decode
from unspool.bench.kernels import add_kernels
from unspool.bench.length import add_length
from unspool.bench.serve_engine import add_serve_engine


def add_bench(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the sub-verbs; what it returns runs the one that was chosen."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    runs = {
        "length": add_length(
            benchmarks.add_parser("length", help="time per token and bytes of state at several positions of a text")
        ),
        "decode": add_decode(
            benchmarks.add_parser("decode", help="time per token against the bytes that memory must move for it")
        ),
        "kernels": add_kernels(
            benchmarks.add_parser(
                "kernels", help="a step of every kernel against the bytes that memory must move for it"
            )
        ),
        "serve-engine": add_serve_engine(
            benchmarks.add_parser(
                "serve-engine", help="requests together, a long prompt beside them, sessions found again and forked"
            )
        ),
    }
    return lambda arguments: runs[arguments.benchmark](arguments)
