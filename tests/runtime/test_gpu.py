"""The executor for GPUs against plain PyTorch: on a GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when triton is imported, so `test_the_interpreted_executor_passes` runs this file in a process
of its own.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool import UnspoolConfig, UnspoolForCausalLM
from unspool.config import linearize_block
from unspool.cuda_graphs import bucket_of
from unspool.errors import UserError
from unspool.executor import Executor, ExecutorOptions, TorchExecutor, make_executor
from unspool.gpu import GpuExecutor, unsupported
from unspool.mixer_spec import PRESETS, MixerSpec
from unspool.packed_decoder import PackedDecoder
from unspool.packing import PackedTokens
from unspool.state import StatePool
from unspool_kernels.triton import missing
from unspool_kernels.triton.launch import Launch

MISSING = missing()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STALLED_SECONDS = 60
"""After which the interpreter's process prints where it stands: no test of it takes more than a few."""
VOCABULARY, WINDOW, PROMPT, STEPS = 40, 8, 21, 3
GPU_PRESETS = [name for name, spec in PRESETS.items() if spec.memory != "slots"]

needs_triton = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="a CUDA graph needs a CUDA GPU, and torch finds none")
# The interpreter computes in numpy, which warns about what a tl.where then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(MISSING is None, reason="this process has a GPU, or is the interpreter's already")
def test_the_interpreted_executor_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    options = ["-p", "no:cacheprovider", "-o", f"faulthandler_timeout={STALLED_SECONDS}"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " passed" in finished.stdout, finished.stdout


def narrow(name: str, **changes: Any) -> MixerSpec:
    spec = PRESETS[name]
    return spec.replace(window=WINDOW, sinks=min(spec.sinks, 2), **changes)


def make_model(spec: MixerSpec, **options: Any) -> UnspoolForCausalLM:
    """A tiny model whose every parameter has a say."""
    torch.manual_seed(0)
    config = UnspoolConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        max_position_embeddings=16,
        linearize=linearize_block("test", spec, {}),
        **options,
    )
    model = UnspoolForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_map", "gate_weight", "_norm.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model.to(DEVICE)


def draw(length: int, seed: int = 5) -> list[int]:
    tokens: list[int] = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def read_and_step(executor: Executor, prompts: Sequence[list[int]], slots: Sequence[int], want: Any) -> list[Tensor]:
    """The logits of prompts read at once, and of a few steps after them."""
    pool = executor.new_pool(5)
    logits = [executor.logits(prompts, pool, slots, want)]
    for step in range(STEPS):
        logits.append(executor.logits([[(step + slot) % VOCABULARY] for slot in slots], pool, slots))
    assert [pool.positions[slot] for slot in slots] == [len(prompt) + STEPS for prompt in prompts]
    return logits


def require_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-4) -> None:
    for mine, exact in zip(actual, expected, strict=True):
        assert (mine.dtype, mine.device, mine.shape) == (exact.dtype, exact.device, exact.shape)
        assert (mine - exact).abs().max() < tolerance


def rows_of(pool: StatePool, slot: int) -> list[Tensor]:
    return [tensor[slot].clone() for layer in pool.layers for tensor in layer.values()]


@needs_triton
@pytest.mark.parametrize("name", GPU_PRESETS)
def test_a_long_prompt_and_steps_equal_plain_torch(name: str) -> None:
    model = make_model(narrow(name))
    prompts, slots = [draw(PROMPT)], [3]
    expected = read_and_step(TorchExecutor(model), prompts, slots, "every")
    require_close(read_and_step(GpuExecutor(model), prompts, slots, "every"), expected)


@needs_triton
@pytest.mark.parametrize(
    "changes",
    [{"gate": "fixed", "state_heads": "q"}, {"gate": "liger", "feature_map": "elu"}, {"near_mass": "row_max"}],
    ids=["fixed gate per query head", "liger gate and elu", "row maximum"],
)
def test_every_option_equals_plain_torch(changes: dict[str, Any]) -> None:
    options = {"qk_norm": True, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}
    model = make_model(narrow("disjoint", **changes), attention_out_bias=True, **options)
    prompts, slots = [draw(13)], [0]
    expected = read_and_step(TorchExecutor(model), prompts, slots, "every")
    require_close(read_and_step(GpuExecutor(model), prompts, slots, "every"), expected)


