"""Imports run one way between the packages, and without cycles inside them."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "unspool_kernels": ROOT / "kernels",
    "unspool": ROOT / "runtime",
    "unspool_conversion": ROOT / "conversion",
    "unspool_server": ROOT / "server",
}
MAY_IMPORT = {
    "unspool_kernels": {"unspool_kernels"},
    "unspool": {"unspool", "unspool_kernels"},
    "unspool_conversion": {"unspool_conversion", "unspool", "unspool_kernels"},
    "unspool_server": {"unspool_server", "unspool"},
}


def modules(package: str) -> dict[str, Path]:
    root = PACKAGES[package]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / package).rglob("*.py"))
    }


def imported(path: Path) -> Iterator[str]:
    """Full names that a module imports, wherever in it; `from a import b` yields a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    for name, path in modules(package).items():
        ours = {target.split(".")[0] for target in imported(path)} & set(PACKAGES)
        assert ours <= MAY_IMPORT[package], f"{name} imports {sorted(ours - MAY_IMPORT[package])}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_in_a_circle(package: str) -> None:
    known = modules(package)
    # A package's __init__ gathers what its modules offer: only modules may depend on each other.
    graph = {
        name: {target for target in imported(path) if target in known and target not in (name, package)}
        for name, path in known.items()
        if name != package
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_top_level_folders_are_no_packages() -> None:
    """A folder `kernels` that can be imported from the root would be taken for the PyPI package of that name."""
    assert not [path for root in PACKAGES.values() for path in root.glob("__init__.py")]


def test_nothing_unpickles() -> None:
    for package in PACKAGES:
        for name, path in modules(package).items():
            text = path.read_text()
            assert "torch.load" not in text, name
            assert not {"pickle", "dill", "joblib"} & {target.split(".")[0] for target in imported(path)}, name
