"""What the ops refuse, naming the argument, and which backend they take."""

import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from unspool_kernels import contract
from unspool_kernels.contract import BackendMissing, RowKernel, find_backend
from unspool_kernels.ops.diagonal_scan import diagonal_scan
from unspool_kernels.ops.recurrent_cell import recurrent_cell
from unspool_kernels.ops.ring_attention import ring_attention
from unspool_kernels.ops.row_state import row_state
from unspool_kernels.ops.short_conv import short_conv

NAN, INF = float("nan"), float("inf")


def rows(**changes: Any) -> dict[str, Any]:
    """A valid call of the row kernel: two sequences of 3 tokens, a vector gate, an erase parallel to k."""
    return {
        "q": torch.ones(6, 2, 3, 5),
        "k": torch.ones(6, 2, 5),
        "v": torch.ones(6, 2, 4),
        "kernel": RowKernel(gate="key", erase="parallel"),
        "state": torch.zeros(3, 2, 4, 5),
        "slots": torch.tensor([2, 0], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32),
        "log_decay": torch.zeros(6, 2, 5),
        "beta": torch.ones(6, 2),
        "backend": "reference",
        **changes,
    }


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a key too short": ({"k": torch.ones(6, 2, 4)}, r"k must have shape \[N=6, H=2, K=5\], not \[6, 2, 4\]"),
    "a value without heads": ({"v": torch.ones(6, 4)}, r"v must have shape \[N=6, H=2, V\]"),
    "mixed inputs": ({"v": torch.ones(6, 2, 4).half()}, "v must be torch.float32, not torch.float16"),
    "integers": ({"q": torch.ones(6, 2, 3, 5).int()}, "inputs must be float32, float16"),
    "another device": ({"k": torch.ones(6, 2, 5, device="meta")}, "k is on meta, the other tensors are on cpu"),
    "a strided last axis": ({"k": torch.ones(6, 5, 2).mT}, "k: the last axis must be contiguous, its stride is 2"),
    "a state of other rows": ({"state": torch.zeros(3, 2, 5, 5)}, r"state must have shape \[P, H=2, R=4, K=5\]"),
    "a bfloat16 state": ({"state": torch.zeros(3, 2, 4, 5).bfloat16()}, "state must be torch.float32 or torch.float16"),
    "a double state": ({"state": torch.zeros(3, 2, 4, 5).double()}, "state must be torch.float32 or torch.float16"),
    "a state with holes": ({"state": torch.zeros(3, 2, 4, 8)[..., :5]}, "state: the row of a slot must be contiguous"),
    "a half gate": ({"log_decay": torch.zeros(6, 2, 5).half()}, "log_decay must be torch.float32"),
    "a NaN gate": ({"log_decay": torch.full((6, 2, 5), NAN)}, "log_decay must be finite or -inf"),
    "an infinite gate": ({"log_decay": torch.full((6, 2, 5), INF)}, "log_decay must be finite or -inf"),
    "an infinite strength": ({"beta": torch.full((6, 2), -INF)}, "beta must be finite"),
    "a slot beyond the pool": ({"slots": ints(3, 0)}, "slots must be -1 or below the 3 slots"),
    "a slot below -1": ({"slots": ints(-2, 0)}, "slots must be -1 or below the 3 slots"),
    "a slot twice": ({"slots": ints(1, 1)}, "slots names a slot twice"),
    "long slots": ({"slots": torch.tensor([2, 0])}, "slots must be torch.int32"),
    "lengths of another batch": ({"cu_seqlens": ints(0, 6)}, r"cu_seqlens must have shape \[3\], not \[2\]"),
    "lengths that fall": ({"cu_seqlens": ints(0, 7, 6)}, "cu_seqlens must rise from 0 to the 6 tokens"),
    "lengths that end early": ({"cu_seqlens": ints(0, 3, 5)}, "cu_seqlens must rise from 0 to the 6 tokens"),
    "lengths that start late": ({"cu_seqlens": ints(1, 3, 6)}, "cu_seqlens must rise from 0 to the 6 tokens"),
    "no gate": ({"log_decay": None}, "log_decay is needed"),
    "no strength": ({"beta": None}, "beta is needed"),
    "a vector nobody reads": ({"erase_read": torch.ones(6, 2, 5)}, "erase_read is not used"),
    "a bonus nobody reads": ({"bonus": torch.ones(2, 5)}, "bonus is not used"),
    "a maximum nobody reads": ({"max_state": torch.zeros(3, 2)}, "max_state is not used"),
    "an unknown backend": ({"backend": "cuda"}, "backend must be auto, reference, native or triton, not 'cuda'"),
    "gradients of a kernel": (
        {"backend": "native", "beta": torch.ones(6, 2).requires_grad_()},
        "backend native has no gradients: use the reference",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_argument_is_named(changes: dict[str, Any], message: str) -> None:
    row_state(**rows())
    given = rows(**changes)
    before = given["state"].clone()
    with pytest.raises(ValueError, match=message):
        row_state(**given)
    assert torch.equal(given["state"], before)


def test_values_are_checked_only_on_request_where_that_waits_for_the_device() -> None:
    row_state(**rows(log_decay=torch.full((6, 2, 5), NAN), check=False))
    with pytest.raises(ValueError, match="log_decay must be finite"):
        row_state(**rows(log_decay=torch.full((6, 2, 5), NAN), check=True))


@pytest.mark.parametrize(
    "flags",
    [
        {"gate": "value", "normalizer": True},
        {"gate": "value", "erase": "parallel"},
        {"gate": "key", "stabilizer": True},
        {"gate": "scalar", "stabilizer": True, "read": "before"},
    ],
)
def test_a_descriptor_without_meaning_is_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="kernel:"):
        RowKernel(**flags)


