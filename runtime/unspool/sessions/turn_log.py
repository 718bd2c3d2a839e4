"""A session's tokens, read back from its turns."""

from collections.abc import Iterator

from unspool.sessions.head import LogPlace
from unspool.sessions.log_digest import LogDigest
from unspool.sessions.turn import Turn
from unspool.store import Store, StoreCorrupt
from unspool.token_bytes import TOKEN_BYTES


def turn_key(turn: str) -> str:
    return f"turns/{turn}"


class TurnLog:
    """Reads logs of turns that refer to the turn before them. Keeps nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self, turn: str) -> Turn:
        """Raises StoreCorrupt when the record is damaged or missing."""
        key = turn_key(turn)
        data = self._store.get(key)
        if data is None:
            raise StoreCorrupt(
                f"{key}: the record of a turn is missing; restore it from a backup or delete the session"
            )
        return Turn.decode(key, data)

    def back_from(self, place: LogPlace) -> Iterator[tuple[Turn, int]]:
        """The log's turns, the last first, each with the position up to which the log uses it."""
        turn, end = place.turn, place.position
        while turn is not None:
            record = self.read(turn)
            if not record.start < end <= record.end:
                raise StoreCorrupt(f"{turn_key(turn)}: does not fit the turn after it; delete the session")
            yield record, end
            turn, end = record.parent, record.start

    def tokens(self, place: LogPlace, start: int = 0) -> bytes:
        """Tokens [start, place.position), four bytes each."""
        parts = []
        for turn, end in self.back_from(place):
            if end <= start:
                break
            first = max(start - turn.start, 0)
            parts.append(turn.tokens[first * TOKEN_BYTES : (end - turn.start) * TOKEN_BYTES])
        return b"".join(reversed(parts))

    def digest(self, place: LogPlace) -> LogDigest:
        """Of the whole log, from its last turn alone."""
        return LogDigest() if place.turn is None else self.read(place.turn).digest_at(place.position)

    def place_at(self, head: LogPlace, position: int) -> LogPlace | None:
        """Where the log had so many tokens; None when it never had."""
        if position == 0:
            return LogPlace()
        for turn, end in self.back_from(head):
            if turn.start < position <= end:
                return LogPlace(turn.id, position, turn.number)
        return None

    def place_of_turn(self, head: LogPlace, number: int) -> LogPlace | None:
        """Where the log stood after so many turns."""
        if number == 0:
            return LogPlace()
        for turn, end in self.back_from(head):
            if turn.number == number:
                return LogPlace(turn.id, end, number)
        return None
