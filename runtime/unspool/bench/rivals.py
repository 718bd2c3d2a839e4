"""Other runtimes on the same weights: what `unspool bench decode --against` times beside ours."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any, Protocol

import gguf
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from unspool.config import UnspoolConfig
from unspool.errors import UserError
from unspool.model import UnspoolForCausalLM

SAME_BITS = {"none": "F32", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_1"}
"""The GGUF format that moves as many bits a weight as each of ours."""


class Rival(Protocol):
    """A runtime with a context of its own."""

    def read(self, tokens: list[int]) -> None:
        """Empties the context and reads a prompt."""
        ...

    def step(self, token: int) -> None:
        """Decodes one token."""
        ...


def open_rival(name: str, model: UnspoolForCausalLM, quant: str, context: int) -> Rival:
    """Raises UserError for a runtime that is not installed, or a model or format that it has not."""
    if not _is_llama(model.config):
        raise UserError(f"--against {name}: only models of the Llama architecture can be compared")
    if name == "transformers":
        return Transformers(model)
    if importlib.util.find_spec("llama_cpp") is None:
        raise UserError("--against llama.cpp needs llama-cpp-python: pip install llama-cpp-python")
    if quant not in SAME_BITS:
        raise UserError(f"--against llama.cpp has no {quant}; compare one of {', '.join(SAME_BITS)}")
    return LlamaCpp(model, SAME_BITS[quant], context)


class Transformers:
    """The teacher's architecture with its growing cache, in float32."""

    def __init__(self, model: UnspoolForCausalLM) -> None:
        values = {name: getattr(model.config, name) for name in LLAMA_FIELDS}
        self._model = LlamaForCausalLM(LlamaConfig(**values)).eval().float()
        self._model.load_state_dict(model.state_dict(), strict=False)
        self._cache: Any = None

    @torch.inference_mode()
    def read(self, tokens: list[int]) -> None:
        self._cache = self._model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def step(self, token: int) -> None:
        self._model(torch.tensor([[token]]), past_key_values=self._cache)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a GGUF file of the same weights."""

    def __init__(self, model: UnspoolForCausalLM, format: str, context: int) -> None:
        import llama_cpp

        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            write_gguf(model, file, format)
            self._llama = llama_cpp.Llama(
                str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False, use_mmap=False
            )

    def read(self, tokens: list[int]) -> None:
        self._llama.reset()
        self._llama.eval(tokens)

    def step(self, token: int) -> None:
        self._llama.eval([token])


LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
)


def _is_llama(config: UnspoolConfig) -> bool:
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    biased = config.attention_bias or config.attention_out_bias or config.mlp_bias
    return not (config.qk_norm or biased) and config.hidden_act == "silu" and rope == "default"


def write_gguf(model: UnspoolForCausalLM, file: Path, format: str) -> None:
    """Writes the weights that the teacher shares, without a vocabulary, every matrix in one GGUF format."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base((config.rope_parameters or {}).get("rope_theta", 10000.0))
    kind = gguf.GGMLQuantizationType[format]
    for name, tensor in model.state_dict().items():
        if (target := _gguf_name(name, config)) is not None:
            values = _interleaved(name, tensor.float(), config).numpy()
            if values.ndim == 1:
                writer.add_tensor(target, values)
            else:
                writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str, config: UnspoolConfig) -> str | None:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in whole:
        return whole[name]
    if name == "lm_head.weight":
        return None if config.tie_word_embeddings else "output.weight"
    layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight" if part in GGUF_NAMES else None


def _interleaved(name: str, weight: Tensor, config: UnspoolConfig) -> Tensor:
    """llama.cpp rotates neighbouring channels, transformers the two halves of a head."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    interleaved: Tensor = weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return interleaved.contiguous()
