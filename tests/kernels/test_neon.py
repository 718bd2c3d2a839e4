"""The NEON kernels give the bits of the plain C++ ones, with a processor that has dot products of bytes and without."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed"),
    pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"{EMULATOR} is not installed"),
]

KERNELS = Path(__file__).parents[2] / "kernels" / "native"
SOURCES = Path(__file__).parent / "native"
FLAGS = ["-std=c++17", "-O1", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno", f"-I{KERNELS}"]
INSTRUCTION_SETS = {
    "scalar": ["-DUNSPOOL_SCALAR"],
    "neon": ["-march=armv8-a+simd", "-DUNSPOOL_NEON"],
    "neon_dotprod": ["-march=armv8.2-a+dotprod", "-DUNSPOOL_NEON"],
}
LIBRARY = [KERNELS / "library.cpp", KERNELS / "threads.cpp", SOURCES / "neon_against_scalar.cpp"]


def compile_object(source: Path, flags: list[str], target: Path) -> Path:
    command = [COMPILER, *FLAGS, *flags, "-c", str(source), "-o", str(target)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return target


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neon")
    jobs = [(source, ["-DUNSPOOL_HAS_NEON"], folder / f"{source.stem}.o") for source in LIBRARY]
    for name, flags in INSTRUCTION_SETS.items():
        for source in ("compared_functions", "simd_results"):
            jobs.append((SOURCES / f"{source}.cpp", [f"-DUNSPOOL_ISA={name}", *flags], folder / f"{source}_{name}.o"))
    with ThreadPoolExecutor(2) as compilers:
        objects = list(compilers.map(lambda job: compile_object(*job), jobs))
    subprocess.run([COMPILER, "-static", *map(str, objects), "-o", str(folder / "driver")], check=True)
    return folder / "driver"


@pytest.mark.parametrize(("processor", "dot_products"), [("cortex-a72", 0), ("max", 1)])
def test_neon_has_the_bits_of_plain_code(driver: Path, processor: str, dot_products: int) -> None:
    command = [EMULATOR, "-cpu", processor, str(driver)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"dot products: {dot_products}, " in finished.stdout
