"""One evaluation: its models, its text, and the measurements by the name under which they are asked for."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from unspool_conversion.evaluation.bootstrap import Bootstrap
from unspool_conversion.evaluation.corpus import Corpus, read_filler
from unspool_conversion.evaluation.greedy import measure_greedy
from unspool_conversion.evaluation.harness import measure_harness
from unspool_conversion.evaluation.likelihood import (
    TokenScores,
    positions_to_tell_apart,
    score_tokens,
    summarize_likelihood,
)
from unspool_conversion.evaluation.mqar_training import MqarOptions, measure_mqar_training, num_training_steps
from unspool_conversion.evaluation.recall_scores import measure_recall
from unspool_conversion.evaluation.recall_texts import (
    OPENING_TOKENS,
    Compose,
    compose_associations,
    compose_needle,
    make_episode,
)
from unspool_conversion.evaluation.repetition import summarize_recall
from unspool_conversion.evaluation.timescales import measure_timescales
from unspool_conversion.evaluation.variants import NO_STATE, Rows

GREEDY_TOKENS = 64


@dataclass(frozen=True)
class Study:
    """What every measurement reads. Distances are in tokens; sequences [S, T] are the corpus on the models' device."""

    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    text: Path
    corpus: Corpus
    distances: Sequence[int]
    trials: int

    @cached_property
    def sequences(self) -> Tensor:
        return self.corpus.sequences.to(self.rows.converted.device)

    @cached_property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(self.corpus.units)

    @cached_property
    def scores(self) -> dict[str, TokenScores]:
        """Of every row and token: what nll and recall are summed from."""
        with bar("likelihood", len(self.rows.readers) * self.sequences.shape[0], "text") as step:
            return score_tokens(self.rows.readers, self.sequences, step)

    @cached_property
    def filler(self) -> Tensor:
        return read_filler(self.text, self.tokenizer, self.trials, OPENING_TOKENS + max(self.distances))


@contextmanager
def bar(description: str, total: int, unit: str) -> Iterator[Callable[[], object]]:
    """A progress bar; what it gives moves it by one."""
    with tqdm(total=total, desc=description, unit=unit, file=sys.stderr) as shown:
        yield shown.update


def reach(rows: Rows) -> tuple[int, int]:
    """The longest window of any layer of the converted model, and the most sinks."""
    specs = rows.converted.config.mixer_specs()
    return max(spec.window for spec in specs), max(spec.sinks for spec in specs)


def _nll(study: Study) -> dict[str, Any]:
    near_tokens = study.rows.converted.config.near_tokens
    columns = positions_to_tell_apart(study.sequences.shape[1], near_tokens)
    return summarize_likelihood(study.scores, study.bootstrap, columns)


def _recall(study: Study) -> dict[str, Any]:
    return summarize_recall(study.scores, study.corpus.sequences, study.bootstrap, reach(study.rows))


def _greedy(study: Study) -> dict[str, Any]:
    prompts = study.sequences[:, :-GREEDY_TOKENS]
    with bar("greedy", len(study.rows.readers) * prompts.shape[0], "text") as step:
        return measure_greedy(study.rows.readers, prompts, GREEDY_TOKENS, study.bootstrap, step)


def _ask(study: Study, description: str, compose: Compose) -> dict[str, Any]:
    """A trial has the same facts at every distance."""
    pieces = study.filler.shape[0]
    episodes = {
        distance: [
            make_episode(compose, study.tokenizer, study.filler[trial % pieces], distance, trial)
            for trial in range(study.trials)
        ]
        for distance in study.distances
    }
    with bar(description, len(study.rows.readers) * study.trials * len(episodes), "text") as step:
        return measure_recall(study.rows.readers, episodes, step)


def _needle(study: Study) -> dict[str, Any]:
    return _ask(study, "needle", compose_needle)


def _mqar(study: Study) -> dict[str, Any]:
    return _ask(study, "mqar", compose_associations)


def _mqar_train(study: Study) -> dict[str, Any]:
    spec = next((spec for spec in study.rows.converted.config.mixer_specs() if spec.has_state), None)
    if spec is None:
        return {"left_out": NO_STATE}
    options = MqarOptions()
    with bar("mqar-train", num_training_steps(options), "step") as step:
        return measure_mqar_training(spec, options, step)


def _timescales(study: Study) -> list[dict[str, Any]]:
    with bar("timescales", study.sequences.shape[0], "text") as step:
        return measure_timescales(study.rows.converted, study.sequences, step)


TASKS: dict[str, Callable[[Study], Any]] = {
    "nll": _nll,
    "recall": _recall,
    "greedy": _greedy,
    "needle": _needle,
    "mqar": _mqar,
    "timescales": _timescales,
    "mqar-train": _mqar_train,
}
DEFAULT_TASKS = tuple(name for name in TASKS if name != "mqar-train")
"""Training takes minutes and says nothing of the weights."""


def run_harness(study: Study, tasks: Sequence[str], limit: int | None) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness, on every row."""
    with bar("lm-eval", len(study.rows.readers), "row") as step:
        return measure_harness(study.rows.readers, study.tokenizer, tasks, limit, step)