@needs_triton
@pytest.mark.parametrize("sizes", [[5, 1, 12, 3], [1] * PROMPT], ids=["chunks", "steps"])
def test_a_prompt_in_pieces_equals_the_whole_prompt(sizes: list[int]) -> None:
    executor, prompt = GpuExecutor(make_model(narrow("disjoint"))), draw(PROMPT)
    pool, start, rows = executor.new_pool(1), 0, []
    for size in sizes:
        rows.append(executor.logits([prompt[start : start + size]], pool, [0], "every"))
        start += size
    require_close([torch.cat(rows)], [executor.logits([prompt], executor.new_pool(1), [0], "every")])


@needs_triton
@pytest.mark.parametrize("name", ["disjoint", "liger-gla"])
def test_a_batch_equals_each_sequence_alone(name: str) -> None:
    executor = GpuExecutor(make_model(narrow(name)))
    prompts, slots = [draw(13, 1), draw(4, 2)], [4, 1]
    together = read_and_step(executor, prompts, slots, "last")
    for row, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        alone = read_and_step(executor, [prompt], [slot], "last")
        require_close([logits[row : row + 1] for logits in together], alone)


@needs_triton
@pytest.mark.parametrize("name", ["disjoint", "window-only", "liger-hgrn2"])
def test_padding_and_other_slots_take_no_part(name: str) -> None:
    """Not even where they hold NaN."""
    model = make_model(narrow(name))
    executor, decoder = GpuExecutor(model), PackedDecoder(model)
    pool, clean = executor.new_pool(4), executor.new_pool(4)
    for each in (pool, clean):
        executor.logits([draw(PROMPT)], each, [2])
    for layer in pool.layers:
        for tensor in layer.values():
            tensor[[0, 1, 3]] = torch.nan
    batch = PackedTokens.of([[0], [7], [0]], [0, PROMPT, 0], [-1, 2, -1], DEVICE)
    with torch.inference_mode():
        padded = decoder.step(batch, pool.layers)
    assert padded.isfinite().all()
    require_close([padded[1:2]], [executor.logits([[7]], clean, [2])])
    for mine, expected in zip(rows_of(pool, 2), rows_of(clean, 2), strict=True):
        assert torch.allclose(mine, expected, atol=1e-5)
    assert all(row.isnan().all() for slot in (0, 1, 3) for row in rows_of(pool, slot))


@needs_triton
def test_ring_rows_that_were_never_written_do_not_matter() -> None:
    executor = GpuExecutor(make_model(narrow("disjoint")))
    pool, clean = executor.new_pool(1), executor.new_pool(1)
    for layer in pool.layers:
        layer["near_keys"].fill_(torch.nan)
        layer["near_values"].fill_(torch.nan)
    prompts = [draw(1), draw(12)]
    mine, expected = ([executor.logits([prompt], each, [0]) for prompt in prompts] for each in (pool, clean))
    require_close(mine, expected)


@needs_triton
def test_a_step_of_padding_alone_changes_nothing() -> None:
    model = make_model(narrow("disjoint"))
    executor = GpuExecutor(model)
    pool = executor.new_pool(2)
    executor.logits([draw(PROMPT), draw(9)], pool, [0, 1])
    before = [rows_of(pool, slot) for slot in range(2)]
    with torch.inference_mode():
        PackedDecoder(model).step(PackedTokens.of([[0], [0]], [0, 0], [-1, -1], DEVICE), pool.layers)
    for slot, rows in enumerate(before):
        assert all(torch.equal(mine, old) for mine, old in zip(rows_of(pool, slot), rows, strict=True))


