"""One optimizer step and what surrounds it: learning rates over time, clipped and noisy gradients, Adam's moments as
plain tensors."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
NOISE_DECAY = 0.55


class NonFiniteGradient(ArithmeticError):
    """The gradient of a parameter, which the error names, is NaN or infinite."""


@dataclass(frozen=True)
class Group:
    """Parameters by name that share a learning rate."""

    parameters: Mapping[str, nn.Parameter]
    lr: float


class Optimization:
    """AdamW over groups. Its state is its moments, by name; the number of the step is the caller's."""

    def __init__(self, groups: Iterable[Group], *, weight_decay: float, clip: float, noise: float) -> None:
        groups = [group for group in groups if group.parameters and group.lr > 0]
        self.parameters = {name: parameter for group in groups for name, parameter in group.parameters.items()}
        self._lrs = [group.lr for group in groups]
        self._clip, self._noise = clip, noise
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self._adam = (
            torch.optim.AdamW(
                [{"params": list(group.parameters.values()), "lr": group.lr} for group in groups],
                weight_decay=weight_decay,
            )
            if groups
            else None
        )

    def step(self, step: int, share: float, noise: torch.Generator) -> float:
        """Updates the parameters from their gradients, which it clears, at that share of each learning rate.

        Returns the norm of all gradients before clipping. Raises NonFiniteGradient before anything is updated.
        """
        with_gradient = {name: p for name, p in self.parameters.items() if p.grad is not None}
        if self._adam is None or not with_gradient:
            return 0.0
        gradients = [p.grad for p in with_gradient.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not bool(norm.isfinite()):
            raise NonFiniteGradient(
                next((name for name, p in with_gradient.items() if not _is_finite(p.grad)), next(iter(with_gradient)))
            )
        nn.utils.clip_grads_with_norm_(with_gradient.values(), self._clip, norm)
        if self._noise:
            _add_noise(gradients, self._noise / (1 + step) ** NOISE_DECAY, noise)
        for group, lr in zip(self._adam.param_groups, self._lrs, strict=True):
            group["lr"] = lr * share
        self._adam.step()
        self._adam.zero_grad()
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        """The moments as they are now, and shared with the optimizer."""
        state = self._adam.state if self._adam is not None else {}
        return {
            f"{moment}/{name}": state[parameter][moment]
            for name, parameter in self.parameters.items()
            if parameter in state
            for moment in _MOMENTS
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the moments that `tensors` gave."""
        for name, parameter in self.parameters.items():
            if self._adam is not None and f"step/{name}" in tensors:
                moments = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS}
                # Adam counts its steps on the CPU.
                self._adam.state[parameter] = {
                    moment: value if moment == "step" else value.to(parameter.device)
                    for moment, value in moments.items()
                }


def cosine(step: int, steps: int, final: float, warmup: int = 0) -> float:
    """The share of a learning rate at a step: a linear warm-up, then a cosine from 1 to `final` at the last step."""
    warmup = min(warmup, steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(steps - warmup - 1, 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def is_evaluated(step: int, steps: int, evaluations: int) -> bool:
    """Whether a measurement follows this step: after the last one, and evenly before it."""
    return (step + 1) * evaluations // steps > step * evaluations // steps


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(gradient.isfinite().all())


def _add_noise(gradients: list[Tensor], variance: float, generator: torch.Generator) -> None:
    for gradient in gradients:
        noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
        gradient.add_(noise.to(gradient.device), alpha=math.sqrt(variance))
