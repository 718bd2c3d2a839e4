"""The real model: SmolLM2-135M-Instruct as a user gets it, and its conversion by the command a user types."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from unspool_conversion.default_model import fetch_gguf

ROOT = Path(__file__).resolve().parents[2]
Unspool = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def unspool_command() -> Path:
    """The installed command, beside this interpreter."""
    return Path(sys.executable).with_name("unspool")


@pytest.fixture(scope="session")
def run_unspool(unspool_command: Path) -> Unspool:
    """Runs a verb to its end and returns what it printed."""

    def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [str(unspool_command), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        return result

    return run


@pytest.fixture(scope="session")
def prose() -> Path:
    """Four passages of a novel that calibration does not read."""
    return ROOT / "deploy" / "demo" / "prose.jsonl"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    return fetch_gguf()


@pytest.fixture(scope="session")
def smollm2_teacher(smollm2_gguf: Path) -> PreTrainedModel:
    """transformers' own Llama with the file's weights, in float32."""
    teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    return teacher.eval()


@pytest.fixture(scope="session")
def smollm2(run_unspool: Unspool, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default conversion: window 256, 4 sinks, calibrated."""
    directory = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct-unspool"
    run_unspool("convert", smollm2_gguf, directory)
    return directory
