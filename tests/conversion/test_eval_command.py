"""The verb `eval`, from command line to report, model card, JSON and plot."""

import argparse
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unspool.errors import UserError
from unspool.loading import load
from unspool_conversion.convert import convert
from unspool_conversion.evaluation.command import add_eval
from unspool_conversion.evaluation.corpus import read_corpus
from unspool_conversion.evaluation.study import DEFAULT_TASKS
from unspool_conversion.options import CalibrationOptions, ConvertOptions, PerLayer
from unspool_conversion.reports import load_report

SaveTeacher = Callable[..., Path]
ROWS = ["teacher", "window-only", "window-only, equal bytes", "state-only", "converted"]
QUICK = ("--sequences", "6", "--length", "120", "--trials", "3", "--distances", "2,4")


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    evaluate = add_eval(parser)
    return evaluate(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Six documents of random words."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(6):
        letters = torch.randint(26, (80, 5), generator=generator).tolist()
        documents.append(" ".join("".join(string.ascii_lowercase[letter] for letter in word) for word in letters))
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture
def pair(save_teacher: SaveTeacher, tmp_path: Path) -> tuple[Path, Path]:
    """A teacher and what it was converted to, with a window of 16."""
    return convert_one(save_teacher(), tmp_path / "out")


def convert_one(source: Path, destination: Path, preset: str = "disjoint") -> tuple[Path, Path]:
    options = {"preset": preset, "window": PerLayer(16, ()), "calibration": CalibrationOptions(enabled=False)}
    convert(ConvertOptions(source=str(source), destination=destination, **options))  # type: ignore[arg-type]
    return source, destination


def test_everything_lands_in_report_card_and_plot(
    pair: tuple[Path, Path], held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = pair
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    files = ("--json", numbers, "--plot", picture)
    assert run(model, "--teacher", source, "--text", held_out, *QUICK, *files) == 0
    captured = capsys.readouterr()
    evaluation = load_report(model)["evaluation"]
    assert evaluation == json.loads(numbers.read_text())
    assert set(DEFAULT_TASKS) <= set(evaluation)
    for task in ("nll", "recall", "greedy", "needle", "mqar"):
        assert list(evaluation[task]["rows"]) == ROWS, task
    assert list(evaluation["nll"]["positions"]) == ["0-64", "64-120", "far", "all"]
    assert list(evaluation["needle"]["rows"]["converted"]) == ["32", "64"]
    assert evaluation["documents"] == 6 and len(evaluation["timescales"]) == 3
    card = (model / "README.md").read_text()
    for part in (captured.out, "### Likelihood by position", "### Pass key", "### Timescales", "| state-only |"):
        assert part in card
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "likelihood" in captured.err and "needle" in captured.err


def test_json_on_stdout_is_nothing_else(
    pair: tuple[Path, Path], held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = pair
    assert run(model, "--teacher", source, "--text", held_out, *QUICK, "--tasks", "timescales", "--json") == 0
    evaluation = json.loads(capsys.readouterr().out)
    assert "nll" not in evaluation and evaluation == load_report(model)["evaluation"]


def test_a_model_without_state_is_warned_of_loudly(
    save_teacher: SaveTeacher, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = convert_one(save_teacher(), tmp_path / "out", "window-only")
    assert run(model, "--teacher", source, "--text", held_out, *QUICK) == 0
    evaluation = load_report(model)["evaluation"]
    assert "state-only" not in evaluation["nll"]["rows"]
    assert evaluation["left_out"] == {"state-only": "no layer of this model has a state"}
    nothing, bytes_ = evaluation["warnings"]
    assert "within noise of nothing" in nothing and "does not earn its bytes" in bytes_
    errors = capsys.readouterr().err
    card = (model / "README.md").read_text()
    for warning in evaluation["warnings"]:
        assert f"unspool eval: WARNING: {warning}" in errors and f"**Warning**: {warning}" in card


def test_evaluating_and_verifying_keep_each_others_results(pair: tuple[Path, Path], held_out: Path) -> None:
    from unspool_conversion.verify import VerifyOptions, verify

    source, model = pair
    assert run(model, "--teacher", source, "--text", held_out, *QUICK, "--tasks", "nll") == 0
    options = {"teacher": str(source), "text": held_out, "sequences": 2, "length": 96, "parity_tokens": 20}
    verify(VerifyOptions(model=model, **options))  # type: ignore[arg-type]
    report = load_report(model)
    assert report["verification"]["passed"] and "nll" in report["evaluation"]
    card = (model / "README.md").read_text()
    assert "Not verified yet" not in card and "Not evaluated yet" not in card


def test_perplexities_of_eval_and_verify_agree(pair: tuple[Path, Path], held_out: Path) -> None:
    from unspool_conversion.verify import VerifyOptions, verify

    source, model = pair
    assert run(model, "--teacher", source, "--text", held_out, *QUICK, "--tasks", "nll") == 0
    options = {"teacher": str(source), "text": held_out, "sequences": 18, "length": 120, "parity_tokens": 20}
    corpus = read_corpus(held_out, load(model).tokenizer, 18, 120)
    table = verify(VerifyOptions(model=model, **options))["table"]  # type: ignore[arg-type]
    assert corpus.sequences.shape[0] == 18 and corpus.documents == (0, 1, 2, 3, 4, 5) * 3
    assert run(model, "--teacher", source, "--text", held_out, *QUICK, "--sequences", "18", "--tasks", "nll") == 0
    rows = load_report(model)["evaluation"]["nll"]["rows"]
    for name, *perplexities in table["rows"]:
        ours = [rows[name][at]["perplexity"]["value"] for at in ("0-64", "64-120", "all")]
        assert ours == pytest.approx(perplexities, rel=1e-4), name


def test_every_document_gives_one_sequence_before_any_gives_two(pair: tuple[Path, Path], held_out: Path) -> None:
    tokenizer = load(pair[1]).tokenizer
    corpus = read_corpus(held_out, tokenizer, 8, 100)
    assert corpus.documents == (0, 1, 2, 3, 4, 5, 0, 1) == corpus.units
    one = held_out.with_suffix(".txt")
    one.write_text("All of this is a single document. " * 20)
    alone = read_corpus(one, tokenizer, 3, 100)
    assert alone.num_documents == 1 and alone.units == (0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "nll,juggling"), r"--tasks: there is no task 'juggling'; the tasks are nll, recall"),
        (("--length", "40"), r"--length 40 hardly leaves the near set of 20 tokens.*use at least 86"),
        (("--length", "5000"), r"gives 0 sequences of 5000 tokens and an interval takes two: use a longer text"),
        (("--distances", "500"), r"does not fill the 8048 tokens .* use a longer text, or smaller --distances"),
        (("--distances", "0.5"), r"--distances are windows .* from 1 to 1024"),
        (("--sequences", "1"), r"--sequences must be at least 2"),
        (("--trials", "0"), r"--trials must be at least 2"),
        (("--plot", "a.jpg"), r"a\.jpg must end in \.png"),
        (("--plot", "a.png", "--tasks", "timescales"), r"--plot draws nll, needle and mqar"),
        (("--lm-eval", "none.yaml"), r"--lm-eval none\.yaml cannot be loaded"),
        (("--device", "cuda:77"), r"device 'cuda:77' cannot be used"),
    ],
)
def test_what_cannot_be_measured_is_named(
    pair: tuple[Path, Path], held_out: Path, arguments: tuple[str, ...], message: str
) -> None:
    before = load_report(pair[1])
    with pytest.raises(UserError, match=message):
        run(pair[1], "--teacher", pair[0], "--text", held_out, *QUICK, *arguments)
    assert load_report(pair[1]) == before


def test_a_missing_report_text_or_teacher_is_named(
    pair: tuple[Path, Path], held_out: Path, save_teacher: SaveTeacher, tmp_path: Path
) -> None:
    source, model = pair
    with pytest.raises(UserError, match=r"has no conversion_report\.json; pass a directory"):
        run(source, "--teacher", source, "--text", held_out, *QUICK)
    with pytest.raises(UserError, match="does not exist; pass a .txt or .jsonl"):
        run(model, "--teacher", source, "--text", tmp_path / "nowhere.txt", *QUICK)
    with pytest.raises(UserError, match="--teacher .*nothing"):
        run(model, "--teacher", tmp_path / "nothing", "--text", held_out, *QUICK)
    other = save_teacher(vocab_size=300)
    with pytest.raises(UserError, match="has another vocabulary than .*name its own teacher"):
        run(model, "--teacher", other, "--text", held_out, *QUICK)


def test_distances_that_are_no_numbers_are_bad_usage(pair: tuple[Path, Path], held_out: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run(pair[1], "--teacher", pair[0], "--text", held_out, "--distances", "far")
    assert "is not a list of numbers like 2,4,8" in capsys.readouterr().err
