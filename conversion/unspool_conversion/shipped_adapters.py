"""Adapters that come with the package, by name: what training added to a model that many will convert."""

from importlib.resources import files
from pathlib import Path

from unspool.errors import UserError


def shipped_adapters() -> list[str]:
    """Their names."""
    return sorted(path.name for path in _folder().iterdir() if path.is_dir())


def find_adapter(name_or_directory: str) -> Path:
    """The directory of a shipped adapter, or of the user's own. Raises UserError when it is neither."""
    if name_or_directory in shipped_adapters():
        return _folder() / name_or_directory
    path = Path(name_or_directory).expanduser()
    if not path.is_dir():
        raise UserError(
            f"--adapter {name_or_directory}: is neither a directory that `unspool distill` wrote nor one of "
            f"{', '.join(shipped_adapters())}"
        )
    return path


def _folder() -> Path:
    return Path(str(files("unspool_conversion") / "data" / "adapters"))
