"""Opening checkpoint directories, whole ones and damaged ones."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unspool.errors import UserError
from unspool.loading import load

ROOT = Path(__file__).resolve().parents[2]

Damage = Callable[[Path], object]

QUIET_LOAD = """
import sys
from transformers.utils import logging
from unspool.loading import load
before = logging.get_verbosity(), logging.is_progress_bar_enabled()
load(sys.argv[1])
assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
"""


@pytest.fixture
def model(chat_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(chat_model, tmp_path / "model"))


def configure(**fields: Any) -> Damage:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def write(name: str, content: bytes) -> Damage:
    return lambda path: (path / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda path: (path / name).unlink()


def truncate_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")


def break_index(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def test_a_whole_model_loads_with_its_tokenizer(model: Path) -> None:
    loaded = load(model)
    assert loaded.name == "model"
    assert loaded.eos_ids == {loaded.tokenizer.eos_token_id}
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (truncate_weights, r"model\*\.safetensors"),
        (remove("model.safetensors"), r"model\.safetensors"),
        (pickle_weights, r"no file named model\.safetensors"),
        (break_index, r"model\*\.safetensors"),
        (write("config.json", b"\xff\x00\x80"), "config.json"),
        (write("config.json", b"{"), "config.json"),
        (write("config.json", b"[]"), "config.json: is not a JSON object"),
        (configure(hidden_size="abc"), "config.json.*hidden_size"),
        (configure(hidden_size=64), "mismatched keys in the weights, first lm_head.weight"),
        (configure(intermediate_size=1 << 40), "mismatched keys in the weights, first model.layers.0.mlp"),
        (configure(tie_word_embeddings=True, attention_bias=True), "missing keys in the weights, first model.layers.0"),
        (configure(hidden_act="nope"), "config.json.*nope"),
        (configure(linearize={"join": 5}), "config.json.*default"),
        (remove("tokenizer.json"), r"tokenizer\*\.json"),
        (write("tokenizer.json", b"{"), r"tokenizer\*\.json"),
        (write("tokenizer.json", b"{}"), r"tokenizer\*\.json"),
        (write("tokenizer_config.json", b"[]"), r"tokenizer\*\.json"),
        (write("chat_template.jinja", b"\xff"), r"chat_template\.jinja"),
        (write("generation_config.json", b"{"), "generation_config.json"),
        (write("generation_config.json", b"\xff"), "generation_config.json"),
        (write("generation_config.json", b"[]"), "generation_config.json"),
        (write("generation_config.json", b'{"eos_token_id": [1, "x"]}'), "generation_config.json: eos_token_id"),
        (write("generation_config.json", b'{"do_sample": true, "top_p": 7}'), "generation_config.json: top_p"),
        (write("generation_config.json", b'{"do_sample": true, "top_p": "x"}'), "generation_config.json"),
    ],
)
def test_damage_is_one_line_that_names_the_part_and_the_remedy(model: Path, damage: Damage, part: str) -> None:
    damage(model)
    with pytest.raises(UserError, match=f"^{model}.*{part}.*convert (it|the model) again$"):
        load(model)


@pytest.mark.parametrize("device", ["nonsense", "meta", "vulkan"])
def test_a_device_that_cannot_be_used_is_a_user_error(model: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"^device '{device}' cannot be used: .*; try --device cpu$"):
        load(model, device=device)


@pytest.mark.parametrize(
    ("settings", "defaults"),
    [
        ({"do_sample": True, "temperature": 0.3, "top_k": 5}, {"temperature": 0.3, "top_k": 5}),
        ({"do_sample": True, "top_k": -1, "min_p": 0.2}, {"top_k": -1, "min_p": 0.2}),
        ({"do_sample": False, "temperature": 0.3}, {}),
        ({"temperature": 0.3}, {}),
    ],
)
def test_sampling_defaults_are_those_of_a_model_that_asks_for_sampling(
    model: Path, settings: dict[str, Any], defaults: dict[str, Any]
) -> None:
    (model / "generation_config.json").write_text(json.dumps(settings))
    assert load(model).sampling_defaults == defaults


def test_a_model_without_a_generation_configuration_ends_where_its_configuration_says(model: Path) -> None:
    (model / "generation_config.json").unlink()
    loaded = load(model)
    assert loaded.eos_ids == {loaded.tokenizer.eos_token_id}
    assert loaded.sampling_defaults == {}


def test_loading_writes_nothing_where_there_is_no_terminal(model: Path) -> None:
    (model / "generation_config.json").write_text('{"temperature": 0.5}')  # transformers warns of this
    path = os.pathsep.join([str(ROOT / "runtime"), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", QUIET_LOAD, str(model)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
