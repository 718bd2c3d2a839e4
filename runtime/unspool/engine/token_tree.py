"""A radix tree over token sequences. Knows no state: its nodes carry whatever is put there."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from unspool.token_bytes import TOKEN_BYTES

Value = TypeVar("Value")


def common_bytes(first: bytes, second: bytes) -> int:
    """Bytes of the tokens with which both begin."""
    low, high = 0, min(len(first), len(second)) // TOKEN_BYTES
    while low < high:  # memory is compared faster than tokens are walked through
        middle = (low + high + 1) // 2
        if first[low * TOKEN_BYTES : middle * TOKEN_BYTES] == second[low * TOKEN_BYTES : middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low * TOKEN_BYTES


@dataclass(eq=False)
class TokenNode(Generic[Value]):
    """The place where a sequence of tokens ends; `edge` are its bytes since the parent's."""

    edge: bytes = b""
    parent: "TokenNode[Value] | None" = None
    children: dict[bytes, "TokenNode[Value]"] = field(default_factory=dict)
    """By their edge's first token."""
    value: Value | None = None
    end: int = 0
    """Bytes from the root to here."""

    @property
    def position(self) -> int:
        """Tokens from the root to here."""
        return self.end // TOKEN_BYTES


class TokenTree(Generic[Value]):
    """Token sequences as bytes, four a token."""

    def __init__(self) -> None:
        self.root: TokenNode[Value] = TokenNode()

    @property
    def is_empty(self) -> bool:
        return not self.root.children

    def walk(self, tokens: bytes) -> tuple[list[TokenNode[Value]], int]:
        """The nodes that lie on the way along `tokens`, and how many tokens anything in the tree shares with it."""
        node = self.root
        path: list[TokenNode[Value]] = []
        while child := node.children.get(tokens[node.end : node.end + TOKEN_BYTES]):
            shared = common_bytes(child.edge, tokens[node.end :])
            if shared < len(child.edge):
                return path, (node.end + shared) // TOKEN_BYTES
            path.append(child)
            node = child
        return path, node.position

    def insert(self, tokens: bytes) -> TokenNode[Value]:
        """The node where `tokens` end; it may have a value already."""
        node = self.root
        while node.end < len(tokens):
            first = tokens[node.end : node.end + TOKEN_BYTES]
            child = node.children.get(first)
            if child is None:
                child = TokenNode(edge=tokens[node.end :], parent=node, end=len(tokens))
                node.children[first] = child
                return child
            shared = common_bytes(child.edge, tokens[node.end :])
            node = child if shared == len(child.edge) else _split(child, shared)
        return node

    def prune(self, node: TokenNode[Value]) -> None:
        """Removes a node that no value needs any more, and what was there only for it."""
        while node.parent is not None and node.value is None and not node.children:
            del node.parent.children[node.edge[:TOKEN_BYTES]]
            node = node.parent
        if node.parent is not None and node.value is None and len(node.children) == 1:
            _join(node)

    def with_values(self) -> Iterator[TokenNode[Value]]:
        nodes = [self.root]
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            if node.value is not None:
                yield node


def _split(child: TokenNode[Value], at: int) -> TokenNode[Value]:
    """Puts a node into the edge that leads to `child`, so many bytes after its parent."""
    parent = child.parent
    assert parent is not None
    middle = TokenNode(edge=child.edge[:at], parent=parent, end=parent.end + at)
    parent.children[middle.edge[:TOKEN_BYTES]] = middle
    child.edge, child.parent = child.edge[at:], middle
    middle.children[child.edge[:TOKEN_BYTES]] = child
    return middle


def _join(node: TokenNode[Value]) -> None:
    """Takes a node out of the way to its only child."""
    assert node.parent is not None
    (child,) = node.children.values()
    child.edge, child.parent = node.edge + child.edge, node.parent
    node.parent.children[child.edge[:TOKEN_BYTES]] = child
