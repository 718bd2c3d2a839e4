"""Converting to quantised weights: what is written, how much of it, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unspool import UnspoolConfig
from unspool.errors import UserError
from unspool.executor import Quant
from unspool_conversion.convert import convert, prepare
from unspool_conversion.options import CalibrationOptions, ConvertOptions, PerLayer
from unspool_conversion.reports import load_report

SaveTeacher = Callable[..., Path]
StoredTensors = Callable[[Path], dict[str, torch.Tensor]]

MATRIX = "model.layers.1.self_attn.q_proj.weight"
QUANTS: tuple[Quant, ...] = ("bf16", "fp16", "int8", "int4")


def options(source: Path, destination: Path, **fields: Any) -> ConvertOptions:
    defaults: dict[str, Any] = {"window": PerLayer(16, ()), "calibration": CalibrationOptions(enabled=False)}
    return ConvertOptions(source=str(source), destination=destination, **defaults | fields)


@pytest.mark.parametrize("quant", QUANTS)
def test_the_account_of_bytes_is_what_lies_on_disk(
    save_teacher: SaveTeacher, tmp_path: Path, stored_tensors: StoredTensors, quant: Quant
) -> None:
    source = save_teacher(attention_bias=True)
    announced = prepare(options(source, tmp_path / "out", quant=quant)).plan
    convert(options(source, tmp_path / "out", quant=quant))
    stored = stored_tensors(tmp_path / "out")
    assert sum(tensor.nbytes for tensor in stored.values()) == announced.num_bytes
    assert load_report(tmp_path / "out")["sizes"]["weight_bytes"] == announced.num_bytes
    config = UnspoolConfig.from_pretrained(tmp_path / "out")
    assert config.quantization_config == {"quant_method": "unspool", "format": quant, "group_size": 32}
    assert config.dtype == torch.float32


@pytest.mark.parametrize(
    ("quant", "matrix", "embedding"),
    [
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.float16),
        ("int8", torch.int8, torch.int8),
        ("int4", torch.uint8, torch.int8),
    ],
)
def test_only_matrices_are_rounded(
    save_teacher: SaveTeacher,
    tmp_path: Path,
    stored_tensors: StoredTensors,
    quant: Quant,
    matrix: torch.dtype,
    embedding: torch.dtype,
) -> None:
    convert(options(save_teacher(attention_bias=True, dtype=torch.bfloat16), tmp_path / "out", quant=quant))
    stored = stored_tensors(tmp_path / "out")
    assert stored[MATRIX].dtype == matrix
    assert stored["model.embed_tokens.weight"].dtype == stored["lm_head.weight"].dtype == embedding
    assert (f"{MATRIX}_scale" in stored) == (quant in ("int8", "int4"))
    assert (f"{MATRIX}_minimum" in stored) == (quant == "int4")
    for name, tensor in stored.items():
        if "norm" in name or name.endswith("bias") or "gate_weight" in name:
            assert tensor.dtype == torch.float32, name
        if name.endswith("_map"):
            assert tensor.dtype == torch.float16, name


def test_shards_do_not_change_what_is_stored(
    save_teacher: SaveTeacher, tmp_path: Path, stored_tensors: StoredTensors
) -> None:
    source = save_teacher()
    convert(options(source, tmp_path / "whole", quant="int4"))
    convert(options(source, tmp_path / "parts", quant="int4", max_shard_bytes=10_000))
    one, other = stored_tensors(tmp_path / "whole"), stored_tensors(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_calibration_is_that_of_the_float_weights(
    save_teacher: SaveTeacher, tmp_path: Path, stored_tensors: StoredTensors
) -> None:
    source, calibration = save_teacher(), CalibrationOptions(sequences=2, length=64)
    stored = []
    for quant in ("none", "int4"):
        convert(options(source, tmp_path / quant, quant=quant, calibration=calibration))
        stored.append(stored_tensors(tmp_path / quant))
    name = "model.layers.1.self_attn.far.bias"
    assert torch.equal(stored[0][name], stored[1][name])


@pytest.mark.parametrize(
    ("quant", "value", "reason"),
    [
        ("int8", torch.nan, "int8 cannot keep"),
        ("int4", 3e6, "int4 cannot keep"),
        ("fp16", -7e4, "beyond the range of float16"),
    ],
)
def test_a_weight_that_the_format_cannot_hold_is_named(
    save_teacher: SaveTeacher, tmp_path: Path, quant: Quant, value: float, reason: str
) -> None:
    source = save_teacher()
    tensors = load_file(source / "model.safetensors")
    tensors[MATRIX][3, 4] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{MATRIX} holds values .*{reason}.*; use --quant bf16|{reason}"):
        convert(options(source, tmp_path / "out", quant=quant))
    assert not (tmp_path / "out").exists()


def test_dtype_and_quant_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--quant int8 .*--dtype; leave one out"):
        options(tmp_path, tmp_path / "out", quant="int8", dtype="bfloat16")
