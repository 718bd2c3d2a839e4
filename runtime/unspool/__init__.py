"""Unspool: constant-memory inference for transformers converted into recurrent form.

Importing the package makes converted checkpoints known to `transformers`' Auto classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from unspool.config import UnspoolConfig
from unspool.mixer_spec import PRESETS, MixerSpec
from unspool.model import UnspoolForCausalLM

__version__ = "0.1.0"
__all__ = ["PRESETS", "MixerSpec", "UnspoolConfig", "UnspoolForCausalLM"]

AutoConfig.register(UnspoolConfig.model_type, UnspoolConfig, exist_ok=True)
AutoModelForCausalLM.register(UnspoolConfig, UnspoolForCausalLM, exist_ok=True)
