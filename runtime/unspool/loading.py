"""Opens a converted checkpoint directory: model, tokenizer, and which tokens end a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from unspool.config import UnspoolConfig
from unspool.errors import UserError
from unspool.model import UnspoolForCausalLM


@dataclass(frozen=True)
class LoadedModel:
    """A converted model ready to run. `name` is its directory's name."""

    model: UnspoolForCausalLM
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: Path

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text: the generation configuration's, else the model's, else the tokenizer's."""
        candidates = (self.model.generation_config.eos_token_id, self.model.config.eos_token_id)
        chosen = next((eos for eos in candidates if eos is not None), self.tokenizer.eos_token_id)
        if chosen is None:
            return frozenset()
        return frozenset([chosen] if isinstance(chosen, int) else chosen)


def load(path: Path | str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> LoadedModel:
    """Loads a directory that `unspool convert` wrote, in its own dtype unless another is given.

    Raises UserError when the directory is missing, is no converted checkpoint, or disagrees with its weights.
    """
    path = Path(path).expanduser().resolve()
    config = _read_config(path)
    loaded: Any = UnspoolForCausalLM.from_pretrained(
        path, config=config, dtype=dtype or "auto", output_loading_info=True
    )
    model, report = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[problem]):
            raise UserError(f"{path}: {problem.replace('_', ' ')} in the weights, first {names[0]}; convert it again")
    tokenizer = AutoTokenizer.from_pretrained(path)
    return LoadedModel(model.eval().to(device), tokenizer, path.name, path)


def _read_config(path: Path) -> UnspoolConfig:
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; pass one that `unspool convert` wrote")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; pass a directory that `unspool convert` wrote")
    values, _ = UnspoolConfig.get_config_dict(path)
    if values.get("model_type") != UnspoolConfig.model_type:
        found = values.get("model_type")
        raise UserError(f"{path} holds a {found!r} model; convert it first: unspool convert {path} DST")
    try:
        return UnspoolConfig.from_dict(values)
    except ValueError as error:
        raise UserError(f"{path}/config.json: {error}") from error
