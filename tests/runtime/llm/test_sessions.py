"""Sessions of `LLM`: turns of chats and of texts, places to go back to, and finding them again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from unspool import LLM, Place, SamplingParams, StructuredOutput
from unspool.llm import Session, TurnOutput
from unspool.requests import InvalidRequest
from unspool.sessions import SessionBusy, SessionConflict, SessionMismatch, SessionNotFound, TurnFailed

GREEDY = SamplingParams(temperature=0.0, max_tokens=10)
ENDLESS = SamplingParams(max_tokens=100_000, ignore_eos=True, temperature=0)


@pytest.fixture
def session(llm: LLM) -> Session:
    return llm.session()


@pytest.fixture
def letters(letters_only: dict[int, float]) -> SamplingParams:
    return replace(GREEDY, logit_bias=letters_only)


def test_a_chat_is_the_conversation_that_the_template_writes(
    llm: LLM, session: Session, letters: SamplingParams
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    first = session.say(messages, letters)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
    before = llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    second = session.say("And then?", letters)
    assert first.text and second.text
    assert session.text == before + second.text
    assert session.token_ids[-len(second.token_ids) :] == second.token_ids


def test_an_answer_is_what_the_whole_log_gives(llm: LLM, session: Session) -> None:
    log: list[int] = []
    for turn in ("Hello there", "Go on", "And again"):
        output = session.say(turn, GREEDY)
        before = session.token_ids[: -len(output.token_ids)]
        assert before[: len(log)] == log
        assert llm.generate(before, GREEDY)[0].outputs[0].token_ids == output.token_ids
        log = session.token_ids


def test_usage_says_what_was_read(session: Session) -> None:
    first = session.say("A thread of any length is drawn from a spool that never grows.", GREEDY)
    assert (first.generation, first.turn, first.position) == (1, 1, first.prompt_tokens + len(first.token_ids))
    assert (first.state_source, first.replayed_tokens) == ("empty", 0)
    second = session.say("And?", GREEDY)
    assert (second.generation, second.turn, second.state_source) == (2, 2, "memory")
    assert (second.replayed_tokens, second.cached_tokens) == (1, first.position - 1)
    assert second.prompt_tokens == second.position - len(second.token_ids)


def test_a_beginning_that_the_engine_knows_counts_as_cached(llm: LLM) -> None:
    beginning = [
        {"role": "system", "content": "A thread, drawn from a spool. " * 8},
        {"role": "user", "content": "So?"},
    ]
    first, second = (llm.session().say(beginning, GREEDY) for _ in range(2))
    assert (first.cached_tokens, first.state_source) == (0, "empty")
    assert first.prompt_tokens // 2 < second.cached_tokens <= second.prompt_tokens
    assert second.token_ids == first.token_ids


def test_texts_are_added_and_continued(llm: LLM, session: Session) -> None:
    added = session.append("The quick")
    assert (added.text, added.token_ids, added.position) == ("", [], added.prompt_tokens)
    assert session.append(llm.tokenizer.encode(" brown fox")).generation == 2
    output = session.generate(GREEDY)
    assert output.token_ids == llm.generate("The quick brown fox", GREEDY)[0].outputs[0].token_ids
    further = session.generate(GREEDY)
    assert session.text == "The quick brown fox" + llm.tokenizer.decode([*output.token_ids, *further.token_ids])


def test_only_the_beginning_of_a_log_is_the_beginning_of_a_text(
    blanks_in_front: LLM, only_new_words: dict[int, float]
) -> None:
    llm = blanks_in_front
    session = llm.session()
    session.append("The quick")
    session.append("brown fox")
    assert session.token_ids.count(llm.tokenizer.bos_token_id) == 1
    output = session.generate(replace(GREEDY, logit_bias=only_new_words))
    assert output.text.startswith(" ")
    assert session.text == "<s> The quick brown fox" + output.text


def test_messages_follow_a_part_of_an_answer_but_not_of_a_question(session: Session) -> None:
    first = session.say("Hello", GREEDY)
    session.rollback(position=first.prompt_tokens + 3)
    session.say("You were cut short", GREEDY)
    session.rollback(position=first.prompt_tokens - 2)
    with pytest.raises(InvalidRequest, match="messages: the session's log does not end in an answer"):
        session.say("So was I", GREEDY)


def test_a_turn_is_not_added_to_a_log_that_it_was_not_made_for(session: Session) -> None:
    session.say("Hello", GREEDY)
    pieces = session.stream_sync("Go on", GREEDY)
    session.append("but")
    with pytest.raises(SessionConflict):
        next(pieces)


def test_messages_do_not_follow_what_is_no_answer(session: Session) -> None:
    session.append("Once upon a time")
    session.generate(GREEDY)
    with pytest.raises(InvalidRequest, match="messages: the session's log does not end in an answer"):
        session.say("Hello", GREEDY)
    session.rollback(turn=0)
    session.say("Hello", GREEDY)
    session.generate(GREEDY)
    session.say("A longer answer can be followed too", GREEDY)
    session.append("but")
    with pytest.raises(InvalidRequest, match="messages"):
        session.say("not this", GREEDY)


def test_forks_and_places_to_go_back_to(session: Session) -> None:
    session.say("Hello", GREEDY)
    first = session.info
    session.snapshot("hello")
    session.say("Go on", GREEDY)
    fork = session.fork(Place(snapshot="hello"), id=f"{session.id[:20]}-fork")
    assert (fork.info.forked_from, fork.info.position) == (session.id, first.position)
    fork.say("Somewhere else", GREEDY)
    back = session.rollback(turn=-1)
    assert back.replay_tokens == 1
    assert session.rollback(snapshot="hello").position == first.position
    assert session.rollback(position=first.position - 3).position == first.position - 3
    assert session.delete_snapshot("hello").snapshots == {}
    session.delete()
    with pytest.raises(SessionNotFound):
        _ = session.info
    assert fork.text.count("<|start|>user") == 2


def test_a_fork_answers_as_its_origin_would(session: Session) -> None:
    session.say("Hello", GREEDY)
    fork = session.fork()
    assert fork.say("Go on", GREEDY).token_ids == session.say("Go on", GREEDY).token_ids
    assert fork.text == session.text


def test_stop_strings_and_log_probabilities_of_turns(session: Session) -> None:
    session.append("The quick")
    whole = session.generate(GREEDY)
    stop = whole.text[6:8]
    session.rollback(turn=1)
    cut = session.generate(replace(GREEDY, stop=stop, logprobs=2))
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[: whole.text.index(stop)], "stop", stop)
    assert cut.logprobs is not None and cut.cumulative_logprob is not None
    assert [next(iter(place)) for place in cut.logprobs] == cut.token_ids
    assert cut.cumulative_logprob == pytest.approx(
        sum(place[token].logprob for place, token in zip(cut.logprobs, cut.token_ids, strict=True))
    )


def test_a_turn_has_the_form_that_is_asked_for(session: Session) -> None:
    colours = StructuredOutput(kind="choice", value=("red", "green"))
    answer = session.say("Which?", replace(GREEDY, structured_outputs=colours, max_tokens=20))
    assert answer.text in ("red", "green") and answer.finish_reason == "stop"
    assert session.say("And now?", replace(GREEDY, max_tokens=5)).turn == 2


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", {"n": 2}),
        ("best_of", {"best_of": 2}),
        ("prompt_logprobs", {"prompt_logprobs": 0}),
        ("structured_outputs", {"structured_outputs": StructuredOutput(kind="regex", value="(")}),
    ],
)
def test_what_a_turn_cannot_have_is_refused(session: Session, field: str, values: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as error:
        session.say("Hello", SamplingParams(**values))  # type: ignore[arg-type]
    assert error.value.field == field
    assert session.info.generation == 0


def test_sessions_survive_closing_the_model(open_llm: Callable[..., LLM], tmp_path: Path) -> None:
    store = tmp_path / "sessions"
    with open_llm(store=store) as llm:
        session = llm.session("diary")
        first = session.say("Remember this", GREEDY)
        uncut = session.fork(id="uncut").say("And now?", GREEDY)
        text = session.text
    reopened = open_llm(store=str(store))
    assert [info.id for info in reopened.list_sessions()] == ["diary", "uncut"]
    session = reopened.session("diary")
    assert (session.text, session.info.generation) == (text, 1)
    second = session.say("And now?", GREEDY)
    assert (second.state_source, second.replayed_tokens) == ("store", 1)
    assert second.cached_tokens == first.position - 1
    assert second.token_ids == uncut.token_ids


def test_another_owner_sees_nothing(open_llm: Callable[..., LLM], tmp_path: Path) -> None:
    with open_llm(store=tmp_path / "s", owner="ann") as llm:
        llm.session("diary").say("Mine", GREEDY)
    other = open_llm(store=tmp_path / "s", owner="bob")
    assert other.list_sessions() == []
    assert other.session("diary").info.generation == 0


def test_an_id_of_another_tokenizer_is_refused(open_llm: Callable[..., LLM], chat_model: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in chat_model.iterdir():
        (changed / file.name).write_bytes(file.read_bytes() + (b"\n" if file.name == "tokenizer.json" else b""))
    with open_llm(store=tmp_path / "s") as llm:
        llm.session("diary")
    with pytest.raises(SessionMismatch):
        open_llm(changed, store=tmp_path / "s").session("diary")


def test_streamed_turns_are_the_turns(llm: LLM, session: Session) -> None:
    async def read(session: Session) -> list[TurnOutput]:
        outputs = []
        for message in ("Hello", None):
            text = ""
            async with aclosing(session.stream(message, GREEDY)) as pieces:
                async for piece in pieces:
                    text += piece.delta
            assert piece.turn is not None and piece.turn.text == text
            outputs.append(piece.turn)
        return outputs

    streamed = asyncio.run(read(session))
    other = llm.session()
    expected = [other.say("Hello", GREEDY), other.generate(GREEDY)]
    assert [turn.token_ids for turn in streamed] == [turn.token_ids for turn in expected]
    pieces = list(llm.session().stream_sync("Hello", GREEDY))
    assert "".join(piece.delta for piece in pieces) == expected[0].text
    assert [piece.turn is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]


def test_cancelling_a_turn_leaves_the_session_as_it_was(open_llm: Callable[..., LLM]) -> None:
    llm = open_llm(max_slots=1)
    session = llm.session()
    session.say("Hello", GREEDY)
    text = session.text

    async def cancel() -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in session.stream("Talk on and on", ENDLESS):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        with pytest.raises(SessionBusy):
            session.generate(GREEDY)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        session.rollback(turn=1)  # it would be busy if the turn had not ended

    asyncio.run(cancel())
    assert session.text == text
    pieces = session.stream_sync("Talk on and on", ENDLESS)
    next(pieces)
    pieces.close()
    assert (session.text, session.info.generation) == (text, 2)
    # With one slot and one place for each: whatever was not given back would keep this waiting.
    assert session.say("Hello", GREEDY).generation == 3
    assert llm._admission._room == llm.engine.options.max_queue


def test_a_turn_that_does_not_begin_in_time_fails(open_llm: Callable[..., LLM]) -> None:
    llm = open_llm(max_slots=1)
    session = llm.session()
    endless = llm.stream_sync("A", ENDLESS)
    next(endless)
    with pytest.raises(TurnFailed, match="expired"):
        session.say("Hello", replace(GREEDY, deadline=0.001))
    endless.close()
    assert session.say("Hello", GREEDY).generation == 1


def test_many_sessions_at_once_say_what_each_says_alone(llm: LLM) -> None:
    expected = [llm.session().say(f"{number} Hello", GREEDY).token_ids for number in range(24)]

    async def talk(number: int) -> list[int]:
        pieces = [piece async for piece in llm.session().stream(f"{number} Hello", GREEDY)]
        assert pieces[-1].turn is not None
        return pieces[-1].turn.token_ids

    async def together() -> list[list[int]]:
        return await asyncio.gather(*map(talk, range(24)))

    assert asyncio.run(together()) == expected
