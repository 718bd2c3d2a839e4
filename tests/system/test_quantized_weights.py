"""What quantised weights and a float16 state cost the real model, as KL divergence from float32 on prose."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unspool.executor import NativeExecutor
from unspool.loading import load
from unspool.native import pack
from unspool_kernels.native.library import available
from unspool_kernels.native.packed import Format

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")

TOKENS = 1024
MOST_NATS: dict[tuple[Format, torch.dtype], float] = {
    ("bfloat16", torch.float32): 2e-4,
    ("float16", torch.float32): 2e-5,
    ("int8", torch.float32): 2e-3,
    ("int4", torch.float32): 5e-2,
    ("float32", torch.float16): 1e-5,
}


def test_quantised_weights_stay_close_to_float32(smollm2: Path, prose: Path) -> None:
    loaded = load(smollm2)
    texts = [json.loads(line)["text"] for line in prose.read_text("utf-8").splitlines()]
    tokens = [token for text in texts for token in loaded.tokenizer.encode(text)][:TOKENS]
    assert len(tokens) == TOKENS

    def log_probabilities(format: Format, state_dtype: torch.dtype) -> Tensor:
        executor = NativeExecutor(loaded.model.config, pack(loaded.model, format), state_dtype)
        return executor.logits([tokens], executor.new_pool(1), [0], "every").log_softmax(-1)

    exact = log_probabilities("float32", torch.float32)
    for (format, state_dtype), most in MOST_NATS.items():
        nats = (exact.exp() * (exact - log_probabilities(format, state_dtype))).sum(-1).mean().item()
        assert 0 < nats <= most, f"{format} weights, {state_dtype} state: {nats} nats a token"
