"""The stage that fits which tokens each layer's bank holds, from the attention that the teacher pays to them later.

What a later token is worth is chosen on the held-out text and on its echo, the first half of each sequence read twice:
every token of an echo is needed again, half a sequence later.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unspool.decoder import Block
from unspool.mixer import Heads
from unspool_conversion.bank_calibration import BankText, set_bank
from unspool_conversion.bank_regression import Moments, token_moments
from unspool_conversion.calibration import calibrate_state, teacher_attention
from unspool_conversion.distillation.layer_walk import LayerText, walk_layers
from unspool_conversion.distillation.recipe import BankStage
from unspool_conversion.distillation.run import Run
from unspool_conversion.distillation.student import Student, without_adapter

_log = logging.getLogger(__name__)


def run_bank(run: Run, stage: BankStage) -> None:
    """Fits the layers that are left; those without a bank stay as they are."""
    if not any(".far.bank." in name for name in run.student.far()):
        _log.warning("no layer has a bank, so the bank stage has nothing to fit; convert with --bank to have one")
        return
    layers = run.progress.stages[run.progress.stage].setdefault("layers", [])
    with tqdm(total=len(run.student.layers), initial=run.progress.layer, desc="bank") as bar:
        tokens = run.corpus.first(stage.sequences)
        echoes = _echo(tokens[-run.corpus.held_out :])
        for text in walk_layers(run, torch.cat([tokens, echoes]), len(echoes) + run.corpus.held_out):
            found = _fit_layer(run, text)
            layers.append({"layer": run.progress.layer} | found)
            record = {"loss": found["bank_error_of_longer_window"]} if found else None
            run.finish_layer(record, text.num_training * text.inputs.shape[1])
            bar.update()


@torch.no_grad()
def _fit_layer(run: Run, text: LayerText) -> dict[str, Any]:
    """What was found for the progress's layer; nothing for one without a bank."""
    student, layer = run.student, run.progress.layer
    block, window = student.layers[layer], student.teacher_windows[layer]
    mixer = block.self_attn
    if mixer.far is None or mixer.far.bank is None:
        return {}
    with without_adapter(block):
        moments = _moments(student, block, text, window)
        middle = text.num_training + text.held_out // 2
        parts = (range(text.num_training, middle), range(middle, text.inputs.shape[0]))
        texts = [_bank_text(student, block, text, rows, window) for rows in parts]
        found = set_bank(mixer, None if moments is None else moments.solve(), texts)
        # The state now holds other tokens than those that its weight was found for.
        heads = Heads(*(torch.cat(parts) for parts in zip(*(each.heads for each in texts), strict=True)))
        target = torch.cat([each.target for each in texts])
        return found | calibrate_state(mixer, heads, target, texts[0].context(len(target)))


def _echo(tokens: Tensor) -> Tensor:
    """The first half of sequences [N, T], twice."""
    half = tokens[:, : tokens.shape[1] // 2]
    return torch.cat([half, half, tokens[:, 2 * half.shape[1] :]], 1)


def _bank_text(student: Student, block: Block, text: LayerText, rows: range, teacher_window: int | None) -> BankText:
    projected = [_project(student, block, text, row) for row in rows]
    heads = Heads(*(torch.cat(parts) for parts in zip(*projected, strict=True)))
    target = teacher_attention(heads, student.context((len(rows), text.inputs.shape[1])), teacher_window)
    return BankText(heads, target, student.model.rotary)


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
