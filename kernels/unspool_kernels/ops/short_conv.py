"""The causal depthwise convolution and the token shift that stand before many mixers."""

from typing import Literal

from torch import Tensor

from unspool_kernels.contract import Arguments, Backend, find_backend, run_reference
from unspool_kernels.reference import short_conv as reference

Activation = Literal["none", "silu"]


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "none",
    *,
    state: Tensor,
    cursor: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    backend: Backend = "auto",
    check: bool | None = None,
) -> Tensor:
    """y_t = act(bias + sum_j weight[:, W - 1 - j] x_{t-j}), j = 0 .. W - 1: the last tap is the token's own, as in
    torch.nn.Conv1d.

    x [N, C], weight [C, W] with W >= 2, bias [C]. state [P, W - 1, C] is a ring and cursor int32 [P] its oldest row,
    the next to be written: row cursor holds x_{t-W+1}. Earlier tokens are read as the state stores them. A fresh slot
    is zero in both. Both are updated in place. Returns y [N, C].
    """
    if activation not in ("none", "silu"):
        raise ValueError(f"activation must be none or silu, not {activation!r}")
    args = Arguments(x, check)
    args.input("x", x, "N C")
    args.input("weight", weight, "C W")
    if bias is not None:
        args.input("bias", bias, "C")
    if args.sizes["W"] < 2:
        raise ValueError("weight must have at least 2 taps: one tap has no state, multiply instead")
    args.sizes["W-1"] = args.sizes["W"] - 1
    args.state("state", state, "P W-1 C")
    args.packing(slots, cu_seqlens)
    args.index("cursor", cursor, "P")
    if args.check:
        used = cursor[slots[slots >= 0].long()]
        if bool(((used < 0) | (used >= args.sizes["W-1"])).any()):
            raise ValueError(f"cursor must be a row of the ring, 0 to {args.sizes['W-1'] - 1}")
    module = find_backend(backend, "short_conv", [x, weight, bias])
    states = {"state": state, "cursor": cursor}
    result: Tensor
    if module is not None:
        result = module.short_conv(x, weight, bias, activation, slots=slots, cu_seqlens=cu_seqlens, **states)
        return result
    options = {"x": x, "weight": weight, "bias": bias, "activation": activation, "cu_seqlens": cu_seqlens}
    result = run_reference(reference.short_conv, states, slots, **options)
    return result


def token_shift(
    x: Tensor,
    *,
    state: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    backend: Backend = "auto",
    check: bool | None = None,
) -> Tensor:
    """The token before each token: x [N, C], state [P, C] (the last token of the call before, as it stores it).

    Returns x_{t-1} [N, C].
    """
    args = Arguments(x, check)
    args.input("x", x, "N C")
    args.state("state", state, "P C")
    args.packing(slots, cu_seqlens)
    module = find_backend(backend, "short_conv", [x])
    result: Tensor
    if module is not None:
        result = module.token_shift(x, state=state, slots=slots, cu_seqlens=cu_seqlens)
        return result
    result = run_reference(reference.token_shift, {"state": state}, slots, x=x, cu_seqlens=cu_seqlens)
    return result
