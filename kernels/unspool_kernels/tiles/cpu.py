"""Tiles of the native CPU kernels: tasks that a team of threads shares, and the registers of a task's inner loop.

Sizes: K key features, V value channels, G query heads per state head.
"""

from dataclasses import dataclass

from unspool_kernels.tiles.expressions import Expression, Order, Variable, ceil_div
from unspool_kernels.tiles.limits import CpuLimits, require_positive
from unspool_kernels.tiles.relations import any_of, at_most, equal, multiple_of
from unspool_kernels.tiles.solver import Constraint, Model

VECTOR_LANES = 16
"""float32 lanes of the kernels' logical vector, on every instruction set."""
FEW_KEY_FEATURES = 64
"""So short a row leaves the processor waiting for its sums: several rows at once hide that, from any cache."""
WIDE_ELEMENT_BYTES = 4
"""Narrower elements are converted both ways, which memory does not outlast."""
TASKS_PER_THREAD = 4
"""Enough for threads that finish early to take over work."""
MOST_X_ROWS = 8
PRODUCT_OPERANDS = 4
"""Registers for weights, the same unpacked, activations, and their products."""


def even_splits(count: int) -> tuple[int, ...]:
    """Into how many parts `count` things can be cut when all parts but the last are equal."""
    parts = [1]
    while (size := -(-count // parts[-1])) > 1:
        parts.append(-(-count // (size - 1)))
    return tuple(parts)


def _balanced(tasks: Expression, threads: Variable) -> Constraint:
    return Constraint(
        "balanced tasks",
        any_of(equal(threads, 1), equal(tasks, threads), at_most(TASKS_PER_THREAD * threads, tasks)),
    )


@dataclass(frozen=True, kw_only=True)
class CpuRowKernel:
    """Tasks of `value_rows` rows of one head's state that stay in L1 while tokens pass by, `row_block` rows at once.

    `state_bytes` is the size of one element. Prefers many threads, then four rows at once, then few tasks,
    then even ones.
    """

    slots: int
    heads: int
    key_features: int
    value_channels: int
    state_bytes: int
    queries: int = 1
    erase: bool = False
    limits: CpuLimits

    def __post_init__(self) -> None:
        require_positive(self)

    def model(self) -> Model:
        limits, channels = self.limits, self.value_channels
        threads = Variable("threads", range(1, limits.threads + 1), Order.LARGEST)
        block = Variable("row_block", (1, 4), Order.LARGEST)
        parts = Variable("tasks_per_head", even_splits(channels), Order.SMALLEST)
        rows = Variable("value_rows", range(1, channels + -channels % 4 + 1), Order.SMALLEST)
        row_bytes = self.key_features * self.state_bytes
        all_bytes = self.slots * self.heads * channels * row_bytes
        # One row at once always works, if need be with registers spilled.
        one_row = equal(block, 1)
        # Queries, and what an erase reads, pass one after the other: only the rows of a block share the registers.
        sums = VECTOR_LANES * 4 // limits.vector_bytes * (block + 1)
        few_features = at_most(self.key_features, FEW_KEY_FEATURES)
        near = at_most(all_bytes, threads * limits.l2_bytes)
        constraints: tuple[Constraint, ...] = (
            Constraint("rows in half of L1", at_most(rows * row_bytes, limits.l1d_bytes // 2)),
            _balanced(self.slots * self.heads * parts, threads),
            Constraint("tasks cover the head", equal(parts, ceil_div(channels, rows))),
            Constraint("rows within the head", at_most(rows, block * ceil_div(channels, block))),
            Constraint("whole row blocks", multiple_of(rows, block)),
            Constraint("row block within the head", at_most(block, channels)),
            Constraint("vector registers", any_of(one_row, at_most(sums, limits.vector_registers))),
        )
        if self.queries == 1 and not self.erase and self.state_bytes >= WIDE_ELEMENT_BYTES:
            # So little work waits for memory, which likes few streams.
            constraints += (Constraint("row blocks near the core", any_of(one_row, few_features, near)),)
        return Model((threads, block, parts, rows), constraints)


@dataclass(frozen=True, kw_only=True)
class CpuPackedProduct:
    """x W^T with W in panels of `panel_rows` interleaved rows: tasks of `weight_rows` rows, `x_rows` of x in registers.

    `rows` are those of x, `inputs` and `outputs` the sides of W. Prefers many threads, then many rows of x, then few
    tasks: one long stream of weights for each thread.
    """

    rows: int
    inputs: int
    outputs: int
    x_bytes: int
    weight_bits: int
    panel_rows: int = 8
    limits: CpuLimits

    def __post_init__(self) -> None:
        require_positive(self)

    def model(self) -> Model:
        limits, panel = self.limits, self.panel_rows
        panels = -(-self.outputs // panel)
        threads = Variable("threads", range(1, limits.threads + 1), Order.LARGEST)
        x_rows = Variable("x_rows", range(1, min(self.rows, MOST_X_ROWS) + 1), Order.LARGEST)
        tasks = Variable("tasks", even_splits(panels), Order.SMALLEST)
        weight_rows = Variable("weight_rows", range(panel, panels * panel + 1, panel), Order.SMALLEST)
        sums = -(-panel * 4 // limits.vector_bytes)
        constraints = (
            Constraint("vector registers", at_most(x_rows * sums + PRODUCT_OPERANDS, limits.vector_registers)),
            Constraint(
                "rows of x in half of L1",
                any_of(equal(x_rows, 1), at_most(x_rows * (self.inputs * self.x_bytes), limits.l1d_bytes // 2)),
            ),
            Constraint(
                "weights met again in half of L2",
                any_of(
                    at_most(self.rows, x_rows),
                    equal(weight_rows, panel),
                    at_most(ceil_div(weight_rows * (self.inputs * self.weight_bits), 8), limits.l2_bytes // 2),
                ),
            ),
            _balanced(tasks, threads),
            Constraint("even tasks", equal(weight_rows, panel * ceil_div(panels, tasks))),
        )
        return Model((threads, x_rows, tasks, weight_rows), constraints)
