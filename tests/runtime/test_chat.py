"""`unspool chat` as a process: through pipes, and at a pseudo-terminal."""

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from unspool.chat import Conversation
from unspool.cli import main
from unspool.local import LocalEngine, LocalOptions, TextRequest
from unspool.requests import InvalidRequest, SamplingParams
from unspool.text import render_chat

ROOT = Path(__file__).resolve().parents[2]

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the verb known when the package is only on the path, as an installed distribution would."""
    metadata = tmp_path / "site" / "unspool-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: unspool\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[unspool.verbs]\nchat = unspool.chat:add_chat\n")
    monkeypatch.syspath_prepend(metadata.parent)
    return metadata.parent


@pytest.fixture
def engine(chat_model: Path) -> Iterator[LocalEngine]:
    with LocalEngine.open(str(chat_model), LocalOptions()) as engine:
        yield engine


def chat(model: Path, monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    return main(["chat", str(model), "--temperature", "0", "--max-tokens", "12", *arguments])


def answer_to(engine: LocalEngine, messages: list[dict[str, str]]) -> str:
    prompt = render_chat(engine.loaded.tokenizer, messages)
    return "".join(engine.generate(TextRequest(prompt=prompt, max_tokens=12, sampling=GREEDY)))


def test_each_line_of_a_pipe_is_a_message_and_the_history_is_kept(
    chat_model: Path, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "system", "content": "Be brief."}]
    expected = []
    for text in ("Hello there", "And again"):
        messages.append({"role": "user", "content": text})
        expected.append(answer_to(engine, messages))
        messages.append({"role": "assistant", "content": expected[-1]})
    assert chat(chat_model, monkeypatch, "Hello there\n\nAnd again\n", "--system", "Be brief.") == 0
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)


def test_reset_forgets_the_conversation_but_not_the_system_message(engine: LocalEngine) -> None:
    conversation = Conversation(engine, GREEDY, 12, "Be brief.")
    first = "".join(conversation.answer("Hello there"))
    assert "".join(conversation.answer("Hello there")) != first
    conversation.reset()
    assert "".join(conversation.answer("Hello there")) == first


def test_commands_are_not_messages(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(chat_model, monkeypatch, "/help\n/reset\n/unknown\n/exit\nnever read\n") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("/reset") and captured.out.count("\n") == 4
    assert captured.err == "unknown command /unknown; /help lists the commands\n"


def test_an_answer_that_was_cut_is_said_to_be(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(chat_model, monkeypatch, "Hello there\n") == 0
    assert "cut after 12 tokens; --max-tokens" in capsys.readouterr().err


def test_an_interrupted_answer_is_remembered_as_far_as_it_came(engine: LocalEngine) -> None:
    conversation = Conversation(engine, GREEDY, 100_000, None)
    pieces = conversation.answer("Hello there")
    shown = [next(pieces), next(pieces)]
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt())
    follow_up = Conversation(engine, GREEDY, 8, None)
    follow_up._messages = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "".join(shown)},
    ]
    conversation._max_tokens = 8
    assert "".join(conversation.answer("Go on")) == "".join(follow_up.answer("Go on"))


def test_a_refused_message_is_forgotten(engine: LocalEngine) -> None:
    conversation = Conversation(engine, GREEDY, 12, None)
    first = "".join(Conversation(engine, GREEDY, 12, None).answer("Hello there"))
    with pytest.raises(InvalidRequest):
        list(conversation.answer("\ud83d"))
    assert "".join(conversation.answer("Hello there")) == first


def test_a_model_without_a_template_cannot_chat(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "plain"
    model.mkdir()
    for file in chat_model.iterdir():
        if file.name != "chat_template.jinja":
            (model / file.name).symlink_to(file)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    assert tokenizer.chat_template is None
    assert chat(model, monkeypatch, "Hello\n") == 2
    assert "no chat template" in capsys.readouterr().err


def test_input_that_is_no_text_is_a_user_error(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert main(["chat", str(chat_model)]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def with_template(model: Path, template: str, path: Path) -> Path:
    """A copy of the model with another chat template."""
    shutil.copytree(model, path)
    (path / "chat_template.jinja").write_text(template)
    return path


def test_a_refused_message_ends_a_piped_conversation(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_template(chat_model, "{{ 1/0 }}", tmp_path / "broken")
    assert chat(model, monkeypatch, "hi\nyo\n") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "unspool: error: messages: the model's chat template refuses them: division by zero\n"


def test_flags_are_checked_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(tmp_path / "no-model", monkeypatch, "hi\nyo\n", "--max-tokens", "-5") == 2
    assert capsys.readouterr().err == "unspool: error: max_tokens: must be at least 1\n"


def test_input_that_cannot_be_read_is_a_user_error(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "unreadable").open("w") as file, open(file.fileno(), closefd=False) as unreadable:
        monkeypatch.setattr(sys, "stdin", unreadable)
        assert main(["chat", str(chat_model)]) == 2
    assert "cannot read standard input: Bad file descriptor" in capsys.readouterr().err


@pytest.fixture
def endless_model(chat_model: Path, tmp_path: Path) -> Path:
    """The same model without an end token."""
    copy = tmp_path / "endless"
    shutil.copytree(chat_model, copy)
    for name in ("config.json", "generation_config.json"):
        record = json.loads((copy / name).read_text("utf-8"))
        (copy / name).write_text(json.dumps(record | {"eos_token_id": []}), "utf-8")
    return copy


def chat_command(model: Path, installed: Path) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a process that chats, with answers that only an interrupt ends."""
    path = os.pathsep.join([str(installed), str(ROOT / "runtime"), str(ROOT / "kernels")])
    command = "import sys; from unspool.cli import main; sys.exit(main())"
    arguments = [sys.executable, "-c", command, "chat", str(model), "--max-tokens", "1000000", "--temperature", "0"]
    return arguments, {**os.environ, "PYTHONPATH": path, "TERM": "dumb"}


