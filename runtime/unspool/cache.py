"""What `transformers.generate` carries between steps: a pool with one slot for each sequence of the batch."""

import torch

from unspool.config import UnspoolConfig
from unspool.state import StatePool


class UnspoolCache:
    """Holds the state of a batch under the name `past_key_values`. Its size does not depend on the text's length."""

    is_compileable = False

    def __init__(self, config: UnspoolConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.pool = StatePool(config, batch_size, dtype, device)
        self._columns = 0

    @property
    def slots(self) -> range:
        return range(self.pool.num_slots)

    def advance(self, columns: int) -> None:
        """Counts the columns of input_ids that were consumed, padding included."""
        self._columns += columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input_ids consumed so far."""
        return self._columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i continues what sequence beam_idx[i] was (beam search)."""
        self.pool.reorder(beam_idx)
