"""The native decoder against the model in float64: every preset, step and chunk, formats, state types, refusals."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool import UnspoolConfig, UnspoolForCausalLM
from unspool.config import linearize_block
from unspool.errors import UserError
from unspool.executor import ExecutorOptions, NativeExecutor, TorchExecutor, make_executor
from unspool.mixer_spec import PRESETS, MixerSpec
from unspool.native import pack, unsupported
from unspool.state import StatePool
from unspool_kernels.native import decoder_program
from unspool_kernels.native.decoder import NativeDecoder
from unspool_kernels.native.library import Arguments, available, call
from unspool_kernels.native.packed import Format

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")

VOCABULARY, LENGTH = 300, 90
LAYERS: dict[str, MixerSpec] = {
    **PRESETS,
    "disjoint-bank": PRESETS["disjoint"].replace(bank=20),
    "disjoint-bank-rotated-query-state": PRESETS["disjoint"].replace(sinks=0, bank=9, state_heads="q", state_rope=True),
}
NATIVE_LAYERS = [name for name, spec in LAYERS.items() if spec.memory != "slots"]
EVERY_OPTION: dict[str, Any] = {
    "qk_norm": True,
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": False,
}


def make_model(spec: MixerSpec, **options: Any) -> UnspoolForCausalLM:
    """A tiny model whose every parameter has a say."""
    torch.manual_seed(0)
    config = UnspoolConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        linearize=linearize_block("test", spec, {}),
        **options,
    )
    model = UnspoolForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_map", "gate_weight", "_norm.weight", "bank.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias") and not name.endswith("gate_bias"):
                parameter.normal_(0, 0.3)
    return model


def narrow(name: str) -> MixerSpec:
    spec = LAYERS[name]
    return spec.replace(window=24, sinks=min(spec.sinks, 4))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(5)).tolist()


def exact_logits(model: UnspoolForCausalLM, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.double()(torch.tensor([tokens]), use_cache=False).logits[0]
    model.float()
    return logits


def read(
    decoder: NativeDecoder, pool: StatePool, tokens: list[int], sizes: list[int], threads: int, slot: int = 1
) -> Tensor:
    """Every token's logits, consumed in pieces of these sizes in turn."""
    program = decoder.bind(pool.layers)
    rows, start = [], 0
    while start < len(tokens):
        piece = tokens[start : start + sizes[len(rows) % len(sizes)]]
        rows.append(program.logits([piece], [slot], [start], want="every", threads=threads))
        start += len(piece)
    return torch.cat(rows)


