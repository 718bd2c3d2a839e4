import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from unspool.cli import SUMMARIES, main

ROOT = Path(__file__).resolve().parents[2]

VERB_MODULE = """
import sys
from unspool.errors import UserError
from unspool.requests import EngineDead, InvalidRequest

ERRORS = {
    "user": UserError("no such thing"),
    "request": InvalidRequest("top_p", "too high"),
    "dead": EngineDead("gone"),
    "interrupt": KeyboardInterrupt(),
    "lookup": FileNotFoundError(2, "No such file", "x"),
}

def add_spin(parser):
    parser.add_argument("--fail")
    parser.add_argument("--lines", type=int, default=1)
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--read", action="store_true")
    return run

def run(args):
    if args.read:
        sys.stdout.write(f"read {sys.stdin.read()!r}\\n")
    if args.fail:
        raise ERRORS[args.fail]
    for _ in range(args.lines):
        sys.stdout.write("spun \\U0001f9f5\\n")
    return args.code
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution `unspool` on the path with two verbs, of which one cannot be imported."""
    metadata = tmp_path / "unspool-9.8.7.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: unspool\nVersion: 9.8.7\n")
    (metadata / "entry_points.txt").write_text(
        "[unspool.verbs]\nspin = spinning_verb:add_spin\nconvert = module_that_is_not_there:add_convert\n"
    )
    (tmp_path / "spinning_verb.py").write_text(VERB_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "spinning_verb", raising=False)
    return tmp_path


def run_process(installed: Path, arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    path = os.pathsep.join([str(installed), str(ROOT / "runtime"), str(ROOT / "kernels")])
    return subprocess.run(
        ["bash", "-c", f"{sys.executable} -m unspool_entry {arguments}"],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def entry(installed: Path) -> Path:
    (installed / "unspool_entry.py").write_text("import sys\nfrom unspool.cli import main\nsys.exit(main())\n")
    return installed


def test_help_lists_the_verbs_without_importing_them(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    listed = capsys.readouterr().out
    assert f"convert {SUMMARIES['convert']}" in " ".join(listed.split())
    assert "spin from spinning_verb" in " ".join(listed.split())
    assert "spinning_verb" not in sys.modules


def test_only_the_verb_that_is_used_is_imported(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spin", "--lines", "2"]) == 0
    assert capsys.readouterr().out == "spun \U0001f9f5\n" * 2


def test_a_verbs_help_shows_its_arguments(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["spin", "--help"])
    assert "--lines" in capsys.readouterr().out


def test_version_is_the_distributions(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == "unspool 9.8.7\n"


@pytest.mark.parametrize("arguments", [["unravel"], [], ["spin", "--unknown"]])
def test_bad_usage_exits_with_two(installed: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: unspool" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        ("user", 2, "unspool: error: no such thing\n"),
        ("request", 2, "unspool: error: top_p: too high\n"),
        ("dead", 1, "unspool: error: gone\n"),
        ("interrupt", 130, ""),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(
    installed: Path, failure: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["spin", "--fail", failure]) == code
    assert capsys.readouterr().err == message


def test_the_verbs_own_exit_code_is_returned(installed: Path) -> None:
    assert main(["spin", "--code", "7"]) == 7


def test_a_reader_that_leaves_early_is_no_error(entry: Path) -> None:
    done = run_process(entry, "spin --lines 200000 | head -1; exit ${PIPESTATUS[0]}")
    assert done.returncode == 141
    assert done.stdout.decode() == "spun \U0001f9f5\n"
    assert done.stderr == b""


def test_a_terminal_that_lacks_a_character_shows_its_escape(entry: Path) -> None:
    done = run_process(entry, "spin", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout == b"spun \\U0001f9f5\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["spin", "spin --lines 200000"])
def test_output_that_finds_no_room_is_one_line_and_a_failure(entry: Path, arguments: str, unbuffered: str) -> None:
    done = run_process(entry, f"{arguments} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.stderr.decode() == "unspool: error: cannot write the output: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("redirection", ["2> /dev/full", "2>&-", "<&- >&- 2>&-"])
def test_the_code_tells_a_failure_that_cannot_be_written(entry: Path, redirection: str, unbuffered: str) -> None:
    done = run_process(entry, f"spin --fail user {redirection}", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_help_that_finds_no_room_is_a_failure(entry: Path) -> None:
    done = run_process(entry, "--help > /dev/full", PYTHONUNBUFFERED="")
    assert done.stderr.decode() == "unspool: error: cannot write the output: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("redirection", "output"), [("<&-", b"read ''\nspun \xf0\x9f\xa7\xb5\n"), (">&-", b""), ("<&- >&- 2>&-", b"")]
)
def test_a_closed_standard_stream_is_an_empty_one(entry: Path, redirection: str, output: bytes) -> None:
    done = run_process(entry, f"spin --read {redirection}")
    assert (done.returncode, done.stdout, done.stderr) == (0, output, b"")


def test_an_error_of_another_kind_is_not_taken_for_one_of_writing(installed: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["spin", "--fail", "lookup"])


def test_every_shipped_verb_has_a_summary() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["entry-points"]["unspool.verbs"]) == set(SUMMARIES)
