"""The block stack: embed, layers of mixer and MLP, final norm. Parameter names are those of transformers' Llama."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.activations import ACT2FN

from unspool.batch import StepContext
from unspool.config import UnspoolConfig
from unspool.linear import Linear
from unspool.mixer import LinearizedAttention
from unspool.mixer_spec import MixerSpec
from unspool.norm import RMSNorm
from unspool.state import LayerState, StatePool


class MLP(nn.Module):
    """Gated feed-forward: down(act(gate(x)) * up(x))."""

    def __init__(self, config: UnspoolConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, hidden, bias=config.mlp_bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return output


class Block(nn.Module):
    """One layer: x + mixer(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: UnspoolConfig, spec: MixerSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LinearizedAttention(config, spec)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: StepContext, state: LayerState | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, state)
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half of the layer, which no token shares with another."""
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


@dataclass
class DecoderOutput:
    """The final norm's output [B, T, hidden], and each layer's input when it was asked for."""

    hidden: Tensor
    layer_inputs: tuple[Tensor, ...] | None


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: UnspoolConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, spec) for spec in config.mixer_specs())
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embeddings: Tensor, context: StepContext, pool: StatePool | None, *, keep_inputs: bool = False
    ) -> DecoderOutput:
        """Runs embeddings [B, T, hidden] through every layer, advancing the pool's tensors but not its positions."""
        x, inputs = embeddings, []
        for index, layer in enumerate(self.layers):
            if keep_inputs:
                inputs.append(x)
            x = layer(x, context, pool.layers[index] if pool is not None else None)
        hidden = self.norm(x)
        return DecoderOutput(hidden, (*inputs, hidden) if keep_inputs else None)
