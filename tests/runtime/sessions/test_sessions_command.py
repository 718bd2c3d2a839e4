"""The verb `sessions` on a tiny model: as a process where that matters, and by `main` elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from unspool.cli import main
from unspool.local import LocalOptions
from unspool.requests import SamplingParams
from unspool.sessions import Place, SessionOptions, TurnRequest, default_store
from unspool.sessions.arguments import age
from unspool.sessions.local_sessions import LocalSessions, local_sessions
from unspool.sessions.report_text import format_age
from unspool.store import open_store
from unspool.store.local import LocalStore

ROOT = Path(__file__).resolve().parents[3]

GREEDY = SamplingParams(temperature=0.0)
LINES = ("A thread of any length", " is drawn from\x1b[2J a spool\nthat never grows,", " said the weaver.")

Run = Callable[..., int]


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the verb known when the package is only on the path, as an installed distribution would."""
    metadata = tmp_path / "site" / "unspool-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: unspool\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[unspool.verbs]\nsessions = unspool.sessions.command:add_sessions\n")
    monkeypatch.syspath_prepend(metadata.parent)
    monkeypatch.delenv("UNSPOOL_HOME", raising=False)
    return metadata.parent


@contextlib.contextmanager
def served(model: Path, path: Path) -> Iterator[LocalSessions]:
    """The sessions of a directory, open for writing as a server has them."""
    with (
        contextlib.closing(open_store(str(path), max_bytes=1 << 30)) as store,
        local_sessions(str(model), store, LocalOptions(), SessionOptions()) as local,
    ):
        yield local


@pytest.fixture(scope="module")
def filled(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a session of three turns, a fork and a snapshot of it, and another owner's session."""
    path = tmp_path_factory.mktemp("stores") / "filled"
    with served(chat_model, path) as (loaded, sessions):
        encode = loaded.tokenizer.encode
        sessions.create("local", "weaver")
        for line in LINES:
            request = TurnRequest(tokens=tuple(encode(line)), max_tokens=8, sampling=GREEDY)
            sessions.generate("local", "weaver", request)
            sessions.flush()
        sessions.snapshot("local", "weaver", "middle", Place(turn=2))
        sessions.fork("local", "weaver", Place(turn=2), new="fork")
        sessions.create("ann", "hers")
        sessions.append("ann", "hers", tuple(encode("Sphinx")))
    return path


@pytest.fixture
def path(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "store"))


@pytest.fixture
def run(path: Path) -> Run:
    return lambda verb, *arguments: main(["sessions", verb, "--store", str(path), *map(str, arguments)])


