"""What a native decoder is made of: one record for a layer's weights, one for how it mixes tokens, one for the whole.

Knows no model class and no configuration: the caller describes the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from unspool_kernels.native.packed import PackedMatrix

JOINS = ("disjoint", "mixed", "window")
GATES = ("scalar", "fixed", "none", "liger", "hgrn2")
FEATURE_MAPS = ("hedgehog", "softmax", "elu", "identity")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "relu")
MAX_CHANNELS = 512
CHANNEL_MULTIPLE = 16
WIDTH_MULTIPLE = 32


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

    @property
    def window(self) -> int:
        """The smallest window: as many tokens as a call may take past what the ring still holds."""
        return min(mixer.window for _, mixer in self.layers)

    def check(self) -> None:
        """Raises ValueError for sizes that the kernels have no code for."""
        if self.head_dim % CHANNEL_MULTIPLE or not 0 < self.head_dim <= MAX_CHANNELS:
            raise ValueError(f"head_dim={self.head_dim} is not a multiple of {CHANNEL_MULTIPLE} up to {MAX_CHANNELS}")
        attention = self.heads * self.head_dim
        for name, width in (("hidden", self.embedding.columns), ("intermediate", self.intermediate)):
            if width % WIDTH_MULTIPLE:
                raise ValueError(f"{name}={width} is not a multiple of {WIDTH_MULTIPLE}")
        if attention % WIDTH_MULTIPLE:
            raise ValueError(f"heads x head_dim = {attention} is not a multiple of {WIDTH_MULTIPLE}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
