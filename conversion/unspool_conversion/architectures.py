"""How each architecture names its tensors and lays them out: tables read in both directions, and nothing of values.

A row pairs a module path of ours with the source's; the part after the last dot (`weight`, `bias`) is the same in both.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor

from unspool.config import UnspoolConfig
from unspool.errors import UserError


class Transform(NamedTuple):
    """A change of layout and its inverse, both tensor and configuration to tensor."""

    to_unspool: Callable[[Tensor, UnspoolConfig], Tensor]
    to_source: Callable[[Tensor, UnspoolConfig], Tensor]


class MappedName(NamedTuple):
    """A tensor's name on the other side, and how to lay it out for either."""

    name: str
    transform: Transform


class Row(NamedTuple):
    """One module: our path, the source's, and the layout change between them."""

    unspool: str
    source: str
    transform: Transform


def _unchanged(tensor: Tensor, config: UnspoolConfig) -> Tensor:
    return tensor


def _halves_from_pairs(heads: Literal["num_attention_heads", "num_key_value_heads"]) -> Transform:
    """Rotary channels of each head: GGUF's llama stores channel pairs (i, i + D/2) side by side, we store halves."""

    def to_halves(tensor: Tensor, config: UnspoolConfig) -> Tensor:
        paired = tensor.reshape(getattr(config, heads), -1, 2, *tensor.shape[1:])
        return paired.transpose(1, 2).reshape(tensor.shape)

    def to_pairs(tensor: Tensor, config: UnspoolConfig) -> Tensor:
        halved = tensor.reshape(getattr(config, heads), 2, -1, *tensor.shape[1:])
        return halved.transpose(1, 2).reshape(tensor.shape)

    return Transform(to_halves, to_pairs)


UNCHANGED = Transform(_unchanged, _unchanged)
QUERY_PAIRS = _halves_from_pairs("num_attention_heads")
KEY_PAIRS = _halves_from_pairs("num_key_value_heads")

_LAYER = re.compile(r"\.(0|[1-9]\d*)\.")


@dataclass(frozen=True)
class Naming:
    """A source's tensor names. `dropped` are paths of buffers that follow from the configuration."""

    rows: tuple[Row, ...]
    dropped: tuple[str, ...] = ()

    def to_unspool(self, name: str) -> MappedName | None:
        """Our name for a source tensor; None when no row has it."""
        return _translate(name, self._by_source, lambda row: row.unspool)

    def to_source(self, name: str) -> MappedName | None:
        """The source's name for a tensor of ours; None when no row has it, as for the parameters conversion adds."""
        return _translate(name, self._by_unspool, lambda row: row.source)

    def drops(self, name: str) -> bool:
        """Whether a source tensor carries nothing that a converted model needs."""
        return _split_layer(name)[0] in self.dropped

    @cached_property
    def _by_source(self) -> dict[str, Row]:
        return {row.source: row for row in self.rows}

    @cached_property
    def _by_unspool(self) -> dict[str, Row]:
        return {row.unspool: row for row in self.rows}


def _translate(name: str, table: dict[str, Row], other: Callable[[Row], str]) -> MappedName | None:
    template, layer = _split_layer(name)
    path, _, part = template.rpartition(".")
    row = table.get(path)
    if row is None or part not in ("weight", "bias"):
        return None
    return MappedName(f"{other(row)}.{part}".replace("{layer}", layer), row.transform)


def _split_layer(name: str) -> tuple[str, str]:
    match = _LAYER.search(name)
    if match is None:
        return name, ""
    return f"{name[: match.start()]}.{{layer}}.{name[match.end() :]}", match[1]


_BLOCK = "model.layers.{layer}"
_OUR_PATHS = (
    "model.embed_tokens",
    f"{_BLOCK}.input_layernorm",
    f"{_BLOCK}.self_attn.q_proj",
    f"{_BLOCK}.self_attn.k_proj",
    f"{_BLOCK}.self_attn.v_proj",
    f"{_BLOCK}.self_attn.o_proj",
    f"{_BLOCK}.self_attn.q_norm",
    f"{_BLOCK}.self_attn.k_norm",
    f"{_BLOCK}.post_attention_layernorm",
    f"{_BLOCK}.mlp.gate_proj",
    f"{_BLOCK}.mlp.up_proj",
    f"{_BLOCK}.mlp.down_proj",
    "model.norm",
    "lm_head",
)
_GGUF_PATHS = (
    "token_embd",
    "blk.{layer}.attn_norm",
    "blk.{layer}.attn_q",
    "blk.{layer}.attn_k",
    "blk.{layer}.attn_v",
    "blk.{layer}.attn_output",
    "blk.{layer}.attn_q_norm",
    "blk.{layer}.attn_k_norm",
    "blk.{layer}.ffn_norm",
    "blk.{layer}.ffn_gate",
    "blk.{layer}.ffn_up",
    "blk.{layer}.ffn_down",
    "output_norm",
    "output",
)
_EXAONE_PATHS = (
    "transformer.wte",
    "transformer.h.{layer}.ln_1",
    "transformer.h.{layer}.attn.attention.q_proj",
    "transformer.h.{layer}.attn.attention.k_proj",
    "transformer.h.{layer}.attn.attention.v_proj",
    "transformer.h.{layer}.attn.attention.out_proj",
    None,
    None,
    "transformer.h.{layer}.ln_2",
    "transformer.h.{layer}.mlp.c_fc_0",
    "transformer.h.{layer}.mlp.c_fc_1",
    "transformer.h.{layer}.mlp.c_proj",
    "transformer.ln_f",
    "lm_head",
)


def _rows(paths: tuple[str | None, ...], transforms: dict[str, Transform]) -> tuple[Row, ...]:
    return tuple(
        Row(ours, theirs, transforms.get(theirs, UNCHANGED))
        for ours, theirs in zip(_OUR_PATHS, paths, strict=True)
        if theirs is not None
    )


_LLAMA = Naming(_rows(_OUR_PATHS, {}), (f"{_BLOCK}.self_attn.rotary_emb.inv_freq",))
_EXAONE = Naming(_rows(_EXAONE_PATHS, {}))
_GGUF = Naming(_rows(_GGUF_PATHS, {}))
_GGUF_PAIRED = Naming(
    _rows(_GGUF_PATHS, {"blk.{layer}.attn_q": QUERY_PAIRS, "blk.{layer}.attn_k": KEY_PAIRS}), ("rope_freqs.weight",)
)

NAMINGS: dict[tuple[str, str], Naming] = {
    ("safetensors", "llama"): _LLAMA,
    ("safetensors", "mistral"): _LLAMA,
    ("safetensors", "ministral"): _LLAMA,
    ("safetensors", "qwen2"): _LLAMA,
    ("safetensors", "qwen3"): _LLAMA,
    ("safetensors", "seed_oss"): _LLAMA,
    ("safetensors", "exaone"): _EXAONE,
    ("gguf", "llama"): _GGUF_PAIRED,
    ("gguf", "mistral"): _GGUF_PAIRED,
    ("gguf", "qwen2"): _GGUF,
    ("gguf", "qwen3"): _GGUF,
}
"""By source format and `model_type`."""


def naming_of(source_format: str, model_type: str) -> Naming:
    """The naming of an architecture. Raises UserError for one that is not in the table."""
    if (naming := NAMINGS.get((source_format, model_type))) is None:
        known = ", ".join(model for file_format, model in NAMINGS if file_format == source_format)
        raise UserError(f"model_type {model_type!r} is not converted from {source_format}; known are {known}")
    return naming
