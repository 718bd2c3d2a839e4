"""The keyword arguments of `LLM`, each of which is an option of one of its parts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from unspool import LLM
from unspool.engine import EngineOptions
from unspool.llm.options import LLMArguments, StoreOptions, read_options
from unspool.local import LocalOptions
from unspool.requests import InvalidRequest
from unspool.sessions import SessionOptions


def test_every_option_of_the_parts_is_an_argument() -> None:
    parts = (LocalOptions, EngineOptions, SessionOptions, StoreOptions)
    names = [field.name for part in parts for field in fields(part)]
    assert len(names) == len(set(names)), "a name means one thing"
    inside = {"max_queue"}
    for_exports = {"signing_key", "max_import_bytes"}
    assert set(LLMArguments.__annotations__) == set(names) - inside - for_exports


def test_each_part_gets_its_own() -> None:
    local, engine, sessions, store = read_options(
        {"quant": "int8", "threads": None, "max_slots": 300, "prefix_cache": "2MB", "state_memory": 5, "store": "x"}
    )
    assert (local, sessions.state_memory) == (LocalOptions(quant="int8"), 5)
    assert (engine.max_slots, engine.prefix_cache, engine.max_queue) == (300, 2_000_000, 300)
    assert store == StoreOptions(store="x")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quant", "int3"),
        ("dtype", "float8"),
        ("backend", "cpu"),
        ("state_dtype", "bfloat16"),
        ("max_slots", 0),
        ("max_slots", "8"),
        ("threads", 0),
        ("prefix_cache", "lots"),
        ("store_bytes", -1),
        ("store_bytes", 0),
        ("slot_memory", 1.5j),
        ("lease_seconds", True),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_loaded(name: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        LLM(tmp_path / "no-model", **{name: value})  # type: ignore[arg-type]


def test_an_argument_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'tensor_parallel_size'"):
        LLM(tmp_path, tensor_parallel_size=2)  # type: ignore[call-arg]


def test_too_little_memory_for_a_slot_is_refused(chat_model: Path) -> None:
    with pytest.raises(InvalidRequest, match="slot_memory: holds no slot"):
        LLM(chat_model, slot_memory="1KB")


def test_defaults_come_from_the_models_generation_config(chat_model: Path, tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    warm.mkdir()
    for file in chat_model.iterdir():
        (warm / file.name).write_bytes(file.read_bytes())
    end = AutoTokenizer.from_pretrained(chat_model).eos_token_id
    (warm / "generation_config.json").write_text(
        f'{{"do_sample": true, "temperature": 0.25, "top_k": 9, "eos_token_id": {end}}}'
    )
    with LLM(warm) as llm:
        assert (llm.default_params.temperature, llm.default_params.top_k, llm.default_params.max_tokens) == (
            0.25,
            9,
            16,
        )


def test_importing_the_package_loads_no_engine() -> None:
    program = (
        "import sys, unspool; loaded = {'unspool.llm', 'unspool.engine', 'unspool.sessions'} & set(sys.modules);"
        "assert not loaded, loaded; from unspool import LLM, SamplingParams, StructuredOutput, Place;"
        "assert set(unspool.__all__) <= set(dir(unspool)); assert not hasattr(unspool, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
