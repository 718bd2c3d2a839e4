"""What runs a model's tokens: the native kernels on the CPU, Triton's on a GPU, or plain PyTorch on any device.

A backend is chosen once, when a model is opened, and the choice is logged: nothing is swapped in silence.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from unspool import gpu, native
from unspool.config import UnspoolConfig
from unspool.errors import UserError
from unspool.gpu import GpuExecutor
from unspool.model import UnspoolForCausalLM
from unspool.quantization import FLOATS, PACKED_FORMATS
from unspool.state import StatePool
from unspool_kernels import triton
from unspool_kernels.logit_rows import LogitRows, each_wish, logit_rows
from unspool_kernels.native.decoder import NativeDecoder
from unspool_kernels.native.decoder_program import DecoderProgram
from unspool_kernels.native.library import NativeUnavailable, allocate, instruction_set, library

logger = logging.getLogger(__name__)

Quant = Literal["none", "bf16", "fp16", "int8", "int4"]
Backend = Literal["native", "triton", "torch"]

DTYPE_FORMATS = {dtype: format for format, dtype in FLOATS.items()}


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """How the model is computed."""

    quant: Quant = field(
        default="none",
        metadata={"help": "format of the weights in memory; none keeps the checkpoint's"},
    )
    state_dtype: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "number format of the state with kernels; float16 halves it"}
    )
    backend: Literal["auto", "native", "triton", "torch"] = field(
        default="auto",
        metadata={"help": "native kernels (CPU only), Triton's (CUDA only), or plain PyTorch; auto takes kernels"},
    )


class Executor(Protocol):
    """A model whose state lies in slots. Not thread-safe."""

    config: UnspoolConfig
    shared_chunk: int
    """Tokens that each sequence may bring to a call which it shares with others, every one getting the bits that it
    gets alone and in any other pieces. 0: only steps are shared, and a text's bits depend on where it was cut."""

    def new_pool(self, num_slots: int) -> StatePool:
        """Empty slots of the kind that this executor runs on."""
        ...

    def logits(
        self,
        tokens: Sequence[Sequence[int]],
        pool: StatePool,
        slots: Sequence[int],
        want: LogitRows | Sequence[LogitRows] = "last",
    ) -> Tensor:
        """Consumes each sequence's tokens, advancing its slot, and returns logits [rows, vocabulary]: one row for each
        sequence's last token, or one for every token in order, or none, as all or each of them want."""
        ...


class TorchExecutor:
    """Plain PyTorch, on whatever device the model is."""

    def __init__(self, model: UnspoolForCausalLM) -> None:
        self.config: UnspoolConfig = model.config
        self.shared_chunk = 0
        self.model = model

    def new_pool(self, num_slots: int) -> StatePool:
        return StatePool(self.config, num_slots, self.model.dtype, self.model.device)

    @torch.inference_mode()
    def logits(
        self,
        tokens: Sequence[Sequence[int]],
        pool: StatePool,
        slots: Sequence[int],
        want: LogitRows | Sequence[LogitRows] = "last",
    ) -> Tensor:
        lengths = [len(sequence) for sequence in tokens]
        longest = max(lengths)
        padded = [[*sequence, *[0] * (longest - len(sequence))] for sequence in tokens]
        batch = torch.tensor(padded, device=self.model.device)
        hidden = self.model.hidden(batch, lengths=lengths, slots=(pool, slots))
        rows = logit_rows(lengths, want)
        if not rows:
            return hidden.new_empty(0, self.config.vocab_size)
        real = torch.cat([sequence[:length] for sequence, length in zip(hidden, lengths, strict=True)])
        logits: Tensor = self.model.lm_head(real[rows])
        return logits


