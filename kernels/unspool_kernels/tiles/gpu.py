"""Tiles of the GPU kernels: programs of a grid that keep their part of the state in registers.

Sizes: K key features, V value channels, G query heads per state head.
"""

from dataclasses import dataclass

from unspool_kernels.tiles.expressions import Expression, Order, Variable, ceil_div, maximum, minimum
from unspool_kernels.tiles.limits import GpuLimits, require_positive
from unspool_kernels.tiles.relations import at_most, equal
from unspool_kernels.tiles.solver import Constraint, Model

WARP = 32
WARPS = (1, 2, 4, 8)
DOT_SIDE = 16
"""Tensor cores multiply tiles of at least 16 x 16; elementwise tiles keep to the same least width."""
VECTOR_REGISTERS = 63
"""For vectors, masks and addresses: leaves 192 of 255 for tiles."""
RESERVED_SHARED_BYTES = 1024
"""The system keeps 1 KiB for each block."""


def padded(size: int, least: int = DOT_SIDE) -> int:
    """The power of two, at least `least`, that covers `size`."""
    return max(least, 1 << (size - 1).bit_length())


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """Those from `low`, itself one, up to `high`; at least `low`."""
    return tuple(low << shift for shift in range(max(1, (high // low).bit_length())))


def _warps() -> Variable:
    return Variable("warps", WARPS, Order.SMALLEST)


def _busy(blocks: Expression, limits: GpuLimits) -> tuple[Variable, Constraint]:
    """A first variable that stands for the wish to give every multiprocessor a block, as far as there are any."""
    busy = Variable("busy_multiprocessors", range(1, limits.multiprocessors + 1), Order.LARGEST)
    return busy, Constraint("busy multiprocessors", equal(busy, minimum(blocks, limits.multiprocessors)))


def _thread_limits(elements: Expression, warps: Variable, limits: GpuLimits) -> tuple[Constraint, ...]:
    """For tiles of so many 32-bit `elements` in all, spread over the threads of a block."""
    threads = WARP * warps
    registers = ceil_div(elements, threads) + VECTOR_REGISTERS
    return (
        Constraint("registers per thread", at_most(registers, limits.registers_per_thread)),
        Constraint("registers per block", at_most(threads * registers, limits.registers_per_block)),
        Constraint("threads per block", at_most(threads, limits.threads_per_block)),
    )


@dataclass(frozen=True, kw_only=True)
class GpuRowKernel:
    """State rows [value_block, key_block] in registers while the tokens of a sequence pass by.

    Prefers busy multiprocessors, then keys in one pass, then many rows, then few warps.
    """

    slots: int
    heads: int
    key_features: int
    value_channels: int
    limits: GpuLimits

    def __post_init__(self) -> None:
        require_positive(self)

    def model(self) -> Model:
        keys = Variable("key_block", powers_of_two(DOT_SIDE, padded(self.key_features)), Order.LARGEST)
        values = Variable("value_block", powers_of_two(8, min(32, padded(self.value_channels, 8))), Order.LARGEST)
        warps = _warps()
        limits = self.limits
        busy, fill = _busy(self.slots * self.heads * ceil_div(self.value_channels, values), limits)
        state = values * keys
        constraints = (
            fill,
            # The state, and a temporary of its size.
            *_thread_limits(2 * state, warps, limits),
            Constraint("an element for each thread", at_most(WARP * warps, state)),
        )
        return Model((busy, keys, values, warps), constraints)


@dataclass(frozen=True, kw_only=True)
class GpuChunkKernel:
    """Tokens of a chunk at once by dot products: operands staged in shared memory, state [key_block, value_block].

    `key_operands` (q, k and with erase p, b) and `value_operands` (v, and with erase its correction) are the tiles that
    a stage holds. Prefers busy multiprocessors, then long chunks, wide blocks, many stages, few warps.
    """

    sequences: int
    heads: int
    key_features: int
    value_channels: int
    element_bytes: int
    key_operands: int = 2
    value_operands: int = 1
    limits: GpuLimits

    def __post_init__(self) -> None:
        require_positive(self)

    def model(self) -> Model:
        chunk = Variable("chunk", (16, 32, 64), Order.LARGEST)
        keys = Variable("key_block", powers_of_two(DOT_SIDE, min(128, padded(self.key_features))), Order.LARGEST)
        values = Variable("value_block", powers_of_two(DOT_SIDE, min(128, padded(self.value_channels))), Order.LARGEST)
        stages = Variable("stages", (1, 2, 3), Order.LARGEST)
        warps = _warps()
        busy, fill = _busy(self.sequences * self.heads * ceil_div(self.value_channels, values), self.limits)
        operands = stages * chunk * (self.key_operands * keys + self.value_operands * values) * self.element_bytes
        scores = chunk * chunk
        shared = operands + 4 * scores + RESERVED_SHARED_BYTES
        accumulators = maximum(keys * values, chunk * values + scores)
        # Next to the accumulators, twice as many registers for operands and the stages in flight.
        constraints = (
            fill,
            Constraint("shared memory", at_most(shared, self.limits.shared_bytes)),
            *_thread_limits(3 * accumulators, warps, self.limits),
        )
        return Model((busy, chunk, keys, values, stages, warps), constraints)


@dataclass(frozen=True, kw_only=True)
class GpuRingAttention:
    """Queries of one state head [G, D] against `ring_block` rows of its keys and values at a time, in float32.

    Prefers many rows, then few warps.
    """

    queries: int
    head_dim: int
    ring_rows: int
    limits: GpuLimits

    def __post_init__(self) -> None:
        require_positive(self)

    def model(self) -> Model:
        width = padded(self.head_dim)
        rows = Variable("ring_block", powers_of_two(DOT_SIDE, min(128, padded(self.ring_rows))), Order.LARGEST)
        warps = _warps()
        # Keys, values, a product of their size; queries and their sums, scores.
        elements = 3 * width * rows + self.queries * (2 * width + rows)
        return Model((rows, warps), _thread_limits(elements, warps, self.limits))
