"""What calibration fits, in which layers, and that its error is the one that the layer makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from unspool import PRESETS, UnspoolConfig
from unspool.batch import StepContext, step_context
from unspool.config import linearize_block
from unspool.errors import UserError
from unspool.mixer import Heads, LinearizedAttention
from unspool.mixer_spec import MixerSpec
from unspool.rotary import Rotary
from unspool_conversion import convert as convert_module
from unspool_conversion.bank_calibration import BankText, calibrate_bank
from unspool_conversion.bank_regression import RIDGE, Moments
from unspool_conversion.calibration import BIASES, HALF_LIVES, OFF, Teacher, _output_error, calibrate, teacher_attention
from unspool_conversion.convert import convert
from unspool_conversion.estimates import estimate_seconds
from unspool_conversion.options import CalibrationOptions, ConvertOptions, PerLayer
from unspool_conversion.plan import plan_conversion
from unspool_conversion.reports import load_report
from unspool_conversion.sources import open_source

SaveTeacher = Callable[..., Path]
StoredTensors = Callable[[Path], dict[str, torch.Tensor]]
UNCALIBRATED = ["lolcats", "liger-gla", "liger-hgrn2", "liger-gsa", "window-only"]


def options(source: Path, destination: Path, **fields: Any) -> ConvertOptions:
    defaults: dict[str, Any] = {
        "window": PerLayer(16, ()),
        "calibration": CalibrationOptions(sequences=2, length=128),
    }
    return ConvertOptions(source=str(source), destination=destination, **defaults | fields)


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def config_of(spec: MixerSpec, **fields: Any) -> UnspoolConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return UnspoolConfig(**sizes | fields, linearize=linearize_block("disjoint", spec, {}))


@pytest.mark.parametrize(
    ("overrides", "has_half_life"),
    [
        ({"gate": "scalar"}, True),
        ({"gate": "fixed", "state_heads": "q"}, True),
        ({"gate": "none"}, False),
        ({"gate": "liger"}, False),
        ({"gate": "hgrn2", "feature_map": "softmax"}, False),
    ],
    ids=lambda value: value["gate"] if isinstance(value, dict) else "",
)
def test_every_gate_of_a_disjoint_join_gets_its_weights(
    save_teacher: SaveTeacher,
    tmp_path: Path,
    stored_tensors: StoredTensors,
    overrides: dict[str, Any],
    has_half_life: bool,
) -> None:
    convert(options(save_teacher(), tmp_path / "out", overrides=overrides))
    calibration, tensors = load_report(tmp_path / "out")["calibration"], stored_tensors(tmp_path / "out")
    assert calibration["enabled"] and calibration["tokens"] == 256
    assert [layer["layer"] for layer in calibration["layers"]] == [0, 1, 2]
    for layer in calibration["layers"]:
        stored = tensors[f"model.layers.{layer['layer']}.self_attn.far.bias"]
        assert stored.tolist() == layer["bias"] and set(layer["bias"]) <= {OFF, *BIASES}
        assert layer["error_of_window_only"] <= 1.0
        assert (layer["half_life"] is not None) == has_half_life
        assert not has_half_life or (len(layer["half_life"]) == 2 and set(layer["half_life"]) <= set(HALF_LIVES))
    assert any(bias > OFF for layer in calibration["layers"] for bias in layer["bias"])
    assert any(layer["error_of_window_only"] < 1.0 for layer in calibration["layers"])


@pytest.mark.parametrize("preset", UNCALIBRATED)
def test_layers_with_nothing_to_calibrate_read_no_text(
    save_teacher: SaveTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    monkeypatch.setattr(convert_module, "calibration_tokens", pytest.fail)
    monkeypatch.setattr(convert_module, "calibrate", pytest.fail)
    convert(options(save_teacher(), tmp_path / "out", preset=preset))
    assert load_report(tmp_path / "out")["calibration"] == {"enabled": False}
    assert "Fitted on" not in (tmp_path / "out" / "README.md").read_text()


def test_lolcats_keeps_its_published_weight(
    save_teacher: SaveTeacher, tmp_path: Path, stored_tensors: StoredTensors
) -> None:
    convert(options(save_teacher(), tmp_path / "out", preset="lolcats"))
    bias = stored_tensors(tmp_path / "out")["model.layers.2.self_attn.far.bias"]
    assert torch.equal(bias, torch.full((4,), PRESETS["lolcats"].far_bias))


def test_a_named_text_that_is_not_read_is_said(
    save_teacher: SaveTeacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibration = CalibrationOptions(text=Path("prose.txt"))
    convert(options(save_teacher(), tmp_path / "out", preset="lolcats", calibration=calibration))
    assert "prose.txt is not read: no layer of this conversion is calibrated" in caplog.text


@pytest.mark.parametrize("preset", [*UNCALIBRATED, "disjoint"])
def test_the_estimate_counts_calibration_only_where_there_is_some(save_teacher: SaveTeacher, preset: str) -> None:
    plan = plan_conversion(
        open_source(str(save_teacher())), ConvertOptions(source="", destination=Path("unused"), preset=preset)
    )
    without = estimate_seconds(plan, 0)
    assert (estimate_seconds(plan, 10**9) > without) == (preset == "disjoint")


def test_a_layer_whose_output_projection_is_zero_is_left_off(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    source = save_teacher()
    change_weights(source, lambda tensors: tensors["model.layers.1.self_attn.o_proj.weight"].zero_())
    convert(options(source, tmp_path / "out"))
    layer = load_report(tmp_path / "out")["calibration"]["layers"][1]
    assert layer["error_of_window_only"] == 1.0 and set(layer["bias"]) == {OFF}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["mlp.up_proj", "self_attn.k_proj"])
def test_weights_that_are_not_finite_are_named(
    save_teacher: SaveTeacher, tmp_path: Path, name: str, value: float
) -> None:
    source = save_teacher()
    change_weights(source, lambda tensors: tensors[f"model.layers.1.{name}.weight"][0].fill_(value))
    with pytest.raises(UserError, match=rf"model\.layers\.1\.{name}\.weight holds NaN or infinite values"):
        convert(options(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_layer_that_overflows_is_named(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    source = save_teacher()
    change_weights(source, lambda tensors: tensors["model.layers.1.self_attn.v_proj.weight"].fill_(1e38))
    with pytest.raises(UserError, match="layer 1 computes NaN or infinite values on the calibration text"):
        convert(options(source, tmp_path / "out"))


@pytest.mark.parametrize("near_mass", ["softmax", "row_max"])
@torch.inference_mode()
def test_the_error_searched_is_the_error_of_the_join(near_mass: Any) -> None:
    torch.manual_seed(0)
    spec = MixerSpec(window=8, sinks=2, near_mass=near_mass)
    config = config_of(spec)
    mixer = LinearizedAttention(config, spec)
    for parameter in mixer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    assert mixer.far is not None
    mixer.far.bias.fill_(1.5)
    context = step_context((2, 40), Rotary(config), torch.float32, torch.device("cpu"))
    heads = mixer.project(torch.randn(2, 40, 32))
    target = teacher_attention(heads, context, None)
    off = mixer.join_disjoint(*mixer.attend_both(heads, context), context) - target
    image = torch.einsum("bthgd,nhgd->bthgn", off, mixer.o_proj.weight.unflatten(1, (2, 2, 8)))
    found = _output_error(mixer, *mixer.attend_both(heads, context), target).at(1.5)
    torch.testing.assert_close(found[:, 10:], image.square().sum(-1)[:, 10:], rtol=1e-3, atol=1e-5)


def test_the_embedding_is_never_converted_whole() -> None:
    spec = MixerSpec(window=8, sinks=0)
    config = config_of(spec, vocab_size=100_000)
    weights = {"model.embed_tokens.weight": torch.randn(100_000, 32).bfloat16()}

    def load(name: str) -> torch.Tensor:
        if name not in weights:
            sizes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
            sizes |= {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
            weights[name] = torch.ones(32) if "norm" in name else torch.randn(sizes[name.split(".")[-2]]) / 6
        return weights[name]

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        calibrate(Teacher(config, load, [None]), torch.randint(0, 100_000, (1, 32)), lambda done, total: None)
    largest = max(event.self_cpu_memory_usage for event in record.events())
    assert 0 < largest < weights["model.embed_tokens.weight"].nbytes


def test_a_bank_keeps_the_tokens_that_the_teacher_will_attend_to() -> None:
    """Every query looks for channel 0, and one token in ten has it: a window of the last tokens cannot hold them."""
    torch.manual_seed(0)
    spec = MixerSpec(window=8, sinks=0, bank=16)
    config = config_of(spec, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    mixer = LinearizedAttention(config, spec)
    heads, wanted = heads_with_rare_tokens(sequences=2, length=512)
    context = step_context((2, 512), Rotary(config), torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        target = teacher_attention(heads, context, None)
        report = calibrate_bank(mixer, BankText(heads, target, context.rotary), None)
        held = attended_positions(mixer, heads, context)
    assert all(aging > 0 for aging in report["bank_aging"])
    assert report["bank_error_of_longer_window"] < 0.5
    late = torch.arange(256, 512)
    rare = [len(held[t] & set(wanted[0].nonzero().flatten().tolist())) for t in late.tolist()]
    assert sum(rare) / len(rare) > 12  # of 16 rows; the last 16 tokens would hold one or two


def test_moments_of_parts_add_up_and_solve_the_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 2, 6, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0, 1.0]) + 5.0
    x[..., 5] = 7.0  # says nothing
    y = (x[..., 0] - 4.0 * x[..., 2]) + 0.1 * torch.randn(300, 2, generator=generator)
    whole = Moments.of(x, y)
    parts = Moments.of(x[:100], y[:100]).plus(Moments.of(x[100:], y[100:]))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(whole.minus(Moments.of(x[:100], y[:100])).solve(), Moments.of(x[100:], y[100:]).solve())
    for head in range(2):
        varying = x[:, head, :5].double()
        scale = varying.std(0, correction=0)
        standard = (varying - varying.mean(0)) / scale
        # Ridge regression as ordinary least squares with one more row a feature.
        rows = torch.cat([standard, (RIDGE * 300) ** 0.5 * torch.eye(5, dtype=torch.float64)])
        wanted = torch.cat([y[:, head].double() - y[:, head].double().mean(), torch.zeros(5, dtype=torch.float64)])
        expected = torch.linalg.lstsq(rows, wanted[:, None]).solution[:, 0] / scale
        torch.testing.assert_close(whole.solve()[head, :5], expected.float(), rtol=1e-4, atol=1e-5)
    assert bool((whole.solve()[:, 5] == 0).all())


def test_a_bank_on_text_that_says_nothing_is_a_longer_window() -> None:
    spec = MixerSpec(window=8, sinks=0, bank=16)
    config = config_of(spec, num_attention_heads=2, num_key_value_heads=1)
    mixer = LinearizedAttention(config, spec)
    heads, _ = heads_with_rare_tokens(sequences=1, length=24)
    context = step_context((1, 24), Rotary(config), torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        target = teacher_attention(heads, context, None)
        report = calibrate_bank(mixer, BankText(heads, target, context.rotary), None)
    assert report == {"bank_aging": [0.0], "bank_error_of_longer_window": 1.0}
    assert mixer.far is not None and mixer.far.bank is not None
    assert bool((mixer.far.bank.weight == 0).all()) and mixer.far.bank.aging.tolist() == [1.0]


def heads_with_rare_tokens(sequences: int, length: int) -> tuple[Heads, torch.Tensor]:
    """Heads whose last channel pair, which hardly rotates, says which keys every query wants; and which those are."""
    generator = torch.Generator().manual_seed(1)
    wanted = torch.rand(sequences, length, generator=generator) < 0.1
    k = 0.1 * torch.randn(sequences, length, 1, 8, generator=generator)
    k[..., 3] += 12.0 * wanted[..., None]
    q = 0.1 * torch.randn(sequences, length, 1, 2, 8, generator=generator)
    q[..., 3] += 2.0
    return Heads(q, k, torch.randn(sequences, length, 1, 8, generator=generator)), wanted


def attended_positions(mixer: LinearizedAttention, heads: Heads, context: StepContext) -> list[set[int]]:
    """What the bank of the first sequence holds at each token."""
    part = mixer.attend_near(heads, context, None)
    held, now = [], set[int]()
    for token in range(heads.k.shape[1]):
        if token - mixer.spec.window >= mixer.spec.sinks:
            now.add(token - mixer.spec.window)
        if bool(part.left[0, token]):
            now.discard(int(part.left_positions[0, token, 0]))
        held.append(set(now))
    return held
