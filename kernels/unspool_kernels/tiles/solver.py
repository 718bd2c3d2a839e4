"""Depth-first search for natural numbers under named constraints; domains shrink from both ends after each choice.

The order of the variables and of their values is the preference: solutions come out best first.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from unspool_kernels.tiles.expressions import Box, Domain, Order, Variable
from unspool_kernels.tiles.relations import Relation


@dataclass(frozen=True)
class Constraint:
    name: str
    relation: Relation


@dataclass(frozen=True)
class Model:
    """Variables in order of importance, and what must hold between them.

    Raises ValueError for a name used twice, or a variable that a constraint uses and nobody declares.
    """

    variables: tuple[Variable, ...]
    constraints: tuple[Constraint, ...]

    def __post_init__(self) -> None:
        declared = {variable.name for variable in self.variables}
        if len(declared) != len(self.variables):
            raise ValueError("two variables of the model have the same name")
        if len({constraint.name for constraint in self.constraints}) != len(self.constraints):
            raise ValueError("two constraints of the model have the same name")
        for constraint in self.constraints:
            if unknown := constraint.relation.names - declared:
                raise ValueError(f"{constraint.name}: uses {sorted(unknown)}, which the model does not declare")

    @property
    def box(self) -> Box:
        return {variable.name: variable.domain for variable in self.variables}


class Infeasible(ValueError):
    """Nothing satisfies the model. `constraints` names some that conflict, and no longer do without any one of them."""

    def __init__(self, subject: str, model: Model) -> None:
        core = conflict(model)
        box = model.box
        facts = "; ".join(f"{c.name}: {c.relation.numbers(box)} ({c.relation})" for c in core)
        super().__init__(f"{subject}: no choice satisfies [{facts}]. Relax one of these limits or change the sizes")
        self.constraints = tuple(constraint.name for constraint in core)


class Search:
    """One walk over a model. `nodes` counts the values tried so far, the measure of work."""

    def __init__(self, model: Model) -> None:
        self.nodes = 0
        self._model = model
        self._relations = [(constraint.relation, sorted(constraint.relation.names)) for constraint in model.constraints]
        self._watchers = {
            variable.name: [index for index, (_, names) in enumerate(self._relations) if variable.name in names]
            for variable in model.variables
        }

    def solutions(self) -> Iterator[Mapping[str, int]]:
        """Values by variable name, preferred first, each choice once."""
        box = self._propagate(self._model.box, range(len(self._relations)))
        if box is not None:
            yield from self._descend(box, 0)

    def _descend(self, box: Box, depth: int) -> Iterator[Mapping[str, int]]:
        if depth == len(self._model.variables):
            yield {name: domain[0] for name, domain in box.items()}
            return
        variable = self._model.variables[depth]
        values = box[variable.name]
        for value in reversed(values) if variable.first is Order.LARGEST else values:
            self.nodes += 1
            narrowed = self._propagate({**box, variable.name: (value,)}, self._watchers[variable.name])
            if narrowed is not None:
                yield from self._descend(narrowed, depth + 1)

    def _propagate(self, box: Box, suspects: Iterable[int]) -> Box | None:
        """The box without values that some relation rules out, or None if a relation rules out all."""
        box = dict(box)
        waiting = set(suspects)
        while waiting:
            relation, names = self._relations[waiting.pop()]
            if not relation.possible(box):
                return None
            for name in names:
                before = len(box[name])
                box[name] = _shave(relation, box, name)
                if len(box[name]) < before:
                    waiting.update(self._watchers[name])
        return box


def _shave(relation: Relation, box: Box, name: str) -> Domain:
    """The domain of a variable without the ends that a relation, possible for the box, rules out."""
    domain = box[name]
    count = len(domain)
    if count == 1:
        return domain
    trial = dict(box)

    def possible(part: Domain) -> bool:
        trial[name] = part
        return relation.possible(trial)

    # A part that contains a possible part is possible: the sizes that fail come first.
    if not possible(domain[-1:]):
        domain = domain[: count - bisect_left(range(1, count), True, key=lambda size: possible(domain[count - size :]))]
    if not possible(domain[:1]):
        domain = domain[bisect_left(range(1, len(domain)), True, key=lambda size: possible(domain[:size])) :]
    return domain


def conflict(model: Model) -> tuple[Constraint, ...]:
    """Constraints of an infeasible model that conflict among themselves, none of which could be left out."""
    core = model.constraints
    for constraint in model.constraints:
        rest = tuple(other for other in core if other is not constraint)
        if next(Search(replace(model, constraints=rest)).solutions(), None) is None:
            core = rest
    return core
