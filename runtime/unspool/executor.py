"""What runs a model's tokens: plain PyTorch on any device, or the native kernels on the CPU.

A backend is chosen once, when a model is opened, and the choice is logged: nothing is swapped in silence.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from unspool import native
from unspool.config import UnspoolConfig
from unspool.errors import UserError
from unspool.model import UnspoolForCausalLM
from unspool.state import StatePool
from unspool_kernels.native.decoder import NativeDecoder
from unspool_kernels.native.decoder_program import DecoderProgram, Wanted
from unspool_kernels.native.library import NativeUnavailable, allocate, instruction_set, library
from unspool_kernels.native.packed import Format

logger = logging.getLogger(__name__)

Quant = Literal["none", "bf16", "fp16", "int8", "int4"]

QUANT_FORMATS: dict[Quant, Format] = {"bf16": "bfloat16", "fp16": "float16", "int8": "int8", "int4": "int4"}
DTYPE_FORMATS: dict[torch.dtype, Format] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """How the model is computed."""

    quant: Quant = field(
        default="none",
        metadata={"help": "format of the weights in memory; none keeps the checkpoint's"},
    )
    state_dtype: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "number format of the state with native kernels; float16 halves it"}
    )
    backend: Literal["auto", "native", "torch"] = field(
        default="auto", metadata={"help": "native kernels (CPU only), or plain PyTorch; auto takes native where it can"}
    )


class Executor(Protocol):
    """A model whose state lies in slots. Not thread-safe."""

    config: UnspoolConfig

    def new_pool(self, num_slots: int) -> StatePool:
        """Empty slots of the kind that this executor runs on."""
        ...

    def logits(
        self, tokens: Sequence[Sequence[int]], pool: StatePool, slots: Sequence[int], want: Wanted = "last"
    ) -> Tensor:
        """Consumes each sequence's tokens, advancing its slot, and returns logits [rows, vocabulary]: one row for each
        sequence's last token, or one for every token in order, or none. A row has the same bits alone and in any
        batch."""
        ...


class TorchExecutor:
    """Plain PyTorch, on whatever device the model is."""

    def __init__(self, model: UnspoolForCausalLM) -> None:
        self.config: UnspoolConfig = model.config
        self.model = model

    def new_pool(self, num_slots: int) -> StatePool:
        return StatePool(self.config, num_slots, self.model.dtype, self.model.device)

    @torch.inference_mode()
    def logits(
        self, tokens: Sequence[Sequence[int]], pool: StatePool, slots: Sequence[int], want: Wanted = "last"
    ) -> Tensor:
        lengths = [len(sequence) for sequence in tokens]
        longest = max(lengths)
        padded = [[*sequence, *[0] * (longest - len(sequence))] for sequence in tokens]
        batch = torch.tensor(padded, device=self.model.device)
        hidden = self.model.hidden(batch, lengths=lengths, slots=(pool, slots))
        if want == "none":
            return hidden.new_empty(0, self.config.vocab_size)
        if want == "last":
            rows = hidden[torch.arange(len(tokens)), torch.tensor(lengths) - 1]
        else:
            rows = torch.cat([sequence[:length] for sequence, length in zip(hidden, lengths, strict=True)])
        logits: Tensor = self.model.lm_head(rows)
        return logits


class NativeExecutor:
    """The native decoder: packed weights, one call a step."""

    def __init__(self, config: UnspoolConfig, decoder: NativeDecoder, state_dtype: torch.dtype) -> None:
        self.config = config
        self.decoder = decoder
        self.state_dtype = state_dtype
        self._programs: WeakKeyDictionary[StatePool, DecoderProgram] = WeakKeyDictionary()

    def new_pool(self, num_slots: int) -> StatePool:
        dtype = self.state_dtype
        return StatePool(self.config, num_slots, dtype, "cpu", far_dtype=dtype, allocate=allocate)

    def logits(
        self, tokens: Sequence[Sequence[int]], pool: StatePool, slots: Sequence[int], want: Wanted = "last"
    ) -> Tensor:
        if max(map(len, tokens)) <= self.decoder.window:
            return self._run(tokens, pool, slots, want)
        rows = [self._run_long(sequence, pool, slot, want) for sequence, slot in zip(tokens, slots, strict=True)]
        return torch.cat(rows)

    def _run_long(self, tokens: Sequence[int], pool: StatePool, slot: int, want: Wanted) -> Tensor:
        """One sequence of any length, in pieces that the window holds."""
        size = self.decoder.window
        pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        early: Wanted = "every" if want == "every" else "none"
        rows = [self._run([piece], pool, [slot], early) for piece in pieces[:-1]]
        return torch.cat([*rows, self._run(pieces[-1:], pool, [slot], want)])

    def _run(self, tokens: Sequence[Sequence[int]], pool: StatePool, slots: Sequence[int], want: Wanted) -> Tensor:
        positions = [pool.positions[slot] for slot in slots]
        program = self._programs.get(pool)
        if program is None:
            program = self._programs[pool] = self.decoder.bind(pool.layers)
        logits = program.logits(tokens, slots, positions, want=want)
        for slot, sequence in zip(slots, tokens, strict=True):
            pool.positions[slot] += len(sequence)
        return logits


def make_executor(model: UnspoolForCausalLM, options: ExecutorOptions | None = None) -> Executor:
    """The executor that the options and the machine allow; the log says which, and why not the native one.

    It takes the model over: with native kernels nothing is left of its own weights, nor of a cast model's first dtype.
    Raises UserError when the options ask for what cannot be had here.
    """
    options = options or ExecutorOptions()
    reason = _why_not_native(model)
    if options.backend == "torch" or (reason is not None and options.backend == "auto"):
        return _torch_executor(model, options, "backend is torch" if options.backend == "torch" else str(reason))
    if reason is not None:
        raise UserError(f"backend native: {reason}; use --backend torch")
    format = QUANT_FORMATS[options.quant] if options.quant != "none" else DTYPE_FORMATS[model.dtype]
    decoder = native.pack(model, format, release=True)
    logger.info("native kernels (%s), weights %s, state %s", instruction_set(), format, options.state_dtype)
    return NativeExecutor(model.config, decoder, getattr(torch, options.state_dtype))


def _torch_executor(model: UnspoolForCausalLM, options: ExecutorOptions, reason: str) -> TorchExecutor:
    if options.quant in ("int8", "int4"):
        raise UserError(f"quant {options.quant} needs the native kernels: {reason}; use --quant none, bf16 or fp16")
    if options.state_dtype != "float32":
        raise UserError(f"state_dtype {options.state_dtype} needs the native kernels: {reason}")
    if options.backend != "torch" and model.device.type == "cpu":
        logger.warning("running on plain PyTorch, which is several times slower: %s", reason)
    if options.quant != "none":
        model = model.to(getattr(torch, QUANT_FORMATS[options.quant]))
    return TorchExecutor(model)


def _why_not_native(model: UnspoolForCausalLM) -> str | None:
    if model.device.type != "cpu":
        return f"the native kernels run on the CPU, not on {model.device}"
    if model.dtype not in DTYPE_FORMATS:
        return f"the native kernels have no {model.dtype}"
    try:
        library()
    except NativeUnavailable as error:
        return str(error)
    return native.unsupported(model.config)
