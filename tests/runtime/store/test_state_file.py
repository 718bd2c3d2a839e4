"""State files: what was written is read, in the safetensors library too, and nothing else is ever taken for a state."""

import hashlib
import hmac
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool import UnspoolConfig
from unspool.config import linearize_block
from unspool.mixer_spec import PRESETS, MixerSpec
from unspool.state import SlotSnapshot, StatePool, TensorSpec, layer_state_specs
from unspool.store import (
    ExpectedState,
    StateIdentity,
    StateProvenance,
    StateRejected,
    read_state,
    write_state,
)

KEY = b"a server's key"
IDENTITY = StateIdentity(
    weights="1" * 64,
    config="2" * 64,
    tokenizer="3" * 64,
    template="4" * 64,
    weight_format="int8",
    state_dtype="float32",
    depth=2,
)
PROVENANCE = StateProvenance(
    log_digest="5" * 64,
    owner="6" * 64,
    parent='snap_"7\\',
    created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
)
POSITION = 41


def config_of(spec: MixerSpec) -> UnspoolConfig:
    return UnspoolConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        linearize=linearize_block("test", spec, {1: {"window": 3}}),
    )


def filled(spec: MixerSpec, dtype: torch.dtype, far_dtype: torch.dtype | None = None) -> tuple[StatePool, SlotSnapshot]:
    """A pool whose slot 1 holds random numbers of every sign, and that slot's snapshot."""
    pool = StatePool(config_of(spec), 2, dtype, "cpu", far_dtype=far_dtype)
    generator = torch.Generator().manual_seed(7)
    for layer in pool.layers:
        for tensor in layer.values():
            tensor[1] = (torch.randn(tensor.shape[1:], generator=generator) * 100).to(tensor.dtype)
    pool.positions[1] = POSITION
    return pool, pool.snapshot(1)


SMALL = PRESETS["disjoint"].replace(window=2, sinks=1)
SPECS = {
    "far": SMALL,
    "bank": SMALL.replace(bank=3),
    "window only": PRESETS["window-only"].replace(window=2, sinks=1),
    "slots": PRESETS["liger-gsa"].replace(window=2),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def pool() -> StatePool:
    return filled(SMALL, torch.float32)[0]


@pytest.fixture(scope="module")
def snapshot(pool: StatePool) -> SlotSnapshot:
    return pool.snapshot(1)


@pytest.fixture(scope="module")
def expected(pool: StatePool) -> ExpectedState:
    return ExpectedState(identity=IDENTITY, layers=pool.specs)


@pytest.fixture(scope="module")
def file(snapshot: SlotSnapshot) -> bytes:
    return bytes(write_state(snapshot, IDENTITY, PROVENANCE))


def assert_same(found: SlotSnapshot, wanted: SlotSnapshot) -> None:
    assert found.position == wanted.position
    for mine, its in zip(found.layers, wanted.layers, strict=True):
        assert mine.keys() == its.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == its[name].dtype and tensor.shape == its[name].shape
            assert torch.equal(tensor.view(torch.uint8), its[name].contiguous().view(torch.uint8)), name


def rejected(data: bytes, expected: ExpectedState, key: bytes | None = None) -> str:
    with pytest.raises(StateRejected) as raised:
        read_state(data, expected, key=key)
    assert str(raised.value).startswith(raised.value.reason + ": ")
    return raised.value.reason


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    )
    return struct.pack("<Q", len(text)) + text + body


def sealed(header: dict[str, Any], body: bytes, key: bytes | None = None) -> bytes:
    """The file with the digests that a writer of just this content would have put there."""
    metadata = {name: text for name, text in header["__metadata__"].items() if name not in ("digest", "hmac")}
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}

    def content() -> bytes:
        described = json.dumps([metadata, tensors], sort_keys=True, separators=(",", ":")).encode()
        return described + hashlib.sha256(body).digest()

    if key is not None:
        metadata["hmac"] = hmac.new(key, content(), hashlib.sha256).hexdigest()
    digest = hashlib.sha256(content()).hexdigest()
    return joined({"__metadata__": metadata | {"digest": digest}} | tensors, body)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_what_was_written_is_read(spec: MixerSpec, dtype: torch.dtype) -> None:
    for far_dtype in (None, dtype):
        pool, snapshot = filled(spec, dtype, far_dtype)
        data = write_state(snapshot, IDENTITY, PROVENANCE)
        found, provenance = read_state(data, ExpectedState(identity=IDENTITY, layers=pool.specs))
        assert_same(found, snapshot)
        assert provenance == PROVENANCE
        pool.restore(0, found)
        assert_same(pool.snapshot(0), snapshot)


