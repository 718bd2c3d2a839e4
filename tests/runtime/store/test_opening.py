"""Which store a URL or a path opens, and what is said when it cannot be opened."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unspool.errors import UserError
from unspool.store import open_store
from unspool.store.local import LocalStore
from unspool.store.memory import MemoryStore
from unspool.store.redis_store import RedisStore
from unspool.store.s3_store import S3Store


def test_urls_and_paths(tmp_path: Path, redis_server: Any, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    monkeypatch.chdir(tmp_path)
    kinds = {
        "memory:": MemoryStore,
        str(tmp_path / "a path"): LocalStore,
        "relative": LocalStore,
        f"file://{tmp_path}/a%20file%20url": LocalStore,
        redis_server.url: RedisStore,
        f"s3://{s3_server.bucket}": S3Store,
        f"s3://{s3_server.bucket}/some/prefix/": S3Store,
    }
    for url, kind in kinds.items():
        store = open_store(url, max_bytes=1 << 20)
        assert type(store) is kind, url
        store.put("opened/by-url", url.encode())
        assert store.get("opened/by-url") == url.encode()
        store.delete("opened/by-url")
        store.close()
    assert (tmp_path / "a file url").is_dir() and (tmp_path / "relative").is_dir()


def test_a_directory_opens_for_reading(tmp_path: Path) -> None:
    writer = open_store(str(tmp_path / "store"), max_bytes=1 << 20)
    reader = open_store(str(tmp_path / "store"), max_bytes=1 << 20, read_only=True)
    writer.put("key", b"v")
    assert reader.get("key") == b"v"
    for store in (reader, writer):
        store.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com", "http:// is no store; pass memory:"),
        ("postgres://host/database", "postgres:// is no store"),
        ("s3://", "names no bucket"),
        ("s3://bucket/a b", "prefix of s3://bucket has characters"),
        ("redis://host:nonsense", "write redis://HOST:PORT"),
    ],
)
def test_what_is_no_store_is_refused(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_store(url, max_bytes=1 << 20)


def test_a_missing_extra_is_named() -> None:
    """In a process of its own, where neither client can be imported; the other stores need none."""
    code = (
        "import sys\n"
        "sys.modules['redis'] = sys.modules['boto3'] = None\n"
        "from unspool.store import open_store\n"
        "open_store('memory:', max_bytes=1).close()\n"
        "for url in ('redis://localhost', 's3://bucket'):\n"
        "    try: open_store(url, max_bytes=1)\n"
        "    except Exception as error: sys.stdout.write(f'{type(error).__name__}: {error}\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"UserError: store: {name} is not installed: pip install 'unspool[cluster]'" for name in ("redis", "boto3")
    ]
