"""Asks every row for the facts of its texts: does it prefer the right answer, by how much, and would it say it?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unspool_conversion.evaluation.bootstrap import Bootstrap, wilson
from unspool_conversion.evaluation.greedy import greedy_tokens
from unspool_conversion.evaluation.likelihood import as_record
from unspool_conversion.evaluation.readers import Reader, Reading
from unspool_conversion.evaluation.recall_texts import CANDIDATES, Episode, Question
from unspool_conversion.evaluation.variants import EQUAL_BYTES, WINDOW_ONLY


class Answer(NamedTuple):
    """To one question: whether the right answer is the likeliest, its log-likelihood above the best wrong one's in
    nats, and whether greedy text is exactly it."""

    right: float
    margin: float
    exact: float


@torch.inference_mode()
def answer_episode(reader: Reader, episode: Episode) -> list[Answer]:
    """One answer a question."""
    device = reader.model.device
    reading = reader.begin()
    reading.feed(episode.context.to(device))
    answers = []
    for question in episode.questions:
        hidden = reading.feed(question.text.to(device))
        answers.append(_answer(reader, reading, hidden, question))
        reading.feed(question.answers[question.right].to(device))
    return answers


def _answer(reader: Reader, reading: Reading, hidden: Tensor, question: Question) -> Answer:
    candidates = question.answers.to(hidden.device)
    scores = torch.stack([_log_likelihood(reader, reading.fork(), hidden, tokens) for tokens in candidates])
    right = scores[question.right]
    margin = float(right - torch.cat([scores[: question.right], scores[question.right + 1 :]]).max())
    said = greedy_tokens(reader, reading.fork(), hidden, candidates.shape[1])
    return Answer(float(margin > 0.0), margin, float(torch.equal(said, candidates[question.right])))


def _log_likelihood(reader: Reader, reading: Reading, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Of tokens [T] after a context whose last vector is the last of `hidden`."""
    vectors = hidden[-1:] if tokens.shape[0] == 1 else torch.cat([hidden[-1:], reading.feed(tokens[:-1])])
    return reader.logits(vectors).log_softmax(-1).gather(1, tokens[:, None]).sum()


def measure_recall(
    readers: Mapping[str, Reader], episodes: Mapping[int, Sequence[Episode]], progress: Callable[[], object]
) -> dict[str, Any]:
    """Rows by distance. `progress` is called once a row and episode."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in readers}
    for distance, texts in episodes.items():
        given = {name: _ask(reader, texts, progress) for name, reader in readers.items()}
        for name in readers:
            rows[name][str(distance)] = _summarize(given, name)
    asked = len(next(iter(episodes.values()))[0].questions)
    trials = len(next(iter(episodes.values())))
    return {"trials": trials, "questions_each": asked, "chance": 1.0 / CANDIDATES, "rows": rows}


def _ask(reader: Reader, texts: Sequence[Episode], progress: Callable[[], object]) -> Tensor:
    """[episodes, questions, 3]: what Answer holds."""
    answers = []
    for text in texts:
        answers.append(answer_episode(reader, text))
        progress()
    return torch.tensor(answers, dtype=torch.float64)


def _summarize(given: Mapping[str, Tensor], row: str) -> dict[str, Any]:
    """Intervals over episodes. Where each asks one question its trials are independent and Wilson's interval holds."""
    right, margin, exact = given[row].unbind(-1)
    bootstrap = Bootstrap(range(right.shape[0]))

    def share(hits: Tensor) -> dict[str, float] | None:
        single = hits.shape[1] == 1
        return as_record(wilson(int(hits.sum()), hits.numel()) if single else bootstrap.mean(hits))

    def paired(other: str) -> dict[str, float] | None:
        return as_record(bootstrap.mean(margin - given[other][..., 1]))

    return {
        "accuracy": share(right),
        "exact": share(exact),
        "margin": as_record(bootstrap.mean(margin)),
        "margin_minus_window_only": paired(WINDOW_ONLY),
        "margin_minus_equal_bytes": paired(EQUAL_BYTES),
    }
