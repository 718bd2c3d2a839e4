"""Options to layers: presets, overrides, per-layer numbers, and the teacher's own windows."""

from pathlib import Path
from typing import Any

import pytest

from unspool import UnspoolConfig
from unspool.errors import UserError
from unspool.mixer_spec import MixerSpec
from unspool_conversion.distillation.adapter import layers_of
from unspool_conversion.options import ConvertOptions, parse_per_layer
from unspool_conversion.shipped_adapters import find_adapter, shipped_adapters


def specs(teacher_windows: list[int | None], **fields: Any) -> tuple[MixerSpec, ...]:
    options = ConvertOptions(source="x", destination=Path("y"), **fields)
    linearize = options.linearize(teacher_windows, 2048)
    config = UnspoolConfig(num_hidden_layers=len(teacher_windows), linearize=linearize)
    return config.mixer_specs()


def test_numbers_for_all_layers_and_for_some() -> None:
    assert parse_per_layer("256") == (256, ())
    assert parse_per_layer("256,0-3=512,7=64") == (256, ((0, 3, 512), (7, 7, 64)))
    assert parse_per_layer("7=64") == (None, ((7, 7, 64),))


@pytest.mark.parametrize("text", ["", "x", "256,128", "3-1=5", "0-3", "-1", "1=2=3"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"neither|ends before"):
        parse_per_layer(text)


def test_a_later_exception_wins_and_the_rest_keeps_the_default() -> None:
    found = specs([None] * 5, window=parse_per_layer("32,0-2=64,1=128"), sinks=parse_per_layer("4=0"))
    assert [spec.window for spec in found] == [64, 128, 64, 32, 32]
    assert [spec.sinks for spec in found] == [4, 4, 4, 4, 0]


def test_overrides_change_the_preset() -> None:
    (spec,) = specs([None], preset="lolcats", overrides={"state_heads": "kv"})
    assert (spec.gate, spec.window, spec.state_heads) == ("none", 64, "kv")


def test_a_teacher_window_that_fits_the_near_set_is_kept_exactly() -> None:
    found = specs([60, 61, 64, None], window=parse_per_layer("56"))
    assert [(spec.join, spec.window, spec.sinks) for spec in found[:1]] == [("window", 60, 0)]
    assert all((spec.join, spec.window, spec.sinks) == ("disjoint", 56, 4) for spec in found[1:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "magic"}, "preset 'magic' is not known; choose from disjoint"),
        ({"window": parse_per_layer("9=5")}, "layer 9 does not exist; the model has layers 0 to 1"),
        ({"window": parse_per_layer("0")}, "window=0 must be a number between 1"),
        ({"overrides": {"feature_map": "identity"}}, "feature_map='identity'"),
    ],
)
def test_impossible_layers_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        specs([None, None], **fields)


def test_an_adapter_is_a_shipped_name_or_a_directory(tmp_path: Path) -> None:
    assert find_adapter(str(tmp_path)) == tmp_path
    assert "smollm2-135m-instruct" in shipped_adapters()
    for name in shipped_adapters():
        assert layers_of(find_adapter(name))["default"]["window"] >= 1
    with pytest.raises(UserError, match="neither a directory .* nor one of .*smollm2-135m-instruct"):
        find_adapter(str(tmp_path / "nowhere"))
