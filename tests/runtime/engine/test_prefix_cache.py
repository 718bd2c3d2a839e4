"""What the cache keeps, finds and gives up; states stand for themselves here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unspool.engine.prefix_cache import MIN_TOKENS, Checkpoint, PrefixCache, _worth
from unspool.state import SlotSnapshot
from unspool.token_bytes import pack_tokens

STATE_BYTES = 100_000
ROOM = 20_000
"""For the tokens that lead to states."""


def checkpoint(position: int, *, logits: bool = False) -> Checkpoint:
    state = SlotSnapshot(position, ({"far": torch.zeros(STATE_BYTES, dtype=torch.uint8)},))
    return Checkpoint(state, torch.zeros(4) if logits else None)


def text(length: int, ending: int = 0, changed: int = 0) -> bytes:
    """Tokens that count; the last `changed` of them are all `ending`."""
    return pack_tokens([*range(length - changed), *[ending] * changed])


def add(cache: PrefixCache, length: int, owner: str = "a", *, logits: bool = False) -> None:
    cache.add(owner, text(length), checkpoint(length, logits=logits))


def test_the_longest_checkpoint_on_the_way_is_found() -> None:
    cache = PrefixCache(10_000_000)
    for length in (50, 200, 120):
        add(cache, length)
    assert cache.match("a", text(180)).position == 120
    assert cache.match("a", text(300, ending=7, changed=90)).position == 200
    assert cache.match("a", text(40)).checkpoint is None


def test_a_whole_prompt_is_found_only_with_the_logits_of_its_last_token() -> None:
    cache = PrefixCache(10_000_000)
    add(cache, 100)
    assert cache.match("a", text(100)).checkpoint is None
    add(cache, 100, logits=True)
    assert cache.match("a", text(100)).position == 100


def test_owners_do_not_see_each_other() -> None:
    cache = PrefixCache(10_000_000)
    add(cache, 100, owner="a")
    assert cache.match("b", text(150)) == (None, 0, 0, "cold")


def test_a_miss_says_why() -> None:
    cache = PrefixCache(STATE_BYTES + ROOM)
    assert cache.match("a", text(100)).miss == "cold"
    add(cache, 100)
    assert cache.match("a", text(150, ending=9, changed=60)).miss == "diverged"
    assert cache.match("a", text(101)).miss is None
    cache.add("a", pack_tokens([5] * 300), checkpoint(300))
    found = cache.match("a", text(150))
    assert (found.position, found.miss) == (0, "evicted")
    assert cache.match("b", text(150)).miss == "cold"


def test_the_logits_of_a_prompt_outlive_an_answer_that_ends_there() -> None:
    cache = PrefixCache(10_000_000)
    add(cache, 100, logits=True)
    add(cache, 100)
    assert cache.match("a", text(100)).position == 100 and len(cache) == 1


def test_checkpoints_are_wanted_at_the_end_at_branches_at_hints_and_on_a_ladder() -> None:
    cache = PrefixCache(10_000_000)
    add(cache, 400)
    match = cache.match("a", text(3000, ending=9, changed=2700))
    assert (match.position, match.shared) == (0, 300)
    assert cache.places(match, 3000, hints=(77, 2990, 4000)) == [77, 300, 952, 1976, 2488, 2744, 2872, 2990, 3000]


def test_nothing_is_kept_that_saves_next_to_no_reading() -> None:
    cache = PrefixCache(10_000_000)
    add(cache, 400)
    assert cache.places(cache.match("a", text(400 + MIN_TOKENS - 1)), 400 + MIN_TOKENS - 1, hints=(405,)) == []
    assert cache.places(cache.match("b", text(20)), 20, hints=()) == []


def test_with_an_alignment_only_multiples_serve_longer_prompts() -> None:
    cache = PrefixCache(10_000_000, alignment=64)
    match = cache.match("a", text(300))
    assert cache.places(match, 300, hints=(100,)) == [64, 128, 256, 300]
    add(cache, 300, logits=True)
    assert cache.match("a", text(350)).position == 0
    assert cache.match("a", text(300)).position == 300
    add(cache, 128)
    assert cache.match("a", text(350)).position == 128
    assert cache.meeting_point(200) == 192


def test_what_saves_the_least_reading_goes_first() -> None:
    cache = PrefixCache(3 * STATE_BYTES + ROOM)
    for length in (1000, 1040, 500):
        add(cache, length)
    add(cache, 2000)
    assert [cache.match("a", text(length + 1)).position for length in (500, 1000, 1040, 2000)] == [
        500,
        1000,
        1000,
        2000,
    ]


def test_what_was_long_of_no_use_goes_in_the_end_whatever_it_would_save() -> None:
    cache = PrefixCache(3 * STATE_BYTES + ROOM)
    cache.add("a", pack_tokens([1] * 1000), checkpoint(1000))
    for number in range(2, 200):
        cache.add("a", pack_tokens([number] * 100), checkpoint(100))
    assert cache.match("a", pack_tokens([1] * 1001)).checkpoint is None


def test_a_checkpoint_larger_than_the_cache_is_not_kept() -> None:
    cache = PrefixCache(STATE_BYTES - 1)
    add(cache, 100)
    assert (len(cache), cache.num_bytes) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 60), st.booleans()), max_size=60), st.integers(0, 6))
def test_bytes_never_exceed_the_cap_and_every_answer_is_a_prefix(
    changes: list[tuple[str, int, bool]], states: int
) -> None:
    cap = states * (STATE_BYTES + 300)
    cache = PrefixCache(cap)
    for owner, length, logits in changes:
        add(cache, length, owner, logits=logits)
        assert cache.num_bytes <= cap
        match = cache.match(owner, text(40))
        assert match.position == (match.checkpoint.state.position if match.checkpoint else 0) <= 40
    kept = [kept.value for tree in cache._trees.values() for kept in tree.with_values() if kept.value]
    for tree in cache._trees.values():
        for node in tree.with_values():
            assert cache._worth._entries[node].value == pytest.approx(cache._worth._entries[node].since + _worth(node))
    assert cache.num_bytes == sum(each.num_bytes for each in kept) and len(cache) == len(kept)
