"""The converted model: one `nn.Module` for transformers, for training and for the engine."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from unspool.batch import step_context
from unspool.cache import UnspoolCache
from unspool.config import UnspoolConfig
from unspool.decoder import Decoder
from unspool.far import FarFeatures
from unspool.linear import Linear
from unspool.padding import Compaction
from unspool.rotary import Rotary
from unspool.state import StatePool

LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})
"""What transformers' Trainer passes beside a batch, with or without labels."""


class UnspoolPreTrainedModel(PreTrainedModel):
    """Ties the model to its configuration class and to transformers' loading and saving."""

    config: UnspoolConfig
    config_class = UnspoolConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["far"]
    _supports_sdpa = True
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]  # transformers leaves it bare
        if isinstance(module, FarFeatures) and not all(
            getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()
        ):
            module.reset_parameters()


class UnspoolForCausalLM(UnspoolPreTrainedModel, GenerationMixin):
    """A decoder with a language-model head, whose state has one size at any length."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: UnspoolConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)
        self.post_init()  # type: ignore[no-untyped-call]  # transformers leaves it bare

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.model.embed_tokens
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def hidden(
        self,
        tokens: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        slots: tuple[StatePool, Sequence[int]] | None = None,
    ) -> Tensor:
        """Final hidden vectors [B, T, hidden] of tokens [B, T]; the engine's way in.

        With `slots`, sequence b continues the state in its slot and leaves the state after its first lengths[b]
        tokens there; the other tokens are padding, are not written anywhere and give meaningless vectors.
        """
        return self._decode(self.model.embed_tokens(tokens), lengths, slots, keep_inputs=False)[0]

    def _decode(
        self,
        embeddings: Tensor,
        lengths: Sequence[int] | None,
        slots: tuple[StatePool, Sequence[int]] | None,
        *,
        keep_inputs: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        batch, tokens = embeddings.shape[:2]
        context = step_context((batch, tokens), self.rotary, embeddings.dtype, embeddings.device, lengths, slots)
        output = self.model(embeddings, context, slots[0] if slots else None, keep_inputs=keep_inputs)
        if slots is not None:
            pool, rows = slots
            for row, count in zip(rows, lengths if lengths is not None else [tokens] * batch, strict=True):
                pool.positions[row] += count
        return output.hidden, output.layer_inputs

    def forward(  # noqa: PLR0913  the signature is transformers'
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: UnspoolCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **loss_arguments: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """transformers' causal-LM call. Positions follow from the state and the mask, which may pad either side.

        Raises ValueError for `position_ids` that say otherwise, for a cache while gradients are recorded, and for
        attention weights, which a state does not have.
        """
        if output_attentions:
            raise ValueError("output_attentions: a state has no attention weights to show")
        if loss_arguments and labels is None and (unknown := sorted(set(loss_arguments) - LOSS_ARGUMENTS)):
            raise ValueError(f"forward does not take {unknown[0]!r}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        embeddings = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache_for(embeddings, past_key_values, use_cache)
        padding = Compaction.of(attention_mask, *embeddings.shape[:2])
        slots = (cache.pool, cache.slots) if cache is not None else None
        if position_ids is not None:
            padding.check_positions(position_ids, cache.pool.positions if cache is not None else None)
        keep_inputs = bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        hidden, inputs = self._decode(padding.compact(embeddings), padding.lengths, slots, keep_inputs=keep_inputs)
        if cache is not None:
            cache.advance(embeddings.shape[1])
        hidden = padding.restore(hidden)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_arguments)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,  # type: ignore[arg-type]  # transformers asks for its own Cache class only in the hint
            hidden_states=tuple(padding.restore(x) for x in inputs) if inputs is not None else None,
        )
        return output if return_dict is not False else output.to_tuple()

    def _cache_for(self, embeddings: Tensor, cache: UnspoolCache | None, use_cache: bool | None) -> UnspoolCache | None:
        recording = torch.is_grad_enabled()
        if cache is None and (use_cache is None or recording):
            use_cache = bool(use_cache) if recording else self.config.use_cache
        if cache is None and not use_cache:
            return None
        if recording:
            raise ValueError("a cache keeps no gradients: pass use_cache=False, or call under torch.no_grad()")
        if cache is None:
            return UnspoolCache(self.config, embeddings.shape[0], embeddings.dtype, embeddings.device)
        if not isinstance(cache, UnspoolCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; this model continues its own UnspoolCache")
        if cache.pool.num_slots != embeddings.shape[0]:
            raise ValueError(f"past_key_values holds {cache.pool.num_slots} sequences, the batch {embeddings.shape[0]}")
        return cache
