"""Joins two shards of one softmax by their log-masses: the combine of Aaren's (m, u, w) scan (arXiv 2405.13956)."""

from torch import Tensor


def merge(near: Tensor, near_log_mass: Tensor, far: Tensor, far_log_mass: Tensor) -> Tensor:
    """(1 - p) near + p far with p = sigmoid(far_log_mass - near_log_mass): values [..., V], log-masses [...].

    A far log-mass of -inf gives exactly the near shard. The share is formed in float64, whose rounding hides whether
    an element met the vectorised sigmoid or the scalar one, which its place in the batch decides.
    """
    share = (far_log_mass.double() - near_log_mass).sigmoid().to(near.dtype)[..., None]
    return near + share * (far - near)
