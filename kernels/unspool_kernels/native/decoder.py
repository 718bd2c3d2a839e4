"""A whole decoder behind one native call: its weights packed once, its state in the caller's tensors.

Knows no model class and no configuration: the caller describes the layers with the records below.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unspool_kernels.native.library import Arguments, address, call
from unspool_kernels.native.packed import MatrixArgument, PackedMatrix, padded

JOINS = ("disjoint", "mixed", "window")
GATES = ("scalar", "fixed", "none", "liger", "hgrn2")
FEATURE_MAPS = ("hedgehog", "softmax", "elu", "identity")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "relu")
MAX_CHANNELS = 512
CHANNEL_MULTIPLE = 16
WIDTH_MULTIPLE = 32

_MATRIX = MatrixArgument()


@dataclass(frozen=True, kw_only=True)
class FarWeights:
    """What a layer's state has learned. Maps hold each head's matrix transposed, padded to whole blocks of rows."""

    query_map: PackedMatrix | None = None
    key_map: PackedMatrix | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    bias: Tensor | None = None


NO_FAR_WEIGHTS = FarWeights()


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer. Matrices are packed [out, in]; vectors are float32; what the layer does not have is None.

    qkv stacks the rows of query, key and value; gate_up has 32 rows of gate and 32 of up in turns, as have the biases.
    """

    input_norm: Tensor
    qkv: PackedMatrix
    out: PackedMatrix
    post_norm: Tensor
    gate_up: PackedMatrix
    down: PackedMatrix
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    out_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    far: FarWeights = NO_FAR_WEIGHTS

    @property
    def matrices(self) -> tuple[PackedMatrix, ...]:
        found = (self.qkv, self.out, self.gate_up, self.down, self.far.query_map, self.far.key_map)
        return tuple(matrix for matrix in found if matrix is not None)


@dataclass(frozen=True, kw_only=True)
class LayerMixer:
    """How one layer mixes tokens, in the words of the tables above. Sizes in tokens and channels."""

    join: str
    gate: str
    feature_map: str
    window: int
    sinks: int
    features: int
    state_per_query_head: bool = False
    state_rope: bool = False
    near_row_max: bool = False
    gate_normalizer: float = 16.0
    mix: float = 0.5


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """The whole model. `frequencies` [head_dim / 2] float64 are the rotary embedding's, per position."""

    layers: Sequence[tuple[LayerWeights, LayerMixer]]
    embedding: PackedMatrix
    head: PackedMatrix
    final_norm: Tensor
    frequencies: Tensor
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    position_limit: int
    rotary_scaling: float
    norm_eps: float


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", ctypes.c_void_p),
        ("qkv", MatrixArgument),
        ("qkv_bias", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("out", MatrixArgument),
        ("out_bias", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("gate_up", MatrixArgument),
        ("gate_up_bias", ctypes.c_void_p),
        ("down", MatrixArgument),
        ("down_bias", ctypes.c_void_p),
        ("query_map", MatrixArgument),
        ("key_map", MatrixArgument),
        ("gate_weight", ctypes.c_void_p),
        ("gate_bias", ctypes.c_void_p),
        ("far_bias", ctypes.c_void_p),
        ("near_keys", ctypes.c_void_p),
        ("near_values", ctypes.c_void_p),
        ("far", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                "join",
                "gate",
                "feature_map",
                "window",
                "sinks",
                "state_per_query_head",
                "state_rope",
                "near_row_max",
                "features",
                "inverse_rotation",
            )
        ),
        ("gate_normalizer", ctypes.c_double),
        ("mix", ctypes.c_double),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("embedding", MatrixArgument),
        ("head", MatrixArgument),
        ("final_norm", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        ("windows", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_windows",
                "num_layers",
                "hidden",
                "intermediate",
                "heads",
                "kv_heads",
                "head_dim",
                "vocabulary",
                "activation",
                "state_format",
                "position_limit",
            )
        ),
        ("rotary_scaling", ctypes.c_double),
        ("norm_eps", ctypes.c_double),
    ]


class _Decode(Arguments):
    function = "decode"
    _fields_ = [
        ("model", ctypes.POINTER(_Model)),
        *(
            (name, ctypes.c_void_p)
            for name in ("tokens", "starts", "slots", "positions", "logit_tokens", "logits", "workspace")
        ),
        *((name, ctypes.c_int64) for name in ("sequences", "num_logits", "logits_stride", "workspace_bytes")),
    ]


class _Workspace(_Decode):
    function = "decode_workspace"


