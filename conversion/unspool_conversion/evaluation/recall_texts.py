"""Texts that ask for a fact again: a pass key told once, or several keys with a value each, then running text of an
exact number of tokens, then the question. Both are plain text, so that any model can be asked."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unspool.errors import UserError
from unspool_conversion.texts import tokenize

NAMES = (
    "Alder", "Birch", "Cedar", "Dahlia", "Elder", "Fern", "Ginger", "Hazel", "Iris", "Juniper", "Laurel", "Maple",
    "Nettle", "Olive", "Poppy", "Quince", "Rowan", "Sage", "Thistle", "Violet", "Willow", "Yarrow", "Zinnia", "Aspen",
)  # fmt: skip
CANDIDATES = 8
"""Answers to choose from, the right one included: chance is one in so many."""
DIGITS = 5
QUESTIONS = 4
"""Keys that an associative recall text asks for again."""
OPENING_TOKENS = 48
"""Of running text before the fact, so that no fact stands among the sinks."""
_TRIES = 1000


@dataclass(frozen=True)
class Question:
    """What follows the context, and the answers to choose from, each of as many tokens: the right one is `right`."""

    text: Tensor
    answers: Tensor
    right: int


@dataclass(frozen=True)
class Episode:
    """One text. Its context [T] holds the facts, then `distance` tokens; the questions come one after the other, each
    followed by its right answer."""

    context: Tensor
    facts: range
    distance: int
    questions: tuple[Question, ...]


Compose = Callable[[PreTrainedTokenizerBase, random.Random], tuple[list[int], tuple[Question, ...]]]
"""Makes the tokens of the facts, and the questions."""


def make_episode(
    compose: Compose, tokenizer: PreTrainedTokenizerBase, filler: Tensor, distance: int, seed: int
) -> Episode:
    """Places facts so that exactly `distance` tokens of the filler [N], N >= OPENING_TOKENS + distance, stand between
    their last token and the question's first."""
    facts, questions = compose(tokenizer, random.Random(seed))
    between = filler[OPENING_TOKENS : OPENING_TOKENS + distance]
    assert between.shape[0] == distance
    context = torch.cat([filler[:OPENING_TOKENS], torch.tensor(facts), between])
    return Episode(context, range(OPENING_TOKENS, OPENING_TOKENS + len(facts)), distance, questions)


def compose_needle(tokenizer: PreTrainedTokenizerBase, choice: random.Random) -> tuple[list[int], tuple[Question, ...]]:
    """One pass key. The wrong answers are other numbers of the same shape, which the text does not hold."""
    question = tokenize(f"\nThe pass key for {choice.choice(NAMES)} is", tokenizer)
    answers = _numbers(tokenizer, choice)
    right = choice.randrange(CANDIDATES)
    facts = [*question, *answers[right], *tokenize(".\n", tokenizer)]
    return facts, (Question(torch.tensor(question), torch.tensor(answers), right),)


def compose_associations(
    tokenizer: PreTrainedTokenizerBase, choice: random.Random
) -> tuple[list[int], tuple[Question, ...]]:
    """As many keys as there are candidates, with a number each; the wrong answers are the other keys' numbers, so that
    to remember the numbers is not enough."""
    keys = [tokenize(f"\n{name}:", tokenizer) for name in choice.sample(NAMES, CANDIDATES)]
    answers = _numbers(tokenizer, choice)
    facts = [token for key, answer in zip(keys, answers, strict=True) for token in (*key, *answer)]
    asked = choice.sample(range(CANDIDATES), QUESTIONS)
    questions = tuple(Question(torch.tensor(keys[index]), torch.tensor(answers), index) for index in asked)
    return [*facts, *tokenize("\n", tokenizer)], questions


def _numbers(tokenizer: PreTrainedTokenizerBase, choice: random.Random) -> list[list[int]]:
    """CANDIDATES different numbers that take the same number of tokens."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for _ in range(_TRIES):
        tokens = tuple(tokenize(f" {choice.randrange(10 ** (DIGITS - 1), 10**DIGITS)}", tokenizer))
        alike = found.setdefault(len(tokens), set())
        alike.add(tokens)
        if len(alike) == CANDIDATES:
            return [list(answer) for answer in sorted(alike)]
    raise UserError(
        f"the model's tokenizer has no {CANDIDATES} numbers of {DIGITS} digits that take as many tokens: leave needle "
        "and mqar out of --tasks"
    )
