"""The rows of an evaluation on models made so that what each must score is known."""

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from unspool.config import UnspoolConfig, linearize_block
from unspool.errors import UserError
from unspool.mixer_spec import PRESETS, MixerSpec
from unspool.model import UnspoolForCausalLM
from unspool.state import layer_state_specs
from unspool_conversion.evaluation import likelihood
from unspool_conversion.evaluation import readers as reading
from unspool_conversion.evaluation.bootstrap import Bootstrap
from unspool_conversion.evaluation.greedy import greedy_tokens, measure_greedy
from unspool_conversion.evaluation.likelihood import (
    positions_to_tell_apart,
    score_tokens,
    summarize_likelihood,
)
from unspool_conversion.evaluation.readers import ConvertedReader, TeacherReader
from unspool_conversion.evaluation.timescales import measure_timescales
from unspool_conversion.evaluation.variants import (
    CONVERTED,
    EQUAL_BYTES,
    NO_STATE,
    STATE_ONLY,
    TEACHER,
    WINDOW_ONLY,
    make_rows,
)
from unspool_conversion.evaluation.verdict import warn_of_documents, warn_of_likelihood

VOCABULARY, CHANNELS, LENGTH = 40, 16, 160
SPEC = MixerSpec(window=4, sinks=2, gate="none")
EXACT_BIAS = math.log(CHANNELS / 2)
"""A zero query has 1 / CHANNELS in each of its features, and a key's sum to 2."""
OFF_BIAS = -1000.0


