"""The radix tree against a dictionary of sequences."""

from hypothesis import given
from hypothesis import strategies as st

from unspool.engine.token_tree import TokenTree, common_bytes
from unspool.token_bytes import pack_tokens

SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple)


def common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@given(SEQUENCES, SEQUENCES)
def test_common_bytes_counts_whole_tokens(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    # Neighbouring numbers share three of their four bytes.
    assert common_bytes(pack_tokens(first), pack_tokens(second)) == 4 * common(first, second)


@given(st.lists(st.tuples(st.booleans(), SEQUENCES), max_size=40), SEQUENCES)
def test_a_walk_finds_every_value_on_its_way(
    changes: list[tuple[bool, tuple[int, ...]]], probe: tuple[int, ...]
) -> None:
    tree: TokenTree[tuple[int, ...]] = TokenTree()
    kept = {}
    for adds, sequence in changes:
        if adds:
            kept[sequence] = tree.insert(pack_tokens(sequence))
            kept[sequence].value = sequence
        elif node := kept.pop(sequence, None):
            node.value = None
            tree.prune(node)
    path, shared = tree.walk(pack_tokens(probe))
    assert [node.value for node in path if node.value] == sorted(
        (sequence for sequence in kept if probe[: len(sequence)] == sequence), key=len
    )
    assert all(node.position == len(node.value) for node in path if node.value)
    assert shared == max((common(probe, sequence) for sequence in kept), default=0)
    assert {node.value for node in tree.with_values()} == set(kept)
    assert tree.is_empty == (not kept)
