"""Identities: every file that decides what a state means changes the fingerprint that names it, and no other does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unspool import UnspoolConfig
from unspool.errors import UserError
from unspool.store import StateIdentity, identity, identity_of


def identity_at(path: Path) -> StateIdentity:
    config = UnspoolConfig.from_pretrained(path)
    return identity_of(path, config, weight_format="float32", state_dtype=torch.float32)


@pytest.fixture
def model(chat_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chat_model, tmp_path / "model"))


def flip_a_bit(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=1))


def test_a_copy_has_the_same_identity(chat_model: Path, model: Path) -> None:
    assert identity_at(model) == identity_at(chat_model)
    assert identity_at(model).difference(identity_at(chat_model)) == []
    for field in ("weights", "config", "tokenizer", "template"):
        fingerprint = getattr(identity_at(model), field)
        assert len(fingerprint) == 64 and int(fingerprint, 16) >= 0
    assert (identity_at(model).depth, identity_at(model).state_dtype) == (2, "float32")


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "one bit of the weights": (lambda path: flip_a_bit(path / "model.safetensors"), ["weights"]),
    "weights with a byte more": (
        lambda path: (path / "model.safetensors").open("ab").write(b"\0"),
        ["weights"],
    ),
    "weights under another name": (
        lambda path: (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors"),
        ["weights"],
    ),
    "more weights": (lambda path: (path / "model-2.safetensors").write_bytes(b""), ["weights"]),
    "a wider window": (lambda path: edit(path / "config.json", rms_norm_eps=1e-5), ["config"]),
    "another release of transformers": (lambda path: edit(path / "config.json", transformers_version="9.9"), []),
    "another path": (lambda path: edit(path / "config.json", _name_or_path="elsewhere"), []),
    "one bit of the vocabulary": (lambda path: flip_a_bit(path / "tokenizer.json"), ["tokenizer"]),
    "one more token file": (lambda path: (path / "added_tokens.json").write_text("{}"), ["tokenizer"]),
    "another template": (lambda path: (path / "chat_template.jinja").write_text("{{ messages }}"), ["template"]),
    "no template": (lambda path: (path / "chat_template.jinja").unlink(), ["template"]),
    "another model card": (lambda path: (path / "README.md").write_text("better"), []),
}


@pytest.mark.parametrize(("change", "fields"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_named(model: Path, change: Callable[[Path], object], fields: list[str]) -> None:
    before = identity_at(model)
    change(model)
    assert before.difference(identity_at(model)) == fields


def test_a_template_is_found_in_either_place(model: Path) -> None:
    """Older checkpoints keep it in tokenizer_config.json; a file of its own comes first."""
    (model / "chat_template.jinja").write_text("{{ messages }}")
    in_file = identity_at(model)
    edit(model / "tokenizer_config.json", chat_template="{{ other }}")
    assert in_file.difference(identity_at(model)) == ["tokenizer"]
    edit(model / "tokenizer_config.json", chat_template="{{ messages }}")
    (model / "chat_template.jinja").unlink()
    assert identity_at(model).template == in_file.template


def test_the_executor_s_formats_count(chat_model: Path) -> None:
    config = UnspoolConfig.from_pretrained(chat_model)
    plain = identity_at(chat_model)
    packed = identity_of(chat_model, config, weight_format="int8", state_dtype=torch.float16)
    assert plain.difference(packed) == ["weight_format", "state_dtype"]


def test_pieces_on_threads_are_in_order(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapping two pieces, or moving the border between two files, changes the fingerprint."""
    monkeypatch.setattr(identity, "PIECE_BYTES", 1000)
    data = (model / "model.safetensors").read_bytes()
    assert len(data) > 20_000
    found = {identity_at(model).weights}
    for changed in (
        data[1000:2000] + data[:1000] + data[2000:],
        data[2000:3000] + data[:2000] + data[3000:],
        data[:-1000],
        data[:-1],
    ):
        (model / "model.safetensors").write_bytes(changed)
        found.add(identity_at(model).weights)
    (model / "model-2.safetensors").write_bytes(data[-1000:])
    (model / "model.safetensors").write_bytes(data[:-1000])
    found.add(identity_at(model).weights)
    assert len(found) == 6


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "has no model"),
        (
            lambda path: (path / "tokenizer_config.json").write_text("{") and (path / "chat_template.jinja").unlink(),
            "damaged",
        ),
        (lambda path: (path / "config.json").unlink(), "config.json: No such file"),
        (lambda path: (path / "config.json").write_text("[]"), "is not a JSON object"),
    ],
)
def test_what_cannot_be_read_is_named(model: Path, break_it: Callable[[Path], object], message: str) -> None:
    config = UnspoolConfig.from_pretrained(model)
    break_it(model)
    with pytest.raises(UserError, match=message):
        identity_of(model, config, weight_format="float32", state_dtype=torch.float32)
