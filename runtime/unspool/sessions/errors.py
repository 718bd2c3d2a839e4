"""What can go wrong with a session; in each case it is as it was before."""


class SessionError(RuntimeError):
    """A request that a session cannot serve now or ever; the message names the remedy."""


class SessionNotFound(SessionError):
    """There is no such session, snapshot or turn, or it is another owner's: which of these is not told."""


class SessionExists(SessionError):
    """The id is taken."""


class SessionBusy(SessionError):
    """A turn is under way: one writer at a time. Try again when it has ended."""


class SessionConflict(SessionError):
    """The session has moved on from the generation that was expected, or another process wrote to it meanwhile."""

    def __init__(self, expected: int, found: int) -> None:
        super().__init__(f"generation: the session is at {found}, not at {expected}; read it again")
        self.expected = expected
        self.found = found


class SessionMismatch(SessionError):
    """The session's tokens mean something else to this model."""


class TurnFailed(SessionError):
    """The turn was cancelled, expired or could not be computed. Nothing of it was kept."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ImportRejected(ValueError):
    """The bytes are no export that may be imported here; the message says why."""
