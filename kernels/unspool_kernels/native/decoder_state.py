"""The tensors that one layer's state is made of, as the native decoder takes them, and their check."""

from collections.abc import Mapping

import torch
from torch import Tensor

from unspool_kernels.native.decoder_weights import DecoderWeights, LayerMixer

BANK_DTYPES = {"bank_scores": torch.float32, "bank_positions": torch.int32}


def check_state(weights: DecoderWeights, mixer: LayerMixer, state: Mapping[str, Tensor], like: Tensor) -> None:
    """Raises ValueError, naming the tensor, unless `state` has a layer's tensors for the slots of `like`, and in its
    dtype but for a bank's scores and positions."""
    for name, shape in _shapes(weights, mixer).items():
        _check_tensor(name, state.get(name), (like.shape[0], *shape), like.dtype)


def _shapes(weights: DecoderWeights, mixer: LayerMixer) -> dict[str, tuple[int, ...]]:
    near = (weights.kv_heads, mixer.sinks + mixer.window + mixer.bank, weights.head_dim)
    shapes: dict[str, tuple[int, ...]] = {"near_keys": near, "near_values": near}
    if mixer.join != "window":
        heads = weights.heads if mixer.state_per_query_head else weights.kv_heads
        shapes["far"] = (heads, weights.head_dim + (mixer.join == "disjoint"), mixer.features)
    if mixer.bank:
        shapes |= dict.fromkeys(BANK_DTYPES, (weights.kv_heads, mixer.bank))
    return shapes


def _check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor is None or tuple(tensor.shape) != shape:
        raise ValueError(
            f"state: {name} must be {shape}, not {tuple(tensor.shape) if tensor is not None else 'absent'}"
        )
    if name in BANK_DTYPES:
        if tensor.dtype != BANK_DTYPES[name]:
            raise ValueError(f"state: {name} must be {BANK_DTYPES[name]}, not {tensor.dtype}")
    elif tensor.dtype != dtype or dtype not in (torch.float32, torch.float16):
        raise ValueError(f"state: {name} is {tensor.dtype}; all must be float32, or all float16")
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"state: {name} must be contiguous and on the CPU")
