"""Directories and hub ids as sources: headers without data, and everything that can be wrong with a download."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unspool.errors import UserError
from unspool_conversion.sources import open_source
from unspool_conversion.tensor_source import TensorInfo, file_sha256

SaveTeacher = Callable[..., Path]


def first_shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[0]


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_headers_and_tensors_are_the_files(save_teacher: SaveTeacher, max_shard_size: str) -> None:
    directory = save_teacher(dtype=torch.bfloat16, max_shard_size=max_shard_size)
    source = open_source(str(directory))
    stored = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert source.tensors == {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in stored.items()}
    for name, tensor in stored.items():
        assert torch.equal(source.load(name), tensor)
    assert source.config["model_type"] == "llama"


def test_provenance_names_every_weight_file_and_its_checksum(save_teacher: SaveTeacher) -> None:
    directory = save_teacher(max_shard_size="20KB")
    record = open_source(str(directory)).provenance()
    assert record["format"] == "safetensors"
    assert record["source"] == str(directory)
    paths = sorted(directory.glob("*.safetensors"))
    assert record["files"] == [{"name": p.name, "bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in paths]


def test_side_files_are_copied_and_weights_are_not(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    directory, copy = save_teacher(), tmp_path / "copy"
    copy.mkdir()
    open_source(str(directory)).write_side_files(copy)
    names = {path.name for path in copy.iterdir()}
    assert names == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    }
    for name in names:
        assert (copy / name).read_bytes() == (directory / name).read_bytes()


def test_a_source_without_tokenizer_is_refused(save_teacher: SaveTeacher, tmp_path: Path) -> None:
    directory = save_teacher()
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        open_source(str(directory)).write_side_files(tmp_path)


def lose_shard(directory: Path) -> None:
    first_shard(directory).unlink()


def truncate_shard(directory: Path) -> None:
    path = first_shard(directory)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)


def corrupt_header(directory: Path) -> None:
    with first_shard(directory).open("r+b") as file:
        file.write(b"\xff" * 32)


def rewrite_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def list_absent_tensor(directory: Path) -> None:
    rewrite_index(directory, lambda files: files.update({"ghost.weight": first_shard(directory).name}))


def forget_tensor(directory: Path) -> None:
    rewrite_index(directory, lambda files: files.pop("model.norm.weight"))


def point_outside(directory: Path) -> None:
    rewrite_index(directory, lambda files: files.update({"model.norm.weight": "../model.safetensors"}))


def empty_index(directory: Path) -> None:
    rewrite_index(directory, lambda files: files.clear())


def break_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": ')


def replace_config_by_list(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def lose_config(directory: Path) -> None:
    (directory / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_shard, r"model-00001-of-\d+\.safetensors is missing though model\.safetensors\.index\.json names it"),
        (truncate_shard, r"model-00001-of-\d+\.safetensors \(\d+ bytes\) is truncated or damaged"),
        (corrupt_header, r"is truncated or damaged"),
        (list_absent_tensor, r"does not hold ghost\.weight"),
        (forget_tensor, r"holds model\.norm\.weight, which model\.safetensors\.index\.json does not list"),
        (point_outside, r"names '\.\./model\.safetensors', which is not a file of this directory"),
        (empty_index, r"has no weight_map"),
        (break_config, r"config\.json is not valid JSON"),
        (replace_config_by_list, r"config\.json holds a list, not a JSON object"),
        (lose_config, r"config\.json is missing"),
    ],
)
def test_damage_is_named(save_teacher: SaveTeacher, damage: Callable[[Path], None], message: str) -> None:
    directory = save_teacher(max_shard_size="20KB")
    damage(directory)
    with pytest.raises(UserError, match=message):
        open_source(str(directory))


def test_quantised_tensors_are_refused(save_teacher: SaveTeacher) -> None:
    directory = save_teacher()
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is stored as I8"):
        open_source(str(directory))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "pickled weights only.*save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "pickled weights only"),
        ("adapter_model.safetensors", "is an adapter"),
        ("notes.txt", "has neither model.safetensors nor"),
    ],
)
def test_directories_without_weights_say_what_to_do(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path))


def test_several_gguf_files_need_a_choice(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match=r"holds 2 \.gguf files; pass one of them"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/path", "does not exist"),
        ("/no/such", "does not exist"),
        ("model.gguf", "does not exist"),
        ("owner/name", "hub cannot be reached"),
    ],
)
def test_what_is_not_there(name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        open_source(name)


def test_a_local_source_has_no_revision(save_teacher: SaveTeacher) -> None:
    with pytest.raises(UserError, match="has no revision 'main'"):
        open_source(str(save_teacher()), "main")


def test_a_single_file_must_be_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(UserError, match=r"is not a \.gguf file"):
        open_source(str(path))


def test_a_hub_model_that_was_downloaded_opens_offline(
    save_teacher: SaveTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(save_teacher(), cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = open_source("owner/name")
    assert source.origin() == {"format": "safetensors", "source": "owner/name", "revision": commit}
    assert source.load("model.norm.weight").shape == (32,)
    with pytest.raises(UserError, match="owner/name is not a local path, and the hub cannot be reached"):
        open_source("owner/name", "another-branch")
