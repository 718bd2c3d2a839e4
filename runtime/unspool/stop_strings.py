"""Finding stop strings in text that arrives in pieces. Knows characters only, no tokens."""

from collections.abc import Sequence

from unspool.requests import InvalidRequest


class StopScanner:
    """Passes text on until a stop string is complete, and holds back what may be the beginning of one.

    The result does not depend on how the text is cut: the stop string that is complete first counts, and of several
    complete at one character the longest. Raises InvalidRequest for an empty stop string.
    """

    found: str | None = None
    """The stop string that ended the text."""

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise InvalidRequest("stop", "stop strings must not be empty")
        self._matchers = [_Matcher(string) for string in stop]
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """The text that is now certain to be before any stop string; "" once one was found.

        Stop strings that end in this text do not count unless it `may_stop`.
        """
        if self.found or not self._matchers:
            return "" if self.found else text
        buffer, seen = self._held + text, len(self._held)
        for character in text:
            seen += 1
            complete = [matcher.string for matcher in self._matchers if matcher.advance(character)]
            if complete and may_stop:
                self.found, self._held = max(complete, key=len), ""
                return buffer[: seen - len(self.found)]
        certain = len(buffer) - max(matcher.matched for matcher in self._matchers)
        self._held = buffer[certain:]
        return buffer[:certain]

    def finish(self) -> str:
        """What was held back, now that no more text will come."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knuth, Morris and Pratt's search for one string, a character at a time."""

    def __init__(self, string: str) -> None:
        self.string = string
        self._borders = _borders(string)
        self.matched = 0
        """Characters at the end of the text that are the string's first ones; the most there are, but not all."""

    def advance(self, character: str) -> bool:
        """Whether the string ends with this character."""
        while self.matched and self.string[self.matched] != character:
            self.matched = self._borders[self.matched - 1]
        self.matched += self.string[self.matched] == character
        ends = self.matched == len(self.string)
        if ends:
            self.matched = self._borders[-1]
        return ends


def _borders(string: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(string)
    length = 0
    for end in range(1, len(string)):
        while length and string[end] != string[length]:
            length = borders[length - 1]
        length += string[end] == string[length]
        borders[end] = length
    return borders
