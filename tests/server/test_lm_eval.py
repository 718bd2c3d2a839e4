"""lm-evaluation-harness over HTTP measures what the model itself computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from unspool import UnspoolForCausalLM

if TYPE_CHECKING:
    from conftest import ServerProcess

instance = pytest.importorskip("lm_eval.api.instance")
openai_completions = pytest.importorskip("lm_eval.models.openai_completions")

PAIRS = [
    ("the quick brown", " fox jumps"),
    ("a thread of any", " length"),
    ("the lazy dog", " café"),
    ("drawn from a spool that never grows", " 🧵 at all"),
    ("the", "<|end|>"),
]


def expected(model: UnspoolForCausalLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].float()
    scores = torch.log_softmax(logits, dim=-1)
    total = scores[torch.arange(len(continuation)), continuation].sum().item()
    return total, logits.argmax(-1).tolist() == continuation


def test_loglikelihoods_are_the_models_own(
    server: ServerProcess, checkpoint: Path, model: UnspoolForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    harness = openai_completions.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", tokenizer=str(checkpoint), batch_size=4, max_retries=1
    )
    # The last continuation is the model's own, so that one of them is greedy.
    with torch.no_grad():
        context = tokenizer.encode(PAIRS[0][0])
        own = [int(model(torch.tensor([context])).logits[0, -1].argmax())]
    tokens = [(tokenizer.encode(before), tokenizer.encode(after)) for before, after in PAIRS] + [(context, own)]
    requests = [(("", ""), before, after) for before, after in tokens]
    measured = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    reference = [expected(model, before, after) for before, after in tokens]
    assert [greedy for _, greedy in measured] == [greedy for _, greedy in reference]
    assert measured[-1][1]
    for (total, _), (truth, _) in zip(measured, reference, strict=True):
        assert total == pytest.approx(truth, abs=1e-3)


def test_generation_until_a_stop_string_is_the_servers(server: ServerProcess, checkpoint: Path) -> None:
    harness = openai_completions.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", tokenizer=str(checkpoint), max_retries=1
    )
    with server.client() as client:
        text = client.completions.create(model="tiny", prompt="the lazy", max_tokens=20, temperature=0).choices[0].text
    until = text[8:11]
    arguments = ("the lazy", {"until": [until], "max_gen_toks": 20})
    request = instance.Instance("generate_until", doc={}, arguments=arguments, idx=0)
    assert harness.generate_until([request], disable_tqdm=True) == [text[: text.index(until)]]