def test_a_half_maximum_is_refused() -> None:
    kernel = RowKernel(gate="scalar", stabilizer=True)
    given = rows(kernel=kernel, log_decay=torch.zeros(6, 2), log_input=torch.zeros(6, 2), beta=None)
    with pytest.raises(ValueError, match="max_state must be float32"):
        row_state(**given, max_state=torch.zeros(3, 2).half())


def test_the_other_ops_name_their_own_arguments() -> None:
    words = {"slots": ints(0), "cu_seqlens": ints(0, 2), "backend": "reference"}
    ring = {"keys": torch.zeros(1, 1, 4, 3), "values": torch.zeros(1, 1, 4, 3)}
    q, k = torch.ones(2, 1, 2, 3), torch.ones(2, 1, 3)
    with pytest.raises(ValueError, match="sinks must leave a window"):
        ring_attention(q, q, k, k, **ring, positions=ints(0), sinks=4, **words)
    with pytest.raises(ValueError, match="positions must not be negative"):
        ring_attention(q, q, k, k, **ring, positions=ints(-1), sinks=1, **words)
    with pytest.raises(ValueError, match="values must be torch.float32 as keys"):
        half = {**ring, "values": ring["values"].half()}
        ring_attention(q, q, k, k, **half, positions=ints(0), sinks=1, **words)
    with pytest.raises(ValueError, match="cursor must be a row of the ring, 0 to 2"):
        short_conv(torch.ones(2, 3), torch.ones(3, 4), state=torch.zeros(1, 3, 3), cursor=ints(3), **words)
    with pytest.raises(ValueError, match="weight must have at least 2 taps"):
        short_conv(torch.ones(2, 3), torch.ones(3, 1), state=torch.zeros(1, 0, 3), cursor=ints(0), **words)
    with pytest.raises(ValueError, match="activation must be none or silu"):
        short_conv(
            torch.ones(2, 3), torch.ones(3, 4), None, "relu", state=torch.zeros(1, 3, 3), cursor=ints(0), **words
        )
    with pytest.raises(ValueError, match="cell must be one of elman, lstm, gru, slstm"):
        recurrent_cell(
            torch.ones(2, 1, 1, 3), torch.ones(1, 1, 3, 3), cell="rnn", state=torch.ones(1, 1, 1, 3), **words
        )
    with pytest.raises(ValueError, match=r"decay must have shape \[C=3, M=4, 2\]"):
        pair = torch.ones(2, 3, 4, 2)
        diagonal_scan(pair, torch.ones(2, 3, 4), state=torch.zeros(1, 3, 4, 2), **words)


def test_float64_and_gradients_go_to_the_reference() -> None:
    wanted = torch.ones(1, requires_grad=True)
    assert find_backend("auto", "row_state", [torch.ones(1).double()]) is None
    assert find_backend("auto", "row_state", [torch.ones(1), None, wanted]) is None
    with pytest.raises(ValueError, match="backend native has no float64"):
        find_backend("native", "row_state", [torch.ones(1).double()])


def test_a_missing_backend_is_said_once_and_refused_by_name() -> None:
    """In a process of its own, whose loader looks for a library that is not there."""
    program = (
        "import torch, logging; logging.basicConfig();"
        "from unspool_kernels.contract import BackendMissing, find_backend;"
        "import unspool_kernels.native.library as native; native.FILE_NAME = 'libabsent.so';"
        "print([find_backend('auto', 'row_state', [torch.ones(1)]) for _ in range(3)]);\n"
        "try: find_backend('native', 'row_state', [torch.ones(1)])\n"
        "except BackendMissing as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "UNSPOOL_NATIVE_LIBRARY"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("[None, None, None]\n") and "reinstall unspool" in done.stdout
    assert done.stderr.count("the slow reference kernels run instead") == 1


def test_a_family_without_kernels_is_a_missing_backend(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BackendMissing, match="backend native has no kernels for astrology"):
        find_backend("native", "astrology", [torch.ones(1)])
    with caplog.at_level(logging.WARNING, contract.__name__):
        assert find_backend("auto", "astrology", [torch.ones(1)]) is None
    assert "astrology" in caplog.text


def test_the_ops_do_not_import_triton() -> None:
    program = (
        "import sys; from unspool_kernels.ops import diagonal_scan, norms, recurrent_cell, ring_attention, row_state,"
        " short_conv, softmax_scan; from unspool_kernels.laws import catalogue; sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_gradients_flow_through_the_op_but_not_through_the_pool() -> None:
    k = torch.ones(6, 2, 5).requires_grad_()
    given = rows(k=k)
    row_state(**given).sum().backward()
    assert k.grad is not None and bool((k.grad != 0).any())
    assert not given["state"].requires_grad and bool((given["state"][2] != 0).any())
