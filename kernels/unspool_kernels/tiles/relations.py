"""What must hold between expressions: each relation tells whether the values left still allow it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from unspool_kernels.tiles.expressions import Bounds, Box, Expression, as_expression


class Relation(ABC):
    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """Names of the variables it speaks of."""

    @abstractmethod
    def possible(self, box: Box) -> bool:
        """False only if no choice from `box` satisfies it. Exact once every variable has one value left."""

    @abstractmethod
    def numbers(self, box: Box) -> str:
        """Both sides as numbers; `low..high` where they are not settled."""


@dataclass(frozen=True)
class Comparison(Relation):
    left: Expression
    right: Expression
    sign: str

    @property
    def names(self) -> frozenset[str]:
        return self.left.names | self.right.names

    def possible(self, box: Box) -> bool:
        return self.allows(self.left.bounds(box), self.right.bounds(box))

    @abstractmethod
    def allows(self, left: Bounds, right: Bounds) -> bool:
        """Whether some pair of values within the bounds satisfies the comparison."""

    def numbers(self, box: Box) -> str:
        return f"{_span(self.left.bounds(box))} {self.sign} {_span(self.right.bounds(box))}"

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right}"


class AtMost(Comparison):
    def allows(self, left: Bounds, right: Bounds) -> bool:
        return left[0] <= right[1]


class Equal(Comparison):
    def allows(self, left: Bounds, right: Bounds) -> bool:
        return left[0] <= right[1] and right[0] <= left[1]


class MultipleOf(Comparison):
    def allows(self, left: Bounds, right: Bounds) -> bool:
        divisor = right[0]
        return divisor != right[1] or left[1] // divisor * divisor >= left[0]


@dataclass(frozen=True)
class AnyOf(Relation):
    alternatives: tuple[Relation, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset().union(*(relation.names for relation in self.alternatives))

    def possible(self, box: Box) -> bool:
        return any(relation.possible(box) for relation in self.alternatives)

    def numbers(self, box: Box) -> str:
        return " or ".join(relation.numbers(box) for relation in self.alternatives)

    def __str__(self) -> str:
        return " or ".join(map(str, self.alternatives))


def at_most(left: Expression | int, right: Expression | int) -> Relation:
    return AtMost(as_expression(left), as_expression(right), "<=")


def equal(left: Expression | int, right: Expression | int) -> Relation:
    return Equal(as_expression(left), as_expression(right), "==")


def multiple_of(left: Expression | int, right: Expression | int) -> Relation:
    """`right` must not be zero."""
    return MultipleOf(as_expression(left), as_expression(right), "is a multiple of")


def any_of(*alternatives: Relation) -> Relation:
    return AnyOf(alternatives)


def _span(bounds: Bounds) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low}..{high}"