class NativeDecoder:
    """Runs tokens through a decoder whose state lies in a pool's tensors. Not thread-safe: it owns one workspace."""

    def __init__(self, weights: DecoderWeights) -> None:
        """Raises ValueError for sizes that the kernels have no code for."""
        self.weights = weights
        _check(weights)
        self.window = min(mixer.window for _, mixer in weights.layers)
        """Tokens that one sequence may bring at most in one call: the smallest window."""
        self._windows = torch.tensor(sorted({mixer.window for _, mixer in weights.layers}))
        self._workspace = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        matrices = [matrix for layer, _ in self.weights.layers for matrix in layer.matrices]
        head, embedding = self.weights.head, self.weights.embedding
        return sum(m.num_bytes for m in [*matrices, head, *([embedding] if embedding is not head else [])])

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights that one decode step reads: all but the embedding, of which it reads a row."""
        return (
            sum(m.num_bytes for layer, _ in self.weights.layers for m in layer.matrices) + self.weights.head.num_bytes
        )

    def logits(
        self,
        tokens: Sequence[Sequence[int]],
        state: Sequence[Mapping[str, Tensor]],
        slots: Sequence[int],
        positions: Sequence[int],
        *,
        want: Literal["none", "last", "every"] = "last",
        threads: int | None = None,
    ) -> Tensor:
        """Consumes each sequence's tokens, advancing its slot in `state` (one mapping a layer: near_keys, near_values
        and far, as `unspool.state` lays them out, float32 or float16).

        Returns float32 logits [rows, vocabulary] of every sequence's last token, or of every token, or none.
        Raises ValueError for more tokens of a sequence than `window`, for slots out of range or named twice, and for
        state tensors that do not fit.
        """
        slot_count = self._check_call(tokens, state, slots, positions)
        counts = torch.tensor([len(sequence) for sequence in tokens], dtype=torch.int32)
        starts = torch.zeros(len(tokens) + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
        total = int(starts[-1])
        wanted = {"none": starts[:0], "last": starts[1:] - 1, "every": torch.arange(total, dtype=torch.int32)}[want]
        flat = torch.tensor([token for sequence in tokens for token in sequence], dtype=torch.int32)
        if total == 0 or int(flat.min()) < 0 or int(flat.max()) >= self.weights.head.rows:
            raise ValueError(f"tokens: ids must be between 0 and {self.weights.head.rows - 1}")
        layers = self._layers(state, slot_count)
        model = self._model(layers, next(iter(state[0].values())).dtype)
        slot_index = torch.tensor(slots, dtype=torch.int32)
        position = torch.tensor(positions, dtype=torch.int64)
        logits = torch.empty(len(wanted), padded(self.weights.head.rows))
        arguments = (ctypes.pointer(model), *map(address, (flat, starts, slot_index, position, wanted, logits)))
        sizes = (len(tokens), len(wanted), logits.shape[1])
        workspace = self._workspace_for(_Workspace(*arguments, None, *sizes, 0), threads)
        call(_Decode(*arguments, address(workspace), *sizes, workspace.numel()), threads)
        return logits[:, : self.weights.head.rows]

    def _workspace_for(self, question: _Workspace, threads: int | None) -> Tensor:
        call(question, threads)
        if self._workspace.numel() < question.workspace_bytes:
            self._workspace = torch.empty(question.workspace_bytes, dtype=torch.uint8)
        return self._workspace

    def _check_call(
        self,
        tokens: Sequence[Sequence[int]],
        state: Sequence[Mapping[str, Tensor]],
        slots: Sequence[int],
        positions: Sequence[int],
    ) -> int:
        slot_count = state[0]["near_keys"].shape[0]
        if not len(tokens) == len(slots) == len(positions):
            raise ValueError("tokens, slots and positions must name the same sequences")
        if len(set(slots)) != len(slots) or not all(0 <= slot < slot_count for slot in slots):
            raise ValueError(f"slots: must be different and between 0 and {slot_count - 1}")
        if not all(1 <= len(sequence) <= self.window for sequence in tokens):
            raise ValueError(f"tokens: a sequence brings between 1 and {self.window} tokens a call")
        if not all(position >= 0 for position in positions):
            raise ValueError("positions: must not be negative")
        return slot_count

    def _layers(self, state: Sequence[Mapping[str, Tensor]], slots: int) -> "ctypes.Array[_Layer]":
        records = (_Layer * len(self.weights.layers))()
        dtype = state[0]["near_keys"].dtype
        for index, ((weights, mixer), tensors) in enumerate(zip(self.weights.layers, state, strict=True)):
            for name, shape in self._state_shapes(mixer).items():
                _check_state(name, tensors.get(name), (slots, *shape), dtype)
            records[index] = self._layer(weights, mixer, tensors)
        return records

    def _state_shapes(self, mixer: LayerMixer) -> dict[str, tuple[int, ...]]:
        sizes = self.weights
        ring = (sizes.kv_heads, mixer.sinks + mixer.window, sizes.head_dim)
        shapes: dict[str, tuple[int, ...]] = {"near_keys": ring, "near_values": ring}
        if mixer.join != "window":
            heads = sizes.heads if mixer.state_per_query_head else sizes.kv_heads
            shapes["far"] = (heads, sizes.head_dim + (mixer.join == "disjoint"), mixer.features)
        return shapes

    def _layer(self, weights: LayerWeights, mixer: LayerMixer, tensors: Mapping[str, Tensor]) -> _Layer:
        return _Layer(
            input_norm=address(weights.input_norm),
            qkv=weights.qkv.argument,
            qkv_bias=address(weights.qkv_bias),
            q_norm=address(weights.q_norm),
            k_norm=address(weights.k_norm),
            out=weights.out.argument,
            out_bias=address(weights.out_bias),
            post_norm=address(weights.post_norm),
            gate_up=weights.gate_up.argument,
            gate_up_bias=address(weights.gate_up_bias),
            down=weights.down.argument,
            down_bias=address(weights.down_bias),
            query_map=weights.far.query_map.argument if weights.far.query_map else _MATRIX,
            key_map=weights.far.key_map.argument if weights.far.key_map else _MATRIX,
            gate_weight=address(weights.far.gate_weight),
            gate_bias=address(weights.far.gate_bias),
            far_bias=address(weights.far.bias),
            near_keys=address(tensors["near_keys"]),
            near_values=address(tensors["near_values"]),
            far=address(tensors.get("far")),
            join=JOINS.index(mixer.join),
            gate=GATES.index(mixer.gate),
            feature_map=FEATURE_MAPS.index(mixer.feature_map),
            window=mixer.window,
            sinks=mixer.sinks,
            state_per_query_head=mixer.state_per_query_head,
            state_rope=mixer.state_rope,
            near_row_max=mixer.near_row_max,
            features=mixer.features,
            inverse_rotation=int(torch.searchsorted(self._windows, mixer.window)),
            gate_normalizer=mixer.gate_normalizer,
            mix=mixer.mix,
        )

    def _model(self, layers: "ctypes.Array[_Layer]", state_dtype: torch.dtype) -> _Model:
        weights = self.weights
        return _Model(
            layers=layers,
            embedding=weights.embedding.argument,
            head=weights.head.argument,
            final_norm=address(weights.final_norm),
            frequencies=address(weights.frequencies),
            windows=address(self._windows),
            num_windows=len(self._windows),
            num_layers=len(layers),
            hidden=weights.embedding.columns,
            intermediate=weights.intermediate,
            heads=weights.heads,
            kv_heads=weights.kv_heads,
            head_dim=weights.head_dim,
            vocabulary=weights.head.rows,
            activation=ACTIVATIONS.index(weights.activation),
            state_format=0 if state_dtype == torch.float32 else 2,
            position_limit=weights.position_limit,
            rotary_scaling=weights.rotary_scaling,
            norm_eps=weights.norm_eps,
        )


def _check(weights: DecoderWeights) -> None:
    if weights.head_dim % CHANNEL_MULTIPLE or not 0 < weights.head_dim <= MAX_CHANNELS:
        raise ValueError(f"head_dim={weights.head_dim} is not a multiple of {CHANNEL_MULTIPLE} up to {MAX_CHANNELS}")
    attention = weights.heads * weights.head_dim
    for name, width in (("hidden", weights.embedding.columns), ("intermediate", weights.intermediate)):
        if width % WIDTH_MULTIPLE:
            raise ValueError(f"{name}={width} is not a multiple of {WIDTH_MULTIPLE}")
    if attention % WIDTH_MULTIPLE:
        raise ValueError(f"heads x head_dim = {attention} is not a multiple of {WIDTH_MULTIPLE}")
    if weights.activation not in ACTIVATIONS:
        raise ValueError(f"activation={weights.activation!r} is not one of {', '.join(ACTIVATIONS)}")


def _check_state(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor is None or tuple(tensor.shape) != shape:
        raise ValueError(
            f"state: {name} must be {shape}, not {tuple(tensor.shape) if tensor is not None else 'absent'}"
        )
    if tensor.dtype != dtype or dtype not in (torch.float32, torch.float16):
        raise ValueError(f"state: {name} is {tensor.dtype}; all must be float32, or all float16")
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"state: {name} must be contiguous and on the CPU")
