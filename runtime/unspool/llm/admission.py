"""Room in the engine's queue, lent to one request at a time, so that the queue is never full. Knows no request."""

import threading
from collections import deque
from concurrent.futures import Future


class Admission:
    """Lends `room` places in the order in which they were asked for. Thread-safe."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._waiting: deque[Future[None]] = deque()
        self._changing = threading.Lock()

    def ask(self) -> Future[None]:
        """A place is lent when this is done. Who wants none any more cancels it or, when that is too late, releases."""
        place: Future[None] = Future()
        with self._changing:
            if self._room == 0:
                self._waiting.append(place)
                return place
            self._room -= 1
        place.set_running_or_notify_cancel()
        place.set_result(None)
        return place

    def release(self) -> None:
        """Gives a place back, or on to who waits for one."""
        with self._changing:
            next_place = self._next()
            if next_place is None:
                self._room += 1
                return
        next_place.set_result(None)

    def abandon(self, place: Future[None]) -> None:
        """For who has asked and will not use the place."""
        if not place.cancel():
            self.release()

    def _next(self) -> Future[None] | None:
        """Who is to have a place; those that have been cancelled are passed over."""
        while self._waiting:
            place = self._waiting.popleft()
            if place.set_running_or_notify_cancel():
                return place
        return None
