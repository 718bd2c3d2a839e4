"""What a conversion takes of the machine: memory of about a shard, and a full disk that leaves nothing behind."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from unspool.errors import UserError
from unspool_conversion.convert import Progress, convert
from unspool_conversion.options import CalibrationOptions, ConvertOptions

CONVERT = """
import resource, sys
from pathlib import Path
from unspool_conversion.convert import convert
from unspool_conversion.options import CalibrationOptions, ConvertOptions
from unspool.errors import UserError

source, destination, shard, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def peak():
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
before = peak()
options = ConvertOptions(source=source, destination=destination, max_shard_bytes=shard,
                         calibration=CalibrationOptions(enabled=False))
try:
    convert(options)
except UserError as error:
    sys.exit(str(error))
print(peak() - before)
"""


def run_convert(source: Path, destination: Path, shard: int, limit: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CONVERT, str(source), str(destination), str(shard), str(limit)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def large_teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """300 MB of random bfloat16 weights in shards of 30 MB."""
    directory = tmp_path_factory.mktemp("large") / "teacher"
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=9,
        num_attention_heads=16,
        num_key_value_heads=16,
        bos_token_id=256,
        eos_token_id=257,
    )
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    teacher.save_pretrained(directory, max_shard_size="30MB")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_peak_memory_is_about_a_shard_not_the_model(large_teacher: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in large_teacher.glob("*.safetensors"))
    finished = run_convert(large_teacher, tmp_path / "out", 30_000_000)
    assert finished.returncode == 0, finished.stderr
    assert size > 290_000_000
    assert int(finished.stdout) < 130_000_000


def test_a_file_the_system_refuses_leaves_nothing(large_teacher: Path, tmp_path: Path) -> None:
    destination = tmp_path / "models" / "out"
    finished = run_convert(large_teacher, destination, 30_000_000, limit=20_000_000)
    assert finished.returncode == 1
    assert "writing failed (File too large): the converted model needs" in finished.stderr
    assert not destination.parent.exists()


def test_a_disk_that_fills_up_leaves_nothing(save_teacher: Callable[..., Path], small_disk: Path) -> None:
    def fill(done: int, total: int) -> None:
        with (small_disk / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass

    options = ConvertOptions(
        source=str(save_teacher()),
        destination=small_disk / "out",
        max_shard_bytes=20_000,
        calibration=CalibrationOptions(enabled=False),
    )
    with pytest.raises(UserError, match=rf"writing failed \(No space left on device\).* bytes in {small_disk}"):
        convert(options, Progress(calibrated=fill, written=fill))
    assert [path.name for path in small_disk.iterdir()] == ["other"]
