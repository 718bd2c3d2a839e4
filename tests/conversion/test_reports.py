"""Report and model card: written in one step, read back strictly, measurements only once there are some."""

import json
from pathlib import Path
from typing import Any

import pytest

from unspool import PRESETS
from unspool.config import linearize_block
from unspool.errors import UserError
from unspool_conversion.reports import load_report, markdown_table, save_report, write_model_card

REPORT: dict[str, Any] = {
    "name": "tiny",
    "unspool_version": "0.1.0",
    "created": "2030-01-01T00:00:00+00:00",
    "source": {
        "format": "safetensors",
        "source": "owner/base",
        "revision": "abc",
        "files": [{"name": "model.safetensors", "bytes": 10, "sha256": "00ff"}],
    },
    "architecture": "llama",
    "linearize": linearize_block("disjoint", PRESETS["disjoint"], {2: {"join": "window", "window": 64}}),
    "exact_tokens": 260,
    "accounting": {},
    "sizes": {
        "parameters": 1234,
        "new_parameters": 34,
        "weight_bytes": 5000,
        "dtype": "float32",
        "state_bytes_per_session": 640,
        "teacher_cache_bytes_per_token": 64,
    },
    "calibration": {
        "enabled": True,
        "tokens": 4096,
        "text": "prose.txt",
        "layers": [{"half_life": [64.0]}, {"half_life": [256.0]}],
    },
}
VERIFICATION: dict[str, Any] = {
    "text": "held-out.txt",
    "sequences": 4,
    "length": 2048,
    "exactness": {"tokens": 260, "relative_difference": 1.2e-6, "same_greedy_tokens": True, "claimed": True},
    "chunking": {"tokens": 400, "by_steps": 2e-6, "by_uneven_chunks": 1e-6},
    "table": {"columns": ["", "0-256", "all"], "rows": [["teacher", 20.123456, 18.0], ["converted", 20.1, 19.5]]},
}


def card(directory: Path, report: dict[str, Any]) -> str:
    write_model_card(directory, report)
    return (directory / "README.md").read_text()


def test_a_report_survives_the_disk(tmp_path: Path) -> None:
    save_report(tmp_path, REPORT)
    report = load_report(tmp_path)
    assert report == json.loads(json.dumps({"schema_version": 1} | REPORT))
    save_report(tmp_path, report | {"verification": VERIFICATION})
    assert load_report(tmp_path)["verification"] == VERIFICATION
    assert [path.name for path in tmp_path.iterdir()] == ["conversion_report.json"]


def test_a_report_that_is_no_json_keeps_the_old_one(tmp_path: Path) -> None:
    save_report(tmp_path, REPORT)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_report(tmp_path, REPORT | {"loss": float("nan")})
    assert load_report(tmp_path)["name"] == "tiny"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no conversion_report\.json; pass a directory that `unspool convert` wrote"),
        ("{", "is not valid JSON"),
        ("[]", "has schema_version None"),
        ('{"schema_version": 99}', "has schema_version 99 and this version reads 1"),
    ],
)
def test_unreadable_reports_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "conversion_report.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_report(tmp_path)


def test_the_card_says_where_the_model_comes_from_and_what_it_costs(tmp_path: Path) -> None:
    text = card(tmp_path, REPORT)
    assert text.startswith('---\nlibrary_name: "unspool"\n')
    for part in ('base_model: "owner/base"', "# tiny\n", "00ff", "Up to 260 tokens", "| 640 |", "prose.txt"):
        assert part in text
    assert "- layer 2: join window, window 64" in text


def test_measurements_appear_after_verification(tmp_path: Path) -> None:
    assert "Not verified yet" in card(tmp_path, REPORT)
    text = card(tmp_path, REPORT | {"verification": VERIFICATION})
    assert "Not verified yet" not in text
    assert "| teacher | 20.12 | 18 |" in text


def test_the_card_says_what_was_fitted_and_where(tmp_path: Path) -> None:
    calibration: dict[str, Any] = REPORT["calibration"]
    whole = "Fitted on 4096 tokens of prose.txt: the far part's weight and half-life, in 2 of the layers."
    assert whole in card(tmp_path, REPORT)
    weight_only = calibration | {"layers": [{"half_life": None}]}
    assert "the far part's weight, in 1 of the layers." in card(tmp_path, REPORT | {"calibration": weight_only})
    text = card(tmp_path, REPORT | {"calibration": {"enabled": False}})
    assert "Fitted on" not in text and "parameters that the conversion added have their initial values" in text


def test_a_near_set_without_room_for_greedy_text_says_nothing_of_it(tmp_path: Path) -> None:
    exactness = VERIFICATION["exactness"] | {"same_greedy_tokens": None}
    text = card(tmp_path, REPORT | {"verification": VERIFICATION | {"exactness": exactness}})
    assert "1.2e-06 of the largest. Reading" in text
    assert "greedy text is the same" in card(tmp_path, REPORT | {"verification": VERIFICATION})


def test_a_mixed_model_is_exact_at_no_length(tmp_path: Path) -> None:
    assert "It approximates the source model at every length." in card(tmp_path, REPORT | {"exact_tokens": 0})


def test_a_model_without_state_is_exact_at_every_length(tmp_path: Path) -> None:
    assert "At every length it computes what the source model computes." in card(
        tmp_path, REPORT | {"exact_tokens": None}
    )


def test_a_local_source_shows_no_path(tmp_path: Path) -> None:
    source = REPORT["source"] | {"source": "/home/someone/base"}
    del source["revision"]
    text = card(tmp_path, REPORT | {"source": source})
    assert "`base`" in text and "/home/someone" not in text and "base_model" not in text


def test_cells_cannot_break_a_table() -> None:
    assert markdown_table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |\n"