class NativeExecutor:
    """The native decoder: packed weights, one call a step."""

    def __init__(self, config: UnspoolConfig, decoder: NativeDecoder, state_dtype: torch.dtype) -> None:
        self.config = config
        self.shared_chunk = decoder.window
        self.decoder = decoder
        self.state_dtype = state_dtype
        self._programs: WeakKeyDictionary[StatePool, DecoderProgram] = WeakKeyDictionary()

    def new_pool(self, num_slots: int) -> StatePool:
        dtype = self.state_dtype
        return StatePool(self.config, num_slots, dtype, "cpu", far_dtype=dtype, allocate=allocate)

    def logits(
        self,
        tokens: Sequence[Sequence[int]],
        pool: StatePool,
        slots: Sequence[int],
        want: LogitRows | Sequence[LogitRows] = "last",
    ) -> Tensor:
        if max(map(len, tokens)) <= self.decoder.window:
            return self._run(tokens, pool, slots, want)
        each = zip(tokens, slots, each_wish(want, len(tokens)), strict=True)
        return torch.cat([self._run_long(sequence, pool, slot, wish) for sequence, slot, wish in each])

    def _run_long(self, tokens: Sequence[int], pool: StatePool, slot: int, want: LogitRows) -> Tensor:
        """One sequence of any length, in pieces that the window holds."""
        size = self.decoder.window
        pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        early: LogitRows = "every" if want == "every" else "none"
        rows = [self._run([piece], pool, [slot], early) for piece in pieces[:-1]]
        return torch.cat([*rows, self._run(pieces[-1:], pool, [slot], want)])

    def _run(
        self,
        tokens: Sequence[Sequence[int]],
        pool: StatePool,
        slots: Sequence[int],
        want: LogitRows | Sequence[LogitRows],
    ) -> Tensor:
        positions = [pool.positions[slot] for slot in slots]
        program = self._programs.get(pool)
        if program is None:
            program = self._programs[pool] = self.decoder.bind(pool.layers)
        logits = program.logits(tokens, slots, positions, want=want)
        for slot, sequence in zip(slots, tokens, strict=True):
            pool.positions[slot] += len(sequence)
        return logits


def make_executor(model: UnspoolForCausalLM, options: ExecutorOptions | None = None) -> Executor:
    """The executor that the options and the machine allow; the log says which, and why not the one with kernels.

    It takes the model over: with native kernels nothing is left of its own weights, nor of a cast model's first dtype.
    Raises UserError when the options ask for what cannot be had here.
    """
    options = options or ExecutorOptions()
    backend, reason = choose_backend(model, options)
    if backend == "torch":
        return _torch_executor(model, options, reason)
    return _native_executor(model, options) if backend == "native" else _gpu_executor(model, options)


def choose_backend(model: UnspoolForCausalLM, options: ExecutorOptions) -> tuple[Backend, str]:
    """What `make_executor` will run the model on, and why on nothing faster. Raises UserError as that does."""
    if options.backend == "torch":
        return "torch", "backend is torch"
    on_gpu = options.backend == "triton" or (options.backend == "auto" and model.device.type == "cuda")
    backend: Backend = "triton" if on_gpu else "native"
    reason = _why_not_triton(model) if on_gpu else _why_not_native(model)
    if reason is None:
        return backend, ""
    if options.backend == "auto":
        return "torch", reason
    raise UserError(f"backend {options.backend}: {reason}; use --backend torch")


def _native_executor(model: UnspoolForCausalLM, options: ExecutorOptions) -> NativeExecutor:
    format = PACKED_FORMATS[options.quant] if options.quant != "none" else DTYPE_FORMATS[model.dtype]
    decoder = native.pack(model, format, release=True)
    logger.info("native kernels (%s), weights %s, state %s", instruction_set(), format, options.state_dtype)
    return NativeExecutor(model.config, decoder, getattr(torch, options.state_dtype))


def _gpu_executor(model: UnspoolForCausalLM, options: ExecutorOptions) -> GpuExecutor:
    model = _cast(model, options, "the Triton kernels read no packed weights")
    logger.info("Triton kernels on %s, weights %s, state %s", model.device, model.dtype, options.state_dtype)
    return GpuExecutor(model, getattr(torch, options.state_dtype))


def _torch_executor(model: UnspoolForCausalLM, options: ExecutorOptions, reason: str) -> TorchExecutor:
    if options.state_dtype != "float32":
        raise UserError(f"state_dtype {options.state_dtype} needs the native or the Triton kernels: {reason}")
    model = _cast(model, options, reason)
    if options.backend != "torch" and model.device.type in ("cpu", "cuda"):
        logger.warning("running on plain PyTorch, which is several times slower: %s", reason)
    return TorchExecutor(model)


def _cast(model: UnspoolForCausalLM, options: ExecutorOptions, reason: str) -> UnspoolForCausalLM:
    """The model in a format that PyTorch computes in; `reason` says why no other one can be had."""
    if options.quant in ("int8", "int4"):
        raise UserError(f"quant {options.quant} needs the native kernels: {reason}; use --quant none, bf16 or fp16")
    return model if options.quant == "none" else model.to(getattr(torch, PACKED_FORMATS[options.quant]))


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


def _why_not_triton(model: UnspoolForCausalLM) -> str | None:
    if reason := triton.missing():
        return reason
    if model.device.type != "cuda" and torch.cuda.is_available():
        return f"the Triton kernels run on a CUDA GPU, and the model is on {model.device}"
    if model.dtype not in DTYPE_FORMATS:
        return f"the Triton kernels have no {model.dtype}"
    return gpu.unsupported(model.config)
