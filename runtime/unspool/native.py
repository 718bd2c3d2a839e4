"""Packs a loaded model for the native decoder, and says why when it cannot be."""

import torch
from torch import Tensor, nn

from unspool.config import UnspoolConfig
from unspool.decoder import MLP, Block
from unspool.mixer import LinearizedAttention
from unspool.mixer_spec import MixerSpec
from unspool.model import UnspoolForCausalLM
from unspool.quantization import map_format, vocabulary_format
from unspool.state import feature_size
from unspool_kernels.native.decoder import NativeDecoder
from unspool_kernels.native.decoder_weights import (
    ACTIVATIONS,
    CHANNEL_MULTIPLE,
    MAX_CHANNELS,
    WIDTH_MULTIPLE,
    DecoderWeights,
    FarWeights,
    LayerMixer,
    LayerWeights,
)
from unspool_kernels.native.packed import BLOCK_ROWS, Format, PackedMatrix


def unsupported(config: UnspoolConfig) -> str | None:
    """Why the native decoder has no code for this model, or None."""
    if config.hidden_act not in ACTIVATIONS:
        return f"hidden_act {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}"
    if config.head_dim % CHANNEL_MULTIPLE or config.head_dim > MAX_CHANNELS:
        return f"head_dim {config.head_dim} is not a multiple of {CHANNEL_MULTIPLE} up to {MAX_CHANNELS}"
    attention = config.num_attention_heads * config.head_dim
    for name, width in (
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("num_attention_heads x head_dim", attention),
    ):
        if width % WIDTH_MULTIPLE:
            return f"{name} {width} is not a multiple of {WIDTH_MULTIPLE}"
    if any(spec.has_state and spec.memory == "slots" for spec in config.mixer_specs()):
        return "slot memory has no native kernel"
    return None


def pack(model: UnspoolForCausalLM, format: Format, *, release: bool = False) -> NativeDecoder:
    """Copies the model's weights into the packed format; the feature maps of the state stay float16 or wider, and the
    embedding and head int8 or wider.

    With `release` the model's own weights are given up one by one as they are packed, and it can only be asked for its
    configuration afterwards. Raises ValueError with the reason when `unsupported` has one.
    """
    config = model.config
    if reason := unsupported(config):
        raise ValueError(reason)
    layers = []
    for block in _blocks(model):
        layers.append((_layer(block, format), _mixer(config, block.self_attn.spec)))
        if release:
            block.to(torch.device("meta"))
    head = PackedMatrix.pack(model.lm_head.weight, vocabulary_format(format))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    weights = DecoderWeights(
        layers=layers,
        embedding=head if tied else PackedMatrix.pack(model.model.embed_tokens.weight, vocabulary_format(format)),
        head=head,
        final_norm=_vector(model.model.norm.weight),
        frequencies=model.rotary.frequencies,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        activation=config.hidden_act,
        position_limit=model.rotary.position_limit,
        rotary_scaling=model.rotary.scaling,
        norm_eps=config.rms_norm_eps,
    )
    if release:
        nn.Module.to(model, torch.device("meta"))
    return NativeDecoder(weights)


def _blocks(model: UnspoolForCausalLM) -> list[Block]:
    return [block for block in model.model.layers if isinstance(block, Block)]


def _layer(block: Block, format: Format) -> LayerWeights:
    attention, mlp = block.self_attn, block.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv_bias = [projection.bias.detach() for projection in projections if projection.bias is not None]
    norms = hasattr(attention, "q_norm")
    return LayerWeights(
        input_norm=_vector(block.input_layernorm.weight),
        qkv=PackedMatrix.pack(torch.cat([projection.weight.detach() for projection in projections]), format),
        qkv_bias=_padded_vector(torch.cat(qkv_bias)) if qkv_bias else None,
        q_norm=_vector(attention.q_norm.weight) if norms else None,
        k_norm=_vector(attention.k_norm.weight) if norms else None,
        out=PackedMatrix.pack(attention.o_proj.weight, format),
        out_bias=_optional(attention.o_proj.bias),
        post_norm=_vector(block.post_attention_layernorm.weight),
        gate_up=PackedMatrix.pack(_in_turns(mlp.gate_proj.weight, mlp.up_proj.weight), format),
        gate_up_bias=_gate_up_bias(mlp),
        down=PackedMatrix.pack(mlp.down_proj.weight, format),
        down_bias=_optional(mlp.down_proj.bias),
        far=_far(attention, map_format(format)),
    )


def _far(attention: LinearizedAttention, format: Format) -> FarWeights:
    far = attention.far
    if far is None:
        return FarWeights()
    hedgehog = far.spec.feature_map == "hedgehog"
    return FarWeights(
        query_map=PackedMatrix.pack(_stacked_maps(far.query_map), format) if hedgehog else None,
        key_map=PackedMatrix.pack(_stacked_maps(far.key_map), format) if hedgehog else None,
        gate_weight=_optional(getattr(far, "gate_weight", None)),
        gate_bias=_optional(getattr(far, "gate_bias", None)),
        bias=_optional(getattr(far, "bias", None)),
        bank_weight=_vector(far.bank.weight) if far.bank is not None else None,
        bank_aging=_vector(far.bank.aging) if far.bank is not None else None,
    )


def _stacked_maps(maps: Tensor) -> Tensor:
    """Maps [heads, in, out] as rows [heads x padded out, in]."""
    maps = maps.detach()
    heads, channels, outputs = maps.shape
    rows = maps.new_zeros(heads, -(-outputs // BLOCK_ROWS) * BLOCK_ROWS, channels)
    rows[:, :outputs] = maps.transpose(1, 2)
    return rows.flatten(0, 1)


def _mixer(config: UnspoolConfig, spec: MixerSpec) -> LayerMixer:
    return LayerMixer(
        join=spec.join,
        gate=spec.gate,
        feature_map=spec.feature_map,
        window=spec.window,
        sinks=spec.sinks,
        bank=spec.bank if spec.has_state else 0,
        features=feature_size(config, spec),
        state_per_query_head=spec.state_heads == "q",
        state_rope=spec.state_rope,
        near_row_max=spec.near_mass == "row_max",
        gate_normalizer=spec.gate_normalizer,
        mix=spec.mix,
    )


def _gate_up_bias(mlp: MLP) -> Tensor | None:
    if mlp.gate_proj.bias is None:
        return None
    return _vector(_in_turns(mlp.gate_proj.bias[:, None], mlp.up_proj.bias[:, None])[:, 0])


def _in_turns(gate: Tensor, up: Tensor) -> Tensor:
    """32 rows of the one, 32 of the other: [2 x rows, columns]."""
    blocks = [tensor.detach().unflatten(0, (-1, BLOCK_ROWS)) for tensor in (gate, up)]
    return torch.stack(blocks, dim=1).flatten(0, 2)


def _vector(values: Tensor) -> Tensor:
    return values.detach().float().contiguous().clone()


def _padded_vector(values: Tensor) -> Tensor:
    vector = values.new_zeros(-(-len(values) // BLOCK_ROWS) * BLOCK_ROWS, dtype=torch.float32)
    vector[: len(values)] = values.detach()
    return vector


def _optional(values: Tensor | None) -> Tensor | None:
    return None if values is None else _vector(values)
