"""One model, every way of feeding it: whole, in chunks, token by token, padded, beamed, saved and loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import unspool
from unspool import PRESETS, MixerSpec, UnspoolConfig, UnspoolForCausalLM
from unspool.config import linearize_block
from unspool.state import StatePool, state_bytes

VOCABULARY = 61
LAYERS: dict[str, MixerSpec] = {
    **{name: spec.replace(window=6) for name, spec in PRESETS.items()},
    "disjoint-no-sinks-query-state": PRESETS["disjoint"].replace(window=6, sinks=0, state_heads="q"),
    "disjoint-liger-gate": PRESETS["disjoint"].replace(window=6, sinks=2, gate="liger"),
    "disjoint-fixed-elu-rotated": PRESETS["disjoint"].replace(
        window=6, sinks=2, gate="fixed", feature_map="elu", state_rope=True
    ),
    "disjoint-bank": PRESETS["disjoint"].replace(window=4, sinks=2, bank=5),
    "disjoint-bank-rotated-query-state": PRESETS["disjoint"].replace(
        window=6, sinks=0, bank=3, state_heads="q", state_rope=True
    ),
    "liger-gsa-more-slots": PRESETS["liger-gsa"].replace(window=6, num_slots=12),
}


def build(spec: MixerSpec, layers: dict[int, dict[str, Any]] | None = None, **changes: Any) -> UnspoolForCausalLM:
    """A random model whose far parts speak up: weights of size one, so that a wrong token anywhere is seen."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "linearize": linearize_block("test", spec, layers or {}),
    }
    model = UnspoolForCausalLM(UnspoolConfig(**(values | changes))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("far.bias"):
            parameter.data.fill_(1.0)
        elif ".far." in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def run_in_chunks(model: UnspoolForCausalLM, ids: Tensor, sizes: list[int]) -> Tensor:
    cache, parts = None, []
    for part in ids.split(sizes, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("length", [5, 8, 9, 20, 70])
def test_prefill_in_one_equals_steps_and_chunks(name: str, length: int) -> None:
    model, ids = build(LAYERS[name]), tokens(2, length)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for sizes in ([length], [1] * length, [2, length - 2], [length - 1, 1]):
        torch.testing.assert_close(run_in_chunks(model, ids, sizes), whole, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 25), min_size=1, max_size=7), name=st.sampled_from(sorted(LAYERS)))
