"""The executor for GPUs: Triton kernels over packed tokens, decode steps as CUDA graphs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unspool.config import UnspoolConfig
from unspool.cuda_graphs import DecodeGraphs
from unspool.model import UnspoolForCausalLM
from unspool.packed_decoder import PackedDecoder
from unspool.packing import PackedTokens
from unspool.state import StatePool
from unspool_kernels.logit_rows import LogitRows, logit_rows

MAX_CHANNELS = 512
"""The widest head whose registers the kernels' tiles are planned for."""


def unsupported(config: UnspoolConfig) -> str | None:
    """Why the Triton kernels cannot run this model, or None."""
    if config.head_dim > MAX_CHANNELS:
        return f"head_dim {config.head_dim} is more than the {MAX_CHANNELS} channels of the Triton kernels"
    if any(spec.has_state and spec.bank for spec in config.mixer_specs()):
        return "a bank has no Triton kernel"
    if any(spec.has_state and spec.memory == "slots" for spec in config.mixer_specs()):
        return "slot memory has no Triton kernel"
    return None


class GpuExecutor:
    """A model on a CUDA device, or on the CPU in Triton's interpreter, where nothing is captured.

    A step's matrix products depend on how many sequences it is filled up to, so that a row agrees with the one it has
    alone to rounding, not to the bit.
    """

    def __init__(self, model: UnspoolForCausalLM, state_dtype: torch.dtype = torch.float32) -> None:
        """Raises ValueError with the reason when `unsupported` has one."""
        if reason := unsupported(model.config):
            raise ValueError(reason)
        self.config: UnspoolConfig = model.config
        self.shared_chunk = 0
        self.state_dtype = state_dtype
        self._device = model.device
        self._decoder = PackedDecoder(model)
        self._graphs = DecodeGraphs(self._decoder.step, model.device) if model.device.type == "cuda" else None

    def new_pool(self, num_slots: int) -> StatePool:
        return StatePool(self.config, num_slots, self.state_dtype, self._device, far_dtype=self.state_dtype)

    @torch.inference_mode()
    def logits(
        self,
        tokens: Sequence[Sequence[int]],
        pool: StatePool,
        slots: Sequence[int],
        want: LogitRows | Sequence[LogitRows] = "last",
    ) -> Tensor:
        positions = [pool.positions[slot] for slot in slots]
        if self._graphs is not None and want == "last" and all(len(sequence) == 1 for sequence in tokens):
            logits = self._graphs.logits([sequence[0] for sequence in tokens], pool, positions, slots)
        else:
            hidden = self._decoder.hidden(PackedTokens.of(tokens, positions, slots, self._device), pool.layers)
            rows = logit_rows([len(sequence) for sequence in tokens], want)
            logits = self._decoder.head(hidden[rows]) if rows else hidden.new_empty(0, self.config.vocab_size)
        for slot, sequence in zip(slots, tokens, strict=True):
            pool.positions[slot] += len(sequence)
        return logits
