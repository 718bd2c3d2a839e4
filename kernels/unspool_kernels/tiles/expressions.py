"""Arithmetic on natural numbers that are not all chosen yet: from the domains of the variables to bounds of the value.

Bounds never miss a possible value, shrink with the domains, and are exact once every variable has one value left.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

Domain = Sequence[int]
"""Ascending: a range is an interval, a tuple an explicit set."""
Box = Mapping[str, Domain]
"""What each variable, by name, may still be."""
Bounds = tuple[int, int]
"""The least and the largest value possible."""


class Order(Enum):
    """Which value of a variable is tried first."""

    SMALLEST = "smallest"
    LARGEST = "largest"


class Expression(ABC):
    """A natural number that depends on variables. Plain ints may stand on either side of + and *."""

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """Names of the variables it depends on."""

    @abstractmethod
    def bounds(self, box: Box) -> Bounds:
        """Every domain of `box` must have a value left."""

    def __add__(self, other: "Expression | int") -> "Expression":
        return Increasing("+", operator.add, self, as_expression(other))

    def __radd__(self, other: int) -> "Expression":
        return as_expression(other) + self

    def __mul__(self, other: "Expression | int") -> "Expression":
        return Increasing("*", operator.mul, self, as_expression(other))

    def __rmul__(self, other: int) -> "Expression":
        return as_expression(other) * self


@dataclass(frozen=True)
class Constant(Expression):
    value: int

    def __post_init__(self) -> None:
        if self.value < 0:
            raise ValueError(f"{self.value} is negative: bounds are computed for natural numbers only")

    @property
    def names(self) -> frozenset[str]:
        return frozenset()

    def bounds(self, box: Box) -> Bounds:
        return self.value, self.value

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Variable(Expression):
    """Something to choose. Raises ValueError unless `domain` is ascending, natural and not empty."""

    name: str
    domain: Domain
    first: Order

    def __post_init__(self) -> None:
        if not self.domain or self.domain[0] < 0:
            raise ValueError(f"domain of {self.name}: needs natural numbers, got {self.domain}")
        steps = (
            (self.domain.step,) if isinstance(self.domain, range) else map(operator.sub, self.domain[1:], self.domain)
        )
        if any(step <= 0 for step in steps):
            raise ValueError(f"domain of {self.name}: must ascend, got {self.domain}")

    @property
    def names(self) -> frozenset[str]:
        return frozenset((self.name,))

    def bounds(self, box: Box) -> Bounds:
        domain = box[self.name]
        return domain[0], domain[-1]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Increasing(Expression):
    """An operation that grows with both operands."""

    sign: str
    apply: Callable[[int, int], int]
    left: Expression
    right: Expression

    @property
    def names(self) -> frozenset[str]:
        return self.left.names | self.right.names

    def bounds(self, box: Box) -> Bounds:
        left, right = self.left.bounds(box), self.right.bounds(box)
        return self.apply(left[0], right[0]), self.apply(left[1], right[1])

    def __str__(self) -> str:
        if self.sign == "+":
            return f"{self.left} + {self.right}"
        if self.sign == "*":
            return f"{_operand(self.left, '+')} * {_operand(self.right, '+')}"
        return f"{self.sign}({self.left}, {self.right})"


@dataclass(frozen=True)
class Quotient(Expression):
    """left / right, rounded up. `right` must not be zero."""

    left: Expression
    right: Expression

    @property
    def names(self) -> frozenset[str]:
        return self.left.names | self.right.names

    def bounds(self, box: Box) -> Bounds:
        left, right = self.left.bounds(box), self.right.bounds(box)
        return -(-left[0] // right[1]), -(-left[1] // right[0])

    def __str__(self) -> str:
        return f"ceil({_operand(self.left, '+')} / {_operand(self.right, '+*')})"


def _operand(expression: Expression, looser: str) -> str:
    """Its text, in parentheses if it is one of the operations that bind less than the one around it."""
    return f"({expression})" if isinstance(expression, Increasing) and expression.sign in looser else str(expression)


def as_expression(value: Expression | int) -> Expression:
    return Constant(value) if isinstance(value, int) else value


def ceil_div(left: Expression | int, right: Expression | int) -> Expression:
    """left / right, rounded up."""
    return Quotient(as_expression(left), as_expression(right))


def minimum(left: Expression | int, right: Expression | int) -> Expression:
    return Increasing("min", min, as_expression(left), as_expression(right))


def maximum(left: Expression | int, right: Expression | int) -> Expression:
    return Increasing("max", max, as_expression(left), as_expression(right))