def test_the_specs_of_a_pool_are_the_configuration_s() -> None:
    pool, _ = filled(SMALL.replace(bank=3), torch.float16, torch.float16)
    config = config_of(SMALL.replace(bank=3))
    wanted = [layer_state_specs(config, spec, torch.float16, torch.float16) for spec in config.mixer_specs()]
    assert list(pool.specs) == wanted


@given(
    position=st.integers(0, (1 << 63) - 1),
    labels=st.tuples(*[st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200)] * 3),
    created=st.datetimes(timezones=st.just(UTC)),
    signed=st.booleans(),
)
@settings(deadline=None, derandomize=True)
def test_every_provenance_is_read_back(
    position: int, labels: tuple[str, str, str], created: datetime, signed: bool
) -> None:
    pool, snapshot = filled(SMALL, torch.float32)
    provenance = StateProvenance(log_digest=labels[0], owner=labels[1], parent=labels[2], created=created)
    key = KEY if signed else None
    data = write_state(replace(snapshot, position=position), IDENTITY, provenance, key=key)
    asked = ExpectedState(
        identity=IDENTITY, layers=pool.specs, position=position, owner=labels[1], log_digest=labels[0]
    )
    found, read = read_state(memoryview(data), asked, key=key)
    assert (found.position, read) == (position, provenance)


def test_the_safetensors_library_reads_it(file: bytes, snapshot: SlotSnapshot) -> None:
    tensors = safetensors.torch.load(file)
    assert len(tensors) == sum(map(len, snapshot.layers))
    for index, layer in enumerate(snapshot.layers):
        for name, tensor in layer.items():
            assert torch.equal(tensors[f"layers.{index}.{name}"], tensor)
    (length,) = struct.unpack_from("<Q", file)
    assert (8 + length) % 64 == 0, "tensors are aligned in the file"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_that_the_safetensors_library_writes_is_read(spec: MixerSpec, dtype: torch.dtype) -> None:
    """Its layout and its JSON are ours, but for the order of metadata."""
    pool, snapshot = filled(spec, dtype)
    file = bytes(write_state(snapshot, IDENTITY, PROVENANCE, key=KEY))
    header, _ = split(file)
    rewritten = safetensors.torch.save(safetensors.torch.load(file), header["__metadata__"])
    found, provenance = read_state(rewritten, ExpectedState(identity=IDENTITY, layers=pool.specs), key=KEY)
    assert_same(found, snapshot)
    assert provenance == PROVENANCE


def test_every_changed_byte_is_noticed(snapshot: SlotSnapshot, expected: ExpectedState) -> None:
    """In the header by any of several changes, all of space's other meanings among them; in the tensors by two."""
    file = bytearray(write_state(snapshot, IDENTITY, PROVENANCE, key=KEY))
    (length,) = struct.unpack_from("<Q", file)
    for at in range(len(file)):
        in_header = at < 8 + length
        masks = {1, 0x20, 0x80} | {ord(" ") ^ ord(blank) for blank in "\t\n\r"} if in_header else {1, 0x80}
        for mask in masks:
            file[at] ^= mask
            rejected(bytes(file), expected)  # with no key at hand, although the HMAC is changed too
            file[at] ^= mask
    read_state(file, expected, key=KEY)


def test_every_truncation_and_any_tail_is_noticed(file: bytes, expected: ExpectedState) -> None:
    for length in range(len(file)):
        assert rejected(file[:length], expected) == "truncated"
    for tail in (b"\x00", b" ", bytes(64), bytes(1 << 20), file):
        assert rejected(file + tail, expected) == "oversized"
    assert rejected(b"", expected) == "truncated"


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 1 << 20, 0, 1, 2])
def test_a_wrong_header_length_is_no_work(file: bytes, expected: ExpectedState, length: int) -> None:
    assert rejected(struct.pack("<Q", length) + file[8:], expected) in ("header", "oversized")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a":1,"a":1}',
        b'{"__metadata__":{"a":"1","a":"1"}}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1.0}',
        b'{"a":1e999}',
        b'{"a":"\xff"}',
        b"[" * 9_000,
        b'{"a":' * 1_500,
        b'{"a": 1}',
        b'{"\\u0061":1}',
        b'{"a":' + b"9" * 5_000 + b"}",
    ],
    ids=lambda text: text[:24].decode(errors="replace"),
)
def test_what_is_no_header_is_refused(file: bytes, expected: ExpectedState, text: bytes) -> None:
    assert rejected(joined(text, split(file)[1]), expected) == "header"


