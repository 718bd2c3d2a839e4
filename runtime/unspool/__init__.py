"""Unspool: constant-memory inference for transformers converted into recurrent form.

Importing the package makes converted checkpoints known to `transformers`' Auto classes. What runs models in this
process is imported when it is first asked for: `from unspool import LLM`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM

from unspool.config import UnspoolConfig
from unspool.mixer_spec import PRESETS, MixerSpec
from unspool.model import UnspoolForCausalLM

if TYPE_CHECKING:
    from unspool.llm import LLM as LLM
    from unspool.llm import SamplingParams as SamplingParams
    from unspool.requests import StructuredOutput as StructuredOutput
    from unspool.sessions import Place as Place

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "PRESETS",
    "MixerSpec",
    "Place",
    "SamplingParams",
    "StructuredOutput",
    "UnspoolConfig",
    "UnspoolForCausalLM",
]

_LATER = {
    "LLM": "unspool.llm",
    "SamplingParams": "unspool.llm",
    "StructuredOutput": "unspool.requests",
    "Place": "unspool.sessions",
}

AutoConfig.register(UnspoolConfig.model_type, UnspoolConfig, exist_ok=True)
AutoModelForCausalLM.register(UnspoolConfig, UnspoolForCausalLM, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
