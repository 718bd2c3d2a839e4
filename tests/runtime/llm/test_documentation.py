"""The snippets of docs/python.md, run in order as one program on the tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unspool.llm.options import LLMArguments

PAGE = Path(__file__).resolve().parents[3] / "docs" / "python.md"


def test_every_snippet_runs(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model-dir").symlink_to(chat_model)
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text("utf-8")
    names: dict[str, object] = {"__name__": "snippets"}
    snippets = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(snippets) == text.count("```python")
    for snippet in snippets:
        # Blank lines before it, so that an error names the page's line.
        first = text.count("\n", 0, snippet.start(1))
        exec(compile("\n" * first + snippet[1], str(PAGE), "exec"), names)
    assert " store 1\n" in capsys.readouterr().out, "the session was found again"


def test_every_argument_is_described() -> None:
    table = re.findall(r"^\| (`.*?) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    described = {name for row in table for name in re.findall(r"`(\w+)`", row)}
    assert described == set(LLMArguments.__annotations__)