def no_progress() -> None: ...


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    """Its queries are zero: every token attends evenly to all before it, which a state can do exactly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=CHANNELS,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    return model


def converted(teacher: PreTrainedModel, spec: MixerSpec, bias: float = 0.0) -> UnspoolForCausalLM:
    fields = {name: getattr(teacher.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config = UnspoolConfig(
        **fields,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=CHANNELS,
        max_position_embeddings=512,
        linearize=linearize_block("test", spec, {}),
    )
    model = UnspoolForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and all(".far." in name for name in missing)
    for name, parameter in model.named_parameters():
        if name.endswith("far.bias"):
            parameter.data.fill_(bias)
    return model


@pytest.fixture(scope="module")
def sequences(teacher: PreTrainedModel) -> Tensor:
    """Sampled from the teacher, so that no other model predicts it better."""
    torch.manual_seed(1)
    tokens = cast(Any, teacher).generate(
        torch.randint(VOCABULARY, (12, 1)),
        max_new_tokens=LENGTH - 1,
        min_new_tokens=LENGTH - 1,
        do_sample=True,
        top_k=0,
    )
    return cast(Tensor, tokens)


def evaluate(teacher: PreTrainedModel, model: UnspoolForCausalLM, sequences: Tensor) -> dict[str, Any]:
    scores = score_tokens(make_rows(teacher, model).readers, sequences, no_progress)
    columns = positions_to_tell_apart(LENGTH, model.config.near_tokens)
    return summarize_likelihood(scores, Bootstrap(range(len(sequences))), columns)


def test_the_same_weights_are_the_teacher_inside_the_near_set(teacher: PreTrainedModel, sequences: Tensor) -> None:
    scores = score_tokens(make_rows(teacher, converted(teacher, SPEC)).readers, sequences[:3], no_progress)
    near = SPEC.near_tokens
    for name in (WINDOW_ONLY, EQUAL_BYTES, CONVERTED):
        torch.testing.assert_close(scores[name].loss[:, :near], scores[TEACHER].loss[:, :near], rtol=0, atol=1e-4)
        assert scores[name].divergence[:, :near].abs().max() < 1e-4
        assert bool(scores[name].agreement[:, :near].all())
        assert scores[name].divergence[:, near:].max() > 1e-2


def test_scores_are_the_full_logits_own(
    teacher: PreTrainedModel, sequences: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of positions and chunks of text that do not fit the length."""
    for module in (reading, likelihood):
        monkeypatch.setattr(module, "HEAD_BLOCK", 7)
    monkeypatch.setattr(reading, "READ_CHUNK", 50)
    model, tokens = converted(teacher, SPEC), sequences[:2]
    scores = score_tokens(make_rows(teacher, model).readers, tokens, no_progress)[CONVERTED]
    with torch.no_grad():
        actual = model(tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        expected = teacher(tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    loss = -actual.gather(2, tokens[:, 1:, None])[..., 0]
    divergence = (expected.exp() * (expected - actual)).sum(-1)
    torch.testing.assert_close(scores.loss.double(), loss, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.divergence.double(), divergence, rtol=0, atol=1e-4)
    assert torch.equal(scores.agreement.bool(), actual.argmax(-1) == expected.argmax(-1))


@pytest.mark.parametrize("preset", ["disjoint", "liger-gla", "liger-gsa", "lolcats"])
def test_a_window_of_equal_bytes_has_all_of_them_and_no_token_more(teacher: PreTrainedModel, preset: str) -> None:
    rows = make_rows(teacher, converted(teacher, PRESETS[preset].replace(window=5)))
    spec = rows.converted.config.mixer_specs()[0]
    whole = sum(each.num_bytes for each in layer_state_specs(rows.converted.config, spec, torch.float32).values())
    variant = cast(UnspoolForCausalLM, rows.readers[EQUAL_BYTES].model).config
    wide = variant.mixer_specs()[0]
    near = sum(each.num_bytes for each in layer_state_specs(variant, wide, torch.float32).values())
    a_token = 2 * 2 * CHANNELS * 4
    assert not wide.has_state and wide.sinks == spec.sinks
    assert whole <= near < whole + a_token
    sizes = rows.describe()
    assert sizes[EQUAL_BYTES] == {"near_bytes": 2 * near, "state_bytes": 0, "windows": [wide.window]}
    assert sizes[CONVERTED]["near_bytes"] + sizes[CONVERTED]["state_bytes"] == 2 * whole
    assert sizes[WINDOW_ONLY]["near_bytes"] == sizes[CONVERTED]["near_bytes"]


def test_a_bank_is_far_and_its_bytes_count(teacher: PreTrainedModel, sequences: Tensor) -> None:
    banked, plain = (make_rows(teacher, converted(teacher, SPEC.replace(bank=bank))) for bank in (8, 0))
    for name in (WINDOW_ONLY, EQUAL_BYTES, STATE_ONLY):
        assert all(spec.bank == 0 for spec in cast(Any, banked.readers[name].model).config.mixer_specs()), name
    wide, narrow = (rows.describe()[EQUAL_BYTES]["windows"][0] for rows in (banked, plain))
    assert wide - narrow in (9, 10)  # 8 keys and values, and what ranks them
    scores = score_tokens(banked.readers, sequences[:1], no_progress)
    near = banked.converted.config.near_tokens
    assert near == plain.converted.config.near_tokens + 8
    torch.testing.assert_close(scores[CONVERTED].loss[:, :near], scores[TEACHER].loss[:, :near], rtol=0, atol=1e-4)


def test_variants_share_the_weights(teacher: PreTrainedModel) -> None:
    rows = make_rows(teacher, converted(teacher, SPEC))
    own = rows.converted.model.layers[0].self_attn.k_proj.weight
    for name in (WINDOW_ONLY, EQUAL_BYTES, STATE_ONLY):
        model = cast(UnspoolForCausalLM, rows.readers[name].model)
        assert model.model.layers[0].self_attn.k_proj.weight.data_ptr() == own.data_ptr(), name


def test_the_state_alone_reads_all_but_the_last_token(teacher: PreTrainedModel, sequences: Tensor) -> None:
    """Here a state attends as the teacher does, so alone it must still be the teacher."""
    rows = make_rows(teacher, converted(teacher, SPEC, EXACT_BIAS))
    model = cast(UnspoolForCausalLM, rows.readers[STATE_ONLY].model)
    assert model.config.near_tokens == 1
    scores = score_tokens(rows.readers, sequences[:2], no_progress)
    torch.testing.assert_close(scores[STATE_ONLY].loss, scores[TEACHER].loss, rtol=0, atol=1e-3)


def test_a_model_without_state_has_no_row_for_it_and_says_why(teacher: PreTrainedModel) -> None:
    rows = make_rows(teacher, converted(teacher, SPEC.replace(join="window")))
    assert list(rows.readers) == [TEACHER, WINDOW_ONLY, EQUAL_BYTES, CONVERTED]
    assert rows.left_out == {STATE_ONLY: NO_STATE}


def test_a_state_that_is_off_is_said_to_do_nothing(teacher: PreTrainedModel, sequences: Tensor) -> None:
    summary = evaluate(teacher, converted(teacher, SPEC, OFF_BIAS), sequences)
    nothing, bytes_ = warn_of_likelihood(summary)
    assert "within noise of nothing" in nothing
    assert f"does not earn its bytes: beyond the near set the converted model is worse than {EQUAL_BYTES}" in bytes_
    assert summary["rows"][CONVERTED]["far"]["gap_closed"]["value"] == pytest.approx(0.0, abs=1e-6)


def test_a_state_that_does_the_teachers_work_gets_no_warning(teacher: PreTrainedModel, sequences: Tensor) -> None:
    summary = evaluate(teacher, converted(teacher, SPEC, EXACT_BIAS), sequences)
    assert warn_of_likelihood(summary) == []
    far = summary["rows"][CONVERTED]["far"]
    assert far["minus_window_only"]["high"] < 0 and far["minus_equal_bytes"]["high"] < 0
    assert far["gap_closed"]["value"] == pytest.approx(1.0, abs=1e-2)
    assert summary["rows"][WINDOW_ONLY]["far"]["gap_closed"]["value"] == 0.0
    assert summary["rows"][CONVERTED]["far"]["perplexity"]["value"] == pytest.approx(math.exp(far["nll"]["value"]))


@pytest.mark.parametrize(
    ("by_range", "warning"),
    [
        ([(-0.1, 0.1), (-0.2, 0.1)], "within noise of nothing"),
        ([(-0.1, 0.1), (0.1, 0.3)], "makes predictions worse"),
        ([(-0.1, 0.1), (-0.3, -0.1)], None),
        ([(0.1, 0.2), (-0.3, -0.1)], None),
    ],
)
def test_one_range_where_the_state_helps_is_enough(by_range: list[tuple[float, float]], warning: str | None) -> None:
    def differences(low: float, high: float) -> dict[str, Any]:
        interval = {"value": (low + high) / 2, "low": low, "high": high}
        return {"minus_window_only": interval, "minus_equal_bytes": {"value": -2.0, "low": -3.0, "high": -1.0}}

    names = ("64-128", "128-256")
    rows = {name: differences(*ends) for name, ends in zip(names, by_range, strict=True)}
    summary = {
        "near_tokens": 70,
        "positions": {"0-64": [0, 64], "64-128": [64, 128], "128-256": [128, 256], "far": [70, 256], "all": [0, 256]},
        "rows": {CONVERTED: rows | {"0-64": differences(-9.0, -8.0), "far": differences(-9.0, -8.0)}},
    }
    warnings = warn_of_likelihood(summary)
    assert warnings == [] if warning is None else warning in warnings[0]


@pytest.mark.parametrize(
    ("documents", "said"), [(1, "one document"), (3, "over 3 documents are rough"), (5, None), (40, None)]
)
def test_few_documents_are_warned_of(documents: int, said: str | None) -> None:
    warnings = warn_of_documents(documents, 8)
    assert warnings == [] if said is None else said in warnings[0]


@pytest.mark.parametrize("kind", ["teacher", "converted"])
def test_a_fork_reads_on_without_the_other(teacher: PreTrainedModel, sequences: Tensor, kind: str) -> None:
    reader = TeacherReader(teacher) if kind == "teacher" else ConvertedReader(converted(teacher, SPEC))
    text = sequences[0]
    with torch.inference_mode():
        whole = reader.hidden(text[:30])
        first = reader.begin()
        first.feed(text[:20])
        second = first.fork()
        second.feed(sequences[1][:9])
        torch.testing.assert_close(first.feed(text[20:30]), whole[20:], rtol=1e-4, atol=1e-4)


def test_predictions_that_are_no_numbers_stop_the_evaluation(teacher: PreTrainedModel, sequences: Tensor) -> None:
    model = converted(teacher, SPEC)
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="the row window-only computes NaN"):
        score_tokens(make_rows(teacher, model).readers, sequences[:1], no_progress)


def test_greedy_match_is_what_generating_would_give(teacher: PreTrainedModel, sequences: Tensor) -> None:
    prompts, count = sequences[:4, :60], 12
    model = converted(teacher, SPEC)
    rows = make_rows(teacher, model)
    result = measure_greedy(rows.readers, prompts, count, Bootstrap(range(4)), no_progress)

    def generate(reader: Any, prompt: Tensor) -> list[int]:
        reading_ = reader.begin()
        with torch.inference_mode():
            return cast(list[int], greedy_tokens(reader, reading_, reading_.feed(prompt), count).tolist())

    expected = []
    for prompt in prompts:
        ours, theirs = generate(rows.readers[CONVERTED], prompt), generate(rows.readers[TEACHER], prompt)
        own = cast(Any, teacher).generate(prompt[None], max_new_tokens=count, min_new_tokens=count, do_sample=False)
        assert theirs == own[0, 60:].tolist()
        expected.append(next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), count))
    assert result["rows"][CONVERTED]["match"]["value"] == pytest.approx(sum(expected) / 4)
    assert result["rows"][TEACHER]["match"] == {"value": count, "low": count, "high": count}


