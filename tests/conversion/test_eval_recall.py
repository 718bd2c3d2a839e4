"""Facts placed at exact distances, and how they are asked for again."""

import random
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from unspool.errors import UserError
from unspool_conversion.evaluation.bootstrap import Bootstrap
from unspool_conversion.evaluation.likelihood import TokenScores
from unspool_conversion.evaluation.readers import Reader, Reading
from unspool_conversion.evaluation.recall_scores import answer_episode, measure_recall
from unspool_conversion.evaluation.recall_texts import (
    CANDIDATES,
    NAMES,
    OPENING_TOKENS,
    QUESTIONS,
    Compose,
    Episode,
    compose_associations,
    compose_needle,
    make_episode,
)
from unspool_conversion.evaluation.repetition import REPEATED, REST, repeated_beyond, summarize_recall
from unspool_conversion.evaluation.variants import CONVERTED, EQUAL_BYTES, TEACHER, WINDOW_ONLY

COMPOSITIONS = [compose_needle, compose_associations]
VOCABULARY = 272


class LookupReading(Reading):
    """Predicts what followed the last six tokens when they stood before, within `memory` tokens."""

    def __init__(self, memory: int, text: list[int]) -> None:
        self.memory, self.text = memory, text

    def feed(self, tokens: Tensor) -> Tensor:
        vectors = []
        for token in tokens.tolist():
            self.text.append(token)
            vectors.append(self._predict(self.text[-self.memory :]))
        return torch.tensor(vectors)

    def fork(self) -> Reading:
        return LookupReading(self.memory, list(self.text))

    @staticmethod
    def _predict(seen: list[int]) -> list[float]:
        """One where each token that followed stands."""
        scores = [0.0] * VOCABULARY
        for end in range(6, len(seen)):
            if seen[end - 6 : end] == seen[-6:]:
                scores[seen[end]] = 9.0
        return scores


