"""Directories that appear whole or not at all."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from unspool.errors import UserError
from unspool_conversion import staging
from unspool_conversion.staging import check_destination, staged_directory


def left_behind(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def make_model(directory: Path, content: str) -> None:
    directory.mkdir()
    (directory / "conversion_report.json").write_text("{}")
    (directory / "weights").write_text(content)


def test_the_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    destination = tmp_path / "new" / "deep" / "model"
    with staged_directory(destination, 1, overwrite=False) as directory:
        (directory / "a").write_text("x")
        assert not destination.exists()
        assert directory.parent == destination.parent
    assert left_behind(destination) == {"a"}
    assert left_behind(destination.parent) == {"model"}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), staged_directory(tmp_path / "new" / "model", 1, overwrite=False) as directory:
        (directory / "a").write_text("x")
        raise failure
    assert left_behind(tmp_path) == set()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_old_model_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(staging, "_rename", lambda first, second, flag: False)
    destination = tmp_path / "model"
    make_model(destination, "old")
    check_destination(destination, 1, overwrite=True)
    with staged_directory(destination, 1, overwrite=True) as directory:
        (directory / "weights").write_text("new")
        assert (destination / "weights").read_text() == "old"
    assert (destination / "weights").read_text() == "new"
    assert left_behind(tmp_path) == {"model"}


def test_a_failure_keeps_the_old_model(tmp_path: Path) -> None:
    destination = tmp_path / "model"
    make_model(destination, "old")
    with pytest.raises(RuntimeError), staged_directory(destination, 1, overwrite=True):
        raise RuntimeError
    assert (destination / "weights").read_text() == "old"
    assert left_behind(tmp_path) == {"model"}


@pytest.mark.parametrize(
    ("content", "overwrite"),
    [("letters", True), ("letters", False), ("conversion_report.json", False), (None, False)],
)
def test_what_appears_meanwhile_stays(tmp_path: Path, content: str | None, overwrite: bool) -> None:
    destination = tmp_path / "model"
    with (
        pytest.raises(UserError, match=f"{destination} appeared meanwhile"),
        staged_directory(destination, 1, overwrite=overwrite),
    ):
        destination.mkdir()
        if content is not None:
            (destination / content).write_text("mine")
    assert left_behind(tmp_path) == {"model"}
    assert left_behind(destination) == ({content} if content else set())


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_link_that_appears_meanwhile_stays(tmp_path: Path, overwrite: bool) -> None:
    with (
        pytest.raises(UserError, match="appeared meanwhile"),
        staged_directory(tmp_path / "model", 1, overwrite=overwrite),
    ):
        (tmp_path / "model").symlink_to(tmp_path / "nowhere")
    assert (tmp_path / "model").is_symlink() and left_behind(tmp_path) == {"model"}


def test_what_appears_at_the_last_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    destination = tmp_path / "model"
    with pytest.raises(UserError, match="appeared meanwhile"), staged_directory(destination, 1, overwrite=False):
        destination.mkdir()
        inode = destination.stat().st_ino
    assert destination.stat().st_ino == inode


def test_without_the_systems_call_a_new_directory_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_rename", lambda first, second, flag: False)
    with staged_directory(tmp_path / "model", 1, overwrite=False) as directory:
        (directory / "a").touch()
    assert left_behind(tmp_path / "model") == {"a"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_bytes_and_the_place(tmp_path: Path, code: int) -> None:
    def fail() -> NoReturn:
        raise OSError(code, os.strerror(code))

    with (
        pytest.raises(UserError, match=rf"needs \d+ bytes in {tmp_path}"),
        staged_directory(tmp_path / "m", 5, overwrite=False),
    ):
        fail()
    assert left_behind(tmp_path) == set()


def test_other_operating_system_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), staged_directory(tmp_path / "m", 5, overwrite=False):
        raise PermissionError(errno.EACCES, "no")


def test_an_existing_destination_needs_overwrite(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "old")
    with pytest.raises(UserError, match=r"exists; choose another destination, or pass --overwrite"):
        check_destination(tmp_path / "model", 1, overwrite=False)


def test_overwrite_replaces_only_converted_models(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    check_destination(tmp_path / "home", 1, overwrite=True)
    (tmp_path / "home" / "letters").touch()
    with pytest.raises(UserError, match="is not a converted model"):
        check_destination(tmp_path / "home", 1, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "home")
    with pytest.raises(UserError, match="is not a converted model"):
        check_destination(tmp_path / "link", 1, overwrite=True)


def test_too_little_room_is_found_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs \d+ bytes and .* has \d+ bytes free"):
        check_destination(tmp_path / "new" / "model", 1 << 60, overwrite=False)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a directory"):
        check_destination(tmp_path / "file" / "model", 1, overwrite=False)
