"""A tiny model whose native bits do not depend on how a text is cut, and the identity of its states."""

import torch

from unspool import UnspoolConfig, UnspoolForCausalLM
from unspool.config import linearize_block
from unspool.executor import NativeExecutor
from unspool.mixer_spec import PRESETS
from unspool.native import pack
from unspool.store import StateIdentity

VOCABULARY = 64
IDENTITY = StateIdentity(
    weights="w" * 64,
    config="c" * 64,
    tokenizer="t" * 64,
    template="e" * 64,
    weight_format="float32",
    state_dtype="float32",
    depth=2,
)


def tiny_model() -> UnspoolForCausalLM:
    """The same weights in every process."""
    torch.manual_seed(1)
    config = UnspoolConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.4,
        linearize=linearize_block("test", PRESETS["disjoint"].replace(window=8, far_bias=0.0), {}),
    )
    return UnspoolForCausalLM(config).eval()


def tiny_executor() -> NativeExecutor:
    model = tiny_model()
    return NativeExecutor(model.config, pack(model, "float32"), torch.float32)
