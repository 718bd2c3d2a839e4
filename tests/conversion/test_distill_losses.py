"""What training minimises, against plain formulas; and what decides learning rates, windows and order."""

import math

import pytest
import torch
from torch.nn import functional as F

from unspool import PRESETS, UnspoolConfig, UnspoolForCausalLM
from unspool.batch import StepContext, step_context
from unspool.config import linearize_block
from unspool.mixer import SMALLEST_MASS, Heads
from unspool_conversion.distillation.layer_losses import (
    LayerLoss,
    attend_to_far,
    find_left,
    output_error,
    training_loss,
)
from unspool_conversion.distillation.optimization import cosine, is_evaluated
from unspool_conversion.distillation.prediction_loss import prediction_loss
from unspool_conversion.distillation.randomness import batch_rows
from unspool_conversion.distillation.recipe import LoraOptions
from unspool_conversion.distillation.student import Student, attend_as_teacher, first_far_position, narrowed


def random_model(window: int = 8, sinks: int = 2, bank: int = 0) -> UnspoolForCausalLM:
    torch.manual_seed(0)
    spec = PRESETS["disjoint"].replace(window=window, sinks=sinks, bank=bank, far_bias=0.0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    config = UnspoolConfig(**sizes, **heads, linearize=linearize_block("disjoint", spec, {}))
    return UnspoolForCausalLM(config).eval()


@pytest.mark.parametrize("teacher_window", [None, 14])
def test_far_attention_is_softmax_over_what_left_window_and_sinks(teacher_window: int | None) -> None:
    model, length = random_model(), 24
    mixer = model.model.layers[0].self_attn
    context = step_context((2, length), model.rotary, torch.float32, torch.device("cpu"))
    heads = mixer.project(torch.randn(2, length, 32))
    loss = LayerLoss(mixer, 10, teacher_window, 0.5, 1.0)
    actual = attend_to_far(heads, find_left(mixer, heads, context), context, loss)
    assert actual.shape == (2, length - 10, 2, 2, 8)
    for t in (10, 11, 23):
        low = 2 if teacher_window is None else max(2, t - teacher_window + 1)
        for head in (0, 1):
            far = list(range(low, t - 8 + 1))
            torch.testing.assert_close(actual[:, t - 10, head], softmax_over(heads, context, t, head, far))


def test_far_attention_leaves_out_what_a_bank_keeps() -> None:
    model, length = random_model(bank=3), 24
    mixer = model.model.layers[0].self_attn
    with torch.no_grad():
        mixer.far.bank.weight.normal_()
    context = step_context((1, length), model.rotary, torch.float32, torch.device("cpu"))
    heads = mixer.project(torch.randn(1, length, 32))
    assert first_far_position(mixer.spec) == 13
    left_at = find_left(mixer, heads, context)
    actual = attend_to_far(heads, left_at, context, LayerLoss(mixer, 13, None, 0.5, 1.0))
    part = mixer.attend_near(heads, context, None)
    sets = []
    for t in (13, 18, 23):
        for head in (0, 1):
            far = sorted(part.left_positions[0, 13 : t + 1, head].tolist())
            assert len(set(far)) == t - 12 and min(far) >= 2 and max(far) <= t - 8
            sets.append(far)
            torch.testing.assert_close(actual[:, t - 13, head], softmax_over(heads, context, t, head, far))
    assert sets[-2] != sets[-1]


def softmax_over(heads: Heads, context: StepContext, t: int, head: int, tokens: list[int]) -> torch.Tensor:
    q, k = context.query.apply(heads.q), context.query.apply(heads.k)
    scores = torch.einsum("bgd,bjd->bgj", q[:, t, head], k[:, tokens, head]) / math.sqrt(8)
    return torch.einsum("bgj,bjd->bgd", scores.softmax(-1), heads.v[:, tokens, head])


def test_a_layers_loss_is_its_errors_relative_to_the_targets_variance() -> None:
    model, length = random_model(), 24
    block = model.model.layers[0]
    x = torch.randn(3, length, 32)
    context = step_context((3, length), model.rotary, torch.float32, x.device)
    with torch.no_grad():
        target = attend_as_teacher(block, x, context, None)
        normed = block.input_layernorm(x)
        output = block.self_attn(normed, context)
        heads = block.self_attn.project(normed)
        loss = LayerLoss(block.self_attn, 10, None, 0.5, 1.0).scaled_by(target)
        far_target = attend_to_far(heads, find_left(block.self_attn, heads, context), context, loss)
        _, far = block.self_attn.attend_both(heads, context)
    torch.testing.assert_close(output[:, :10], target[:, :10])
    expected = ((output - target)[:, 10:] ** 2).mean() / target[:, 10:].var()
    read_out = (far[..., :-1] / far[..., -1:].clamp_min(SMALLEST_MASS))[:, 10:]
    state = ((read_out - far_target) ** 2).mean() / far_target.var()
    total, output_part, state_part = training_loss(loss, normed, target, context)
    torch.testing.assert_close(output_error(loss, normed, target, context), expected)
    assert (output_part, state_part) == pytest.approx((expected.item(), state.item()), rel=1e-4)
    assert total.item() == pytest.approx(expected.item() + 0.5 * state.item(), rel=1e-4)


@pytest.mark.parametrize("confidence", [False, True])
def test_prediction_losses_are_summed_over_blocks(confidence: bool) -> None:
    head = torch.nn.Linear(8, 50, bias=False)
    hidden, teacher, tokens = torch.randn(600, 8), torch.randn(600, 50), torch.randint(50, (600,))
    loss = prediction_loss(head, hidden, teacher, tokens, confidence=confidence)
    student, p = head(hidden).log_softmax(-1), teacher.softmax(-1)
    weight = p.amax(-1) if confidence else torch.ones(600)
    divergence = (weight * (p * (p.log() - student)).sum(-1)).sum()
    torch.testing.assert_close(loss.divergence, divergence)
    torch.testing.assert_close(loss.cross_entropy, F.cross_entropy(head(hidden), tokens, reduction="sum"))
    torch.testing.assert_close(loss.mixed(0.25), 0.75 * loss.divergence + 0.25 * loss.cross_entropy)
    assert prediction_loss(head, hidden, None, tokens, confidence=False).divergence.item() == 0


def test_the_shared_teacher_ignores_the_adapter_and_the_far_part() -> None:
    model, tokens = random_model(), torch.randint(64, (1, 40))
    student = Student(model, LoraOptions(rank=2), (None, None), seed=0)
    before = student.teacher_hidden(tokens)
    untrained = student.hidden(tokens)
    with torch.no_grad():
        for name, parameter in student.parameters.items():
            if ".lora_B." in name or name.endswith("far.bias"):
                parameter.add_(0.5)
    assert torch.equal(student.teacher_hidden(tokens), before)
    trained = student.hidden(tokens)
    assert not torch.allclose(trained, untrained, atol=1e-3)
    assert not torch.allclose(before[:, 12:], untrained[:, 12:], atol=1e-3)


def test_a_narrowed_model_is_whole_again_afterwards() -> None:
    model = random_model(window=16)
    with narrowed(model, 4):
        assert [layer.self_attn.spec.window for layer in model.model.layers] == [4, 4]
    with narrowed(model, 20), narrowed(model, None):
        assert [layer.self_attn.spec.window for layer in model.model.layers] == [16, 16]
    assert [layer.self_attn.spec.window for layer in model.model.layers] == [16, 16]


def test_learning_rates_warm_up_and_fall_to_the_final_share() -> None:
    shares = [cosine(step, 12, 0.1, warmup=3) for step in range(12)]
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert shares[-1] == pytest.approx(0.1) and sorted(shares[3:], reverse=True) == shares[3:]
    assert cosine(0, 1, 0.1, warmup=3) == 1.0


def test_measurements_are_spread_evenly_and_follow_the_last_step() -> None:
    assert [step for step in range(10) if is_evaluated(step, 10, 3)] == [3, 6, 9]
    assert [step for step in range(2) if is_evaluated(step, 2, 8)] == [0, 1]


def test_every_sequence_comes_once_before_any_comes_again() -> None:
    rows = [row for step in range(6) for row in batch_rows(9, 3, step, seed=1, stage=0)]
    assert sorted(rows[:9]) == sorted(rows[9:]) == list(range(9)) and rows[:9] != rows[9:]
    assert batch_rows(9, 3, 4, seed=1, stage=0) == rows[12:15]
    assert sorted(batch_rows(2, 4, 0, seed=1, stage=0)) == [0, 0, 1, 1]
