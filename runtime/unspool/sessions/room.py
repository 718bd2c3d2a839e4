"""Writing to a store that may be full of what it can do without."""

from collections.abc import Callable
from typing import TypeVar

from unspool.store import StoreFull

Result = TypeVar("Result")


def with_room(write: Callable[[], Result], make_room: Callable[[], bool]) -> Result:
    """What `write` returns, tried again each time that `make_room` could give something up. Raises StoreFull when that
    has nothing left."""
    while True:
        try:
            return write()
        except StoreFull:
            if not make_room():
                raise