def test_duplicate_names_are_refused(file: bytes, expected: ExpectedState) -> None:
    """Of a tensor, and of metadata: readers differ in which one they take."""
    text = json.dumps(split(file)[0], separators=(",", ":"))
    for name in ('"position":"41"', '"layers.0.far":{'):
        assert name in text
        entry = name if name.endswith('"') else text[text.index(name) : text.index("}", text.index(name)) + 1]
        twice = text.replace(entry, f"{entry},{entry}")
        assert rejected(joined(twice.encode(), split(file)[1]), expected) == "header"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "0" * 64),
        ("config", "0" * 64),
        ("tokenizer", "0" * 64),
        ("template", "0" * 64),
        ("weight_format", "float32"),
        ("state_dtype", "float16"),
        ("depth", 1),
    ],
)
def test_a_state_of_another_model_is_refused(file: bytes, expected: ExpectedState, field: str, value: Any) -> None:
    other = replace(expected, identity=replace(IDENTITY, **{field: value}))
    with pytest.raises(StateRejected, match=f"made under another {field}") as raised:
        read_state(file, other)
    assert raised.value.reason == "identity"
    assert IDENTITY.difference(other.identity) == [field]


def metadata_with(**changes: str | None) -> Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]:
    def change(header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        metadata = header["__metadata__"] | changes
        return header | {"__metadata__": {name: text for name, text in metadata.items() if text is not None}}, body

    return change


def tensor_with(**changes: Any) -> Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]:
    return lambda header, body: (header | {"layers.0.far": header["layers.0.far"] | changes}, body)


def with_numbers(number: float) -> Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]:
    return lambda header, body: (header, body[:-4] + struct.pack("<f", number))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (metadata_with(format_version="2"), "version"),
        (metadata_with(format_version=None), "version"),
        (metadata_with(format="pt"), "version"),
        (metadata_with(extra="1"), "header"),
        (metadata_with(owner=None), "header"),
        (metadata_with(owner="x" * 201), "header"),
        (metadata_with(parent="\u00e9"), "header"),
        (metadata_with(created="yesterday"), "header"),
        (metadata_with(created="0001-01-01T00:00:00+14:00"), "header"),
        (metadata_with(position="-1"), "position"),
        (metadata_with(position="041"), "position"),
        (metadata_with(position="4.1"), "position"),
        (metadata_with(position="9" * 20), "position"),
        (metadata_with(position="42"), "position"),
        (metadata_with(valid_positions="[41,40]"), "position"),
        (metadata_with(valid_positions="[41]"), "position"),
        (tensor_with(dtype="F16"), "shape"),
        (tensor_with(dtype="I32"), "shape"),
        (tensor_with(shape=[1, 4, 5]), "shape"),
        (tensor_with(shape=[True, 5, 4]), "shape"),
        (tensor_with(shape=[20]), "shape"),
        (tensor_with(data_offsets=[4, 84]), "shape"),
        (tensor_with(data_offsets=[-80, 0]), "shape"),
        (tensor_with(extra=1), "shape"),
        (lambda header, body: (header | {"layers.0.more": header["layers.0.far"]}, body), "shape"),
        (lambda header, body: ({n: e for n, e in header.items() if n != "layers.1.far"}, body), "shape"),
        (lambda header, body: (header | {"layers.0.far": 1}, body), "shape"),
        (lambda header, body: (header | {"__metadata__": {}}, body), "version"),
        (lambda header, body: (header | {"__metadata__": {"format": 1}}, body), "header"),
        (with_numbers(float("nan")), "not_finite"),
        (with_numbers(float("inf")), "not_finite"),
        (with_numbers(-float("inf")), "not_finite"),
    ],
)
def test_a_wrong_file_with_right_digests_is_refused(
    file: bytes,
    expected: ExpectedState,
    change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]],
    reason: str,
) -> None:
    header, body = split(file)
    read_state(sealed(header, body), expected)
    changed, new_body = change(header, body)
    assert rejected(sealed(changed, new_body), expected) == reason


def test_swapped_places_are_refused(file: bytes, expected: ExpectedState) -> None:
    """Two tensors of one shape, each with the other's bytes."""
    header, body = split(file)
    keys, values = header["layers.0.near_keys"], header["layers.0.near_values"]
    assert keys["shape"] == values["shape"]
    swapped = header | {"layers.0.near_keys": values, "layers.0.near_values": keys}
    assert rejected(sealed(swapped, body), expected) == "shape"


