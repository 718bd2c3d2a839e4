"""A whole decoder behind one native call: its weights packed once, its state in the caller's tensors."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from unspool_kernels.native.decoder_program import DecoderProgram
from unspool_kernels.native.decoder_weights import DecoderWeights


class NativeDecoder:
    """Packed weights, which any number of programs share."""

    def __init__(self, weights: DecoderWeights) -> None:
        """Raises ValueError for sizes that the kernels have no code for."""
        weights.check()
        self.weights = weights

    @property
    def window(self) -> int:
        """Tokens that one sequence may bring at most in one call."""
        return self.weights.window

    def bind(self, state: Sequence[Mapping[str, Tensor]]) -> DecoderProgram:
        """This decoder on the state tensors of a pool. Raises ValueError for tensors that do not fit."""
        return DecoderProgram(self.weights, state)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        head, embedding = self.weights.head, self.weights.embedding
        return self.bytes_per_step + (embedding.num_bytes if embedding is not head else 0)

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights that one decode step reads: all but the embedding, of which it reads a row."""
        layers = (matrix for layer, _ in self.weights.layers for matrix in layer.matrices)
        return sum(matrix.num_bytes for matrix in layers) + self.weights.head.num_bytes