def test_every_split_gives_the_same_logits(sizes: list[int], name: str) -> None:
    model, ids = build(LAYERS[name]), tokens(1, sum(sizes))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(run_in_chunks(model, ids, sizes), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_far_token_changes_the_output_exactly_when_there_is_a_state(name: str) -> None:
    model, ids = build(LAYERS[name]), tokens(1, 40)
    other = ids.clone()
    other[0, 10] = (ids[0, 10] + 1) % VOCABULARY
    with torch.no_grad():
        difference = (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max()
    assert (difference > 1e-5) == LAYERS[name].has_state


@pytest.mark.parametrize("name", ["disjoint", "liger-gla", "liger-gsa", "lolcats", "window-only"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_runs(name: str, side: str) -> None:
    model, ids, lengths = build(LAYERS[name]), tokens(3, 30), [30, 11, 3]
    mask = torch.zeros_like(ids)
    padded = torch.full_like(ids, VOCABULARY - 1)
    for row, length in enumerate(lengths):
        place = slice(30 - length, 30) if side == "left" else slice(0, length)
        mask[row, place], padded[row, place] = 1, ids[row, :length]
    with torch.no_grad():
        batch = model(padded, attention_mask=mask, use_cache=True)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length], use_cache=True)
            torch.testing.assert_close(batch.logits[row][mask[row].bool()], alone.logits[0], rtol=1e-4, atol=1e-4)
            for layer, single in zip(batch.past_key_values.pool.layers, alone.past_key_values.pool.layers, strict=True):
                for key in layer:
                    torch.testing.assert_close(layer[key][row], single[key][0], rtol=1e-4, atol=1e-5)


def test_generate_from_a_left_padded_batch_equals_single_runs() -> None:
    model, ids = build(LAYERS["disjoint"]), tokens(2, 25)
    mask = torch.ones_like(ids)
    mask[0, :14] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=mask, **options)
    first = model.generate(ids[:1, 14:], **options)
    second = model.generate(ids[1:], **options)
    assert batch[0, 25:].tolist() == first[0, 11:].tolist()
    assert batch[1].tolist() == second[0].tolist()


def test_beam_search_with_the_cache_equals_beam_search_without() -> None:
    model, ids = build(LAYERS["disjoint"]), tokens(2, 20)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    with_cache = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    without = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", ["disjoint", "liger-gla", "liger-hgrn2", "liger-gsa", "lolcats"])
def test_gradients_reach_every_parameter_and_equal_finite_differences(name: str) -> None:
    model, ids = build(LAYERS[name]).double(), tokens(2, 30)
    _loss(model, ids).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name
        index = tuple(int(i) for i in torch.unravel_index(parameter.grad.abs().argmax(), parameter.shape))
        slope = _finite_difference(model, ids, parameter, index)
        assert float(parameter.grad[index]) == pytest.approx(slope, rel=1e-4), parameter_name


def _loss(model: UnspoolForCausalLM, ids: Tensor) -> Tensor:
    """In float64: transformers' own loss rounds to float32, too coarse for a finite difference."""
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def _finite_difference(model: UnspoolForCausalLM, ids: Tensor, parameter: Tensor, index: tuple[int, ...]) -> float:
    value, losses = float(parameter[index]), []
    for offset in (1e-5, -1e-5):
        parameter[index] = value + offset
        losses.append(float(_loss(model, ids)))
    parameter[index] = value
    return (losses[0] - losses[1]) / 2e-5


@pytest.mark.parametrize("name", ["disjoint", "liger-gsa", "lolcats"])
def test_a_saved_model_loads_through_the_auto_classes(name: str, tmp_path: Path) -> None:
    model, ids = build(LAYERS[name], layers={1: {"window": 3}}), tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is unspool.UnspoolForCausalLM
    assert loaded.config.mixer_specs()[1].window == 3
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_half_precision_keeps_what_is_summed_over_time_in_float32(tmp_path: Path) -> None:
    build(LAYERS["disjoint"]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".far." in name} == {torch.float32}
    assert dtypes["model.layers.0.self_attn.q_proj.weight"] == torch.bfloat16
    with torch.no_grad():
        output = model(tokens(1, 30), use_cache=True)
    layer = output.past_key_values.pool.layers[0]
    assert layer["far"].dtype == torch.float32
    assert layer["near_keys"].dtype == torch.bfloat16
    assert output.logits.isfinite().all()


def test_state_bytes_do_not_depend_on_the_length() -> None:
    model = build(LAYERS["disjoint"])
    pool = StatePool(model.config, 1, torch.float32, "cpu")
    sizes = set()
    with torch.no_grad():
        for _ in range(3):
            model.hidden(tokens(1, 50), slots=(pool, [0]))
            sizes.add(pool.num_bytes)
    assert sizes == {state_bytes(model.config)}
    assert pool.positions == [150]


@pytest.mark.parametrize("layer", ["disjoint", "disjoint-bank"])
def test_slots_in_any_order_give_each_sequence_its_own_result(layer: str) -> None:
    model, ids = build(LAYERS[layer]), tokens(3, 20)
    pool = StatePool(model.config, 6, torch.float32, "cpu")
    untouched = pool.layers[0]["far"][[0, 2, 3]].clone()
    with torch.no_grad():
        expected = model(ids).logits
        slots = (pool, [5, 1, 4])
        hidden = [model.hidden(part, slots=slots) for part in ids.split([9, 1, 10], dim=1)]
        torch.testing.assert_close(model.lm_head(torch.cat(hidden, 1)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(pool.layers[0]["far"][[0, 2, 3]], untouched)


def test_a_restored_snapshot_continues_as_if_nothing_had_happened() -> None:
    model, ids = build(LAYERS["disjoint"]), tokens(1, 30)
    pool = StatePool(model.config, 2, torch.float32, "cpu")
    with torch.no_grad():
        model.hidden(ids[:, :20], slots=(pool, [0]))
        snapshot = pool.snapshot(0)
        expected = model.hidden(ids[:, 20:], slots=(pool, [0]))
        pool.restore(1, snapshot)
        assert torch.equal(model.hidden(ids[:, 20:], slots=(pool, [1])), expected)
    pool.clear(1)
    assert pool.positions[1] == 0
    assert all(not tensor[1].any() for layer in pool.layers for tensor in layer.values())


def test_positions_that_disagree_with_the_state_are_refused() -> None:
    model, ids = build(LAYERS["disjoint"]), tokens(1, 5)
    with torch.no_grad():
        model(ids, position_ids=torch.arange(5)[None])
        with pytest.raises(ValueError, match="position_ids"):
            model(ids, position_ids=torch.arange(5)[None] + 3)


def test_a_cache_under_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps no gradients"):
        build(LAYERS["disjoint"])(tokens(1, 5), use_cache=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"sinks": -1}, "sinks=-1"),
        ({"gate": "sigmoid"}, "gate='sigmoid' is not one of scalar"),
        ({"feature_map": "identity"}, "identity"),
        ({"memory": "slots"}, "slots"),
    ],
)
def test_a_layer_that_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRESETS["disjoint"].replace(**changes)


def test_an_unknown_mixer_field_is_refused() -> None:
    block = linearize_block("test", PRESETS["disjoint"], {0: {"windw": 3}})
    with pytest.raises(ValueError, match="unknown mixer field 'windw'"):
        UnspoolConfig(linearize=block)
