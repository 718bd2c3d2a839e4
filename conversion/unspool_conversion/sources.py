"""Opens what a user calls a model: a directory, a GGUF file, or a repository on the HuggingFace hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from unspool.errors import UserError
from unspool_conversion.gguf_source import GGUFSource
from unspool_conversion.safetensors_source import INDEX, SIDE_FILES, WEIGHTS, SafetensorsSource
from unspool_conversion.tensor_source import TensorSource

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DOWNLOADED = ("config.json", WEIGHTS, "model-*.safetensors", INDEX, *SIDE_FILES)


def open_source(name: str, revision: str | None = None) -> TensorSource:
    """Opens a HuggingFace directory, a .gguf file, a directory that holds just one, or a hub id.

    `revision` is a hub branch, tag or commit. Raises UserError when there is nothing there to convert.
    """
    path = Path(name).expanduser()
    if not path.exists():
        return _open_hub(name, revision)
    if revision is not None:
        raise UserError(f"{path} is local, so it has no revision {revision!r}; leave --revision out")
    if path.is_file():
        return _open_file(path)
    return _open_directory(path)


def _open_file(path: Path) -> TensorSource:
    if path.suffix != ".gguf":
        raise UserError(f"{path} is not a .gguf file; for safetensors pass the directory that holds them")
    return GGUFSource(path, {"source": str(path.resolve())})


def _open_directory(path: Path) -> TensorSource:
    files = sorted(path.glob("*.gguf"))
    if files and not any(path.glob("*.safetensors")):
        if len(files) > 1:
            raise UserError(f"{path} holds {len(files)} .gguf files; pass one of them, such as {files[0]}")
        return _open_file(files[0])
    return SafetensorsSource(path, {"source": str(path.resolve())})


def _open_hub(name: str, revision: str | None) -> TensorSource:
    if name.endswith(".gguf") or not _HUB_ID.fullmatch(name):
        raise UserError(f"{name} does not exist; pass a directory, a .gguf file or a hub id like owner/name")
    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED)))
    except GatedRepoError as error:
        raise UserError(f"{name} is gated; accept its terms on the hub, then log in: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{name} is neither a local path nor a model on the hub that you may read") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r} on the hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"{name} is not a local path, and the hub cannot be reached; go online, or download the model and "
            "pass its directory"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{name} could not be downloaded from the hub ({error}); try again") from error
    return SafetensorsSource(directory, {"source": name, "revision": directory.name})