def pool_for(model: UnspoolForCausalLM, dtype: torch.dtype = torch.float32) -> StatePool:
    return StatePool(model.config, 3, dtype, "cpu", far_dtype=dtype)


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
@pytest.mark.parametrize("name", NATIVE_LAYERS)
def test_it_computes_what_the_model_does_in_float64(name: str, options: dict[str, Any], tokens: list[int]) -> None:
    model = make_model(narrow(name), **options)
    logits = read(pack(model, "float32"), pool_for(model), tokens, [20, 1, 24], threads=2)
    exact = exact_logits(model, tokens)
    assert (logits - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize("name", NATIVE_LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_steps_and_chunks_and_threads_give_the_same_bits(name: str, dtype: torch.dtype, tokens: list[int]) -> None:
    model = make_model(narrow(name))
    decoder = pack(model, "int8")
    pools = [pool_for(model, dtype) for _ in range(3)]
    ways = [([1], 1), ([24], 2), ([7, 1, 24, 3], 3)]
    results = [read(decoder, pool, tokens, sizes, threads) for pool, (sizes, threads) in zip(pools, ways, strict=True)]
    for result, pool in zip(results[1:], pools[1:], strict=True):
        assert torch.equal(result, results[0])
        for layer, first in zip(pool.layers, pools[0].layers, strict=True):
            assert all(torch.equal(layer[key], first[key]) for key in first)


def test_a_state_of_half_precision_drifts_little(tokens: list[int]) -> None:
    model = make_model(narrow("disjoint"))
    decoder = pack(model, "float32")
    whole = read(decoder, pool_for(model), tokens, [24], 2)
    half = read(decoder, pool_for(model, torch.float16), tokens, [24], 2)
    assert 0 < (half - whole).norm() / whole.norm() < 5e-3


@pytest.mark.parametrize(("format", "bound"), [("float16", 5e-3), ("bfloat16", 3e-2), ("int8", 0.15)])
def test_narrow_weights_cost_what_their_format_costs(format: Format, bound: float, tokens: list[int]) -> None:
    model = make_model(narrow("disjoint"))
    exact = exact_logits(model, tokens)
    logits = read(pack(model, format), pool_for(model), tokens, [24], 2)
    assert 1e-6 < (logits - exact).norm() / exact.norm() < bound


def test_sequences_in_one_call_do_not_know_each_other(tokens: list[int]) -> None:
    model = make_model(narrow("disjoint"))
    decoder = pack(model, "int4")
    apart, together = (decoder.bind(pool_for(model).layers) for _ in range(2))
    pieces, slots = [tokens[:24], tokens[24:25], tokens[25:40]], [2, 0, 1]
    alone = [apart.logits([piece], [slot], [0]) for piece, slot in zip(pieces, slots, strict=True)]
    assert torch.equal(together.logits(pieces, slots, [0, 0, 0]), torch.cat(alone))


def test_poison_in_other_slots_and_in_rows_not_yet_written_changes_nothing(tokens: list[int]) -> None:
    model = make_model(narrow("disjoint"))
    decoder, clean, poisoned = pack(model, "float32"), pool_for(model), pool_for(model)
    for layer in poisoned.layers:
        layer["near_keys"].fill_(torch.nan)
        layer["near_values"].fill_(torch.nan)
        layer["far"][0::2].fill_(torch.nan)
    expected = read(decoder, clean, tokens, [24, 1], 2)
    assert torch.equal(read(decoder, poisoned, tokens, [24, 1], 2), expected)
    for layer in poisoned.layers:
        assert all(bool(tensor[0::2].isnan().all()) for tensor in layer.values())


@pytest.mark.parametrize("name", ["disjoint", "disjoint-bank"])
def test_a_snapshot_restored_is_as_if_the_tokens_had_never_been(name: str, tokens: list[int]) -> None:
    model = make_model(narrow(name))
    executor = NativeExecutor(model.config, pack(model, "int8"), torch.float32)
    pool = executor.new_pool(1)
    executor.logits([tokens[:50]], pool, [0])
    saved = pool.snapshot(0)
    expected = executor.logits([tokens[50:60]], pool, [0])
    executor.logits([tokens[60:]], pool, [0])
    pool.restore(0, saved)
    assert torch.equal(executor.logits([tokens[50:60]], pool, [0]), expected)


def test_a_long_prompt_goes_in_pieces_that_the_window_holds(tokens: list[int]) -> None:
    model = make_model(narrow("disjoint"))
    executor = NativeExecutor(model.config, pack(model, "float32"), torch.float32)
    pools = [executor.new_pool(2) for _ in range(2)]
    every = executor.logits([tokens, tokens[:30]], pools[0], [0, 1], "every")
    last = executor.logits([tokens, tokens[:30]], pools[1], [0, 1], "last")
    assert every.shape == (LENGTH + 30, VOCABULARY)
    assert torch.equal(last, every[[LENGTH - 1, LENGTH + 29]])
    assert executor.logits([tokens], pools[0], [0], "none").shape == (0, VOCABULARY)
    assert pools[0].positions == [2 * LENGTH, 30]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"tokens": [[VOCABULARY]]}, "tokens"),
        ({"tokens": [[]]}, "tokens"),
        ({"tokens": [[1] * 25]}, "tokens"),
        ({"slots": [3]}, "slots"),
        ({"slots": [-1]}, "slots"),
        ({"tokens": [[1], [1]], "slots": [0, 0], "positions": [0, 0]}, "slots"),
        ({"positions": [-1]}, "positions"),
        ({"positions": [0, 0]}, "same sequences"),
    ],
)
def test_a_call_that_cannot_be_is_refused_by_name(arguments: dict[str, Any], name: str) -> None:
    model = make_model(narrow("disjoint"))
    call = {"tokens": [[1]], "slots": [0], "positions": [0]} | arguments
    program = pack(model, "float32").bind(pool_for(model).layers)
    with pytest.raises(ValueError, match=name):
        program.logits(call["tokens"], call["slots"], call["positions"])


def test_state_tensors_that_do_not_fit_are_refused_by_name() -> None:
    model = make_model(narrow("disjoint"))
    decoder, pool = pack(model, "float32"), pool_for(model)
    for name, wrong in (("far", torch.zeros(3, 2, 16, 32)), ("near_values", pool.layers[0]["near_values"].double())):
        layers = [dict(layer) for layer in pool.layers]
        layers[1][name] = wrong
        with pytest.raises(ValueError, match=name):
            decoder.bind(layers)


@pytest.mark.parametrize("arguments", [decoder_program._Decode, decoder_program._Workspace])
def test_structures_of_another_version_are_refused_before_they_are_read(arguments: type[Arguments]) -> None:
    with pytest.raises(ValueError, match="another version"):
        call(arguments(record_bytes=8), 1)


def test_the_executor_says_what_it_runs_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        executor = make_executor(make_model(narrow("disjoint")), ExecutorOptions(quant="int8"))
        assert isinstance(executor, NativeExecutor)
        assert isinstance(make_executor(make_model(narrow("liger-gsa"))), TorchExecutor)
    first, second = (record.getMessage() for record in caplog.records)
    assert "native" in first and "int8" in first
    assert "slot memory" in second


def test_weights_are_given_up_once_they_are_packed(tokens: list[int]) -> None:
    model = make_model(narrow("disjoint"))
    executor = make_executor(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert executor.logits([tokens[:5]], executor.new_pool(1), [0]).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExecutorOptions(quant="int8", backend="torch"), "quant int8"),
        (ExecutorOptions(state_dtype="float16", backend="torch"), "state_dtype"),
    ],
)
def test_what_only_native_kernels_can_do_is_refused_without_them(options: ExecutorOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_executor(make_model(narrow("disjoint")), options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"hidden_act": "gelu"}, "hidden_act"), ({"intermediate_size": 90}, "intermediate_size"), ({"head_dim": 8}, "8")],
)
def test_models_without_native_code_are_named(changes: dict[str, Any], reason: str) -> None:
    config = make_model(narrow("disjoint")).config
    for name, value in changes.items():
        setattr(config, name, value)
    assert reason in str(unsupported(config))


def test_quantised_to_half_on_plain_pytorch() -> None:
    executor = make_executor(make_model(narrow("disjoint")), ExecutorOptions(quant="bf16", backend="torch"))
    assert isinstance(executor, TorchExecutor)
    assert executor.model.dtype == torch.bfloat16
