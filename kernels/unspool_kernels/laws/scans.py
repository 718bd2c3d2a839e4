"""Cases of the scans: `ops.diagonal_scan` and `ops.softmax_scan`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unspool_kernels.laws.case import Case
from unspool_kernels.laws.samples import Samples, Sizes
from unspool_kernels.ops.diagonal_scan import FRESH_EXPONENTIAL, diagonal_scan, exponential_scan
from unspool_kernels.ops.softmax_scan import FRESH_SOFTMAX, softmax_scan


def scan_cases(sizes: Sizes) -> list[Case]:
    kinds = [(constant, read) for constant in (False, True) for read in ("none", "token", "constant")]
    diagonal = [_diagonal(sizes, paired, *kind) for paired in (False, True) for kind in kinds]
    return [*diagonal, _exponential(sizes), _softmax(sizes)]


def _diagonal(sizes: Sizes, paired: bool, constant: bool, read: str) -> Case:
    """Decays of either sign (or any phase), zeros and ones among them."""
    name = f"diagonal-{'complex' if paired else 'real'}-{'constant' if constant else 'varying'}-read-{read}"
    n, channels, states = sizes.tokens, sizes.channels, sizes.features
    draw, pair = Samples(name, sizes), (2,) if paired else ()
    decay = draw.uniform(*(() if constant else (n,)), channels, states, *pair) * 1.4 - 0.7
    decay[:1, 0] = 0.0
    tokens = {"x": draw.normal(n, channels, states, *pair)}
    constants: dict[str, Any] = {}
    (constants if constant else tokens)["decay"] = decay
    if read == "token":
        tokens["read"] = draw.normal(n, 1, states, *pair)
    elif read == "constant":
        constants["read"] = draw.normal(channels, states, *pair)
    return Case(
        name=name,
        oracle=partial(diagonal_scan, backend="reference"),
        tokens=tokens,
        constants=constants,
        states={"state": draw.normal(sizes.pool, channels, states, *pair)},
        slots=draw.slots,
        cu_seqlens=draw.cu_seqlens,
        fresh={"state": torch.zeros(())},
        first=_first_complex if paired else _first_real,
        gates=frozenset({"decay"}),
    )


def _first_real(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return ((given["read"] * given["x"]).sum(-1) if "read" in given else given["x"],)


def _first_complex(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    if "read" not in given:
        return (given["x"],)
    return (2.0 * (given["read"] * given["x"] * torch.tensor([1.0, -1.0])).sum((-1, -2)),)


def _exponential(sizes: Sizes) -> Case:
    draw = Samples("exponential", sizes)
    n, channels = sizes.tokens, sizes.channels
    weights = torch.stack(
        [
            draw.normal(sizes.pool, channels),
            0.5 + draw.uniform(sizes.pool, channels),
            draw.normal(sizes.pool, channels),
        ],
        dim=-1,
    )
    k = 3.0 * draw.normal(n, channels)
    k[:2] = torch.tensor([[100.0], [-100.0]])  # beyond what exp can hold
    return Case(
        name="exponential",
        oracle=partial(exponential_scan, backend="reference"),
        tokens={"k": k, "v": draw.normal(n, channels)},
        constants={"decay": -draw.uniform(channels), "bonus": draw.normal(channels)},
        states={"state": weights},
        slots=draw.slots,
        cu_seqlens=draw.cu_seqlens,
        fresh={"state": torch.tensor(FRESH_EXPONENTIAL)},
        first=lambda given: (given["v"],),
        gates=frozenset({"decay", "bonus"}),
        exponential=True,
    )


def _softmax(sizes: Sizes) -> Case:
    draw = Samples("softmax", sizes)
    heads, channels = sizes.heads, sizes.channels
    scores = 3.0 * draw.normal(sizes.tokens, heads)
    scores[3:4] = -torch.inf
    maximum, mass = draw.normal(sizes.pool, heads, 1), 1.0 + draw.uniform(sizes.pool, heads, 1)
    fresh = torch.tensor([*FRESH_SOFTMAX[:2], *[FRESH_SOFTMAX[2]] * channels])
    return Case(
        name="softmax",
        oracle=partial(softmax_scan, backend="reference"),
        tokens={"scores": scores, "v": draw.normal(sizes.tokens, heads, channels)},
        constants={},
        states={"state": torch.cat([maximum, mass, draw.normal(sizes.pool, heads, channels)], dim=-1)},
        slots=draw.slots,
        cu_seqlens=draw.cu_seqlens,
        fresh={"state": fresh},
        first=_first_softmax,
        gates=frozenset({"scores"}),
    )


def _first_softmax(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    scores = given["scores"]
    return torch.where(scores[..., None] == -torch.inf, 0.0, given["v"]), scores