@needs_triton
@pytest.mark.parametrize("name", GPU_PRESETS)
def test_a_pass_asks_no_tensor_for_its_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on the meta device, whose tensors have none."""
    monkeypatch.setattr(Launch, "run", lambda launch: None)
    model, meta = make_model(narrow(name)), torch.device("meta")
    pool = StatePool(model.config, 3, torch.float32, meta)
    for tokens, positions in (([[1], [2], [0]], [0, 30, 5]), ([draw(PROMPT), [1]], [0, 9])):
        batch = PackedTokens.of(tokens, positions, [0, 1, -1][: len(tokens)], meta)
        with torch.inference_mode():
            logits = PackedDecoder(model.to(meta)).step(batch, pool.layers)
        assert logits.shape == (sum(map(len, tokens)), VOCABULARY)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_plain_torch(dtype: torch.dtype) -> None:
    model = make_model(narrow("disjoint")).to(dtype)
    prompts, slots = [draw(PROMPT)], [1]
    expected = read_and_step(TorchExecutor(model), prompts, slots, "last")
    for state_dtype in (torch.float32, torch.float16):
        actual = read_and_step(GpuExecutor(model, state_dtype), prompts, slots, "last")
        for mine, exact in zip(actual, expected, strict=True):
            assert mine.dtype == dtype
            assert (mine - exact).norm() / exact.norm() < 0.05


@needs_triton
def test_logits_nobody_wants_are_not_computed() -> None:
    executor = GpuExecutor(make_model(narrow("window-only")))
    pool = executor.new_pool(1)
    assert executor.logits([draw(3)], pool, [0], "none").shape == (0, VOCABULARY)
    assert pool.positions == [3]


@needs_triton
@needs_gpu
def test_a_replayed_graph_equals_an_eager_step() -> None:
    model = make_model(narrow("disjoint"))
    executor = GpuExecutor(model)
    replayed, eager = executor.new_pool(5), executor.new_pool(5)
    prompts, slots = [draw(PROMPT, 1), draw(4, 2), draw(11, 3)], [4, 0, 2]
    for pool in (replayed, eager):
        executor.logits(prompts, pool, slots)
    for step in range(WINDOW + 2):
        tokens = [[step + slot] for slot in slots]
        # Every row of one token each: the same numbers, but nothing is captured for this.
        require_close(
            [executor.logits(tokens, replayed, slots)], [executor.logits(tokens, eager, slots, "every")], 1e-3
        )


def test_a_step_runs_in_the_smallest_graph_that_fits() -> None:
    assert [bucket_of(count, 11) for count in range(1, 12)] == [1, 2, 4, 4, 8, 8, 8, 8, 11, 11, 11]


def test_what_the_kernels_cannot_do_is_said() -> None:
    reason = unsupported(make_model(narrow("liger-gsa")).config)
    assert reason is not None
    assert "slot memory" in reason
    assert [unsupported(make_model(narrow(name)).config) for name in GPU_PRESETS] == [None] * len(GPU_PRESETS)
    with pytest.raises(ValueError, match="slot memory"):
        GpuExecutor(make_model(narrow("liger-gsa")))


@needs_triton
def test_the_triton_backend_is_chosen_by_name() -> None:
    options = ExecutorOptions(backend="triton")
    assert isinstance(make_executor(make_model(narrow("disjoint")), options), GpuExecutor)
    with pytest.raises(UserError, match="slot memory"):
        make_executor(make_model(narrow("liger-gsa")), options)
    with pytest.raises(UserError, match="float64"):
        make_executor(make_model(narrow("disjoint")).double(), options)
    with pytest.raises(UserError, match="quant int8"):
        make_executor(make_model(narrow("disjoint")), ExecutorOptions(backend="triton", quant="int8"))


@pytest.mark.skipif(MISSING is None, reason="Triton's kernels run in this process")
def test_the_triton_backend_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(UserError, match="backend triton: .*--backend torch"):
        make_executor(make_model(narrow("disjoint")), ExecutorOptions(backend="triton"))
