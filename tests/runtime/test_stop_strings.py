import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from unspool.requests import InvalidRequest
from unspool.stop_strings import StopScanner
from unspool.text import StopWatcher, TextStream

letters = st.text("ab", min_size=1, max_size=4)


def first_end(text: str, stop: list[str], ignored: int = 0) -> tuple[int, str] | None:
    """Where the first stop string ends beyond the ignored characters, and the longest that ends there, by trying."""
    for end in range(ignored + 1, len(text) + 1):
        if found := [string for string in stop if text[:end].endswith(string)]:
            return end, max(found, key=len)
    return None


@given(pieces=st.lists(st.text("ab", max_size=5), max_size=6), stop=st.lists(letters, max_size=3))
def test_the_stop_string_that_ends_first_is_found_however_the_text_is_cut(pieces: list[str], stop: list[str]) -> None:
    scanner, text = StopScanner(stop), "".join(pieces)
    passed = "".join([*(scanner.push(piece) for piece in pieces), scanner.finish()])
    expected = first_end(text, stop)
    assert scanner.found == (expected[1] if expected else None)
    assert passed == (text[: expected[0] - len(expected[1])] if expected else text)


@given(early=st.text("ab", max_size=8), late=st.text("ab", max_size=8), stop=st.lists(letters, max_size=3))
def test_stop_strings_that_end_too_early_are_text(early: str, late: str, stop: list[str]) -> None:
    """One that begins early and ends late counts, and may overlap one that did not."""
    scanner = StopScanner(stop)
    passed = scanner.push(early, may_stop=False)
    expected = first_end(early + late, stop, ignored=len(early))
    # What may no longer be the beginning of a stop string is out.
    held = len(early) - len(passed)
    beginnings = [n for n in range(len(early) + 1) for string in stop if early.endswith(string[:n]) and n < len(string)]
    assert held == max((n for n in beginnings if n <= len(early)), default=0)
    if expected is None or expected[0] - len(expected[1]) >= len(passed):
        passed += scanner.push(late) + scanner.finish()
        assert passed == ((early + late)[: expected[0] - len(expected[1])] if expected else early + late)
        assert scanner.found == (expected[1] if expected else None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="stop"):
        StopScanner(["a", ""])


@pytest.fixture(params=["byte_level_tokenizer", "metaspace_tokenizer", "byte_fallback_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    found: PreTrainedTokenizerFast = request.getfixturevalue(request.param)
    return found


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), min_tokens=st.integers(0, 12))
def test_a_watcher_fires_at_the_token_where_the_stream_stops(
    tokenizer: PreTrainedTokenizerFast, data: st.DataObject, min_tokens: int
) -> None:
    text = data.draw(st.text("aeh \u00e9😀", max_size=20))
    tokens = [*tokenizer.encode(text), *data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=10))]
    stop = data.draw(st.lists(st.text("aeh \u00e9😀", min_size=1, max_size=3), max_size=3))
    context = tokenizer.encode("the")
    stream = TextStream(tokenizer, stop, context=context, min_tokens=min_tokens)
    watcher = StopWatcher(tokenizer, stop, context=context, min_tokens=min_tokens)
    fired, whole = [], ""
    for token in tokens:
        whole += stream.push(token)
        fired.append(watcher.push(token))
        assert (fired[-1] is not None) == stream.stopped
        assert fired[-1] == stream.stop_string
    assert not any(fired[:min_tokens])
    if min_tokens == 0:
        assert not any(string in whole for string in stop)


def test_a_watcher_says_which_string_is_complete_and_after_how_many_tokens(
    byte_level_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens = [byte_level_tokenizer.convert_tokens_to_ids(letter) for letter in "xabaabab"]
    for min_tokens, expected in ((0, 3), (2, 3), (3, 6), (5, 6), (6, 8), (8, None)):
        watcher = StopWatcher(byte_level_tokenizer, ["ab", "never"], min_tokens=min_tokens)
        fired = [watcher.push(token) for token in tokens]
        first = next((count for count, found in enumerate(fired, start=1) if found), None)
        assert first == expected
        assert set(fired) <= {None, "ab"}


def test_without_stop_strings_a_watcher_decodes_nothing(
    byte_level_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_level_tokenizer, "decode", pytest.fail)
    watcher = StopWatcher(byte_level_tokenizer, [])
    assert [watcher.push(token) for token in (5, 6, 7)] == [None, None, None]