def test_an_interrupt_ends_a_piped_conversation(endless_model: Path, installed: Path) -> None:
    arguments, environment = chat_command(endless_model, installed)
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, env=environment, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Hello there\nAnd again\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, errors) == (130, b"")


class Terminal:
    """A process at a pseudo-terminal."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._unread = ""
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            arguments, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)

    def read_until(self, wanted: str, timeout: float = 60) -> str:
        """What comes up to `wanted`; the rest stays for the next call."""
        deadline = time.monotonic() + timeout
        while wanted not in self._unread:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{wanted!r} did not come; got {self._unread!r}"
            self._unread += os.read(self._master, 4096).decode(errors="replace")
        seen, _, self._unread = self._unread.partition(wanted)
        return seen

    def interrupt_until(self, wanted: str) -> None:
        """Ctrl-C, pressed again where nothing came of it.

        One that arrives after Python's readline wrote its prompt and before it waits for input is seen at the next key.
        """
        for _ in range(10):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(AssertionError):
                self.read_until(wanted, timeout=5)
                return
        raise AssertionError(f"{wanted!r} did not come after ten interrupts; got {self._unread!r}")

    def write(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(endless_model: Path, installed: Path) -> Iterator[Terminal]:
    opened = Terminal(*chat_command(endless_model, installed))
    yield opened
    opened.close()


def test_an_interrupt_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    hint = "(/exit or Ctrl-D leaves)"
    terminal.read_until("> ")
    for _ in range(2):
        terminal.write("Hello there\n")
        terminal.read_until("Hello there\r\n")
        time.sleep(0.5)
        terminal.process.send_signal(signal.SIGINT)
        answer = terminal.read_until("\n> ")
        assert answer and hint not in answer
    terminal.interrupt_until(hint)
    terminal.read_until("> ")
    terminal.write("/exit\n")
    assert terminal.process.wait(timeout=60) == 0


def test_a_refused_message_does_not_end_a_conversation_at_a_terminal(
    chat_model: Path, installed: Path, tmp_path: Path
) -> None:
    terminal = Terminal(*chat_command(with_template(chat_model, "{{ 1/0 }}", tmp_path / "broken"), installed))
    try:
        terminal.read_until("> ")
        for _ in range(2):
            terminal.write("Hello there\n")
            terminal.read_until("messages: the model's chat template refuses them: division by zero")
            terminal.read_until("> ")
        terminal.write("/exit\n")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.close()
