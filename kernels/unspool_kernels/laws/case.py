"""One call of an op as data: what varies by token, what is constant, the state pool, and which sequence is where."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

Op = Callable[..., Tensor | tuple[Tensor, ...]]
"""Called with everything by keyword; updates the states in place."""


class Outcome(NamedTuple):
    """What a call returned, and the state tensors after it."""

    outputs: tuple[Tensor, ...]
    states: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """tokens [N, ...], constants (tensors, numbers, descriptors), states [P, ...] with every slot in a state that can
    be reached, slots [S] and cu_seqlens [S + 1]; positions [S], if the op takes them, grow by one with each token.

    oracle is the float64 reference. gates names the tensors that stay float32, and log_states the states that do.
    fresh is each state's row before the first token; first gives the outputs [S, ...] of one token per fresh slot.
    """

    name: str
    oracle: Op
    tokens: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    states: Mapping[str, Tensor]
    slots: Tensor
    cu_seqlens: Tensor
    fresh: Mapping[str, Tensor]
    first: Callable[[Mapping[str, Any]], tuple[Tensor, ...]]
    positions: Tensor | None = None
    gates: frozenset[str] = frozenset()
    log_states: frozenset[str] = frozenset()
    exponential: bool = False

    @property
    def lengths(self) -> list[int]:
        lengths: list[int] = self.cu_seqlens.diff().tolist()
        return lengths

    @property
    def used(self) -> Tensor:
        """The slots that live sequences with tokens name."""
        return self.slots[(self.slots >= 0) & (self.cu_seqlens.diff() > 0)].long()

    def run(self, op: Op) -> Outcome:
        """Calls op on copies of the states."""
        return self.run_in_place(op, {name: state.clone() for name, state in self.states.items()})

    def run_in_place(self, op: Op, states: dict[str, Tensor]) -> Outcome:
        words: dict[str, Any] = {"slots": self.slots, "cu_seqlens": self.cu_seqlens}
        if self.positions is not None:
            words["positions"] = self.positions
        outputs = op(**self.tokens, **self.constants, **states, **words)
        return Outcome(outputs if isinstance(outputs, tuple) else (outputs,), states)

    def cast(self, dtype: torch.dtype, state_dtype: torch.dtype, device: str = "cpu") -> "Case":
        """With inputs and states of other dtypes; float64 for both gives float64 gates too."""
        gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def converted(tensors: Mapping[str, Any], kept: frozenset[str], target: torch.dtype) -> dict[str, Any]:
            def convert(name: str, value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                if not value.is_floating_point():
                    return value.to(device)
                return value.to(device, gate_dtype if name in kept else target)

            return {name: convert(name, value) for name, value in tensors.items()}

        return replace(
            self,
            tokens=converted(self.tokens, self.gates, dtype),
            constants=converted(self.constants, self.gates, dtype),
            states=converted(self.states, self.log_states, state_dtype),
            fresh=converted(self.fresh, self.log_states, state_dtype),
            slots=self.slots.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            positions=None if self.positions is None else self.positions.to(device),
        )

    def part(self, starts: Sequence[int], ends: Sequence[int]) -> tuple["Case", Tensor]:
        """The call on tokens starts[s]..ends[s] of each sequence s, without those that are left with none; and the
        places of its tokens in this call."""
        kept = [s for s, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < end]
        offsets = self.cu_seqlens.tolist()
        index = [offsets[s] + t for s in kept for t in range(starts[s], ends[s])]
        total = [0]
        for s in kept:
            total.append(total[-1] + ends[s] - starts[s])
        device = self.slots.device
        places = torch.tensor(index, dtype=torch.long, device=device)
        shift = torch.tensor([starts[s] for s in kept], dtype=torch.int32, device=device)
        smaller = replace(
            self,
            tokens={name: tensor[places] for name, tensor in self.tokens.items()},
            slots=self.slots[kept],
            cu_seqlens=torch.tensor(total, dtype=torch.int32, device=device),
            positions=None if self.positions is None else self.positions[kept] + shift,
        )
        return smaller, places