def process(installed: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    roots = [str(installed), *(str(ROOT / root) for root in ("runtime", "kernels"))]
    return subprocess.run(
        [sys.executable, "-c", "import sys; from unspool.cli import main; sys.exit(main())", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def record(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    value: dict[str, Any] = json.loads(line)
    return value


def change(path: Path, act: Callable[[LocalStore], object]) -> None:
    with contextlib.closing(LocalStore(path, 1 << 30)) as store:
        act(store)


def turn_keys(path: Path) -> list[str]:
    with contextlib.closing(LocalStore(path, 1 << 30, read_only=True)) as store:
        return [entry.key for entry in store.list("turns/")]


def test_list_shows_every_owners_sessions(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:3] == ["owner", "session", "tokens"]
    assert [line[:2] for line in lines[1:]] == [["ann", "hers"], ["local", "fork"], ["local", "weaver"]]
    assert lines[2][-1] == "weaver" and lines[2][-2] == "ago"
    assert run("list", "--owner", "ann", "--json") == 0
    (hers,) = record(capsys)["sessions"]
    assert (hers["owner"], hers["session"], hers["turns"], hers["forked_from"]) == ("ann", "hers", 1, None)
    assert run("list", "--owner", "nobody") == 0
    assert capsys.readouterr().out == "no sessions\n"


def test_list_is_bounded_and_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--limit", 2) == 0
    out = capsys.readouterr().out
    assert "fork" in out and out.endswith("there are more: --limit shows them\n") and out.count("\n") == 4
    assert run("list", "--limit", 3) == 0
    assert "more" not in capsys.readouterr().out


def test_list_goes_on_after_a_damaged_record(run: Run, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(path, lambda store: store.swap_head("sessions/ann/bad", None, b"{}"))
    assert run("list") == 1
    out = capsys.readouterr().out
    assert "sessions/ann/bad: the record of a session is damaged" in out
    assert " weaver" in out


def test_inspect_shows_turns_states_snapshots_and_forks(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "weaver", "--json") == 0
    found = record(capsys)
    assert (found["generation"], found["turns"], found["forks"], found["damaged"]) == (3, 3, ["fork"], None)
    assert [turn["turn"] for turn in found["log"]] == [1, 2, 3]
    assert [turn["start"] for turn in found["log"]] + [found["tokens"]] == [0] + [turn["end"] for turn in found["log"]]
    assert all(turn["generated"] == 8 and turn["finish_reason"] == "length" for turn in found["log"])
    assert all(turn["given"] + 8 == turn["end"] - turn["start"] for turn in found["log"])
    assert [(state["turn"], len(state["stored"])) for state in found["kept_states"]] == [(1, 1), (2, 1), (3, 1)]
    ((name, position),) = [(place["name"], place["position"]) for place in found["named"]]
    assert (name, position) == ("middle", found["log"][1]["end"])
    assert "text" not in found["log"][0]
    assert run("inspect", "weaver") == 0
    out = capsys.readouterr().out
    for part in ("weaver of local", "in 3 turns, generation 3", f"0-{found['log'][0]['end']}", "kB of model", "middle"):
        assert part in out


def test_inspect_shows_text_and_no_control_characters(
    run: Run, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", "weaver", "--text", "--model", chat_model, "--json") == 0
    texts = [turn["text"] for turn in record(capsys)["log"]]
    assert all(text.startswith(line) for text, line in zip(texts, LINES, strict=True))
    assert run("inspect", "weaver", "--text", "--model", chat_model) == 0
    out = capsys.readouterr().out
    assert " A thread of any length" in out and "drawn from\\x1b[2J a spool that never" in out
    assert "\x1b" not in out


def test_inspect_shows_what_is_left_of_a_damaged_log(run: Run, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("inspect", "weaver", "--json")
    lost = record(capsys)["log"][1]["id"]
    change(path, lambda store: store.delete(f"turns/{lost}"))
    assert run("inspect", "weaver", "--json") == 1
    found = record(capsys)
    assert [turn["turn"] for turn in found["log"]] == [3]
    assert f"turns/{lost}: the record of a turn is missing" in found["damaged"]
    assert run("inspect", "weaver") == 1
    assert f"turns/{lost}" in capsys.readouterr().out


def test_states_that_are_not_stored_are_said_to_be_replayed(
    run: Run, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(path, lambda store: [store.delete(entry.key) for entry in list(store.list("states/"))])
    assert run("inspect", "weaver") == 0
    assert capsys.readouterr().out.count("no: replayed when it is wanted") == 3


def test_verify_compares_bits(run: Run, chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "weaver", "--model", chat_model) == 0
    assert "in 3 turns is sound; the state at" in (out := capsys.readouterr().out)
    assert "has the same bits as a replay" in out
    assert run("verify", "--all", "--model", chat_model, "--json") == 0
    results = record(capsys)["sessions"]
    assert [result["session"] for result in results] == ["hers", "fork", "weaver"]
    assert all(result["holds"] and result["difference"]["same_bits"] for result in results)


def test_verify_fails_where_something_is_wrong_and_checks_the_others(
    run: Run, path: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("inspect", "weaver", "--json")
    last = record(capsys)["log"][2]["id"]
    change(path, lambda store: store.delete(f"turns/{last}"))
    change(path, lambda store: store.swap_head("sessions/ann/bad", None, b"{}"))
    assert run("verify", "--all", "--model", chat_model) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ann/bad", "ann/hers", "local/fork", "local/weaver"]
    assert "damaged" in lines[0] and "is missing" in lines[3]
    assert all("same bits" in line for line in lines[1:3])
    assert run("verify", "weaver", "--model", chat_model, "--json") == 1
    assert [result["holds"] for result in record(capsys)["sessions"]] == [False]
    assert run("verify", "fork", "--model", chat_model) == 0


def test_verify_passes_over_sessions_of_another_tokenizer(
    run: Run, path: Path, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(chat_model, tmp_path / "other"))
    with (other / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    assert run("verify", "--all", "--model", other) == 0
    assert capsys.readouterr().out.count("passed over: the session was made with another tokenizer") == 3
    assert run("inspect", "weaver", "--text", "--model", other) == 2
    assert "weaver was made with another tokenizer than" in capsys.readouterr().err


def test_a_session_moves_from_store_to_store(
    run: Run, path: Path, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, there = tmp_path / "weaver.session", tmp_path / "there"
    assert run("export", "weaver", "-o", file) == 0
    assert "weaver.session: " in capsys.readouterr().out
    assert file.stat().st_mode & 0o777 == 0o600
    arguments = ["sessions", "import", str(file), "--model", str(chat_model), "--store", str(there)]
    assert main([*arguments, "--owner", "bob", "--id", "copy", "--json"]) == 0
    assert record(capsys) | {"tokens": 0} == {"owner": "bob", "session": "copy", "tokens": 0, "turns": 3}
    with served(chat_model, there) as (_, sessions), served(chat_model, path) as (_, origin):
        assert sessions.tokens("bob", "copy") == origin.tokens("local", "weaver")
        moved = sessions.generate("bob", "copy", TurnRequest(max_tokens=5, sampling=GREEDY))
        stayed = origin.generate("local", "weaver", TurnRequest(max_tokens=5, sampling=GREEDY))
        assert (moved.tokens, moved.state_source, moved.replayed_tokens) == (stayed.tokens, "store", 1)
    assert main([*arguments, "--owner", "bob", "--id", "copy"]) == 2
    assert "copy: you have a session of that id" in capsys.readouterr().err


def test_export_needs_a_model_where_no_state_is_stored(
    run: Run, path: Path, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(path, lambda store: [store.delete(entry.key) for entry in list(store.list("states/"))])
    file = tmp_path / "weaver.session"
    assert run("export", "weaver", "-o", file) == 2
    assert "weaver has no stored state, which would say what made it; pass --model DST" in capsys.readouterr().err
    assert not file.exists()
    assert run("export", "weaver", "-o", file, "--model", chat_model) == 0
    assert run("import", file, "--model", chat_model, "--owner", "bob") == 0


def test_a_damaged_state_is_passed_over_by_an_export(run: Run, path: Path, chat_model: Path, tmp_path: Path) -> None:
    def damage(store: LocalStore) -> None:
        newest = max(store.list("states/"), key=lambda entry: entry.created)
        data = bytearray(store.get(newest.key) or b"")
        data[-1] ^= 1
        store.delete(newest.key)
        store.put(newest.key, data)

    change(path, lambda store: [store.delete(e.key) for e in list(store.list("states/")) if "/ann/" in e.key])
    change(path, damage)
    file = tmp_path / "weaver.session"
    assert run("export", "weaver", "-o", file) == 0
    assert run("import", file, "--model", chat_model, "--id", "copy") == 0
    with served(chat_model, path) as (_, sessions):
        result = sessions.generate("local", "copy", TurnRequest(max_tokens=2, sampling=GREEDY))
        assert result.state_source == "store" and result.replayed_tokens > 1


def test_a_signing_key_is_asked_for_and_enough(
    run: Run, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, other, file = tmp_path / "key", tmp_path / "other", tmp_path / "weaver.session"
    key.write_text("a" * 64 + "\n")
    other.write_text("b" * 64 + "\n")
    assert run("export", "weaver", "-o", file, "--signing-key-file", key) == 0
    assert capsys.readouterr().out.endswith(", signed\n")
    importing = ("import", file, "--model", chat_model)
    assert run(*importing, "--id", "one", "--signing-key-file", key) == 0
    assert run(*importing, "--id", "two", "--signing-key-file", other) == 2
    assert "was signed with another key than this server's" in capsys.readouterr().err
    assert run("export", "weaver", "-o", file) == 0
    assert run(*importing, "--id", "two", "--signing-key-file", key) == 2
    assert "is not signed" in capsys.readouterr().err


def test_gc_deletes_what_was_taken_back(
    run: Run, path: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(chat_model, path) as (_, sessions):
        sessions.rollback("local", "weaver", Place(turn=1))
        sessions.delete_snapshot("local", "weaver", "middle")
    change(path, lambda store: store.put("states/model/local/digest", b"nobody's"))
    assert run("gc") == 0
    assert capsys.readouterr().out == "deleted 0 sessions, 0 turns, 0 states, 0 in quarantine; 0 B\n"
    assert run("gc", "--older-than", "0", "--dry-run", "--json") == 0
    assert (planned := record(capsys))["turns"] == 1 and planned["dry_run"]
    assert len(turn_keys(path)) == 4
    assert run("gc", "--older-than", "0") == 0
    assert capsys.readouterr().out.startswith(f"deleted 0 sessions, 1 turns, {planned['states']} states, ")
    assert planned["states"] >= 1
    assert len(turn_keys(path)) == 3
    assert run("gc", "--older-than", "0", "--idle-days", "0") == 0
    assert capsys.readouterr().out.startswith("deleted 3 sessions, 3 turns, ")
    assert turn_keys(path) == []


def test_gc_says_why_it_deletes_no_turns(run: Run, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(path, lambda store: store.swap_head("sessions/ann/bad", None, b"{}"))
    assert run("gc", "--older-than", "0") == 1
    assert "no turns, as these records cannot be read:\nsessions/ann/bad: " in capsys.readouterr().out


def test_beside_a_server_it_reads(
    installed: Path, run: Run, path: Path, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(chat_model, path) as (_, sessions):
        sessions.append("local", "weaver", (1, 2, 3))
        listed = process(installed, "sessions", "list", "--store", path, "--json")
        assert (listed.returncode, listed.stderr) == (0, "")
        assert [found["turns"] for found in json.loads(listed.stdout)["sessions"]] == [1, 2, 4]
        assert run("inspect", "weaver", "--json") == 0
        assert len(record(capsys)["log"]) == 4
        assert run("export", "fork", "-o", tmp_path / "fork.session") == 0
        assert run("gc", "--dry-run") == 0
        assert sessions.append("local", "weaver", (4,)).generation == 5


def test_beside_a_server_it_does_not_write(
    installed: Path, run: Run, path: Path, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("export", "fork", "-o", tmp_path / "fork.session")
    capsys.readouterr()
    with served(chat_model, path) as (_, sessions):
        refused = process(installed, "sessions", "gc", "--store", path)
        assert (refused.returncode, refused.stdout) == (2, "")
        said = [refused.stderr]
        for arguments in (("verify", "weaver"), ("verify", "--all"), ("import", tmp_path / "fork.session")):
            assert run(*arguments, "--model", chat_model) == 2
            captured = capsys.readouterr()
            assert captured.out == ""
            said.append(captured.err)
        for line in said:
            assert line.startswith("unspool: error: ") and line.count("\n") == 1
            assert "is being written to by another process; stop it" in line
        assert sessions.append("local", "weaver", (4,)).generation == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nobody"], "there is no such session; list yours"),
        (["inspect", "weaver", "--owner", "ann"], "there is no such session"),
        (["inspect", "a/b"], "session: must be 1 to 64 letters"),
        (["list", "--owner", "../x"], "owner: must be 1 to 64 letters"),
        (["inspect", "weaver", "--text"], "pass --model DST"),
        (["export", "nobody", "-o", "f"], "there is no such session"),
        (["export", "weaver", "-o", "/nowhere/f"], "cannot write /nowhere/f: No such file"),
        (["export", "weaver", "-o", "f", "--signing-key-file", "/nowhere"], "signing key /nowhere cannot be read"),
        (["import", "/nowhere/f", "--model", "m"], "cannot read /nowhere/f: No such file"),
        (["verify", "weaver", "--model", "/nowhere/m"], "/nowhere/m is not a directory"),
        (["verify", "weaver", "--model", "m", "--tolerance", "-1"], "--tolerance must not be negative"),
        (["verify", "weaver", "--model", "m", "--tolerance", "nan"], "--tolerance must not be negative"),
        (["gc", "--idle-days", "-1"], "idle_days: must not be negative"),
        (["gc", "--owner", "ann"], "gc looks at every owner"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    run: Run, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("unspool: error: ") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_what_is_no_export_is_refused(
    run: Run, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f").write_bytes(b"PK\x03\x04" + bytes(100))
    assert run("import", tmp_path / "f", "--model", chat_model) == 2
    assert "unspool: error: is no exported session" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["list"], ["inspect", "s"], ["gc"], ["verify", "s", "--model", "m"]])
def test_a_store_that_is_not_there_is_not_made(
    tmp_path: Path, verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sessions", *verb, "--store", str(tmp_path / "typo")]) == 2
    assert "typo: No such file or directory" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_a_damaged_store_is_a_failure(run: Run, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path / "index.sqlite").write_bytes(b"no database at all" * 1000)
    for file in path.glob("index.sqlite-*"):
        file.unlink()
    assert run("list") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("unspool: error: ") and "is damaged" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["verify", "--model", "m"],
        ["verify", "s", "--all", "--model", "m"],
        ["import", "f"],
        ["list", "--limit", "0"],
        ["list", "--limit", "x"],
        ["gc", "--older-than", "soon"],
        ["gc", "--older-than", "-1h"],
        ["gc", "--older-than", "nan"],
    ],
)
def test_bad_usage_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sessions", *arguments])
    assert caught.value.code == 2
    assert "usage: unspool sessions" in capsys.readouterr().err


def test_the_default_store_is_in_one_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_store() == tmp_path / ".local/share/unspool/sessions"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_store() == tmp_path / "data/unspool/sessions"
    monkeypatch.setenv("UNSPOOL_HOME", str(tmp_path / "100%"))
    assert default_store() == tmp_path / "100%/sessions"
    shutil.copytree(filled, default_store())
    assert main(["sessions", "list"]) == 0
    assert "weaver" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["sessions", "list", "--help"])
    assert "100%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (3 * 3600 + 1, "3 h"), (86_400, "1 d")],
)
def test_ages_are_in_the_largest_whole_unit(seconds: float, text: str) -> None:
    assert format_age(seconds) == f"{text} ago"


def test_ages_are_read_in_any_unit() -> None:
    assert [age(text) for text in ("90", "1.5m", "2h", "7d", "0", "30s")] == [90, 90, 7200, 604_800, 0, 30]