def test_other_shapes_are_refused(file: bytes, expected: ExpectedState) -> None:
    """Of as many bytes, of fewer, and of more than the file has."""
    for shape in ((1, 2, 10), (1, 4, 4), (1, 6, 4), (1, 5, 4, 1)):
        layers = [dict(layer) for layer in expected.layers]
        layers[0]["far"] = TensorSpec(shape, torch.float32)
        assert rejected(file, replace(expected, layers=layers)) in ("shape", "oversized", "truncated")


def test_only_the_holder_of_the_key_makes_signed_states(snapshot: SlotSnapshot, expected: ExpectedState) -> None:
    signed = bytes(write_state(snapshot, IDENTITY, PROVENANCE, key=KEY))
    assert_same(read_state(signed, expected, key=KEY)[0], snapshot)
    assert_same(read_state(signed, expected)[0], snapshot)
    assert rejected(signed, expected, b"another key") == "signature"
    assert rejected(bytes(write_state(snapshot, IDENTITY, PROVENANCE)), expected, KEY) == "signature"

    header, body = split(signed)
    assert_same(read_state(sealed(header, body, KEY), expected, key=KEY)[0], snapshot)
    changed, _ = metadata_with(owner="0" * 64)(header, body)
    assert rejected(sealed(changed, body, b"a guess"), expected, KEY) == "signature"
    forged = sealed(changed, body)  # the old HMAC beside a new digest
    forged_header, _ = split(forged)
    forged_header["__metadata__"]["hmac"] = header["__metadata__"]["hmac"]
    assert rejected(joined(forged_header, body), expected, KEY) == "digest"


def test_another_owner_log_or_position_is_refused(file: bytes, expected: ExpectedState) -> None:
    right = replace(expected, owner=PROVENANCE.owner, log_digest=PROVENANCE.log_digest, position=POSITION)
    read_state(file, right)
    assert rejected(file, replace(right, owner="0" * 64)) == "owner"
    assert rejected(file, replace(right, log_digest="0" * 64)) == "log"
    assert rejected(file, replace(right, position=POSITION - 1)) == "position"


def test_a_snapshot_shares_no_memory_with_its_file(
    file: bytes, expected: ExpectedState, snapshot: SlotSnapshot
) -> None:
    """The file may change or go: what was checked is what is used, and it takes no more memory than its tensors."""
    data = bytearray(file)
    found, _ = read_state(data, expected)
    data[:] = bytes(len(data))
    data.clear()  # possible only if nothing exports the buffer
    assert_same(found, snapshot)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
        for layer in found.layers
        for tensor in layer.values()
    }
    assert sum(storage.nbytes() for storage in storages.values()) == found.num_bytes


def test_noncontiguous_tensors_are_written(expected: ExpectedState, snapshot: SlotSnapshot) -> None:
    layers = tuple(
        {name: tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for name, tensor in layer.items()}
        for layer in snapshot.layers
    )
    found, _ = read_state(write_state(replace(snapshot, layers=layers), IDENTITY, PROVENANCE), expected)
    assert_same(found, snapshot)


def test_the_same_state_makes_the_same_file(file: bytes, snapshot: SlotSnapshot) -> None:
    backwards = tuple(dict(reversed(layer.items())) for layer in snapshot.layers)
    assert bytes(write_state(replace(snapshot, layers=backwards), IDENTITY, PROVENANCE)) == file


def test_what_cannot_be_a_state_is_not_written(snapshot: SlotSnapshot) -> None:
    with pytest.raises(ValueError, match="has 2 layers, its identity 3"):
        write_state(snapshot, replace(IDENTITY, depth=3), PROVENANCE)
    with pytest.raises(ValueError, match="position -1"):
        write_state(replace(snapshot, position=-1), IDENTITY, PROVENANCE)
    for field, value in {"owner": "x" * 201, "parent": "\n", "log_digest": "\u00e9"}.items():
        with pytest.raises(ValueError, match=f"{field}: must be"):
            replace(PROVENANCE, **{field: value})
    for created in (datetime(2026, 1, 1), datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1)))):
        with pytest.raises(ValueError, match="created: must be in UTC"):
            replace(PROVENANCE, created=created)


@given(st.binary(max_size=400), st.booleans())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_no_bytes_do_anything_but_get_refused(data: bytes, framed: bool) -> None:
    layers = [{"far": TensorSpec((1, 2, 2), torch.float32)}]
    expected = ExpectedState(identity=replace(IDENTITY, depth=1), layers=layers)
    rejected(joined(data, bytes(16)) if framed else data, expected)
