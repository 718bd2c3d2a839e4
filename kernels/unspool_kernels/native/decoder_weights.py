"""What a native decoder is made of: one record for a layer's weights, one for how it mixes tokens, one for the whole.

Knows no model class and no configuration: the caller describes the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unspool_kernels.native.packed import PackedMatrix, padded

JOINS = ("disjoint", "mixed", "window")
GATES = ("scalar", "fixed", "none", "liger", "hgrn2")
FEATURE_MAPS = ("hedgehog", "softmax", "elu", "identity")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "relu")
MAX_CHANNELS = 512
CHANNEL_MULTIPLE = 16
WIDTH_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True)
class FarWeights:
    """What a layer's state has learned. Maps hold each head's matrix transposed, padded to whole blocks of rows.
    A bank has a weight [kv_heads, 4 head_dim] of its tokens' (k, v, k^2, v^2) and an aging [kv_heads]."""

    query_map: PackedMatrix | None = None
    key_map: PackedMatrix | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    bias: Tensor | None = None
    bank_weight: Tensor | None = None
    bank_aging: Tensor | None = None


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
    bank: int
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

    @property
    def window(self) -> int:
        """The smallest window: as many tokens as a call may take past what the ring still holds."""
        return min(mixer.window for _, mixer in self.layers)

    def check(self) -> None:
        """Raises ValueError, naming the field, for sizes that the kernels have no code for and for weights that do not
        fit together: the native side believes what it is given."""
        if self.head_dim % CHANNEL_MULTIPLE or not 0 < self.head_dim <= MAX_CHANNELS:
            raise ValueError(f"head_dim={self.head_dim} is not a multiple of {CHANNEL_MULTIPLE} up to {MAX_CHANNELS}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        widths = {"hidden": self.embedding.columns, "intermediate": self.intermediate}
        for name, width in {**widths, "heads x head_dim": self.heads * self.head_dim}.items():
            if width % WIDTH_MULTIPLE:
                raise ValueError(f"{name}={width} is not a multiple of {WIDTH_MULTIPLE}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if not self.layers:
            raise ValueError("layers: there must be at least one")
        _check_matrix("embedding", self.embedding, self.head.rows, self.embedding.columns)
        _check_matrix("head", self.head, self.head.rows, self.embedding.columns)
        _check_vector("final_norm", self.final_norm, self.embedding.columns)
        if self.frequencies.dtype != torch.float64 or self.frequencies.shape != (self.head_dim // 2,):
            raise ValueError(f"frequencies: must be float64 [{self.head_dim // 2}]")
        for layer, mixer in self.layers:
            self._check_layer(layer)
            self._check_mixer(layer.far, mixer)

    def _check_layer(self, layer: LayerWeights) -> None:
        hidden, inner, attention = self.embedding.columns, self.intermediate, self.heads * self.head_dim
        projected = attention + 2 * self.kv_heads * self.head_dim
        _check_matrix("qkv", layer.qkv, projected, hidden)
        _check_matrix("out", layer.out, hidden, attention)
        _check_matrix("gate_up", layer.gate_up, 2 * inner, hidden)
        _check_matrix("down", layer.down, hidden, inner)
        lengths = {
            "input_norm": hidden,
            "post_norm": hidden,
            "q_norm": self.head_dim,
            "k_norm": self.head_dim,
            "qkv_bias": padded(projected),
            "out_bias": hidden,
            "gate_up_bias": 2 * inner,
            "down_bias": hidden,
        }
        for name, length in lengths.items():
            _check_vector(name, getattr(layer, name), length)

    def _check_mixer(self, far: FarWeights, mixer: LayerMixer) -> None:
        if mixer.window < 1 or mixer.sinks < 0:
            raise ValueError(f"window={mixer.window} must be at least 1 and sinks={mixer.sinks} not negative")
        self._check_bank(far, mixer)
        hedgehog = mixer.feature_map == "hedgehog"
        if mixer.join != "window" and mixer.features != self.head_dim * (2 if hedgehog else 1):
            raise ValueError(f"features={mixer.features} are not those of {mixer.feature_map}")
        if mixer.join == "window" or not hedgehog:
            return
        key_heads = self.heads if mixer.state_per_query_head else self.kv_heads
        for name, map, heads in (("query_map", far.query_map, self.heads), ("key_map", far.key_map, key_heads)):
            if map is None or map.format not in ("float32", "float16", "bfloat16"):
                raise ValueError(f"{name}: must be there, in a float format")
            _check_matrix(name, map, heads * padded(self.head_dim), self.head_dim)

    def _check_bank(self, far: FarWeights, mixer: LayerMixer) -> None:
        if mixer.bank < 0 or (mixer.bank and mixer.join != "disjoint"):
            raise ValueError(f"bank={mixer.bank} must not be negative, and needs join='disjoint'")
        shapes = {"bank_weight": (self.kv_heads, 4 * self.head_dim), "bank_aging": (self.kv_heads,)}
        for name, shape in shapes.items() if mixer.bank else ():
            if (weight := getattr(far, name)) is None or weight.dtype != torch.float32 or weight.shape != shape:
                raise ValueError(f"{name}: must be there, float32 {list(shape)}")


def _check_matrix(name: str, matrix: PackedMatrix, rows: int, columns: int) -> None:
    if (matrix.rows, matrix.columns) != (rows, columns):
        raise ValueError(f"{name}: must be [{rows}, {columns}], not [{matrix.rows}, {matrix.columns}]")


def _check_vector(name: str, vector: Tensor | None, length: int) -> None:
    if vector is not None and (vector.dtype != torch.float32 or vector.shape != (length,)):
        raise ValueError(f"{name}: must be float32 [{length}], not {vector.dtype} {list(vector.shape)}")
