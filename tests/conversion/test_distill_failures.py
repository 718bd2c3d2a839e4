"""Training runs that cannot go on: what is said, and that nothing is lost."""

import errno
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unspool.errors import UserError
from unspool_conversion.convert import convert
from unspool_conversion.distillation import progress, student
from unspool_conversion.distillation.distill import DistillOptions, distill, run_directory
from unspool_conversion.distillation.optimization import Group, NonFiniteGradient, Optimization
from unspool_conversion.distillation.recipe_files import parse_recipe
from unspool_conversion.options import CalibrationOptions, ConvertOptions, PerLayer

SaveTeacher = Callable[..., Path]

RECIPE = """
name: tiny
length: 64
sequences: 4
lora: {rank: 2}
stages:
- {kind: %s, steps: 4, batch: 1, lora: [q_proj]}
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("A thread of any length is drawn from a spool. " * 20)
    return path


@pytest.fixture
def make_options(save_teacher: SaveTeacher, tmp_path: Path, text: Path) -> Callable[..., DistillOptions]:
    source, model = save_teacher(), tmp_path / "model"

    def make(kind: str = "layerwise", quant: str = "none", **fields: Any) -> DistillOptions:
        if not model.exists():
            calibration = CalibrationOptions(sequences=1, length=64)
            window = PerLayer(16, ())
            convert(
                ConvertOptions(
                    source=str(source), destination=model, window=window, calibration=calibration, quant=quant
                )
            )
        defaults: dict[str, Any] = {
            "model": model,
            "destination": tmp_path / "out",
            "teacher": str(source),
            "recipe": parse_recipe(RECIPE % kind, "recipe"),
            "texts": (str(text),),
        }
        return DistillOptions(**defaults | fields)

    return make


@pytest.mark.parametrize("kind", ["layerwise", "logits"])
def test_a_value_that_is_not_finite_names_stage_step_and_layer(
    make_options: Callable[..., DistillOptions], kind: str
) -> None:
    options = make_options(kind)
    path = options.model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.far.query_map"][0, 0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"stage 1 \({kind}\), step 1, layer 1: the held-out \w+ is NaN"):
        distill(options)
    assert not options.destination.exists() and progress.has_checkpoint(run_directory(options.destination))


def test_a_gradient_that_is_not_finite_is_named_and_moves_nothing() -> None:
    good, bad = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimization = Optimization([Group({"good": good, "bad": bad}, 0.1)], weight_decay=0.0, clip=1.0, noise=0.0)
    good.grad, bad.grad = torch.ones(2), torch.tensor([1.0, torch.inf])
    with pytest.raises(NonFiniteGradient, match="bad"):
        optimization.step(0, 1.0, torch.Generator())
    assert torch.equal(good, torch.ones(2)) and torch.equal(bad, torch.ones(2))


@pytest.mark.parametrize("kind", ["layerwise", "logits", "finetune"])
def test_a_full_disk_loses_no_more_than_the_last_step(
    make_options: Callable[..., DistillOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored_tensors: Callable[[Path], dict[str, torch.Tensor]],
    kind: str,
) -> None:
    text = RECIPE % kind
    if kind == "finetune":
        text = text.replace(", lora: [q_proj]", "") + "teacher: source\n"
    options = make_options(recipe=parse_recipe(text, "recipe"), checkpoint_seconds=0.0)
    distill(replace(options, destination=tmp_path / "unbroken"))
    written, real = [], progress.save_file

    def save_three_times(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
        real(tensors, path)
        written.append(path)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(progress, "save_file", save_three_times)
        with pytest.raises(UserError, match=r"cannot be written .*No space left.*--resume"):
            distill(options)
    directory = run_directory(options.destination)
    assert not list(directory.glob(".checkpoint*"))
    kept, _ = progress.load_checkpoint(directory, {})
    assert (kept.stage, kept.layer, kept.step) == (0, 0, 2)
    distill(replace(options, resume=True))
    expected = stored_tensors(tmp_path / "unbroken")
    for name, tensor in stored_tensors(options.destination).items():
        assert torch.equal(tensor, expected[name]), name


def test_another_run_is_not_resumed(make_options: Callable[..., DistillOptions], text: Path) -> None:
    options = make_options("logits")
    with pytest.raises(UserError, match="holds no run to resume; leave --resume out"):
        distill(make_options("logits", resume=True))
    run_directory(options.destination).mkdir()
    identity = {"recipe": "another"}
    progress.save_checkpoint(run_directory(options.destination), identity, progress.Progress(), {})
    with pytest.raises(UserError, match="holds a run that was stopped; pass --resume to continue it, or remove it"):
        distill(options)
    with pytest.raises(UserError, match="is a run with another recipe"):
        distill(make_options("logits", resume=True))


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    progress.save_checkpoint(tmp_path, {}, progress.Progress(), {"a": torch.ones(3)})
    state = next(tmp_path.glob("checkpoint-*")) / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-2])
    with pytest.raises(UserError, match="is damaged"):
        progress.load_checkpoint(tmp_path, {})


def test_a_trained_model_is_not_trained_again(make_options: Callable[..., DistillOptions], tmp_path: Path) -> None:
    options = make_options()
    distill(options)
    with pytest.raises(UserError, match="out is already distilled"):
        distill(make_options(model=options.destination, destination=tmp_path / "again"))
    with pytest.raises(UserError, match=r"out exists; choose another destination"):
        distill(options)


def test_quantised_weights_are_not_trained(make_options: Callable[..., DistillOptions]) -> None:
    with pytest.raises(UserError, match="is stored as int8; convert without --quant"):
        distill(make_options(quant="int8"))


def test_another_teacher_is_refused(make_options: Callable[..., DistillOptions], save_teacher: SaveTeacher) -> None:
    other = save_teacher(intermediate_size=56)
    with pytest.raises(UserError, match="has intermediate_size 56 and the model 48"):
        distill(make_options(teacher=str(other)))


def test_sequences_that_stay_near_are_refused(make_options: Callable[..., DistillOptions]) -> None:
    recipe = parse_recipe((RECIPE % "layerwise").replace("length: 64", "length: 20"), "recipe")
    with pytest.raises(UserError, match="sequences of 20 tokens never leave a near set of 20"):
        distill(make_options(recipe=recipe))


def test_the_destination_is_not_the_model(make_options: Callable[..., DistillOptions]) -> None:
    options = make_options()
    with pytest.raises(UserError, match="is the model to train from"):
        distill(make_options(destination=options.model, overwrite=True))


def test_an_adapter_without_peft_names_the_package(
    make_options: Callable[..., DistillOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package peft: pip install 'unspool\[train\]'"):
        distill(make_options("logits"))
