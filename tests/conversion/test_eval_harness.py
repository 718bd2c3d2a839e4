"""lm-evaluation-harness on every row, with a task whose data lies beside it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unspool.errors import UserError
from unspool_conversion.convert import convert
from unspool_conversion.evaluation import harness
from unspool_conversion.evaluation.command import EvaluationOptions, evaluate
from unspool_conversion.evaluation.harness import check_harness
from unspool_conversion.options import CalibrationOptions, ConvertOptions, PerLayer

SaveTeacher = Callable[..., Path]
TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [{"question": f"{word * 12}:", "choices": [" a", " b", " c"], "answer": 1} for word in ("oak", "elm")]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    file = tmp_path / "tiny_choice.yaml"
    file.write_text(TASK.format(data=data))
    return file


def test_every_row_answers(save_teacher: SaveTeacher, tmp_path: Path, task: Path) -> None:
    source, model, text = save_teacher(), tmp_path / "out", tmp_path / "text.txt"
    text.write_text("Of this text only its length matters here. " * 20)
    calibration = CalibrationOptions(enabled=False)
    convert(ConvertOptions(source=str(source), destination=model, window=PerLayer(8, ()), calibration=calibration))
    options = EvaluationOptions(
        model=model, teacher=str(source), text=text, length=64, tasks=("timescales",), lm_eval=(str(task),)
    )
    rows = evaluate(options)["lm_eval"]["rows"]
    assert list(rows) == ["teacher", "window-only", "window-only, equal bytes", "state-only", "converted"]
    metrics = [row["tiny_choice"]["acc"] for row in rows.values()]
    assert all(metric["value"] in (0.0, 0.5, 1.0) for metric in metrics)
    assert all(metric["low"] <= metric["value"] <= metric["high"] for metric in metrics)
    assert "tiny_choice acc" in (model / "README.md").read_text()


def test_tasks_that_are_unknown_or_without_data_are_named(tmp_path: Path, task: Path) -> None:
    check_harness([str(task)])
    with pytest.raises(UserError, match="--lm-eval no_such_task cannot be loaded"):
        check_harness(["no_such_task"])
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(UserError, match="tiny_choice.yaml cannot be loaded .*whose data is in the cache"):
        check_harness([str(task)])


def test_a_missing_harness_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        check_harness(["arc_easy"])
