"""The verb `verify` on converted tiny teachers, down to a near set of one token."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unspool.executor import Quant
from unspool_conversion.convert import convert
from unspool_conversion.options import CalibrationOptions, ConvertOptions, PerLayer
from unspool_conversion.reports import load_report
from unspool_conversion.verification import TOLERANCE, Exactness, measure_divergence
from unspool_conversion.verify import add_verify

SaveTeacher = Callable[..., Path]


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    path.write_text(json.dumps({"text": "What left the window is kept in a state of one size. " * 8}) + "\n")
    return path


@pytest.mark.parametrize(("window", "sinks", "same"), [(1, 0, None), (1, 1, True), (16, 4, True)])
def test_a_converted_model_passes_and_says_what_was_compared(
    save_teacher: SaveTeacher, tmp_path: Path, held_out: Path, window: int, sinks: int, same: bool | None
) -> None:
    source, destination = save_teacher(), tmp_path / "out"
    near = {"window": PerLayer(window, ()), "sinks": PerLayer(sinks, ())}
    calibration = CalibrationOptions(enabled=False)
    convert(ConvertOptions(source=str(source), destination=destination, calibration=calibration, **near))
    parser = argparse.ArgumentParser()
    verify = add_verify(parser)
    numbers = ["--sequences", "1", "--length", "96", "--parity-tokens", "40"]
    assert (
        verify(parser.parse_args([str(destination), "--teacher", str(source), "--text", str(held_out), *numbers])) == 0
    )
    exactness = load_report(destination)["verification"]["exactness"]
    assert exactness["tokens"] == window + sinks and exactness["same_greedy_tokens"] is same
    card = (destination / "README.md").read_text()
    assert ("greedy text is the same" in card) == (same is True)


def test_different_greedy_text_fails_and_no_greedy_text_does_not() -> None:
    assert Exactness(10, TOLERANCE / 2, True).passed
    assert Exactness(1, TOLERANCE / 2, None).passed
    assert not Exactness(10, TOLERANCE / 2, False).passed
    assert not Exactness(1, TOLERANCE * 2, None).passed


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_quantised_model_reports_its_divergence_and_claims_nothing(
    save_teacher: SaveTeacher, tmp_path: Path, held_out: Path, quant: Quant
) -> None:
    source, destination = save_teacher(), tmp_path / "out"
    calibration = CalibrationOptions(enabled=False)
    options = ConvertOptions(
        source=str(source), destination=destination, calibration=calibration, window=PerLayer(16, ()), quant=quant
    )
    assert convert(options).plan.exact_tokens == 0
    parser = argparse.ArgumentParser()
    verify = add_verify(parser)
    numbers = ["--sequences", "1", "--length", "96", "--parity-tokens", "40"]
    assert (
        verify(parser.parse_args([str(destination), "--teacher", str(source), "--text", str(held_out), *numbers])) == 0
    )
    result = load_report(destination)["verification"]
    assert result["exactness"]["claimed"] is False
    rounding = result["rounding"]
    assert rounding["format"] == quant and rounding["tokens"] == 20
    assert 0 < rounding["divergence"] < (0.02 if quant == "int8" else 1.0)
    card = (destination / "README.md").read_text()
    assert f"rounded to {quant}" in card and f"{rounding['divergence']:.2g} nats a token" in card
    assert "It approximates the source model at every length." in card


def test_divergence_is_zero_for_the_same_predictions_and_known_for_others() -> None:
    tokens = torch.arange(6)
    logits = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0))

    def predicting(values: torch.Tensor) -> Any:
        return lambda prompt, use_cache: SimpleNamespace(logits=values)

    assert measure_divergence(predicting(logits), predicting(logits), tokens) == 0.0
    other = logits.roll(1, -1)
    p, q = logits[0].softmax(-1), other[0].softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert measure_divergence(predicting(other), predicting(logits), tokens) == pytest.approx(expected, rel=1e-5)
