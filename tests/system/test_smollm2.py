"""The main job on the real model: exact in the near set, one result for every split, better than its window."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from unspool import UnspoolForCausalLM
from unspool.cache import UnspoolCache
from unspool.loading import load
from unspool_conversion import verification
from unspool_conversion.evaluation import variants

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village by the sea,"]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> UnspoolForCausalLM:
    return load(smollm2).model


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(smollm2)
    return tokenizer


@pytest.fixture(scope="module")
def texts(prose: Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids [2, 2048]."""
    documents = [json.loads(line)["text"] for line in prose.read_text().splitlines()[:2]]
    return torch.tensor([tokenizer(document)["input_ids"][:2048] for document in documents])


def test_every_weight_is_what_transformers_loads(model: UnspoolForCausalLM, smollm2_teacher: PreTrainedModel) -> None:
    expected = smollm2_teacher.state_dict()
    actual = model.state_dict()
    assert set(expected) <= set(actual)
    assert all(".far." in name for name in set(actual) - set(expected))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 4, 5, 100, 259, 260])
def test_logits_in_the_near_set_are_the_teachers(
    length: int, model: UnspoolForCausalLM, smollm2_teacher: PreTrainedModel, texts: Tensor
) -> None:
    expected = smollm2_teacher(texts[:, :length]).logits
    difference = (model(texts[:, :length]).logits - expected).abs().max() / expected.abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_in_the_near_set_is_the_teachers(
    prompt: str, model: UnspoolForCausalLM, smollm2_teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(prompt, return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False}
    assert model.generate(**ids, **options).tolist() == smollm2_teacher.generate(**ids, **options).tolist()


@torch.no_grad()
def test_a_thousand_tokens_at_once_or_in_any_split_are_the_same(model: UnspoolForCausalLM, texts: Tensor) -> None:
    def run(sizes: list[int]) -> Tensor:
        cache = UnspoolCache(model.config, 1, model.dtype, model.device)
        parts = texts[:1, :1000].split(sizes, dim=1)
        return torch.cat([model(part, past_key_values=cache, use_cache=True).logits[0] for part in parts])

    whole = run([1000])
    for sizes in ([1] * 1000, [259, 1, 1, 1, 738], [333, 333, 334], [7] * 142 + [6]):
        assert (run(sizes) - whole).abs().max() / whole.abs().max() < 1e-4, sizes[:5]


@torch.no_grad()
def test_a_ragged_batch_equals_single_runs(model: UnspoolForCausalLM, texts: Tensor) -> None:
    lengths = [700, 300, 20]
    mask = torch.zeros(3, 700, dtype=torch.int64)
    ids = torch.zeros(3, 700, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, 700 - length :], mask[row, 700 - length :] = texts[row % 2, :length], 1
    logits = model(ids, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, 700 - length :]).logits[0]
        assert (logits[row, 700 - length :] - alone).abs().max() / alone.abs().max() < 1e-4


@pytest.mark.parametrize("window", [64, 128, 256])
def test_an_untrained_conversion_is_no_worse_than_its_window_at_any_position(
    window: int, request: pytest.FixtureRequest, texts: Tensor, tmp_path: Path
) -> None:
    directory: Path = tmp_path / "converted"
    if window == 256:
        directory = request.getfixturevalue("smollm2")
    else:
        source = request.getfixturevalue("smollm2_gguf")
        request.getfixturevalue("run_unspool")("convert", source, directory, "--window", str(window))
    model = load(directory).model
    scores = [verification.score_converted(variant) for variant in (model, variants.window_only(model))]
    converted, window_only = (verification.perplexity_by_position(score, texts, lambda: None) for score in scores)
    for positions, perplexity in converted.items():
        assert perplexity <= window_only[positions] * (1 + 1e-6), positions
    assert converted["all"] < window_only["all"] * 0.999


def test_verify_reports_teacher_windows_and_converted(
    smollm2: Path, smollm2_gguf: Path, prose: Path, run_unspool: Any
) -> None:
    arguments = ["--teacher", smollm2_gguf, "--text", prose, "--sequences", "1", "--length", "700"]
    printed = run_unspool("verify", smollm2, *arguments).stdout
    report = json.loads((smollm2 / "conversion_report.json").read_text())["verification"]
    assert report["passed"]
    assert report["exactness"]["tokens"] == 260
    rows = {name: values for name, *values in report["table"]["rows"]}
    assert list(rows) == ["teacher", "window-only", "window-only, equal bytes", "converted"]
    assert report["table"]["columns"][1:] == ["0-64", "64-128", "128-256", "256-512", "512-700", "all"]
    assert rows["converted"][:3] == pytest.approx(rows["teacher"][:3], rel=1e-4)
    assert rows["teacher"][-1] < rows["window-only"][-1]
    card = (smollm2 / "README.md").read_text()
    for line in printed.splitlines():
        assert line in card


@pytest.fixture(scope="module")
def client(smollm2: Path, unspool_command: Path) -> Iterator[OpenAI]:
    """The official client against a server process that serves the real model."""
    import socket
    import subprocess
    import time

    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([str(unspool_command), "serve", str(smollm2), "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        assert process.poll() is None
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client
    process.terminate()
    assert process.wait(60) == 0


def test_the_openai_client_lists_completes_chats_and_streams(client: OpenAI, smollm2: Path) -> None:
    name = smollm2.name
    assert [model.id for model in client.models.list()] == [name]
    completion = client.completions.create(model=name, prompt=PROMPTS[0], max_tokens=3, temperature=0)
    assert completion.choices[0].text.startswith(" Paris")
    messages: Any = [{"role": "user", "content": "What is 2+2? Answer with a number."}]
    options: dict[str, Any] = {"model": name, "messages": messages, "max_tokens": 20, "temperature": 0}
    chat = client.chat.completions.create(**options)
    assert "4" in (chat.choices[0].message.content or "")
    pieces = client.chat.completions.create(**options, stream=True)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == chat.choices[0].message.content