@pytest.mark.parametrize("state_heads", ["kv", "q"])
def test_timescales_are_those_of_the_gate(teacher: PreTrainedModel, sequences: Tensor, state_heads: Any) -> None:
    model = converted(teacher, SPEC.replace(gate="fixed", state_heads=state_heads))
    decays = torch.tensor([0.5, 0.9]) if state_heads == "kv" else torch.tensor([0.5, 0.9, 0.99, 0.0])
    for layer in model.model.layers:
        layer.self_attn.far.gate_bias.data.copy_(torch.logit(decays))
    layers = measure_timescales(model, sequences[:2], no_progress)
    assert [layer["layer"] for layer in layers] == [0, 1]
    for head, decay in zip(layers[1]["heads"], decays.tolist(), strict=True):
        assert head == pytest.approx(dict.fromkeys(("p10", "median", "p90"), 1 / (1 - decay)), rel=1e-4)


def test_timescales_vary_with_a_learned_gate_and_never_end_without_one(
    teacher: PreTrainedModel, sequences: Tensor
) -> None:
    model = converted(teacher, SPEC.replace(gate="scalar"))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.far.gate_weight, generator=torch.Generator().manual_seed(0))
    head = measure_timescales(model, sequences[:2], no_progress)[0]["heads"][0]
    assert head["p10"] < head["median"] < head["p90"]
    assert measure_timescales(converted(teacher, SPEC), sequences[:1], no_progress)[0]["heads"][0]["median"] is None


def no_hook_is_left(model: UnspoolForCausalLM) -> bool:
    return not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


def test_timescales_leave_no_hook_behind(teacher: PreTrainedModel, sequences: Tensor) -> None:
    model = converted(teacher, SPEC)

    def stop() -> None:
        raise KeyboardInterrupt

    steps: tuple[Callable[[], object], ...] = (no_progress, stop)
    measure_timescales(model, sequences[:1], steps[0])
    with pytest.raises(KeyboardInterrupt):
        measure_timescales(model, sequences[:1], steps[1])
    assert no_hook_is_left(model)
