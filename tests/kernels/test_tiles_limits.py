"""A machine's limits are read from what the system describes, and cautious where it describes nothing."""

import logging
import os
from pathlib import Path

import pytest

from unspool_kernels.tiles import CpuLimits


def describe(caches: Path, index: int, level: str, kind: str, size: str) -> None:
    folder = caches / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in (("level", level), ("type", kind), ("size", size)):
        (folder / name).write_text(text + "\n")


def test_caches_are_read_by_level_and_the_instruction_cache_is_not_one_of_them(tmp_path: Path) -> None:
    describe(tmp_path, 0, "1", "Data", "48K")
    describe(tmp_path, 1, "1", "Instruction", "64K")
    describe(tmp_path, 2, "2", "Unified", "1024K")
    describe(tmp_path, 3, "3", "Unified", "32M")
    limits = CpuLimits.of_machine(threads=3, instructions="avx2", caches=tmp_path)
    assert limits == CpuLimits(
        threads=3, l1d_bytes=49_152, l2_bytes=1 << 20, l3_bytes=32 << 20, vector_registers=16, vector_bytes=32
    )


@pytest.mark.parametrize("size", ["", "K", "0K", "many", "-4K"])
def test_a_cache_that_is_not_described_counts_as_small_and_is_logged(
    size: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    describe(tmp_path, 0, "1", "Data", "64K")
    describe(tmp_path, 1, "2", "Unified", size)
    with caplog.at_level(logging.INFO):
        limits = CpuLimits.of_machine(threads=1, instructions="neon", caches=tmp_path)
    assert (limits.l1d_bytes, limits.l2_bytes, limits.l3_bytes) == (64 << 10, 256 << 10, 4 << 20)
    assert "level 2" in caplog.text
    assert "level 3" in caplog.text
    assert "level 1" not in caplog.text


def test_a_system_without_the_folder_gets_cautious_limits(tmp_path: Path) -> None:
    limits = CpuLimits.of_machine(threads=1, instructions="avx512", caches=tmp_path / "nowhere")
    assert limits == CpuLimits(
        threads=1, l1d_bytes=32 << 10, l2_bytes=256 << 10, l3_bytes=4 << 20, vector_registers=32, vector_bytes=64
    )


def test_this_machine_has_limits() -> None:
    limits = CpuLimits.of_machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert limits.threads == usable
    assert limits.l1d_bytes <= limits.l2_bytes


def test_unknown_instructions_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'avx9' is not one of avx512, avx2, neon, scalar"):
        CpuLimits.of_machine(instructions="avx9")
