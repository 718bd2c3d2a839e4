"""Decode steps as CUDA graphs: one for every pool and number of sequences, captured when it is first needed.

A graph replays the same kernels on the same addresses, so a step's inputs are copied to where it reads them, and a
step of fewer sequences is filled up with padding. Knows nothing of models.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from unspool.packing import PackedTokens
from unspool.state import LayerState, StatePool

Step = Callable[[PackedTokens, Sequence[LayerState]], Tensor]
"""Logits [S, vocabulary] of one token for each sequence, advancing their slots; it must not wait for the device."""

TOKENS, POSITIONS, SLOTS = range(3)
"""The rows of a graph's inputs."""
NO_SLOT = -1


def bucket_of(sequences: int, num_slots: int) -> int:
    """The sequences of the smallest graph that fits: a power of two, or all of the pool's slots."""
    return min(1 << (sequences - 1).bit_length(), num_slots)


class DecodeGraphs:
    """A step's graphs. They share their memory, since only one runs at a time and its logits are copied at once."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step = step
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: WeakKeyDictionary[StatePool, dict[int, DecodeGraph]] = WeakKeyDictionary()

    def logits(self, tokens: Sequence[int], pool: StatePool, positions: Sequence[int], slots: Sequence[int]) -> Tensor:
        """[S, vocabulary] of one token for each sequence, whose slots advance but not the pool's positions."""
        graphs = self._graphs.setdefault(pool, {})
        bucket = bucket_of(len(tokens), pool.num_slots)
        with torch.cuda.device(self._device):
            if bucket not in graphs:
                graphs[bucket] = DecodeGraph(self._step, pool.layers, bucket, self._memory)
            return graphs[bucket].replay(tokens, positions, slots)


class DecodeGraph:
    """One step for `bucket` sequences of one pool, captured on the current device."""

    def __init__(self, step: Step, layers: Sequence[LayerState], bucket: int, memory: Any) -> None:
        """`memory` is the handle of the graphs' pool of memory."""
        self._step = step
        self._layers = layers
        self._bucket = bucket
        self._inputs = torch.zeros(3, bucket, dtype=torch.int64, device="cuda")
        self._inputs[SLOTS] = NO_SLOT
        self._cu_seqlens = torch.arange(bucket + 1, dtype=torch.int32, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Compiles the kernels and allocates what they keep, which a capture cannot. All is padding: no slot changes.
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            self._logits = self._run()

    def _run(self) -> Tensor:
        tokens, positions, slots = self._inputs
        batch = PackedTokens(tokens, positions.int(), slots.int(), self._cu_seqlens, longest=1)
        return self._step(batch, self._layers)

    def replay(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Logits [S, vocabulary] of at most `bucket` sequences."""
        missing = self._bucket - len(tokens)
        padding = [0] * missing
        rows = [[*tokens, *padding], [*positions, *padding], [*slots, *[NO_SLOT] * missing]]
        self._inputs.copy_(torch.tensor(rows))
        self._graph.replay()
        return self._logits[: len(tokens)].clone()
