"""How many tokens each head's state remembers on a text: 1 / (1 - decay) of its gate."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unspool.mixer import LinearizedAttention
from unspool.model import UnspoolForCausalLM
from unspool_conversion.evaluation.readers import ConvertedReader

QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}
FOREVER = 1e12
"""Tokens; a gate that forgets no faster is said to keep for ever."""


@torch.inference_mode()
def measure_timescales(
    model: UnspoolForCausalLM, sequences: Tensor, progress: Callable[[], object]
) -> list[dict[str, Any]]:
    """For each layer with a state and each of its heads: median, 10th and 90th percentile over tokens [S, T], and over
    the channels where each has its own gate. None stands for a state that forgets nothing."""
    timescales: dict[int, list[Tensor]] = {}
    mixers = {index: layer.self_attn for index, layer in enumerate(model.model.layers) if layer.self_attn.far}

    def watch(layer: int) -> Callable[..., None]:
        def keep(mixer: LinearizedAttention, inputs: tuple[Any, ...]) -> None:
            timescales.setdefault(layer, []).append(_timescales(mixer, inputs[0]))

        return keep

    handles = [mixer.register_forward_pre_hook(watch(layer)) for layer, mixer in mixers.items()]
    try:
        for tokens in sequences:
            ConvertedReader(model).hidden(tokens)
            progress()
    finally:
        for handle in handles:
            handle.remove()
    return [{"layer": layer, "heads": _quantiles(torch.cat(parts, dim=1))} for layer, parts in timescales.items()]


def _timescales(mixer: LinearizedAttention, x: Tensor) -> Tensor:
    """Of inputs x [1, T, hidden]: [H, T, channels], in tokens."""
    assert mixer.far is not None
    keys = mixer.project(x).k.float()
    if mixer.spec.state_heads == "q":
        keys = keys.repeat_interleave(mixer.group, dim=2)
    return mixer.far.log_decay(keys)[0].double().expm1().abs().reciprocal().float().transpose(0, 1).cpu()


def _quantiles(timescales: Tensor) -> list[dict[str, float | None]]:
    """`torch.quantile` takes 16 million numbers at most; a sort takes any."""
    ordered = timescales.flatten(1).sort(dim=1).values
    last = ordered.shape[1] - 1
    columns = {name: ordered[:, round(share * last)].tolist() for name, share in QUANTILES.items()}
    return [
        {name: value if value < FOREVER else None for name, value in zip(columns, head, strict=True)}
        for head in zip(*columns.values(), strict=True)
    ]
