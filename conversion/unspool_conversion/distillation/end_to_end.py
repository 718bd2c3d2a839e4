"""The stages that train the whole model at once, towards the teacher's predictions or the text's next tokens."""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from unspool.errors import UserError
from unspool_conversion.distillation.optimization import Group, NonFiniteGradient, Optimization, cosine, is_evaluated
from unspool_conversion.distillation.prediction_loss import PredictionLoss, prediction_loss
from unspool_conversion.distillation.randomness import batch_rows, generator
from unspool_conversion.distillation.recipe import FinetuneStage, LogitsStage
from unspool_conversion.distillation.run import Run
from unspool_conversion.distillation.student import Student, first_far_position, narrowed

_LAYER_OF_NAME = 2


class _Batch(NamedTuple):
    """Tokens [B, T], and the positions [B, T] whose next token counts."""

    tokens: Tensor
    positions: Tensor


def run_end_to_end(run: Run, stage: LogitsStage) -> None:
    """Trains from where the progress stands to the stage's last step."""
    training = _Training(run, stage)
    training.begin()
    record = run.progress.stages[run.progress.stage]
    with tqdm(total=stage.steps, initial=run.progress.step, desc=stage.kind) as bar:
        for _ in range(run.progress.step, stage.steps):
            loss = training.step()
            bar.update()
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
    errors = run.progress.errors
    record |= {"held_out_before": errors["start"], "held_out_after": errors["end"], "last_loss": errors["loss"]}


class _Training:
    """The optimization of all layers."""

    def __init__(self, run: Run, stage: LogitsStage) -> None:
        self._run, self._stage = run, stage
        student = run.student
        student.freeze()
        groups = [Group(student.lora(stage.lora), stage.lora_lr), Group(student.far(), stage.far_lr)]
        if isinstance(stage, FinetuneStage):
            groups.append(Group(student.weights(), stage.weight_lr))
        self._optimization = Optimization(
            groups, weight_decay=stage.weight_decay, clip=stage.clip, noise=stage.gradient_noise
        )
        if not self._optimization.parameters:
            raise UserError(
                f"stage {run.progress.stage + 1} ({stage.kind}) has nothing to train: the model's layers have no far "
                "parameters, or their learning rate is 0; name projections in the stage's lora"
            )

    def begin(self) -> None:
        """Takes up the stage where the progress stands, or measures where it starts."""
        self._optimization.restore(self._run.take_tensors())
        if not self._run.progress.errors:
            self._run.progress.errors["start"] = self._measure()

    def step(self) -> float:
        """One step; returns its loss."""
        run, stage, step = self._run, self._stage, self._run.progress.step
        rows = batch_rows(run.corpus.num_training, stage.batch, step, run.seed, run.progress.stage)
        window = _dropout_window(stage, step, generator(run.seed, "window", run.progress.stage, step))
        with narrowed(run.student.model, window):
            record = self._accumulate(rows)
        share = cosine(step, stage.steps, stage.final_lr, stage.warmup)
        try:
            norm = self._optimization.step(step, share, generator(run.seed, "noise", run.progress.stage, step))
        except NonFiniteGradient as error:
            layer = int(str(error).split(".")[_LAYER_OF_NAME])
            run.stop_diverged(f"the gradient of {error}", layer, self._optimization.tensors)
        run.progress.errors["loss"] = record["loss"]
        record |= {"lr": share, "norm": norm}
        if window is not None:
            record["window"] = window
        if is_evaluated(step, stage.steps, stage.evaluations):
            record["held_out"] = run.progress.errors["end"] = self._measure()
        run.finish_step(record, len(rows) * run.corpus.tokens.shape[1], self._optimization.tensors)
        return record["loss"]

    def _accumulate(self, rows: list[int]) -> dict[str, float]:
        """Adds up the gradients of a batch's mean loss, some sequences at a time; returns the loss and its parts."""
        stage = self._stage
        parts = [rows[start : start + stage.at_once] for start in range(0, len(rows), stage.at_once)]
        batches = [_batch(self._run, stage, part) for part in parts]
        count = max(sum(int(batch.positions.sum()) for batch in batches), 1)
        record = dict.fromkeys(("loss", "divergence", "cross_entropy"), 0.0)
        for batch in batches:
            loss = self._loss(batch)
            total = loss.mixed(stage.cross_entropy) / count
            if not bool(total.isfinite()):
                layer = self._run.student.first_bad_layer(batch.tokens)
                self._run.stop_diverged("the loss", layer, self._optimization.tensors)
            if total.requires_grad:
                total.backward()
            record["loss"] += total.item()
            record["divergence"] += loss.divergence.item() / count
            record["cross_entropy"] += loss.cross_entropy.item() / count
        return record

    def _loss(self, batch: _Batch) -> PredictionLoss:
        stage, student = self._stage, self._run.student
        uses_teacher = stage.cross_entropy < 1
        teacher = self._run.teacher.logits(batch.tokens, batch.positions) if uses_teacher else None
        hidden = student.hidden(batch.tokens, recompute=stage.recompute)[batch.positions]
        next_tokens = batch.tokens.roll(-1, dims=1)[batch.positions]
        return prediction_loss(student.model.lm_head, hidden, teacher, next_tokens, confidence=stage.confidence)

    @torch.no_grad()
    def _measure(self) -> float:
        """The mean loss on the held-out text. Stops the run when it is not finite."""
        corpus, total, count = self._run.corpus, 0.0, 0
        for row in range(corpus.num_training, corpus.tokens.shape[0]):
            batch = _batch(self._run, self._stage, [row])
            total += float(self._loss(batch).mixed(self._stage.cross_entropy))
            count += int(batch.positions.sum())
            if not torch.isfinite(torch.tensor(total)):
                layer = self._run.student.first_bad_layer(batch.tokens)
                self._run.stop_diverged("the held-out loss", layer, self._optimization.tensors)
        return total / max(count, 1)


def _batch(run: Run, stage: LogitsStage, rows: list[int]) -> _Batch:
    """The sequences of these rows on the student's device."""
    tokens, trained = run.corpus.tokens[rows], run.corpus.trained[rows]
    positions = trained.roll(-1, dims=1)
    positions[:, -1] = False
    if stage.positions == "far":
        positions[:, : _first_far(run.student)] = False
    return _Batch(tokens.to(run.student.device), positions.to(run.student.device))


def _first_far(student: Student) -> int:
    """The first position at which any layer may differ from the teacher's, with the windows as they are now."""
    return min(first_far_position(layer.self_attn.spec) for layer in student.layers)


def _dropout_window(stage: LogitsStage, step: int, random: torch.Generator) -> int | None:
    """The smaller window that a step runs with, if any. None in the last third."""
    if step >= stage.steps * 2 // 3 or float(torch.rand((), generator=random)) >= stage.window_dropout:
        return None
    return stage.dropout_windows[int(torch.randint(len(stage.dropout_windows), (), generator=random))]
