"""A store in an S3 bucket (or a service that speaks its protocol), shared by replicas.

Heads and leases are swapped by conditional writes: If-Match with the entity tag that was read, If-None-Match for a new
one. So that no two values of a head have the same tag, each begins with its version and a random mark, by which a
writer also knows its own value again when a request was repeated and its first answer lost.
"""

import contextlib
import json
import secrets
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError

from unspool.errors import UserError
from unspool.store.interface import (
    Buffer,
    Entry,
    Head,
    StoreCorrupt,
    StoreUnavailable,
    byte_view,
    check_cap,
    check_key,
    check_lease,
    check_prefix,
    check_room,
    check_swap,
    names_head,
    names_object,
)

HEAD_PREFIX = struct.Struct("<Q16s")
"""Version and mark."""
KIND = "unspool-kind"
USAGE_SECONDS = 60.0
"""How long the bytes that other writers have added may go unnoticed."""
CLOCK_SECONDS = 1.0
"""The server's clock is read from its answers' dates, which have whole seconds."""
LEASE_ATTEMPTS = 3


class _Found(NamedTuple):
    """An object of the bucket as read."""

    body: bytes
    kind: str
    tag: str


class _Description(NamedTuple):
    kind: str
    num_bytes: int


class _Lease(NamedTuple):
    holder: str
    epoch: int
    expires: float


