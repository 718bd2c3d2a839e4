"""The bank in the native decoder: what it holds beside the reference's, and the same bits however tokens come."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unspool import PRESETS, MixerSpec, UnspoolConfig, UnspoolForCausalLM
from unspool.config import linearize_block
from unspool.executor import Executor, ExecutorOptions, NativeExecutor, TorchExecutor, make_executor
from unspool.native import pack
from unspool.state import StatePool
from unspool_kernels.native.library import available, choose_instruction_set, instruction_set, instruction_sets
from unspool_kernels.native.packed import Format

pytestmark = pytest.mark.skipif(not available(), reason="the native library was not built")

VOCABULARY = 150
SPEC = PRESETS["disjoint"].replace(window=16, sinks=3, bank=12, far_bias=0.5)
LONG, SHORT = 4096, 50
"""Positions the teacher knew: more than any test has, and so few that entries become too old."""


def make_model(
    spec: MixerSpec,
    limit: int = LONG,
    aging: Sequence[float] = (0.03, 0.5),
    layers: dict[int, dict[str, Any]] | None = None,
) -> UnspoolForCausalLM:
    """A random model of two layers, whose banks choose by their weights more than by `aging`, one a head."""
    torch.manual_seed(0)
    config = UnspoolConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        max_position_embeddings=limit,
        linearize=linearize_block("test", spec, layers or {}),
    )
    model = UnspoolForCausalLM(config).eval()
    for block in model.model.layers:
        if (bank := block.self_attn.far.bank) is not None:
            bank.weight.data.normal_()
            bank.aging.data.copy_(torch.tensor(aging))
    return model


def some_tokens(count: int, seed: int = 5) -> list[int]:
    tokens: list[int] = torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def native(model: UnspoolForCausalLM, format: Format = "float32", dtype: torch.dtype = torch.float32) -> NativeExecutor:
    return NativeExecutor(model.config, pack(model, format), dtype)


def read(executor: Executor, pool: StatePool, tokens: list[int], sizes: Sequence[int], slot: int = 0) -> Tensor:
    """Every token's logits, consumed in pieces of these sizes in turn."""
    rows: list[Tensor] = []
    start = 0
    while start < len(tokens):
        piece = tokens[start : start + sizes[len(rows) % len(sizes)]]
        rows.append(executor.logits([piece], pool, [slot], "every"))
        start += len(piece)
    return torch.cat(rows)


def assert_same_slot(pool: StatePool, slot: int, other: StatePool, other_slot: int) -> None:
    for layer, expected in zip(pool.layers, other.layers, strict=True):
        for name in layer:
            assert torch.equal(layer[name][slot], expected[name][other_slot]), name


