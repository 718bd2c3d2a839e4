"""Presets against their publications' formulas, written out head by head and token by token in float64.

Liger (arXiv 2503.01496): a state per query head, softmax feature maps, log-gates logsigmoid(k) / 16, mixed half and
half with softmax over the last 64 tokens. LoLCATs (arXiv 2410.10254): one denominator over window and feature part,
the window weighted by gamma and relative to its row maximum. Unlike Liger's release, the window lives on while
decoding, so decoding continues what prefill began: that is the one difference.
"""

import math

import pytest
import torch
from torch import Tensor

from unspool import PRESETS, MixerSpec, UnspoolConfig
from unspool.batch import step_context
from unspool.mixer import Heads, LinearizedAttention
from unspool.rotary import Rotary
from unspool.state import StatePool

HEADS, KV_HEADS, CHANNELS, TOKENS = 6, 2, 8, 150
GROUP = HEADS // KV_HEADS


class Layer:
    """A random layer in float64, its projections, and its rotated queries and keys."""

    def __init__(self, spec: MixerSpec) -> None:
        torch.manual_seed(4)
        self.config = UnspoolConfig(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=CHANNELS,
            linearize={"preset": "test", "default": spec.to_dict()},
        )
        self.rotary = Rotary(self.config)
        self.mixer = LinearizedAttention(self.config, spec).double()
        self.x = torch.randn(1, TOKENS, 24, dtype=torch.float64) * 2
        with torch.no_grad():
            self.heads = self.mixer.project(self.x)
        rotation = self.rotary.rotation(torch.arange(TOKENS)[None], torch.float64)
        self.q, self.k = rotation.apply(self.heads.q)[0], rotation.apply(self.heads.k)[0]

    @torch.no_grad()
    def mixed(self) -> Tensor:
        """What the layer computes before its output projection [T, H, D]."""
        context = step_context((1, TOKENS), self.rotary, torch.float64, self.x.device)
        return self.mixer.mix(self.heads, context)[0].flatten(1, 2)

    @torch.no_grad()
    def decoded(self) -> Tensor:
        """The same, one token at a time."""
        pool, outputs = StatePool(self.config, 1, torch.float64, "cpu"), []
        for t in range(TOKENS):
            context = step_context((1, 1), self.rotary, torch.float64, self.x.device, slots=(pool, [0]))
            heads = Heads(*(part[:, t : t + 1] for part in self.heads))
            outputs.append(self.mixer.mix(heads, context, pool.layers[0])[0].flatten(1, 2))
            pool.positions[0] += 1
        return torch.cat(outputs)

    def window(self, head: int, t: int, size: int) -> tuple[Tensor, Tensor]:
        """Scores and values of the last tokens, as one query head sees them."""
        recent = slice(max(0, t - size + 1), t + 1)
        scores = self.k[recent, head // GROUP] @ self.q[t, head // GROUP, head % GROUP] / math.sqrt(CHANNELS)
        return scores, self.heads.v[0, recent, head // GROUP]


def liger(layer: Layer, variant: str) -> Tensor:
    """The published recurrence, K-first, with keys, values and gates repeated for every query head."""
    output = torch.zeros(TOKENS, HEADS, CHANNELS, dtype=torch.float64)
    for head in range(HEADS):
        state = torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64)
        slots = torch.zeros(2, CHANNELS, CHANNELS, dtype=torch.float64)
        for t in range(TOKENS):
            q, k = layer.heads.q[0, t, head // GROUP, head % GROUP], layer.heads.k[0, t, head // GROUP]
            v = layer.heads.v[0, t, head // GROUP]
            if variant == "gsa":
                gate = torch.nn.functional.logsigmoid(k).div(16).exp()[:, None]
                slots = gate * slots + (1 - gate) * torch.stack([k, v])[:, None]
                far = (slots[0] @ q / math.sqrt(CHANNELS)).softmax(-1) @ slots[1]
            else:
                hgrn2 = variant == "hgrn2"
                gate = k.sigmoid() if hgrn2 else torch.nn.functional.logsigmoid(k).div(16).exp()
                key = 1 - k.sigmoid() if hgrn2 else k.softmax(-1)
                state = gate[:, None] * state + torch.outer(key, v)
                far = q.softmax(-1) @ state
            scores, values = layer.window(head, t, 64)
            output[t, head] = 0.5 * (scores.softmax(-1) @ values) + 0.5 * far
    return output


@pytest.mark.parametrize("variant", ["gla", "hgrn2", "gsa"])
def test_liger_is_the_published_layer_in_prefill_and_in_decode(variant: str) -> None:
    layer = Layer(PRESETS[f"liger-{variant}"])
    expected = liger(layer, variant)
    torch.testing.assert_close(layer.mixed(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.decoded(), expected, rtol=1e-9, atol=1e-9)


def test_lolcats_is_the_published_layer() -> None:
    layer = Layer(PRESETS["lolcats"])
    far = layer.mixer.far
    assert far is not None
    with torch.no_grad():
        far.query_map.add_(torch.randn_like(far.query_map) * 0.3)
        far.key_map.add_(torch.randn_like(far.key_map) * 0.3)

    def features(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([(x @ weight).softmax(-1), (-(x @ weight)).softmax(-1)], -1)

    expected = torch.zeros(TOKENS, HEADS, CHANNELS, dtype=torch.float64)
    for head in range(HEADS):
        keys = features(layer.k[:, head // GROUP], far.key_map[head])
        for t in range(TOKENS):
            scores, values = layer.window(head, t, 64)
            near = 0.1 * (scores - scores.max()).exp()
            query = features(layer.q[t, head // GROUP, head % GROUP], far.query_map[head])
            left = slice(0, max(0, t - 63))
            weights = torch.cat([near, keys[left] @ query])
            everything = torch.cat([values, layer.heads.v[0, left, head // GROUP]])
            expected[t, head] = (weights[:, None] * everything).sum(0) / weights.sum()
    torch.testing.assert_close(layer.mixed(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.decoded(), expected.detach(), rtol=1e-6, atol=1e-6)
