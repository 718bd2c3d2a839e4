"""Multi-query associative recall: its texts, and mixers that can and cannot learn it."""

import pytest
import torch

from unspool.mixer_spec import PRESETS, MixerSpec
from unspool_conversion.evaluation.mqar_training import (
    LAYERS,
    WINDOW,
    MqarOptions,
    draw_mqar,
    measure_mqar_training,
    num_training_steps,
    train_mqar,
)

EASY = MqarOptions(vocabulary=16, length=16, pairs=2, hidden=32, batch=64, steps=300)
STATE = PRESETS["disjoint"].replace(window=WINDOW, sinks=0)


def test_every_key_is_asked_for_once_after_all_pairs() -> None:
    options = MqarOptions()
    batch = draw_mqar(options, 50, torch.Generator().manual_seed(0))
    half, context = options.vocabulary // 2, 2 * options.pairs
    assert batch.inputs.shape == (50, options.length)
    for row in range(50):
        text = batch.inputs[row]
        keys, values = text[:context:2], text[1:context:2]
        assert keys.max() < half <= values.min() and len(set(keys.tolist())) == options.pairs
        assert torch.equal(text[batch.queries[row]], text[batch.pairs[row]])
        assert torch.equal(text[batch.pairs[row] + 1], batch.values[row])
        assert len(set(batch.queries[row].tolist())) == options.pairs
    assert batch.queries.min() >= context
    near, far = (batch.queries == context).sum(), (batch.queries == options.length - 2).sum()
    assert near > 3 * far > 0


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        (STATE, 0.8, 1.0),
        (STATE.replace(join="window", window=EASY.length), 0.9, 1.0),
        (STATE.replace(join="window"), 0.0, 0.3),
    ],
    ids=["state", "softmax", "window"],
)
def test_a_state_recalls_what_no_window_reaches(spec: MixerSpec, low: float, high: float) -> None:
    result = train_mqar(spec, EASY)
    assert result["queries"] > 100
    assert low <= result["accuracy"]["value"] <= high


def test_training_repeats_itself_and_leaves_the_callers_random_numbers() -> None:
    options = MqarOptions(vocabulary=16, length=16, pairs=2, hidden=16, batch=8, steps=4)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    with torch.inference_mode():
        first, second = train_mqar(STATE, options), train_mqar(STATE, options)
    assert first == second
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("preset", ["disjoint", "liger-gla", "liger-gsa", "lolcats"])
def test_every_layer_has_its_rows(preset: str) -> None:
    options = MqarOptions(vocabulary=16, length=16, pairs=2, hidden=16, batch=4, steps=2)
    steps: list[None] = []
    result = measure_mqar_training(PRESETS[preset], options, lambda: steps.append(None))
    assert list(result["rows"]) == list(result["windows"])
    assert result["windows"]["teacher"] == options.length
    assert result["windows"]["window-only"] == result["windows"]["converted"] == WINDOW < LAYERS * WINDOW
    assert result["windows"]["window-only, equal bytes"] > WINDOW
    assert len(steps) == num_training_steps(options)
