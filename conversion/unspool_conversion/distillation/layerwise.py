"""The stage that fits each layer by itself to the teacher's attention, from the teacher's own residual stream.

Holds the text's stream before one layer and what the teacher's attention adds to it there; no gradient crosses a
layer, and no vocabulary is involved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unspool_conversion.distillation.layer_losses import LayerLoss, output_error, training_loss
from unspool_conversion.distillation.layer_walk import LayerText, walk_layers
from unspool_conversion.distillation.optimization import Group, NonFiniteGradient, Optimization, cosine, is_evaluated
from unspool_conversion.distillation.randomness import batch_rows, generator
from unspool_conversion.distillation.recipe import LayerwiseStage
from unspool_conversion.distillation.run import Run
from unspool_conversion.distillation.student import first_far_position


def run_layerwise(run: Run, stage: LayerwiseStage) -> None:
    """Fits the layers that are left. Each keeps the parameters that were best on the held-out text, or the old ones."""
    layers = run.progress.stages[run.progress.stage].setdefault("layers", [])
    total = len(run.student.layers) * stage.steps
    with tqdm(total=total, initial=run.progress.layer * stage.steps + run.progress.step, desc="layerwise") as bar:
        tokens = torch.cat([run.corpus.training(stage.sequences), run.corpus.tokens[run.corpus.num_training :]])
        for text in walk_layers(run, tokens, run.corpus.held_out):
            layers.append(fit_layer(run, stage, text, bar))
            run.finish_layer()


def fit_layer(run: Run, stage: LayerwiseStage, text: LayerText, bar: "tqdm[Any]") -> dict[str, Any]:
    """Fits the progress's layer and says what became of it: its held-out relative output errors before and after."""
    fit = _LayerFit(run, stage, text)
    first = run.progress.step
    if fit.is_hopeless():
        bar.update(stage.steps - first)
        return {"layer": run.progress.layer, "skipped": "nothing to train on, or nothing to train"}
    fit.begin()
    errors = run.progress.errors
    if errors["start"] <= stage.skip_below:
        bar.update(stage.steps - first)
        return {"layer": run.progress.layer, "skipped": "small error", "error_before": errors["start"]}
    for _ in range(first, stage.steps):
        fit.step()
        bar.update()
        bar.set_postfix(layer=run.progress.layer, error=f"{errors['best']:.3g}", refresh=False)
    fit.keep_best()
    return {"layer": run.progress.layer, "error_before": errors["start"], "error_after": errors["best"]}


class _LayerFit:
    """The optimization of one layer."""

    def __init__(self, run: Run, stage: LayerwiseStage, text: LayerText) -> None:
        self._run, self._stage, self._text = run, stage, text
        student, self._layer = run.student, run.progress.layer
        self._block = student.layers[self._layer]
        far = student.far(self._layer)
        maps = {name: parameter for name, parameter in far.items() if name.endswith("_map")}
        gates = {name: parameter for name, parameter in far.items() if name not in maps}
        groups = (
            Group(maps, stage.map_lr),
            Group(gates, stage.gate_lr),
            Group(student.lora(stage.lora, self._layer), stage.lora_lr),
        )
        self._optimization = Optimization(groups, weight_decay=0.0, clip=stage.clip, noise=stage.gradient_noise)
        self._best: dict[str, Tensor] = {}
        first = first_far_position(self._block.self_attn.spec)
        self._loss = LayerLoss(
            self._block.self_attn, first, student.teacher_windows[self._layer], stage.state_weight, variance=1.0
        )

    def is_hopeless(self) -> bool:
        return not self._optimization.parameters or self._loss.first >= self._text.inputs.shape[1]

    def begin(self) -> None:
        """Takes up the fit where the progress stands, or measures where it starts."""
        errors, parameters = self._run.progress.errors, self._optimization.parameters
        self._loss = self._loss.scaled_by(self._text.targets)
        kept = self._run.take_tensors()
        if errors:
            self._optimization.restore(_below("optimizer/", kept))
            self._best = {name: tensor.to(parameters[name].device) for name, tensor in _below("best/", kept).items()}
            return
        errors["start"] = errors["best"] = self._measure()
        self._best = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        far = self._block.self_attn.far
        if self._stage.least_bias is not None and far is not None and hasattr(far, "bias"):
            with torch.no_grad():
                far.bias.clamp_(min=self._stage.least_bias)

    def step(self) -> None:
        run, stage, step = self._run, self._stage, self._run.progress.step
        place = (run.progress.stage, self._layer, step)
        rows = batch_rows(self._text.num_training, stage.batch, step, run.seed, run.progress.stage)
        share = cosine(step, stage.steps, stage.final_lr)
        loss, output, state = self._compute(rows)
        if not bool(loss.isfinite()):
            run.stop_diverged("the loss", self._layer, self.tensors)
        loss.backward()
        try:
            norm = self._optimization.step(step, share, generator(run.seed, "noise", *place))
        except NonFiniteGradient as error:
            run.stop_diverged(f"the gradient of {error}", self._layer, self.tensors)
        record = {"loss": loss.item(), "output": output, "state": state, "lr": share, "norm": norm}
        if is_evaluated(step, stage.steps, stage.evaluations):
            record["held_out"] = self._keep_if_better()
        run.finish_step(record, len(rows) * self._text.inputs.shape[1], self.tensors)

    def tensors(self) -> Mapping[str, Tensor]:
        moments = {f"optimizer/{name}": tensor for name, tensor in self._optimization.tensors().items()}
        return moments | {f"best/{name}": tensor for name, tensor in self._best.items()}

    @torch.no_grad()
    def keep_best(self) -> None:
        for name, tensor in self._best.items():
            self._optimization.parameters[name].copy_(tensor)

    def _compute(self, rows: Sequence[int]) -> tuple[Tensor, float, float]:
        student = self._run.student
        x, target = (part[list(rows)].to(student.device) for part in (self._text.inputs, self._text.targets))
        context = student.context((x.shape[0], x.shape[1]))
        return training_loss(self._loss, self._block.input_layernorm(x), target, context)

    def _keep_if_better(self) -> float:
        error, errors = self._measure(), self._run.progress.errors
        if error < errors["best"]:
            errors["best"] = error
            self._best = {name: p.detach().clone() for name, p in self._optimization.parameters.items()}
        return error

    @torch.no_grad()
    def _measure(self) -> float:
        """The held-out relative error. Stops the run when it is not finite."""
        student, held_out = self._run.student, slice(self._text.num_training, None)
        errors = []
        for x, target in zip(self._text.inputs[held_out], self._text.targets[held_out], strict=True):
            normed = self._block.input_layernorm(x[None].to(student.device))
            context = student.context((1, x.shape[0]))
            errors.append(output_error(self._loss, normed, target[None].to(student.device), context))
        error = torch.stack(errors).mean()
        if not bool(error.isfinite()):
            self._run.stop_diverged("the held-out error", self._layer, self.tensors)
        return float(error)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
