"""The kernels in Triton's interpreter, in a process that knows of it from its start: no GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unspool_kernels.triton import missing

HERE = Path(__file__).parent
STALLED_SECONDS = 60
"""After which the process prints where it stands: no test of it takes more than a few."""


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's already")
@pytest.mark.parametrize("name", ["test_laws.py", "test_norms.py"])
def test_the_interpreted_kernels_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        f"faulthandler_timeout={STALLED_SECONDS}",
    ]
    finished = subprocess.run([*command, str(HERE / name)], capture_output=True, text=True, timeout=800)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout, finished.stdout
