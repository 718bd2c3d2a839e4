"""The source's tensors under our names, in our layout and output dtype, read one at a time."""

import torch
from torch import Tensor

from unspool.errors import UserError
from unspool_conversion.architectures import naming_of
from unspool_conversion.plan import HEAD, ConversionPlan
from unspool_conversion.tensor_source import TensorSource


class MappedTensors:
    """Loads what a plan says; holds no tensor."""

    def __init__(self, source: TensorSource, plan: ConversionPlan) -> None:
        self._source = source
        self._config = plan.config
        self._planned = {tensor.name: tensor for tensor in plan.sourced}

    def load(self, name: str) -> Tensor:
        """A tensor of the converted model that comes from the source, contiguous. Raises KeyError for any other.

        Raises UserError when a finite value of the source is none in float16.
        """
        planned = self._planned[name]
        assert planned.source is not None
        tensor = planned.transform.to_unspool(self._source.load(planned.source), self._config)
        cast = tensor.to(planned.dtype)
        if cast.dtype == torch.float16 and bool((cast.isinf() & tensor.isfinite()).any()):
            raise UserError(f"{planned.source} exceeds float16's range; use --dtype bfloat16")
        return cast.contiguous()


def check_tied_head(source: TensorSource, plan: ConversionPlan) -> None:
    """Raises UserError when the head is dropped as tied to the embedding, but holds other values."""
    naming = naming_of(source.format, source.config["model_type"])
    head, embedding = naming.to_source(HEAD), naming.to_source("model.embed_tokens.weight")
    if head is None or embedding is None or head.name not in plan.dropped:
        return
    if not torch.equal(source.load(head.name), source.load(embedding.name)):
        raise UserError(
            f"config.json says tie_word_embeddings, but {head.name} differs from {embedding.name}; "
            "set tie_word_embeddings to false in config.json"
        )