@pytest.mark.parametrize("limit", [LONG, SHORT])
@pytest.mark.parametrize(
    "changes",
    [{}, {"bank": 1}, {"bank": 200}, {"sinks": 0, "state_heads": "q"}, {"state_rope": True, "gate": "liger"}],
    ids=str,
)
def test_it_holds_the_tokens_that_the_reference_holds(changes: dict[str, Any], limit: int) -> None:
    model, tokens = make_model(SPEC.replace(**changes), limit), some_tokens(160)
    executor = native(model)
    pool = executor.new_pool(1)
    logits = read(executor, pool, tokens, [7, 1, 16])
    reference = TorchExecutor(model.double())
    exact_pool = reference.new_pool(1)
    exact = read(reference, exact_pool, tokens, [160])
    assert (logits - exact).norm() / exact.norm() < 1e-5
    for layer, expected in zip(pool.layers, exact_pool.layers, strict=True):
        assert torch.equal(layer["bank_positions"], expected["bank_positions"])
        torch.testing.assert_close(layer["bank_scores"], expected["bank_scores"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("other", [0, 5, 40])
def test_layers_have_banks_of_their_own_sizes(other: int) -> None:
    model, tokens = make_model(SPEC, layers={0: {"bank": other}}), some_tokens(120)
    executor = native(model)
    logits = read(executor, executor.new_pool(1), tokens, [16, 1])
    reference = TorchExecutor(model.double())
    exact = read(reference, reference.new_pool(1), tokens, [120])
    assert (logits - exact).norm() / exact.norm() < 1e-5


def test_of_entries_worth_the_same_the_first_row_gives_way() -> None:
    model, tokens = make_model(SPEC, aging=(0.0, 0.0)), some_tokens(12) * 10
    for block in model.model.layers:
        block.self_attn.far.bank.weight.data[:, 0:16] = 0.0  # values alone: a repeated token's are equal to the bit
        block.self_attn.far.bank.weight.data[:, 32:48] = 0.0
    held = []
    for executor in (native(model), TorchExecutor(model)):
        pool = executor.new_pool(1)
        read(executor, pool, tokens, [1])
        held.append(pool.layers[0]["bank_positions"])
    assert torch.equal(*held)


def test_an_entry_gives_up_its_place_once_the_teacher_could_not_have_seen_it() -> None:
    tokens, oldest = some_tokens(160), {}
    for limit in (LONG, SHORT):
        executor = native(make_model(SPEC, limit))
        pool = executor.new_pool(1)
        executor.logits([tokens], pool, [0])
        oldest[limit] = min(int(layer["bank_positions"].min()) for layer in pool.layers)
    assert oldest[LONG] < 160 - SHORT <= oldest[SHORT]


@settings(deadline=None, max_examples=25)
@given(
    bank=st.integers(1, 30),
    sinks=st.integers(0, 4),
    limit=st.sampled_from([LONG, SHORT]),
    aging=st.sampled_from([(0.0, 0.0), (0.03, 0.5)]),  # without aging repeated tokens are worth the same
    format=st.sampled_from(["float32", "bfloat16", "int8", "int4"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    sizes=st.lists(st.integers(1, 16), min_size=1, max_size=6),
)
def test_pieces_and_company_give_the_bits_of_steps_alone(
    bank: int,
    sinks: int,
    limit: int,
    aging: tuple[float, float],
    format: Format,
    dtype: torch.dtype,
    sizes: list[int],
) -> None:
    model = make_model(SPEC.replace(bank=bank, sinks=sinks), limit, aging)
    executor = native(model, format, dtype)
    texts = [some_tokens(90, seed) for seed in (1, 2)]
    alone, together = executor.new_pool(2), executor.new_pool(3)
    expected = [read(executor, alone, text, [1], slot) for slot, text in enumerate(texts)]
    executor.logits([texts[1][:11]], together, [0], "none")
    start = 0
    while start < 79:
        size = min(sizes[start % len(sizes)], 79 - start)
        pieces = [texts[0][start : start + size], texts[1][11 + start : 11 + start + size]]
        both = executor.logits(pieces, together, [2, 0], "every").unflatten(0, (2, size))
        assert torch.equal(both[0], expected[0][start : start + size])
        assert torch.equal(both[1], expected[1][11 + start : 11 + start + size])
        start += size
    assert_same_slot(together, 0, alone, 1)


@pytest.fixture
def other_instruction_sets() -> Iterator[list[str]]:
    best = instruction_set()
    yield [name for name, runs in instruction_sets().items() if runs and name != best]
    choose_instruction_set(best)


def test_every_instruction_set_keeps_the_same_tokens_to_the_bit(other_instruction_sets: list[str]) -> None:
    executor, tokens = native(make_model(SPEC)), some_tokens(100)
    pool = executor.new_pool(1)
    expected = read(executor, pool, tokens, [16])
    for name in other_instruction_sets:
        choose_instruction_set(name)
        again = executor.new_pool(1)
        assert torch.equal(read(executor, again, tokens, [16]), expected), name
        assert_same_slot(again, 0, pool, 0)


def test_a_copied_slot_goes_on_as_its_source_does() -> None:
    executor, tokens = native(make_model(SPEC), "int8"), some_tokens(120)
    pool = executor.new_pool(3)
    executor.logits([tokens[:60]], pool, [1], "none")
    pool.restore(2, pool.snapshot(1))
    fork = read(executor, pool, tokens[60:], [5, 1], slot=2)
    pool.reorder(torch.tensor([1, 1, 2]))
    assert torch.equal(read(executor, pool, tokens[60:], [16], slot=0), fork)
    assert_same_slot(pool, 0, pool, 2)


def test_poison_in_other_slots_and_in_entries_not_yet_filled_changes_nothing() -> None:
    executor, tokens = native(make_model(SPEC)), some_tokens(80)
    clean, poisoned = executor.new_pool(1), executor.new_pool(3)
    for layer in poisoned.layers:
        for name, tensor in layer.items():
            tensor[0::2].fill_(torch.nan if tensor.is_floating_point() else 1 << 30)
            if name != "far":
                tensor[1].copy_(tensor[0])
    assert torch.equal(read(executor, poisoned, tokens, [16, 1], slot=1), read(executor, clean, tokens, [16, 1]))
    for layer in poisoned.layers:
        for tensor in layer.values():
            assert bool((tensor[0::2].isnan() if tensor.is_floating_point() else tensor[0::2] == 1 << 30).all())


def test_the_executor_decodes_greedily_what_plain_pytorch_does() -> None:
    def greedy(executor: Executor) -> list[int]:
        pool, tokens = executor.new_pool(1), some_tokens(40)
        logits = executor.logits([tokens], pool, [0])
        for _ in range(60):
            tokens.append(int(logits[0].argmax()))
            logits = executor.logits([tokens[-1:]], pool, [0])
        return tokens

    expected = greedy(TorchExecutor(make_model(SPEC).double()))
    assert greedy(make_executor(make_model(SPEC), ExecutorOptions(backend="native"))) == expected


@pytest.mark.parametrize("name", ["bank_scores", "bank_positions"])
def test_state_of_another_kind_is_refused_by_name(name: str) -> None:
    executor = native(make_model(SPEC))
    for wrong in (lambda x: x.double(), lambda x: x[..., :-1]):
        layers = [dict(layer) for layer in executor.new_pool(1).layers]
        layers[1][name] = wrong(layers[1][name])
        with pytest.raises(ValueError, match=name):
            executor.decoder.bind(layers)
