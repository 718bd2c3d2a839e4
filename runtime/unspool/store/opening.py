"""Opens the store that a URL or a path names."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from unspool.errors import UserError
from unspool.store.interface import InvalidKey, Store
from unspool.store.memory import MemoryStore

DEFAULT_PREFIX = "unspool"
DEFAULT_CACHE_BYTES = 4 << 30
MISSING = "is not installed: pip install 'unspool[cluster]'"


def open_store(
    url_or_path: str,
    *,
    max_bytes: int,
    read_only: bool = False,
    cache_directory: Path | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> Store:
    """`memory:`, a directory or file URL, `redis://`, `rediss://` or `s3://BUCKET/PREFIX`. `read_only` is for opening a
    directory beside the process that writes there; the shared stores need none of it. `cache_directory`, this
    process's own, keeps copies of a shared store's states near, up to `cache_bytes`.

    Raises UserError for what is none of these, or cannot be opened.
    """
    parts = urlsplit(url_or_path)
    if cache_directory is not None:
        if parts.scheme not in ("redis", "rediss", "s3"):
            raise UserError("cache_directory: only a shared store (redis://, s3://) has one; leave it out")
        shared = open_store(url_or_path, max_bytes=max_bytes)
        return _cached(cache_directory, cache_bytes, shared)
    if parts.scheme == "memory":
        return MemoryStore(max_bytes)
    if parts.scheme in ("redis", "rediss"):
        return _open_redis(url_or_path, max_bytes)
    if parts.scheme == "s3":
        return _open_s3(parts.netloc, parts.path.strip("/") or DEFAULT_PREFIX, max_bytes)
    if "://" in url_or_path and parts.scheme != "file":
        raise UserError(
            f"store: {parts.scheme}:// is no store; pass memory:, a directory, redis://, rediss:// or s3://"
        )
    return _open_directory(Path(unquote(parts.path) if parts.scheme == "file" else url_or_path), max_bytes, read_only)


def _cached(directory: Path, cache_bytes: int, shared: Store) -> Store:
    try:
        from unspool.store.cached import CachedStore
        from unspool.store.local import LocalStore
    except ImportError as error:  # no flock
        raise UserError("cache_directory: needs a POSIX system; leave it out") from error
    return CachedStore(LocalStore(directory, cache_bytes, fsync=False), shared)


def _open_directory(path: Path, max_bytes: int, read_only: bool) -> Store:
    try:
        from unspool.store.local import LocalStore
    except ImportError as error:  # no flock
        raise UserError("store: a directory needs a POSIX system; use memory:, redis:// or s3://") from error
    return LocalStore(path, max_bytes, read_only=read_only)


def _open_redis(url: str, max_bytes: int) -> Store:
    try:
        from unspool.store.redis_store import RedisStore
    except ImportError as error:
        raise UserError(f"store: redis {MISSING}") from error
    return RedisStore(url, DEFAULT_PREFIX, max_bytes)


def _open_s3(bucket: str, prefix: str, max_bytes: int) -> Store:
    try:
        from unspool.store.s3_store import S3Store
    except ImportError as error:
        raise UserError(f"store: boto3 {MISSING}") from error
    if not bucket:
        raise UserError("store: s3:// names no bucket; write s3://BUCKET/PREFIX")
    try:
        return S3Store(bucket, prefix, max_bytes)
    except InvalidKey as error:
        raise UserError(f"store: the prefix of s3://{bucket} has characters that keys cannot have ({error})") from error
