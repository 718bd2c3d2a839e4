"""How many prompt tokens to read between two decode steps."""

SMALLEST = 16
MULTIPLE = 8
WEIGHT = 0.2
"""Of the newest measurement in the running averages."""


class PrefillBudget:
    """Fits what reading costs, so that those that decode get a token about every `interval` seconds.

    A step's time is taken to be that of the decode step alone and a constant for every prompt token read beside it;
    both are running averages. At least `SMALLEST` tokens are read, so that prompts get on whatever a step costs.
    """

    def __init__(self, largest: int, interval: float) -> None:
        self._largest = largest
        self._interval = interval
        self._step_seconds: float | None = None
        self._token_seconds: float | None = None

    def tokens(self, decoding: int) -> int:
        """Prompt tokens for the next step, beside so many sequences that decode."""
        if not decoding:
            return self._largest
        if self._token_seconds is None:
            return min(SMALLEST, self._largest)
        spare = max(0.0, self._interval - (self._step_seconds or 0.0))
        fitting = int(spare / self._token_seconds) // MULTIPLE * MULTIPLE
        return min(max(fitting, SMALLEST), self._largest)

    def observe(self, decoding: int, read: int, seconds: float) -> None:
        """What a step took."""
        if not read:
            self._step_seconds = _average(self._step_seconds, seconds)
            return
        beside = (self._step_seconds or 0.0) if decoding else 0.0
        self._token_seconds = _average(self._token_seconds, max(seconds - beside, 0.1 * seconds) / read)


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
