"""States at chosen places of prompts that were read, so that the next prompt that begins alike starts there."""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from unspool.engine.token_tree import TokenNode, TokenTree
from unspool.greedy_dual import GreedyDual
from unspool.requests import CacheMiss
from unspool.state import SlotSnapshot
from unspool.token_bytes import TOKEN_BYTES

MIN_TOKENS = 32
"""Reading fewer costs no more than copying a state does."""
SMALLEST_RUNG = 128
REMEMBERED = 64
"""Checkpoints given up that a miss may be put down to."""


@dataclass(frozen=True)
class Checkpoint:
    """A state after the tokens that lead to it; `logits` [vocabulary] of the last of them where they were computed."""

    state: SlotSnapshot
    logits: Tensor | None

    @property
    def num_bytes(self) -> int:
        return self.state.num_bytes + (self.logits.nbytes if self.logits is not None else 0)


class _Kept(NamedTuple):
    checkpoint: Checkpoint
    owner: str
    num_bytes: int
    """With the tokens that lead to it, most of which it may share with others."""


_Node = TokenNode[_Kept]


class PrefixMatch(NamedTuple):
    """The longest checkpoint that a prompt may start from, and why none lies further on."""

    checkpoint: Checkpoint | None
    position: int
    shared: int
    """Tokens that the prompt has in common with any text on the way to a checkpoint."""
    miss: CacheMiss | None


class PrefixCache:
    """Checkpoints by the tokens that lead to them, a tree for every owner. Not thread-safe.

    What gives way is what saves the least reading for its bytes and has not been of use for long: a checkpoint's cost
    are the tokens since the one before it (as in Marconi, Pan et al. 2024).
    """

    def __init__(self, max_bytes: int, alignment: int = 1) -> None:
        """`alignment`: a checkpoint that ends elsewhere than at a multiple serves only a prompt that ends there, for an
        executor that gives a text other bits when it is cut elsewhere."""
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._alignment = alignment
        self._trees: dict[str, TokenTree[_Kept]] = {}
        self._worth: GreedyDual[_Node] = GreedyDual()
        self._given_up: collections.OrderedDict[tuple[str, int, int], None] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._worth)

    def match(self, owner: str, tokens: bytes) -> PrefixMatch:
        """What a prompt, four bytes a token, need not read. A checkpoint at its very end counts if it has logits."""
        length = len(tokens) // TOKEN_BYTES
        tree = self._trees.get(owner)
        path, shared = tree.walk(tokens) if tree else ([], 0)
        usable = [node for node in path if node.value is not None and self._is_usable(node, length)]
        if not usable:
            return PrefixMatch(None, 0, shared, self._reason(owner, tokens, 0, shared))
        node = usable[-1]
        assert node.value is not None
        self._worth.use(node, _worth(node))
        reason = self._reason(owner, tokens, node.position, shared)
        return PrefixMatch(node.value.checkpoint, node.position, shared, reason)

    def places(self, match: PrefixMatch, length: int, hints: Sequence[int]) -> list[int]:
        """Positions at which a prompt of that length should leave a checkpoint when it is read on from `match`.

        Its end; where it leaves what was read before, as others may; places that the request names; and a ladder of
        distances from the end, each twice the one before, for prompts that differ in their last tokens.
        """
        wanted = {match.shared, *hints}
        rung = SMALLEST_RUNG
        while length - rung >= MIN_TOKENS:
            wanted.add(length - rung)
            rung *= 2
        if self._alignment > 1:  # then the end itself serves nothing that is longer
            wanted.add(length - 1)
        aligned = {place // self._alignment * self._alignment for place in wanted}
        inside = {place for place in aligned if match.position + MIN_TOKENS <= place < length}
        if length - match.position >= MIN_TOKENS:
            inside.add(length)
        return sorted(inside)

    def meeting_point(self, tokens: int) -> int:
        """The last place, of so many tokens that two prompts share, at which one may go on from the other's state."""
        return tokens // self._alignment * self._alignment

    def add(self, owner: str, tokens: bytes, checkpoint: Checkpoint) -> None:
        """Keeps a checkpoint, unless it is larger than the whole cache; others may have to go."""
        num_bytes = checkpoint.num_bytes + len(tokens)
        if num_bytes > self._max_bytes:
            return
        node = self._trees.setdefault(owner, TokenTree()).insert(tokens)
        if node.value is not None:
            if checkpoint.logits is None:  # the state is the one that is there, perhaps with logits
                self._worth.use(node, _worth(node))
                return
            self.num_bytes -= node.value.num_bytes
        node.value = _Kept(checkpoint, owner, num_bytes)
        self.num_bytes += num_bytes
        self._worth.use(node, _worth(node))
        for below in _next_with_values(node):
            self._worth.revalue(below, _worth(below))
        while self.num_bytes > self._max_bytes:
            self._give_up()

    def _is_usable(self, node: _Node, length: int) -> bool:
        assert node.value is not None
        if node.position == length:
            return node.value.checkpoint.logits is not None
        return node.position % self._alignment == 0

    def _reason(self, owner: str, tokens: bytes, position: int, shared: int) -> CacheMiss | None:
        """Why reading must begin at `position`; None when nothing is left, or next to nothing."""
        length = len(tokens) // TOKEN_BYTES
        if length - position < MIN_TOKENS:
            return None
        for owned_by, end, digest in reversed(self._given_up):
            is_further = owned_by == owner and position < end <= length
            if is_further and hash(tokens[: end * TOKEN_BYTES]) == digest:
                return "evicted"
        return "diverged" if 0 < shared < length else "cold"

    def _give_up(self) -> None:
        """Drops the least valuable checkpoint."""
        node = self._worth.give_up()
        assert node.value is not None
        owner = node.value.owner
        self.num_bytes -= node.value.num_bytes
        self._given_up[owner, node.position, hash(_path(node))] = None
        if len(self._given_up) > REMEMBERED:
            self._given_up.popitem(last=False)
        node.value = None
        for below in _next_with_values(node):
            self._worth.revalue(below, _worth(below))
        tree = self._trees[owner]
        tree.prune(node)
        if tree.is_empty:
            del self._trees[owner]


def _worth(node: _Node) -> float:
    """Tokens that would have to be read again without this checkpoint, for each of its bytes."""
    before = node.parent
    while before is not None and before.value is None:
        before = before.parent
    assert node.value is not None
    return (node.position - (before.position if before is not None else 0)) / node.value.checkpoint.num_bytes


def _next_with_values(node: _Node) -> Iterator[_Node]:
    """The first nodes below it, on every branch, that have a checkpoint."""
    below = list(node.children.values())
    while below:
        child = below.pop()
        if child.value is not None:
            yield child
        else:
            below.extend(child.children.values())


def _path(node: _Node) -> bytes:
    edges = []
    while node.parent is not None:
        edges.append(node.edge)
        node = node.parent
    return b"".join(reversed(edges))