class S3Store:
    """`max_bytes` bounds all values under the prefix. The bucket keeps no count, so the bytes are listed now and then:
    several writers together may pass the bound by what they write within a minute."""

    def __init__(self, bucket: str, prefix: str, max_bytes: int, *, endpoint_url: str | None = None) -> None:
        """Credentials, region and, without `endpoint_url`, the endpoint are those that boto3 finds in the environment.
        Raises UserError when boto3 accepts none of it; the service need not be there yet."""
        check_cap(max_bytes)
        check_key(prefix)
        self.max_bytes = max_bytes
        self._bucket = bucket
        self._data, self._leases = f"{prefix}/data/", f"{prefix}/leases/"
        self._used, self._used_known = 0, -USAGE_SECONDS
        self._lock = threading.Lock()
        retries = {"mode": "standard", "total_max_attempts": 3}
        config = Config(connect_timeout=5, read_timeout=30, retries=retries)
        try:
            self._client: Any = boto3.client("s3", endpoint_url=endpoint_url, config=config)
        except (BotoCoreError, ValueError) as error:
            raise UserError(f"s3://{bucket}: {error}; set AWS_REGION and the endpoint as boto3 wants them") from error

    def get(self, key: str) -> bytes | None:
        check_key(key)
        found = self._read(self._data + key)
        return found.body if found is not None and found.kind == "object" else None

    def put(self, key: str, value: Buffer) -> None:
        check_key(key)
        view = byte_view(value)
        if (there := self._describe(key)) is None:
            self._check_room(view.nbytes, view.nbytes)
            if self._write(self._data + key, bytes(view), "object", None):
                self._count(view.nbytes)
                return
            there = self._describe(key)
        if there is not None and there.kind == "head":
            raise names_head(key)

    def delete(self, key: str) -> None:
        check_key(key)
        there = self._describe(key)
        with self._failing():
            self._client.delete_object(Bucket=self._bucket, Key=self._data + key)
            self._client.delete_object(Bucket=self._bucket, Key=self._leases + key)
        self._count(-there.num_bytes if there is not None else 0)

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        return self._entries(prefix)

    def read_head(self, key: str) -> Head | None:
        check_key(key)
        found = self._read(self._data + key)
        if found is None or found.kind != "head":
            return None
        return Head(found.body[HEAD_PREFIX.size :], self._version(key, found))

    def swap_head(
        self, key: str, expected: int | None, value: bytes | None, objects: Mapping[str, Buffer] | None = None
    ) -> int | None:
        views = check_swap(key, value, objects)
        found = self._read(self._data + key)
        if found is not None and found.kind != "head":
            raise names_object(key)
        current = self._version(key, found) if found is not None else None
        if current != expected:
            return None
        for name, view in views.items():
            self.put(name, view)
        # A head that is made anew begins above every version that it had before, for it has not had one a microsecond.
        version = current + 1 if current is not None else time.time_ns() // 1000
        if value is None:
            return version if found is None or self._remove(self._data + key, found) else None
        body = HEAD_PREFIX.pack(version, secrets.token_bytes(16)) + value
        added = len(body) - (len(found.body) if found is not None else 0)
        self._check_room(len(value), added)
        if not self._write(self._data + key, body, "head", found.tag if found is not None else None):
            return None
        self._count(added)
        return version

    def lease(self, key: str, holder: str, seconds: float) -> int | None:
        check_lease(key, holder, seconds)
        for _ in range(LEASE_ATTEMPTS):
            held, tag, now = self._read_lease(key)
            if held.holder != holder and held.expires > now:
                return None
            epoch = held.epoch + (held.holder != holder)
            if self._write_lease(key, _Lease(holder, epoch, now + seconds + CLOCK_SECONDS), tag):
                return epoch
        return None

    def release(self, key: str, holder: str) -> None:
        check_key(key)
        held, tag, _ = self._read_lease(key)
        if held.holder == holder:
            self._write_lease(key, held._replace(expires=0.0), tag)

    def close(self) -> None:
        self._client.close()

    def _read(self, name: str) -> _Found | None:
        with self._failing():
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=name)
            except ClientError as error:
                if _code(error) == "NoSuchKey":
                    return None
                raise
            return _Found(answer["Body"].read(), answer["Metadata"].get(KIND, ""), answer["ETag"])

    def _write(self, name: str, body: bytes, kind: str, tag: str | None) -> bool:
        """Writes in place of what has this tag, or (None) of nothing. False when another came first."""
        condition = {"IfMatch": tag} if tag is not None else {"IfNoneMatch": "*"}
        with self._failing():
            try:
                self._client.put_object(Bucket=self._bucket, Key=name, Body=body, Metadata={KIND: kind}, **condition)
            except ClientError as error:
                if not _lost(error):
                    raise
                if kind == "object":
                    return False
                found = self._read(name)  # it may have been this very value, if the client has asked twice
                return found is not None and found.body == body
        return True

    def _remove(self, name: str, found: _Found) -> bool:
        with self._failing():
            try:
                self._client.delete_object(Bucket=self._bucket, Key=name, IfMatch=found.tag)
            except ClientError as error:
                if not _lost(error):
                    raise
                return False
        self._count(-len(found.body))
        return True

    def _describe(self, key: str) -> _Description | None:
        with self._failing():
            try:
                answer = self._client.head_object(Bucket=self._bucket, Key=self._data + key)
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return None
                raise
        return _Description(answer["Metadata"].get(KIND, ""), answer["ContentLength"])

    def _version(self, key: str, found: _Found) -> int:
        if len(found.body) < HEAD_PREFIX.size:
            raise StoreCorrupt(f"s3://{self._bucket}/{self._data}{key}: is too short for a head; delete it")
        version, _ = HEAD_PREFIX.unpack_from(found.body)
        return int(version)

    def _read_lease(self, key: str) -> tuple[_Lease, str | None, float]:
        """The lease, its tag and the server's time."""
        with self._failing():
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._leases + key)
                body = answer["Body"].read()
            except ClientError as error:
                if _code(error) != "NoSuchKey":
                    raise
                return _Lease("", 0, 0.0), None, _date(error.response)
        try:
            values = json.loads(body)
            lease = _Lease(str(values["holder"]), int(values["epoch"]), float(values["expires"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorrupt(f"s3://{self._bucket}/{self._leases}{key}: is no lease; delete it") from error
        return lease, answer["ETag"], _date(answer)

    def _write_lease(self, key: str, lease: _Lease, tag: str | None) -> bool:
        body = json.dumps(lease._asdict() | {"mark": secrets.token_hex(16)}).encode()
        return self._write(self._leases + key, body, "lease", tag)

    def _entries(self, prefix: str) -> Iterator[Entry]:
        token: dict[str, str] = {}
        while True:
            with self._failing():
                page = self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._data + prefix, **token)
            for found in page.get("Contents", ()):
                yield Entry(found["Key"].removeprefix(self._data), found["Size"], found["LastModified"].timestamp())
            if not page["IsTruncated"]:
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _check_room(self, num_bytes: int, added: int) -> None:
        with self._lock:
            if self._used_known + USAGE_SECONDS < time.monotonic():
                self._used = sum(entry.num_bytes for entry in self._entries(""))
                self._used_known = time.monotonic()
            check_room(num_bytes, self._used, added, self.max_bytes)

    def _count(self, added: int) -> None:
        with self._lock:
            self._used += added

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Gives the client's errors their types."""
        try:
            yield
        except NoCredentialsError as error:
            raise UserError("S3: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role") from error
        except ClientError as error:
            if _code(error) in ("NoSuchBucket", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
                raise UserError(
                    f"s3://{self._bucket}: {_code(error)}; correct the bucket or the credentials"
                ) from error
            raise StoreUnavailable(f"s3://{self._bucket}: {_code(error)}") from error
        except (BotoCoreError, HTTPClientError) as error:
            raise StoreUnavailable(f"s3://{self._bucket}: {type(error).__name__}") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _lost(error: ClientError) -> bool:
    """Whether a conditional request was refused because of another's."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"] in (404, 409, 412) and _code(error) != "NoSuchBucket"


def _date(answer: Mapping[str, Any]) -> float:
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
