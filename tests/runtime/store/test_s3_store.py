"""The S3 store against moto's server in a process: away, refused, answers lost, and writers that come second."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from unspool.errors import UserError
from unspool.store import StoreCorrupt, StoreFull, StoreUnavailable, s3_store
from unspool.store.s3_store import S3Store

PLENTY = 1 << 30


@pytest.fixture
def store(s3_server: Any, tmp_path: Any) -> Iterator[S3Store]:
    store = S3Store(s3_server.bucket, tmp_path.name, PLENTY, endpoint_url=s3_server.url)
    yield store
    store.close()


def test_a_service_that_is_away_is_unavailable(own_s3_server: Any) -> None:
    store = S3Store(own_s3_server.bucket, "test", PLENTY, endpoint_url=own_s3_server.url)
    version = store.swap_head("head", None, b"1")
    own_s3_server.kill()
    calls: list[Callable[[], object]] = [
        lambda: store.get("state"),
        lambda: store.put("new", b"n"),
        lambda: store.delete("state"),
        lambda: [*store.list("")],
        lambda: store.read_head("head"),
        lambda: store.swap_head("head", version, b"2"),
        lambda: store.lease("session", "me", 1.0),
        lambda: store.release("session", "me"),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="s3://sessions: EndpointConnectionError"):
            call()
    own_s3_server.start()
    store.put("state", b"s")
    assert store.get("state") == b"s"
    store.close()


def test_a_missing_bucket_is_the_operator_s_to_mend(s3_server: Any) -> None:
    store = S3Store("nobodys-bucket", "test", PLENTY, endpoint_url=s3_server.url)
    for call in (lambda: store.get("key"), lambda: store.put("key", b""), lambda: store.swap_head("key", None, b"")):
        with pytest.raises(UserError, match="s3://nobodys-bucket: NoSuchBucket; correct the bucket"):
            call()
    store.close()


def test_missing_credentials_are_named(s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    boto3.setup_default_session()  # which has read the environment of other tests
    try:
        store = S3Store(s3_server.bucket, "test", PLENTY, endpoint_url=s3_server.url)
        with pytest.raises(UserError, match="set AWS_ACCESS_KEY_ID"):
            store.get("key")
        store.close()
    finally:
        monkeypatch.undo()
        boto3.setup_default_session()


def test_a_write_whose_answer_was_lost_is_known_again(store: S3Store) -> None:
    """The client repeats it, and is refused because of itself: that is no lost race. Another's is."""
    for tag_of in (lambda: None, lambda: store._read("some/name").tag):  # type: ignore[union-attr]
        tag = tag_of()
        body = f"mine {tag}".encode()
        assert store._write("some/name", body, "head", tag)
        assert store._write("some/name", body, "head", tag), "repeated"
        assert not store._write("some/name", b"another's", "head", tag)
        assert store._read("some/name").body == body  # type: ignore[union-attr]


def test_equal_values_are_not_the_same_version(store: S3Store) -> None:
    """Entity tags are digests: without their marks a head that was changed back would take a stale swap."""
    first = store.swap_head("head", None, b"a")
    second = store.swap_head("head", first, b"b")
    third = store.swap_head("head", second, b"a")
    assert store.swap_head("head", first, b"stale") is None
    tags = set()
    for _ in range(2):
        third = store.swap_head("head", third, b"a")
        tags.add(store._read(store._data + "head").tag)  # type: ignore[union-attr]
    assert len(tags) == 2
    assert store.swap_head("head", third, None) is not None
    again = store.swap_head("head", None, b"a")
    assert again is not None and third is not None and again > third


def test_a_swap_that_another_overtook_has_lost(s3_server: Any, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's swap or deletion comes between its reading and its writing."""
    other = S3Store(s3_server.bucket, store._data.split("/")[0], PLENTY, endpoint_url=s3_server.url)
    write, remove = store._write, store._remove
    others: bytes | None = None

    def overtake() -> None:
        head = other.read_head("head")
        assert other.swap_head("head", head.version if head else None, others) is not None

    monkeypatch.setattr(store, "_write", lambda *call: (overtake(), write(*call))[1])
    monkeypatch.setattr(store, "_remove", lambda *call: (overtake(), remove(*call))[1])
    for before, others, mine in [
        (None, b"theirs", b"mine"),
        (b"old", b"theirs", b"mine"),
        (b"old", b"the same", b"the same"),
        (b"old", None, b"mine"),
        (b"old", b"theirs", None),
        (b"old", None, None),
    ]:
        other.delete("head")
        version = other.swap_head("head", None, before) if before is not None else None
        assert store.swap_head("head", version, mine) is None
        head = other.read_head("head")
        assert (head.value if head else None) == others
    other.close()


def test_another_writer_s_bytes_count(s3_server: Any, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once for a store that has just been opened, and after a while for one that is open."""
    prefix = store._data.split("/")[0]
    store.put("state/0", bytes(60_000))
    for late in (False, True):
        other = S3Store(s3_server.bucket, prefix, 100_000, endpoint_url=s3_server.url)
        if late:
            store.delete("state/0")
            other.put("turn", b"t")
            store.put("state/0", bytes(60_000))
            monkeypatch.setattr(s3_store, "USAGE_SECONDS", -1.0)
        with pytest.raises(StoreFull):
            other.put("state/1", bytes(60_000))
        other.close()


def test_what_others_put_in_the_bucket_is_named(s3_server: Any, store: S3Store) -> None:
    client = boto3.client("s3", endpoint_url=s3_server.url)
    client.put_object(
        Bucket=s3_server.bucket, Key=store._data + "head", Body=b"short", Metadata={"unspool-kind": "head"}
    )
    client.put_object(Bucket=s3_server.bucket, Key=store._data + "mine", Body=b"no kind")
    client.put_object(Bucket=s3_server.bucket, Key=store._leases + "session", Body=b'{"holder": "x"}')
    with pytest.raises(StoreCorrupt, match="too short for a head"):
        store.read_head("head")
    with pytest.raises(StoreCorrupt, match="is no lease; delete it"):
        store.lease("session", "me", 1.0)
    assert (store.get("mine"), store.read_head("mine")) == (None, None)
    store.delete("session")
    assert store.lease("session", "me", 1.0) == 1


def test_leases_go_by_the_service_s_clock(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica whose own clock is hours ahead takes nobody's lease."""
    assert store.lease("session", "me", 600.0) == 1
    ahead = time.time() + 7200
    monkeypatch.setattr(s3_store.time, "time", lambda: ahead)
    assert store.lease("session", "another", 600.0) is None


def test_a_lease_lasts_as_long_as_it_was_taken_for(store: S3Store) -> None:
    """Although the service's clock, as its answers show it, may be a second ahead at once."""
    for number in range(10):
        while not 0.7 < time.time() % 1 < 0.9:
            time.sleep(0.02)
        started = time.monotonic()
        assert store.lease(f"session/{number}", "me", 0.9) == 1
        time.sleep(0.35)
        taken = store.lease(f"session/{number}", "another", 0.9)
        if time.monotonic() < started + 0.9:  # else this machine was held up, and the lease may have ended
            assert taken is None
            return
    pytest.fail("this machine is too slow to try")
