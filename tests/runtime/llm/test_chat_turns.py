"""New messages as a continuation of a log: the text must be what the template writes for the whole conversation."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from unspool.errors import UserError
from unspool.llm.chat_turns import ChatTurns
from unspool.requests import InvalidRequest

END = "<|im_end|>"

CHAT_ML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's, with the system message that it adds by default."""

BRACKETS = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
"""As Llama 2's and Mistral's: no system message, blanks around answers, nothing that opens one."""

PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Without any special token."""

STABLE = {"ChatML": CHAT_ML, "brackets": BRACKETS, "plain": PLAIN}

MESSAGE = (
    "{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}"
)

UNSTABLE = {
    "the system message goes before the last one": (
        "{% for m in messages %}{% if m['role'] != 'system' %}"
        "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
        + MESSAGE
        + "{% endif %}{% endfor %}"
    ),
    "the messages are counted": "{{ messages | length }}{% for m in messages %}" + MESSAGE + "{% endfor %}",
    "users are numbered": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ loop.index }}{% endif %}" + MESSAGE + "{% endfor %}"
    ),
    "only two messages are kept": "{% for m in messages[-2:] %}" + MESSAGE + "{% endfor %}",
    "earlier answers are left out": (
        "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}" + MESSAGE + "{% endif %}{% endfor %}"
    ),
}


@pytest.fixture(scope="module")
def tokenizer(byte_level_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With ChatML's special tokens."""
    own = copy.deepcopy(byte_level_tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", END], "eos_token": END})
    return own


def turns_of(tokenizer: PreTrainedTokenizerFast, template: str | None) -> ChatTurns:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return ChatTurns(own, frozenset([own.convert_tokens_to_ids(END)]))


def rendered(tokenizer: PreTrainedTokenizerFast, template: str, messages: list[dict[str, str]]) -> str:
    text: Any = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return text


WORDS = st.text(st.characters(exclude_characters="<|>", exclude_categories=["Cs", "Z", "C"]), min_size=1, max_size=12)
CONVERSATIONS = st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=4)
"""What the user says, what the model answers, and whether it writes the end of its turn itself."""


@pytest.mark.parametrize("template", STABLE.values(), ids=STABLE)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=CONVERSATIONS, has_system=st.booleans())
def test_a_log_is_the_whole_conversation_as_the_template_writes_it(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    conversation: list[tuple[str, str, bool]],
    has_system: bool,
) -> None:
    turns = turns_of(tokenizer, template)
    end = tokenizer.convert_tokens_to_ids(END)
    messages = [{"role": "system", "content": "Be brief."}] if has_system and template != BRACKETS else []
    log: list[int] = []
    for said, answer, ends_itself in conversation:
        new = [{"role": "user", "content": said}]
        if log:
            given = turns.continuation(new, log[-1])
            messages += new
        else:
            messages += new
            given = turns.opening(messages)
        assert turns.opens_answer(given)
        log += given
        # Blanks are left out of what is compared: a template has its own around what a model answers.
        assert blankless(tokenizer.decode(log)) == blankless(rendered(tokenizer, template, messages))
        log += tokenizer.encode(answer, add_special_tokens=False)
        log += [end] if ends_itself and template != PLAIN else []
        messages.append({"role": "assistant", "content": answer})


def blankless(text: str) -> str:
    return re.sub(r" ", "", text)


@pytest.mark.parametrize("template", UNSTABLE.values(), ids=UNSTABLE)
def test_a_template_that_does_not_go_on_is_refused(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    turns = turns_of(tokenizer, template)
    assert turns.opening([{"role": "user", "content": "Hello"}])
    with pytest.raises(InvalidRequest, match="messages: the model's chat template does not write a longer") as error:
        turns.continuation([{"role": "user", "content": "And again"}], last=1)
    assert "append and generate" in str(error.value)


def test_an_answer_that_ends_in_the_same_letters_as_a_turn_is_ended_all_the_same(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turns, new = turns_of(tokenizer, PLAIN), [{"role": "user", "content": "Hello"}]
    tokens = turns.continuation(new, last=tokenizer.encode("x", add_special_tokens=False)[-1])
    assert tokenizer.decode(tokens) == "\n\nuser: Hello\n\nassistant: "
    assert turns.continuation(new, last=tokens[0]) == tokens


def test_several_messages_go_on_as_well(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = turns_of(tokenizer, CHAT_ML)
    new = [{"role": "system", "content": "Now in French."}, {"role": "user", "content": "Hello"}]
    end = tokenizer.convert_tokens_to_ids(END)
    after_end = "\n<|im_start|>system\nNow in French.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    assert tokenizer.decode(turns.continuation(new, end)) == f"{after_end}<|im_start|>assistant\n"
    other = tokenizer.encode("x", add_special_tokens=False)[-1]
    assert tokenizer.decode(turns.continuation(new, other)) == f"{END}{after_end}<|im_start|>assistant\n"


def test_what_opens_an_answer_is_recognised(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = turns_of(tokenizer, CHAT_ML)
    asked = turns.opening([{"role": "user", "content": "Hello"}])
    assert turns.opens_answer(asked)
    assert not turns.opens_answer(asked[:-1])
    assert not turns.opens_answer(tokenizer.encode("a document", add_special_tokens=False))
    assert not turns.opens_answer(())


def test_messages_that_cannot_be_rendered_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    user = {"role": "user", "content": "Hello"}
    with pytest.raises(InvalidRequest, match="refuses them: roles must alternate"):
        turns_of(tokenizer, BRACKETS).continuation([user, user], last=1)
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        turns_of(tokenizer, CHAT_ML).continuation([{"role": "user", "content": "\ud83d"}], last=1)
    with pytest.raises(UserError, match="no chat template"):
        turns_of(tokenizer, None).continuation([user], last=1)
