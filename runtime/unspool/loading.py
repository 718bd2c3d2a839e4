"""Opens a converted checkpoint directory: model, tokenizer, which tokens end a text and how the model is sampled."""

import contextlib
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from unspool.config import UnspoolConfig
from unspool.errors import UserError
from unspool.model import UnspoolForCausalLM
from unspool.quantization import WeightFormat, stored_parts, weight_format
from unspool.requests import SamplingParams

MODEL_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

MAX_REASON_CHARACTERS = 300

SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class LoadedModel:
    """A converted model ready to run. `name` is its directory's name.

    `stored_as` is the format of a quantised checkpoint, whose weights the model holds as floats.
    """

    model: UnspoolForCausalLM
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: Path
    stored_as: WeightFormat | None = None

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text: the generation configuration's, else the model's, else the tokenizer's."""
        candidates = (self.model.generation_config.eos_token_id, self.model.config.eos_token_id)
        chosen = next((eos for eos in candidates if eos is not None), self.tokenizer.eos_token_id)
        if chosen is None:
            return frozenset()
        return frozenset([chosen] if isinstance(chosen, int) else chosen)

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Fields of SamplingParams set by the model's generation_config.json, if that asks for sampling; else none."""
        config = self.model.generation_config
        if not config.do_sample:
            return {}
        values = {name: getattr(config, name) for name in MODEL_SAMPLING_FIELDS}
        return {name: value for name, value in values.items() if value is not None}


def load(path: Path | str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> LoadedModel:
    """Loads a directory that `unspool convert` wrote, in its own dtype unless another is given; quantised weights are
    dequantised to it.

    Raises UserError when the device cannot be used, and when the directory is missing, is no converted checkpoint, has
    a damaged file or disagrees with its weights. Shows progress only if standard error is a terminal.
    """
    with contextlib.nullcontext() if sys.stderr.isatty() else _silence():
        _check_device(device)
        path = Path(path).expanduser().resolve()
        config, generation_config = _read_config(path), _read_generation_config(path)
        _check_weights(path, config)
        with _refusing(f"{path}: the weights do not load", "make room in memory, or convert the model again"):
            model: Any = UnspoolForCausalLM.from_pretrained(
                path, config=config, generation_config=generation_config, dtype=dtype or "auto", use_safetensors=True
            )
            model = model.eval().to(device)
        with _refusing(f"{path}: the tokenizer (tokenizer*.json, chat_template.jinja)", "convert the model again"):
            tokenizer = AutoTokenizer.from_pretrained(path)
        loaded = LoadedModel(model, tokenizer, path.name, path, weight_format(config))
        _check_generation_config(loaded)
        return loaded


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()  # a value, because the device "meta" has all but values
    except (RuntimeError, AssertionError, ImportError) as error:  # PyTorch asserts that it was built for the device
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"device {device!r} cannot be used: {reason}; try --device cpu") from error


def _read_config(path: Path) -> UnspoolConfig:
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; pass one that `unspool convert` wrote")
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} has no config.json; pass a directory that `unspool convert` wrote")
    with _refusing(str(file)):
        values = json.loads(file.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("is not a JSON object")
    if values.get("model_type") != UnspoolConfig.model_type:
        found = values.get("model_type")
        raise UserError(f"{path} holds a {found!r} model; convert it first: unspool convert {path} DST")
    with _refusing(str(file)):
        config: UnspoolConfig = UnspoolConfig.from_dict(values)
        config.mixer_specs()
        return config


def _read_generation_config(path: Path) -> GenerationConfig | None:
    """None if there is no such file: then the model's configuration says which token ends a text."""
    file = path / "generation_config.json"
    if not file.exists():
        return None
    # Read here because `UnspoolForCausalLM.from_pretrained` goes on without a file that it cannot read.
    with _refusing(str(file)):
        config: GenerationConfig = GenerationConfig.from_pretrained(path)
        return config


def _check_weights(path: Path, config: UnspoolConfig) -> None:
    """Compares the names and shapes in the weight files with the configuration, before memory is taken for either."""
    if (format := weight_format(config)) is not None:
        _check_quantized_weights(path, config, format)
    with _refusing(f"{path}: the weights (model*.safetensors) or config.json", "convert the model again"), _silence():
        loaded: Any = UnspoolForCausalLM.from_pretrained(
            path,
            config=config,
            device_map="meta",
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # A mismatched key comes with its two shapes.
        if names := sorted(key if isinstance(key, str) else key[0] for key in loaded[1][problem]):
            raise UserError(f"{path}: {problem.replace('_', ' ')} in the weights, first {names[0]}; convert it again")


def _check_quantized_weights(path: Path, config: UnspoolConfig, format: WeightFormat) -> None:
    with _refusing(f"{path / 'config.json'}"), torch.device("meta"):
        parameters = {name: tuple(p.shape) for name, p in UnspoolForCausalLM(config).named_parameters()}
    asked = f"quantization_config.format {format} in {path / 'config.json'} asks for"
    stored = _stored_tensors(path)
    for parameter, shape in parameters.items():
        for name, part in stored_parts(parameter, shape, format).items():
            file, found = stored.get(name, (None, None))
            if file is None:
                file = stored[parameter][0] if parameter in stored else path / "model*.safetensors"
                raise UserError(f"{file}: has no {name}, which {asked}; convert the model again")
            if found != (wanted := (SAFETENSORS_NAMES[part.dtype], part.shape)):
                raise UserError(f"{file}: {name} is {found}, but {wanted} is what {asked}; convert the model again")


def _stored_tensors(path: Path) -> dict[str, tuple[Path, tuple[str, tuple[int, ...]]]]:
    """The file of every tensor in the weight files, its dtype's name and its shape, from their headers."""
    stored = {}
    for file in sorted(path.glob("model*.safetensors")):
        with _refusing(str(file), "convert the model again"), safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  this is no mapping
                header = tensors.get_slice(name)
                stored[name] = (file, (header.get_dtype(), tuple(header.get_shape())))
    return stored


def _check_generation_config(loaded: LoadedModel) -> None:
    with _refusing(str(loaded.path / "generation_config.json")):
        SamplingParams(**loaded.sampling_defaults)
        if not all(isinstance(token, int) for token in loaded.eos_ids):
            raise ValueError("eos_token_id is neither a token nor a list of tokens")


@contextlib.contextmanager
def _refusing(part: str, remedy: str = "correct it or convert the model again") -> Iterator[None]:
    """Makes one line of whatever a library says about this part of a checkpoint."""
    try:
        yield
    except Exception as error:  # on damaged files the libraries raise nearly anything, `tokenizers` a bare Exception
        reason = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        raise UserError(f"{part}: {textwrap.shorten(reason, MAX_REASON_CHARACTERS)}; {remedy}") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Turns off transformers' progress bars and warnings."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
