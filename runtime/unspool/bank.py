"""Which tokens that left the window a layer keeps exactly: a priority from their keys and values, learned per head."""

import torch
from torch import Tensor, nn

from unspool.config import UnspoolConfig
from unspool.mixer_spec import MixerSpec
from unspool.rotary import Rotary
from unspool_kernels.reference import bank


class BankPriority(nn.Module):
    """The weight [H_kv, 4 D] of a token's (k, v, k^2, v^2), k unrotated, and what a head gives a token for being one
    position later, aging [H_kv].

    With no weight and any aging above 0 the bank holds the last tokens: it is a longer window.
    """

    def __init__(self, config: UnspoolConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_key_value_heads, 4 * config.head_dim))
        self.aging = nn.Parameter(torch.empty(config.num_key_value_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.zero_()
        self.aging.fill_(1.0)

    def score(self, keys: Tensor, values: Tensor) -> Tensor:
        """The part that does not depend on the position: [B, T, H_kv, D] each to [B, T, H_kv], float32."""
        products = features(keys, values).double() * self.weight.double()
        return products.sum(-1).float()  # summed in float64: one number a head must round alike in any batch


def features(keys: Tensor, values: Tensor) -> Tensor:
    """What a priority is linear in: keys unrotated and values [..., D] to [..., 4 D]."""
    return torch.cat([keys, values, keys.square(), values.square()], -1)


def entries_of(keys: Tensor, values: Tensor, spec: MixerSpec, scores: Tensor, positions: Tensor) -> bank.Entries:
    """The bank's rows of a layer's near set [B, H_kv, M + W + B, D], as views."""
    first = spec.sinks + spec.window
    return bank.Entries(keys[:, :, first:], values[:, :, first:], scores, positions)


def no_entries(keys: Tensor, spec: MixerSpec) -> bank.Entries:
    """An empty bank before the first of the tokens [B, T, H_kv, D]."""
    batch, _, heads, channels = keys.shape
    rows = keys.new_zeros(batch, heads, spec.bank, channels)
    scores = torch.zeros(batch, heads, spec.bank, device=keys.device)
    return bank.Entries(rows, rows, scores, torch.zeros_like(scores, dtype=torch.int32))


def rows_filled(start: Tensor, spec: MixerSpec) -> Tensor:
    """Valid rows of the bank [B] before the token at position start [B]."""
    return (start - spec.window - spec.sinks).clamp(0, spec.bank)


def reach(rotary: Rotary) -> int:
    """The distance at which an entry is too old: the teacher knew rotations of fewer positions only."""
    return rotary.position_limit + 1


def unrotate(keys: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Undoes the rotation of keys [B, T, H, D] that stood at positions [B, T, H]."""
    batch, tokens, heads, channels = keys.shape
    back = rotary.inverse(positions.reshape(batch, tokens * heads), torch.promote_types(keys.dtype, torch.float32))
    return back.apply(keys.reshape(batch, tokens * heads, 1, channels)).view(keys.shape)