class LookupReader(Reader):
    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.model: Any = SimpleNamespace(device=torch.device("cpu"))

    def begin(self) -> Reading:
        return LookupReading(self.memory, [])

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.begin().feed(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.fixture(scope="module")
def filler() -> Tensor:
    return torch.randint(97, 123, (600,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("compose", COMPOSITIONS)
@pytest.mark.parametrize("distance", [1, 77, 512])
def test_facts_stand_exactly_that_many_tokens_before_the_question(
    tokenizer: PreTrainedTokenizerFast, filler: Tensor, compose: Compose, distance: int
) -> None:
    episode = make_episode(compose, tokenizer, filler, distance, seed=3)
    facts, _ = compose(tokenizer, random.Random(3))
    context = episode.context.tolist()
    assert context[episode.facts.start : episode.facts.stop] == facts
    assert len(context) - episode.facts.stop == distance == episode.distance
    real = context[: episode.facts.start] + context[episode.facts.stop :]
    assert real == filler[: OPENING_TOKENS + distance].tolist()


def test_a_needle_is_told_once_and_its_wrong_answers_never(tokenizer: PreTrainedTokenizerFast, filler: Tensor) -> None:
    episode = make_episode(compose_needle, tokenizer, filler, 40, seed=5)
    (question,) = episode.questions
    text, asked = tokenizer.decode(episode.context), tokenizer.decode(question.text)
    answers = [tokenizer.decode(answer) for answer in question.answers]
    assert text.count(f"{asked}{answers[question.right]}.\n") == 1
    assert len(set(answers)) == CANDIDATES == question.answers.shape[0]
    assert not any(answer in text for index, answer in enumerate(answers) if index != question.right)


def test_wrong_answers_of_associations_are_the_other_keys(tokenizer: PreTrainedTokenizerFast, filler: Tensor) -> None:
    episode = make_episode(compose_associations, tokenizer, filler, 40, seed=5)
    text = tokenizer.decode(episode.context)
    assert len(episode.questions) == QUESTIONS
    assert len({question.right for question in episode.questions}) == QUESTIONS
    for question in episode.questions:
        answers = [tokenizer.decode(answer) for answer in question.answers]
        assert all(text.count(f":{answer}\n") == 1 for answer in answers)
        assert f"{tokenizer.decode(question.text)}{answers[question.right]}\n" in text


def test_trials_differ_and_a_seed_repeats_itself(tokenizer: PreTrainedTokenizerFast, filler: Tensor) -> None:
    texts = [make_episode(compose_needle, tokenizer, filler, 9, seed).context.tolist() for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(NAMES)) == len(NAMES) >= CANDIDATES


def test_a_tokenizer_without_numbers_is_refused() -> None:
    class OneToken:
        def encode(self, text: str, **_: Any) -> list[int]:
            return [0]

    with pytest.raises(UserError, match="leave needle and mqar out of --tasks"):
        compose_needle(OneToken(), random.Random(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("compose", COMPOSITIONS)
def test_a_reader_that_remembers_answers_and_one_that_forgets_does_not(
    tokenizer: PreTrainedTokenizerFast, filler: Tensor, compose: Compose
) -> None:
    episode = make_episode(compose, tokenizer, filler, 400, seed=1)
    remembered = answer_episode(LookupReader(2000), episode)
    assert len(remembered) == len(episode.questions)
    assert all(answer.right == 1.0 and answer.exact == 1.0 and answer.margin > 0 for answer in remembered)
    forgotten = answer_episode(LookupReader(300), episode)
    # Of associations, the answers given so far are within reach.
    assert forgotten[0].right == 0.0 and forgotten[0].exact == 0.0
    assert forgotten[0].margin == pytest.approx(0.0)


def test_recall_is_told_by_distance_with_intervals(tokenizer: PreTrainedTokenizerFast, filler: Tensor) -> None:
    def episodes(distance: int, compose: Compose) -> list[Episode]:
        return [make_episode(compose, tokenizer, filler, distance, seed) for seed in range(6)]

    readers = {TEACHER: 2000, WINDOW_ONLY: 100, EQUAL_BYTES: 200, CONVERTED: 2000}
    rows = {name: LookupReader(memory) for name, memory in readers.items()}
    steps: list[None] = []
    result = measure_recall(rows, {at: episodes(at, compose_needle) for at in (40, 300)}, lambda: steps.append(None))
    assert len(steps) == 2 * 4 * 6
    assert result["chance"] == 1 / CANDIDATES and result["trials"] == 6 and result["questions_each"] == 1
    converted, window = result["rows"][CONVERTED], result["rows"][WINDOW_ONLY]
    assert window["40"]["accuracy"]["value"] == 1.0 and window["300"]["accuracy"]["value"] == 0.0
    assert converted["300"]["accuracy"]["value"] == 1.0 and converted["300"]["exact"]["value"] == 1.0
    assert converted["300"]["accuracy"]["low"] == pytest.approx(0.6096657)  # Wilson's, of 6 in 6
    assert converted["300"]["margin_minus_window_only"]["low"] > 0 == converted["40"]["margin_minus_window_only"]["low"]
    several = measure_recall(rows, {300: episodes(300, compose_associations)}, lambda: None)
    accuracy = several["rows"][CONVERTED]["300"]["accuracy"]
    assert several["questions_each"] == QUESTIONS
    assert accuracy["value"] * 6 * QUESTIONS == pytest.approx(22)  # keys that end alike mislead a lookup
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]


def brute_repeated(tokens: list[int], window: int, sinks: int) -> Iterable[bool]:
    for position in range(len(tokens) - 1):
        pair = tokens[position : position + 2]
        second = [end for end in range(1, position + 1) if tokens[end - 1 : end + 1] == pair]
        near = [end for end in second if end < sinks or end > position - window]
        yield bool(second) and not near


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 0), (5, 3), (40, 4)])
def test_repeated_pairs_are_those_that_a_search_finds(window: int, sinks: int) -> None:
    tokens = torch.randint(6, (300,), generator=torch.Generator().manual_seed(7))
    found = repeated_beyond(tokens, window, sinks)
    assert found.tolist() == list(brute_repeated(tokens.tolist(), window, sinks))
    assert found.any()


def test_recall_slices_split_the_far_positions() -> None:
    tokens = torch.randint(6, (3, 200), generator=torch.Generator().manual_seed(8))
    repeated = torch.stack([repeated_beyond(row, 10, 2) for row in tokens])
    zeros = torch.zeros(3, 199)
    scores = {
        name: TokenScores(torch.where(repeated, on_repeated, 1.0), zeros, zeros)
        for name, on_repeated in {TEACHER: 1.0, WINDOW_ONLY: 5.0, EQUAL_BYTES: 4.0, CONVERTED: 2.0}.items()
    }
    summary = summarize_recall(scores, tokens, Bootstrap(range(3)), (10, 2))
    assert sum(summary["tokens"].values()) == 3 * (199 - 12)
    assert summary["tokens"][REPEATED] == int(repeated[:, 12:].sum()) > 0
    row = summary["rows"][CONVERTED]
    assert row[REPEATED]["nll"]["value"] == pytest.approx(2.0) and row[REST]["nll"]["value"] == pytest.approx(1.0)
    assert row[REPEATED]["minus_window_only"]["value"] == pytest.approx(-3.0)
    assert row[REPEATED]["gap_closed"]["value"] == pytest.approx(0.75)
    assert row[REST]["gap_closed"] is None
