import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from unspool.errors import UserError
from unspool.flags import add_flags, from_flags
from unspool.requests import SamplingParams
from unspool.sizes import ByteSize


@dataclass(frozen=True, kw_only=True)
class Weaving:
    threads: int = field(metadata={"help": "how many, of 100%"})
    tension: float = 0.5
    pattern_name: str = "twill"
    mode: Literal["hand", "loom"] = field(default="hand", metadata={"help": "by what"})
    level: Literal[1, 2] = 1
    tight: bool = False
    seed: int | None = None
    output: Path | None = None
    memory: ByteSize | None = None
    colours: tuple[str, ...] = field(default=(), metadata={"flag": False})

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError("threads: must be at least 1")


def parse(arguments: list[str], defaults: dict[str, Any] | None = None) -> Weaving:
    parser = argparse.ArgumentParser()
    add_flags(parser, Weaving, defaults)
    return from_flags(parser.parse_args(arguments), Weaving)


def test_flags_that_are_not_given_leave_the_class_its_defaults() -> None:
    assert parse(["--threads", "3"]) == Weaving(threads=3)


def test_every_type_is_read_from_its_annotation() -> None:
    words = "--threads 3 --tension 1e-2 --pattern-name plain --mode loom --level 2 --tight --seed -7 --output a/b"
    assert parse([*words.split(), "--memory", "1.5GiB"]) == Weaving(
        threads=3,
        tension=0.01,
        pattern_name="plain",
        mode="loom",
        level=2,
        tight=True,
        seed=-7,
        output=Path("a/b"),
        memory=ByteSize(3 << 29),
    )


def test_defaults_replace_those_of_the_class_and_yield_to_flags() -> None:
    defaults = {"threads": 9, "tight": True}
    assert parse([], defaults) == Weaving(threads=9, tight=True)
    assert parse(["--no-tight", "--threads", "2"], defaults) == Weaving(threads=2)


def test_later_defaults_fill_only_what_was_not_given() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, SamplingParams)
    args = parser.parse_args(["--top-k", "3"])
    assert from_flags(args, SamplingParams, {"top_k": 9, "min_p": 0.25}) == SamplingParams(top_k=3, min_p=0.25)


def test_fields_that_are_no_flags_are_given_as_values() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Weaving)
    args = parser.parse_args(["--threads", "1"])
    assert from_flags(args, Weaving, colours=("red",)).colours == ("red",)
    with pytest.raises(SystemExit):
        parser.parse_args(["--threads", "1", "--colours", "red"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --threads"),
        (["--threads", "x"], "--threads: invalid int value: 'x'"),
        (["--threads", "1", "--mode", "foot"], "invalid choice: 'foot'"),
        (["--threads", "1", "--level", "3"], "invalid choice: 3"),
        (["--threads", "1", "--memory", "2 cows"], "argument --memory: '2 cows' is not a size like 500MB or 2GiB"),
    ],
)
def test_a_bad_value_is_a_usage_error(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_value_that_the_class_refuses_is_a_user_error() -> None:
    with pytest.raises(UserError, match="threads: must be at least 1"):
        parse(["--threads", "0"])


def test_help_shows_each_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "how many, of 100%" in text
    assert "by what (default: hand)" in text
    assert "--tight, --no-tight" in text


def test_a_type_that_no_flag_can_have_is_an_error() -> None:
    @dataclass(frozen=True)
    class Unreadable:
        sizes: tuple[int, ...] = ()

    with pytest.raises(TypeError, match="sizes"):
        add_flags(argparse.ArgumentParser(), Unreadable)


def test_a_default_for_no_field_is_an_error() -> None:
    with pytest.raises(ValueError, match="colour"):
        add_flags(argparse.ArgumentParser(), Weaving, {"colour": "red"})
