"""Whole conversions of tiny teachers: the tensors are the source's, and the model computes what the teacher does."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from unspool import UnspoolConfig
from unspool.errors import UserError
from unspool.loading import load
from unspool_conversion import convert as convert_module
from unspool_conversion.architectures import UNCHANGED, naming_of
from unspool_conversion.convert import Progress, convert
from unspool_conversion.options import CalibrationOptions, ConvertOptions, PerLayer
from unspool_conversion.plan import PlannedTensor
from unspool_conversion.reports import load_report
from unspool_conversion.tensor_source import file_sha256
from unspool_conversion.writer import split_into_shards, write_shards

SaveTeacher = Callable[..., Path]
StoredTensors = Callable[[Path], dict[str, torch.Tensor]]

CALIBRATION = CalibrationOptions(sequences=2, length=64)
TEACHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {"head_dim": 16},
    "llama-multi-query": {"num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "ministral": {"model_type": "ministral", "head_dim": 8, "sliding_window": 400},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}


def options(source: Path, destination: Path, **fields: Any) -> ConvertOptions:
    defaults: dict[str, Any] = {"window": PerLayer(16, ()), "calibration": CALIBRATION}
    return ConvertOptions(source=str(source), destination=destination, **defaults | fields)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_converted_model_is_the_teacher_while_the_text_is_near(
    save_teacher: SaveTeacher, tmp_path: Path, stored_tensors: StoredTensors, name: str
) -> None:
    source = save_teacher(**TEACHERS[name])
    result = convert(options(source, tmp_path / "out"))
    kept = {tensor.name: tensor.source for tensor in result.plan.sourced}
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    assert sorted(kept.values(), key=str) == sorted(before)
    for ours, theirs in kept.items():
        assert torch.equal(after[ours], before[str(theirs)])
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    student = load(tmp_path / "out").model
    tokens = torch.randint(0, 258, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "teacher",
    [
        {"model_type": "mistral", "sliding_window": 12},
        {"model_type": "ministral", "head_dim": 8, "sliding_window": 20},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 0},
    ],
    ids=["mistral", "ministral", "qwen2"],
)
def test_a_teacher_with_short_windows_is_kept_at_every_length(
    save_teacher: SaveTeacher, tmp_path: Path, teacher: dict[str, Any]
) -> None:
    source = save_teacher(**teacher)
    result = convert(options(source, tmp_path / "out"))
    assert result.plan.exact_tokens is None and not result.plan.new
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    student = load(tmp_path / "out").model
    tokens = torch.randint(0, 258, (1, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, reference(tokens).logits, rtol=1e-4, atol=1e-4)


def test_an_exaone_is_a_llama_under_other_names(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    source = save_teacher(tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    teacher = AutoModelForCausalLM.from_pretrained(source)
    naming = naming_of("safetensors", "exaone")
    names = {name: naming.to_source(name) for name, _ in teacher.named_parameters()}
    tensors = {
        mapped.name: teacher.get_parameter(name).detach() for name, mapped in names.items() if mapped is not None
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((source / "config.json").read_text()) | {"model_type": "exaone"}
    for ours, theirs in (("num_hidden_layers", "num_layers"), ("hidden_act", "activation_function")):
        fields[theirs] = fields.pop(ours)
    fields["layer_norm_epsilon"] = fields.pop("rms_norm_eps")
    (source / "config.json").write_text(json.dumps(fields))
    convert(options(source, tmp_path / "out"))
    student = load(tmp_path / "out").model
    assert student.config.base_model_type == "exaone"
    tokens = torch.randint(0, 258, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, teacher(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
def test_dtypes(
    save_teacher: SaveTeacher, tmp_path: Path, stored_tensors: StoredTensors, stored: torch.dtype, asked: str
) -> None:
    source = save_teacher(dtype=stored)
    convert(options(source, tmp_path / "out", dtype=asked, calibration=CalibrationOptions(enabled=False)))
    expected = stored if asked == "auto" else getattr(torch, asked)
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    for name, tensor in after.items():
        assert tensor.dtype == (torch.float32 if ".far." in name else expected)
        if ".far." not in name:
            assert torch.equal(tensor, before[name].to(expected))
    assert UnspoolConfig.from_pretrained(tmp_path / "out").dtype == expected
    model = load(tmp_path / "out").model
    assert model.lm_head.weight.dtype == expected


def test_a_weight_that_float16_cannot_hold_is_named(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    source = save_teacher()
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = -7e4
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    message = r"model\.layers\.1\.mlp\.up_proj\.weight exceeds float16's range; use --dtype bfloat16"
    with pytest.raises(UserError, match=message):
        convert(options(source, tmp_path / "out", dtype="float16", calibration=CalibrationOptions(enabled=False)))
    assert not (tmp_path / "out").exists()
    convert(options(source, tmp_path / "out", dtype="bfloat16"))


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    loaded: list[weakref.ref[torch.Tensor]] = []
    names = ("a", "b", "c", "d")

    def load_one(name: str) -> torch.Tensor:
        alive = [reference for reference in loaded if reference() is not None]
        assert len(alive) == names.index(name) % 2
        tensor = torch.ones(4)
        loaded.append(weakref.ref(tensor))
        return tensor

    tensors = [PlannedTensor(name, name, UNCHANGED, (4,), torch.float32) for name in names]
    write_shards(tmp_path, split_into_shards(tensors, 32), load_one, lambda done, total: None)
    assert len(loaded) == 4


def test_sharding_does_not_change_the_model(
    save_teacher: SaveTeacher, tmp_path: Path, stored_tensors: StoredTensors
) -> None:
    source = save_teacher(max_shard_size="20KB")
    whole = convert(options(source, tmp_path / "whole"))
    convert(options(source, tmp_path / "parts", max_shard_bytes=40_000))
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert (tmp_path / "whole" / "model.safetensors").is_file() and len(parts) > 2
    assert all(path.stat().st_size < 45_000 for path in parts)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole.plan.num_bytes
    assert set(index["weight_map"].values()) == {path.name for path in parts}
    one, other = stored_tensors(tmp_path / "whole"), stored_tensors(tmp_path / "parts")
    assert one.keys() == other.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    load(tmp_path / "parts")


def test_tokenizer_generation_configuration_and_licence_come_along(
    save_teacher: SaveTeacher, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    convert(options(save_teacher(), tmp_path / "out"))
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("Hello, wörld").input_ids == tokenizer("Hello, wörld").input_ids
    assert found.chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.7
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do as you like.\n"


def test_the_report_says_what_was_done(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    source = save_teacher("qwen3", head_dim=16)
    result = convert(options(source, tmp_path / "out", preset="lolcats", window=PerLayer(16, ((1, 1, 32),))))
    report = load_report(tmp_path / "out")
    assert report == {"schema_version": 1} | json.loads(json.dumps(result.report))
    assert report["architecture"] == "qwen3"
    assert report["linearize"]["preset"] == "lolcats"
    assert report["linearize"]["layers"] == {"1": {"window": 32}}
    assert report["source"]["files"][0]["sha256"] == file_sha256(source / "model.safetensors")
    assert report["calibration"] == {"enabled": False}
    assert report["sizes"]["weight_bytes"] == result.plan.num_bytes


def test_calibration_can_be_left_out(save_teacher: SaveTeacher, tmp_path: Path, stored_tensors: StoredTensors) -> None:
    convert(options(save_teacher(), tmp_path / "out", calibration=CalibrationOptions(enabled=False)))
    after = stored_tensors(tmp_path / "out")
    assert torch.equal(after["model.layers.0.self_attn.far.bias"], torch.full((4,), -6.0))
    assert load_report(tmp_path / "out")["calibration"] == {"enabled": False}


def test_progress_runs_to_the_end(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    layers: list[tuple[int, int]] = []
    written: list[tuple[int, int]] = []
    progress = Progress(
        calibrated=lambda done, total: layers.append((done, total)),
        written=lambda done, total: written.append((done, total)),
    )
    result = convert(options(save_teacher(), tmp_path / "out", max_shard_bytes=40_000), progress)
    assert layers[-1] == (3, 3)
    assert len(written) > 2 and written[-1] == (result.plan.num_bytes, result.plan.num_bytes)


def test_files_can_be_read_by_others(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    convert(options(save_teacher(), tmp_path / "out"))
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_an_interrupt_leaves_nothing_and_keeps_the_old_model(
    save_teacher: SaveTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = save_teacher(), tmp_path / "models" / "out"
    convert(options(source, destination))
    before = {path.name: path.read_bytes() for path in destination.iterdir()}

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    stop = Progress(calibrated=interrupt, written=interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(options(source, destination, overwrite=True, window=PerLayer(32, ())), stop)
    assert [path.name for path in destination.parent.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in destination.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        convert(options(source, tmp_path / "models" / "other"), stop)
    assert [path.name for path in destination.parent.iterdir()] == ["out"]
    convert(options(source, destination, overwrite=True, window=PerLayer(32, ())))
    assert load(destination).model.config.near_tokens == 36


@pytest.mark.parametrize("below", [False, True])
def test_the_source_is_never_its_own_destination(save_teacher: SaveTeacher, below: bool) -> None:
    source = save_teacher()
    (source / "conversion_report.json").write_text("{}")
    destination = source if not below else source.parent
    with pytest.raises(UserError, match=r"holds the source's model\.safetensors"):
        convert(options(source, destination, overwrite=True))


def test_a_tokenizer_of_another_model_is_refused(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    source = save_teacher(vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with pytest.raises(UserError, match=r"the tokenizer has token 257 and the model's vocab_size is 200"):
        convert(options(source, tmp_path / "models" / "out"))
    assert not (tmp_path / "models").exists()


def test_a_tokenizer_that_needs_code_is_refused(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    source = save_teacher()
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        convert(options(source, tmp_path / "out"))


def test_nothing_is_read_when_the_destination_is_taken(
    save_teacher: SaveTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(convert_module, "check_tied_head", pytest.fail)
    with pytest.raises(UserError, match="exists; choose another destination"):
        convert(options(save_teacher(), tmp_path / "out"))
