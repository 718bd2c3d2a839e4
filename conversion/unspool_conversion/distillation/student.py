"""The model in training: its parameters by role, its adapter, and its forward pass with and without that adapter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unspool.batch import StepContext, step_context
from unspool.decoder import Block, Decoder
from unspool.errors import UserError
from unspool.mixer_spec import MixerSpec
from unspool.model import UnspoolForCausalLM
from unspool_conversion.calibration import teacher_attention
from unspool_conversion.distillation.randomness import generator
from unspool_conversion.distillation.recipe import LoraOptions

_MIXER, _FAR, _LORA = ".self_attn.", ".self_attn.far.", ".lora_"


class Student:
    """A converted model in float32. `adapted` is the same modules under peft, when the recipe has an adapter.

    `teacher_windows` are the layers' own sliding windows in the teacher. Raises UserError when peft is needed and not
    installed.
    """

    def __init__(
        self, model: UnspoolForCausalLM, lora: LoraOptions | None, teacher_windows: Sequence[int | None], seed: int
    ) -> None:
        self.model = model
        self.teacher_windows = teacher_windows
        self.adapted: Any = _adapt(model, lora, seed) if lora is not None else None
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.freeze()

    @property
    def decoder(self) -> Decoder:
        decoder: Decoder = self.model.model
        return decoder

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def layers(self) -> list[Block]:
        layers: Any = self.decoder.layers
        return list(layers)

    def freeze(self) -> None:
        """No parameter records gradients until an optimizer asks for its own."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def far(self, layer: int | None = None) -> dict[str, nn.Parameter]:
        """The far part's parameters by name, of one layer or all."""
        return self._in_layer(layer, lambda name: _FAR in name)

    def lora(self, targets: Sequence[str], layer: int | None = None) -> dict[str, nn.Parameter]:
        """The adapter's parameters of these projections."""
        return self._in_layer(layer, lambda name: _LORA in name and name.split(".")[4] in targets)

    def weights(self) -> dict[str, nn.Parameter]:
        """Projections, biases and norms of all mixers, without adapter and far part."""
        return self._in_layer(None, lambda name: _MIXER in name and _FAR not in name and _LORA not in name)

    def _in_layer(self, layer: int | None, belongs: Any) -> dict[str, nn.Parameter]:
        prefix = "model.layers." if layer is None else f"model.layers.{layer}."
        return {name: p for name, p in self.parameters.items() if name.startswith(prefix) and belongs(name)}

    def context(self, tokens: Tensor | tuple[int, int]) -> StepContext:
        """Where a batch of whole sequences stands."""
        batch, length = tokens.shape if isinstance(tokens, Tensor) else tokens
        return step_context((batch, length), self.model.rotary, self.model.dtype, self.device)

    def hidden(self, tokens: Tensor, *, recompute: bool = False) -> Tensor:
        """Final hidden vectors of tokens [B, T]; `recompute` keeps one layer's activations at a time."""
        x, context = self.decoder.embed_tokens(tokens), self.context(tokens)
        for layer in self.layers:
            if recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, context, None, use_reentrant=False)
            else:
                x = layer(x, context, None)
        hidden: Tensor = self.decoder.norm(x)
        return hidden

    @torch.no_grad()
    def teacher_hidden(self, tokens: Tensor) -> Tensor:
        """As `hidden`, with the teacher's attention over the weights as they were before the adapter."""
        x, context = self.decoder.embed_tokens(tokens), self.context(tokens)
        with without_adapter(self.model):
            for layer, window in zip(self.layers, self.teacher_windows, strict=True):
                x = layer.feed_forward(x + attend_as_teacher(layer, x, context, window))
        hidden: Tensor = self.decoder.norm(x)
        return hidden

    @torch.no_grad()
    def first_bad_layer(self, tokens: Tensor) -> int | None:
        """The first layer that makes a NaN or infinite value of tokens [B, T]; None when no layer does."""
        x, context = self.decoder.embed_tokens(tokens), self.context(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, context, None)
            if not bool(x.isfinite().all()):
                return index
        return None


def first_far_position(spec: MixerSpec) -> int:
    """The first position at which a layer may differ from the teacher's."""
    return 0 if spec.join == "mixed" else spec.near_tokens


def attend_as_teacher(block: Block, x: Tensor, context: StepContext, window: int | None) -> Tensor:
    """What the teacher's attention adds to the residual stream x [B, T, hidden] in this layer."""
    mixer = block.self_attn
    heads = mixer.project(block.input_layernorm(x))
    return mixer.project_out(teacher_attention(heads, context, window), x.dtype)


@contextmanager
def without_adapter(module: nn.Module) -> Iterator[None]:
    """Runs the module's projections with their own weights only; which parameters record gradients stays as it is."""
    layers: list[Any] = [each for each in module.modules() if hasattr(each, "base_layer")]
    recorded = [(parameter, parameter.requires_grad) for each in layers for parameter in each.parameters()]
    try:
        for each in layers:
            each.enable_adapters(False)
        yield
    finally:
        for each in layers:
            each.enable_adapters(True)
        for parameter, requires_grad in recorded:
            parameter.requires_grad_(requires_grad)


@contextmanager
def narrowed(model: UnspoolForCausalLM, window: int | None) -> Iterator[None]:
    """Runs every layer that has a state with a window no larger than that; None changes nothing."""
    mixers = [layer.self_attn for layer in model.model.layers]
    specs = [mixer.spec for mixer in mixers]
    try:
        for mixer, spec in zip(mixers, specs, strict=True):
            if window is not None and spec.has_state and spec.window > window:
                mixer.spec = spec.replace(window=window)
        yield
    finally:
        for mixer, spec in zip(mixers, specs, strict=True):
            mixer.spec = spec


def _adapt(model: UnspoolForCausalLM, lora: LoraOptions, seed: int) -> Any:
    if find_spec("peft") is None:
        raise UserError("the recipe has an adapter, which needs the package peft: pip install 'unspool[train]'")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "adapter").initial_seed())
        return get_peft_model(model, config)
