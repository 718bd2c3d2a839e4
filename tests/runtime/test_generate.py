"""`unspool generate` as a process, on a tiny model, against transformers' own generation of the same checkpoint."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from unspool.cli import main
from unspool.generate import MAX_PROMPT_BYTES

ROOT = Path(__file__).resolve().parents[2]

PROMPT = "The quick brown fox"


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the verb known when the package is only on the path, as an installed distribution would."""
    metadata = tmp_path / "site" / "unspool-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: unspool\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[unspool.verbs]\ngenerate = unspool.generate:add_generate\n")
    monkeypatch.syspath_prepend(metadata.parent)
    return metadata.parent


def generate(model: Path, *arguments: str) -> int:
    return main(["generate", str(model), "--temperature", "0", "--max-tokens", "24", *arguments])


def expected_text(model: Path, prompt: str, max_tokens: int = 24) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    reference: Any = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        output = reference.generate(ids, max_new_tokens=max_tokens, do_sample=False)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str) and text
    return text


def test_greedy_continuation_is_that_of_transformers(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(chat_model, "--prompt", PROMPT) == 0
    assert capsys.readouterr().out == expected_text(chat_model, PROMPT) + "\n"


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_prompt_from_a_file_or_pipe_is_read_without_its_last_newline(
    chat_model: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = f"{PROMPT} \u96ea\n"
    path = tmp_path / "prompt.txt"
    path.write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert generate(chat_model, *(["--prompt-file", str(path)] if source == "file" else [])) == 0
    assert capsys.readouterr().out == expected_text(chat_model, content[:-1]) + "\n"


def test_json_gives_the_text_and_what_it_took(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(chat_model, "--prompt", PROMPT, "--json") == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    record = json.loads(line)
    assert record["text"] == expected_text(chat_model, PROMPT)
    assert record["prompt_tokens"] == len(AutoTokenizer.from_pretrained(chat_model)(PROMPT)["input_ids"])
    assert record["finish_reason"] == "length"
    assert record["generated_tokens"] == 24
    assert 0 < record["prompt_seconds"] <= record["seconds"]


def test_the_text_ends_before_a_stop_string(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = expected_text(chat_model, PROMPT)
    stop = whole[len(whole) // 2 :][:3]
    assert generate(chat_model, "--prompt", PROMPT, "--stop", "never there", "--stop", stop, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == whole[: whole.index(stop)]
    assert record["finish_reason"] == "stop"
    assert record["generated_tokens"] < 24


def test_the_end_token_ends_the_text_and_is_not_written(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(chat_model)
    model: Any = AutoModelForCausalLM.from_pretrained(chat_model)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        produced = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    # An ordinary token, so that only the engine's stop can keep it out of the text.
    end = next(index for index in range(1, 24) if produced[index] not in produced[:index])
    model.generation_config = GenerationConfig(eos_token_id=produced[end])
    model.save_pretrained(tmp_path / "ending")
    tokenizer.save_pretrained(tmp_path / "ending")
    assert generate(tmp_path / "ending", "--prompt", PROMPT, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["finish_reason"] == "stop"
    assert record["text"] == tokenizer.decode(produced[:end])


def test_a_seed_makes_sampling_repeatable(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(chat_model), "--prompt", PROMPT, "--max-tokens", "20", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("do_sample", "greedy"), [(True, True), (False, False)])
def test_the_models_sampling_settings_hold_if_it_asks_for_sampling(
    chat_model: Path, tmp_path: Path, do_sample: bool, greedy: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "configured"
    model.mkdir()
    for file in chat_model.iterdir():
        (model / file.name).symlink_to(file)
    (model / "generation_config.json").unlink(missing_ok=True)
    (model / "generation_config.json").write_text(json.dumps({"do_sample": do_sample, "top_k": 1}))
    assert main(["generate", str(model), "--prompt", PROMPT, "--max-tokens", "24", "--temperature", "50"]) == 0
    assert (capsys.readouterr().out == expected_text(chat_model, PROMPT) + "\n") is greedy


def test_stats_go_to_standard_error(chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(chat_model, "--prompt", PROMPT, "--stats") == 0
    captured = capsys.readouterr()
    assert captured.out == expected_text(chat_model, PROMPT) + "\n"
    assert "24 tokens generated" in captured.err
    assert "bytes at any length" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "prompt"),
        (["--prompt-file", "/nowhere/at/all"], "/nowhere/at/all: No such file"),
        (["--prompt", "x", "--top-p", "0"], "top_p: must be above 0"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens: must be at least 1"),
        (["--prompt", "x", "--stop", ""], "stop"),
        (["--prompt", "x", "--threads", "0"], "threads: must be at least 1"),
        (["--prompt", "x", "--device", "nonsense"], "--device cpu"),
        (["--prompt", "x", "--repetition-penalty", "1e-320"], "repetition_penalty: must be at least 0.01"),
        (["--prompt", "x", "--top-k", "-2"], "top_k"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    chat_model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(chat_model, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("unspool: error: ") and captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("content", "message"), [(b"caf\xe9", "not UTF-8 at byte 3"), (b"x" * (MAX_PROMPT_BYTES + 1), "longer than 64 MiB")]
)
def test_a_file_that_is_no_prompt_is_refused_before_the_model_is_loaded(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompt"
    path.write_bytes(content)
    assert generate(tmp_path / "no-model", "--prompt-file", str(path)) == 2
    assert message in capsys.readouterr().err


def test_flags_are_checked_before_the_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "no-model", "--prompt", "x", "--max-tokens", "-5") == 2
    assert "max_tokens" in capsys.readouterr().err


def test_the_engines_failure_is_reported(chat_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(chat_model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(tmp_path / "broken")
    assert generate(tmp_path / "broken", "--prompt", PROMPT) == 1
    assert "unspool: error: the model's largest logit is nan" in capsys.readouterr().err


def test_an_interrupt_ends_the_process_at_once(chat_model: Path, installed: Path) -> None:
    path = os.pathsep.join([str(installed), str(ROOT / "runtime"), str(ROOT / "kernels")])
    arguments = ["generate", str(chat_model), "--prompt", PROMPT, "--max-tokens", "1000000", "--seed", "0"]
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; from unspool.cli import main; sys.exit(main())", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""
