"""The stage that fits which tokens each layer's bank holds, from the attention that the teacher pays to them later.

What a later token is worth is chosen by layer on the held-out text and on its echo, the first half of each sequence
read twice: every token of an echo is needed again, half a sequence later. Errors of outputs have layers forget sooner
than predictions want, so in the end all layers may forget more slowly, as the predictions on the same texts have it.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unspool.bank import BankPriority
from unspool.decoder import Block
from unspool.mixer import Heads
from unspool_conversion.bank_calibration import BankText, set_bank
from unspool_conversion.bank_regression import Moments, token_moments
from unspool_conversion.calibration import calibrate_state, teacher_attention
from unspool_conversion.distillation.corpus import Corpus
from unspool_conversion.distillation.layer_walk import LayerText, walk_layers
from unspool_conversion.distillation.prediction_loss import prediction_loss
from unspool_conversion.distillation.recipe import BankStage
from unspool_conversion.distillation.run import Run
from unspool_conversion.distillation.student import Student, first_far_position, without_adapter

SCALES = (1.0, 0.7, 0.5, 0.35, 0.25)
MOST_HELD_OUT = 4
"""Sequences of the held-out ones: all are projected at once."""

_log = logging.getLogger(__name__)


def run_bank(run: Run, stage: BankStage) -> None:
    """Fits the layers that are left; those without a bank stay as they are."""
    if not any(".far.bank." in name for name in run.student.far()):
        _log.warning("no layer has a bank, so the bank stage has nothing to fit; convert with --bank to have one")
        return
    layers = run.progress.stages[run.progress.stage].setdefault("layers", [])
    with tqdm(total=len(run.student.layers), initial=run.progress.layer, desc="bank") as bar:
        held_out = _held_out(run.corpus)
        tokens = torch.cat([run.corpus.training(stage.sequences), held_out, _echo(held_out)])
        for text in walk_layers(run, tokens, 2 * len(held_out)):
            found = _fit_layer(run, text)
            layers.append({"layer": run.progress.layer} | found)
            record = {"loss": found["bank_error_of_longer_window"]} if found else None
            run.finish_layer(record, text.num_training * text.inputs.shape[1])
            bar.update()
    run.progress.stages[run.progress.stage] |= _slow_down(run)


@torch.no_grad()
def _fit_layer(run: Run, text: LayerText) -> dict[str, Any]:
    """What was found for the progress's layer; nothing for one without a bank."""
    student, layer = run.student, run.progress.layer
    block, window = student.layers[layer], student.teacher_windows[layer]
    if _bank_of(block) is None:
        return {}
    mixer = block.self_attn
    with without_adapter(block):
        moments = _moments(student, block, text, window)
        middle = text.num_training + text.held_out // 2
        parts = (range(text.num_training, middle), range(middle, text.inputs.shape[0]))
        texts = [_bank_text(student, block, text, rows, window) for rows in parts]
        found = set_bank(mixer, None if moments is None else moments.solve(), texts)
        # The state now holds other tokens than those that its weight was found for.
        heads = _together([each.heads for each in texts])
        target = torch.cat([each.target for each in texts])
        return found | calibrate_state(mixer, heads, target, texts[0].context(len(target)))


def _held_out(corpus: Corpus) -> Tensor:
    """The sequences [N, T] that choices are made on."""
    return corpus.tokens[corpus.num_training :][:MOST_HELD_OUT]


def _echo(tokens: Tensor) -> Tensor:
    """The first half of sequences [N, T], twice."""
    half = tokens[:, : tokens.shape[1] // 2]
    return torch.cat([half, half, tokens[:, 2 * half.shape[1] :]], 1)


def _bank_text(student: Student, block: Block, text: LayerText, rows: range, teacher_window: int | None) -> BankText:
    heads = _together([_project(student, block, text, row) for row in rows])
    target = teacher_attention(heads, student.context((len(rows), text.inputs.shape[1])), teacher_window)
    return BankText(heads, target, student.model.rotary)


def _together(heads: list[Heads]) -> Heads:
    """Projections of several batches as one."""
    return Heads(*(torch.cat(parts) for parts in zip(*heads, strict=True)))


def _moments(student: Student, block: Block, text: LayerText, teacher_window: int | None) -> Moments | None:
    """Of all training sequences, one at a time."""
    context, total = student.context((1, text.inputs.shape[1])), None
    for row in range(text.num_training):
        heads = _project(student, block, text, row)
        own = token_moments(heads, context, block.self_attn.spec.window, teacher_window)
        total = own if total is None or own is None else total.plus(own)
    return total


def _project(student: Student, block: Block, text: LayerText, row: int) -> Heads:
    heads: Heads = block.self_attn.project(block.input_layernorm(text.inputs[row, None].to(student.device)))
    return heads


@torch.no_grad()
def _slow_down(run: Run) -> dict[str, Any]:
    """Multiplies every aging by the one of SCALES that leaves the predictions on the held-out text and its echo nearest
    to the teacher's; returns the divergences in nats a token, and what was chosen."""
    student = run.student
    agings = [bank.aging for bank in map(_bank_of, student.layers) if bank is not None]
    fitted = [aging.clone() for aging in agings]

    def scale_by(scale: float) -> None:
        for aging, whole in zip(agings, fitted, strict=True):
            aging.copy_(whole * scale)

    totals = [0.0] * len(SCALES)
    held_out = _held_out(run.corpus)
    texts = torch.cat([held_out, _echo(held_out)])
    first = min(first_far_position(layer.self_attn.spec) for layer in student.layers)
    for sequence in tqdm(texts, desc="aging"):
        tokens = sequence[None].to(student.device)
        positions = torch.zeros_like(tokens, dtype=torch.bool)
        positions[:, first:-1] = True
        teacher = run.teacher.logits(tokens, positions)
        for index, scale in enumerate(SCALES):
            scale_by(scale)
            totals[index] += _divergence(student, tokens, positions, teacher)
    count = len(texts) * (texts.shape[1] - 1 - first)
    divergences = {scale: total / count for scale, total in zip(SCALES, totals, strict=True)}
    best = min(SCALES, key=lambda scale: divergences[scale])
    scale_by(best)
    return {"aging_scale": best, "divergence_by_aging_scale": {str(scale): d for scale, d in divergences.items()}}


def _divergence(student: Student, tokens: Tensor, positions: Tensor, teacher: Tensor) -> float:
    """The sum of KL(teacher || student), in nats, over these positions."""
    with without_adapter(student.model):
        hidden, following = student.hidden(tokens)[positions], tokens.roll(-1, dims=1)[positions]
        loss = prediction_loss(student.model.lm_head, hidden, teacher, following, confidence=False)
    return loss.divergence.item()


def _bank_of(block: Block) -> BankPriority | None:
    far = block.self_attn.far
    return far.bank if far is not None else None
