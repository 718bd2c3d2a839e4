"""The verb `doctor`: what it finds, and that nothing missing stops it."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unspool.doctor import add_doctor, examine
from unspool.installation import find_needs
from unspool_kernels.native.library import available

RUN = """
import argparse, sys
from unspool.doctor import add_doctor
parser = argparse.ArgumentParser()
run = add_doctor(parser)
sys.exit(run(parser.parse_args()))
"""


def doctor(*arguments: str, **environment: str) -> tuple[int, str]:
    finished = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, env=os.environ | environment
    )
    assert "Traceback" not in finished.stderr
    return finished.returncode, finished.stdout


def parsed(output: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(output)
    return record


@pytest.fixture
def incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed `unspool` that lacks two requirements, an extra's package, and the server."""
    metadata = tmp_path / "unspool-9.8.7.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: unspool\nVersion: 9.8.7\n"
        "Requires-Dist: torch>=99\nRequires-Dist: numpy>=1\nRequires-Dist: never-published-thing<3,>=2\n"
        'Requires-Dist: other-absent-thing[fast]>=1; extra == "plot"\n'
        'Requires-Dist: only-for-beos; platform_system == "BeOS" and extra == "plot"\n'
    )
    (metadata / "entry_points.txt").write_text("[unspool.verbs]\nserve = module_that_is_not_there:add_serve\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_whole_install_can_serve_and_says_what_it_has() -> None:
    code, output = doctor("--json")
    record = parsed(output)
    assert (code, record["serves"], record["problems"]) == (0, True, [])
    assert record["versions"]["torch"].startswith("2.")
    assert 1 <= record["processor"]["usable_cores"] <= record["processor"]["cores"]
    assert record["memory"]["total"] > 1 << 28
    assert {"row_state", "ring_attention"} <= record["backends"].keys()
    if available():
        assert record["native"]["instruction_sets"][record["native"]["chosen"]] is True
        assert record["bandwidth"]["read"] > 1e8
        assert all(backends["native"] for backends in record["backends"].values())


def test_the_text_is_aligned_and_ends_with_the_verdict() -> None:
    code, output = doctor()
    lines = output.splitlines()
    assert code == 0 and lines[-1].split() == ["can", "serve", "yes"]
    start = lines[-1].index("yes")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)


@pytest.mark.parametrize(
    ("variable", "reason"), [("UNSPOOL_NATIVE_LIBRARY", "cannot be loaded"), ("UNSPOOL_INSTRUCTION_SET", "not built")]
)
def test_without_the_native_library_it_says_why_and_can_still_serve(tmp_path: Path, variable: str, reason: str) -> None:
    junk = tmp_path / "junk.so"
    junk.write_bytes(b"no library")
    code, output = doctor("--json", **{variable: str(junk)})
    record = parsed(output)
    assert code == 0 and record["serves"]
    assert record["native"]["chosen"] is None and reason in record["native"]["reason"]
    assert record["bandwidth"] is None
    code, output = doctor(**{variable: str(junk)})
    assert code == 0 and reason in output and "plain PyTorch" in output


def test_unusable_folders_do_not_stop_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = doctor("--json", UNSPOOL_CACHE=str(tmp_path / "file" / "below"), OMP_NUM_THREADS="1")
    assert code == 0
    assert parsed(output)["folders"]["unspool"]["exists"] is False
    assert parsed(output)["processor"]["threads"] == 1


def test_what_is_missing_is_named_with_the_command_that_installs_it(
    incomplete: None, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    run = add_doctor(parser)
    assert run(parser.parse_args([])) == 1
    output = capsys.readouterr().out
    assert "cannot serve" in output
    assert "never-published-thing is missing: pip install 'never-published-thing<3,>=2'" in output
    assert "which does not fit: pip install 'torch>=99'" in output
    assert "numpy" not in output
    assert "the verb `serve` cannot be loaded: ModuleNotFoundError" in output
    assert "lacks other-absent-thing\n" in output and "pip install 'other-absent-thing[fast]>=1'" in output


def test_requirements_of_other_systems_are_left_out(incomplete: None) -> None:
    assert [need.name for need in find_needs()["plot"]] == ["other-absent-thing"]
    assert len(examine().problems) == 3
