"""The checkpoint's configuration: HuggingFace field names, plus a `linearize` block that says how each layer mixes."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from unspool.mixer_spec import PRESETS, MixerSpec
from unspool.quantization import weight_format


@strict
class UnspoolConfig(PreTrainedConfig):
    """Configuration of a converted model.

    The `linearize` block is `{"preset": str, "default": {mixer fields}, "layers": {"3": {fields that differ}}}`;
    `quantization_config`, where there is one, says how the weights are stored. Raises ValueError when a field has a
    value that no model can have.
    """

    model_type = "unspool"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    """Bias on the query, key and value projections."""
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head's query and key before the rotation (Qwen3)."""
    layer_types: list[str] | None = None
    base_model_type: str | None = None
    """`model_type` of the teacher."""
    linearize: dict[str, Any] | None = None
    elastic: dict[str, Any] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.linearize is None:
            self.linearize = linearize_block("disjoint", PRESETS["disjoint"], {})
        if self.layer_types is None:
            self.layer_types = [
                "hybrid_sliding" if spec.has_state else "sliding_attention" for spec in self.mixer_specs()
            ]
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]  # transformers leaves it bare
        weight_format(self)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    def mixer_specs(self) -> tuple[MixerSpec, ...]:
        """Each layer's mixer, in order."""
        assert self.linearize is not None
        default_fields, overrides = self.linearize.get("default"), self.linearize.get("layers", {})
        if not isinstance(default_fields, dict) or not isinstance(overrides, dict):
            raise ValueError("linearize: must hold `default` and may hold `layers`, each an object of mixer fields")
        default = MixerSpec.from_dict(default_fields)
        if outside := [name for name in overrides if not 0 <= int(name) < self.num_hidden_layers]:
            raise ValueError(f"linearize.layers names layer {outside[0]}; the model has {self.num_hidden_layers}")
        return tuple(
            MixerSpec.from_dict(default.to_dict() | overrides.get(str(layer), {}))
            for layer in range(self.num_hidden_layers)
        )

    @property
    def near_tokens(self) -> int:
        """Tokens that fit every layer's near set."""
        return min(spec.near_tokens for spec in self.mixer_specs())


def linearize_block(preset: str, default: MixerSpec, layers: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The `linearize` block of `config.json`. `layers` holds the fields in which a layer differs from `default`."""
    return {
        "preset": preset,
        "default": default.to_dict(),
        "layers": {str(layer): fields for layer, fields in sorted(layers.items())},
    }
