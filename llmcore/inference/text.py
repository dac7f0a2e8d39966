"""From tokens to text as they come: characters whose bytes are not all there and strings that may be the start of a stop
string wait."""

from __future__ import annotations

from collections.abc import Sequence

from llmcore.tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"  # what bytes that are no UTF-8 yet are shown as


class TextStream:
    """The text of one sequence: `feed` each token, show what it gives; `finish` gives what still waits.

    Special tokens are no text. After a stop string `stopped` is True and no text follows; the string is left out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._begin = self._shown = 0  # ids from _begin on are decoded, since a token's text depends on those before it
        self._waiting = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        before = self._decode(self._begin, self._shown)
        now = self._decode(self._begin, len(self._ids))
        if now.endswith(_INCOMPLETE) and len(self._ids) - self._shown < 8:  # more would be bytes that never fit
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return self._hold_back(now[len(before) :])

    def finish(self) -> str:
        """The text that waits."""
        if self.stopped:
            return ""
        rest = self._decode(self._begin, len(self._ids))[len(self._decode(self._begin, self._shown)) :]
        self._begin = self._shown = len(self._ids)
        text = self._hold_back(rest) + self._waiting
        self._waiting = ""
        return text

    def _decode(self, begin: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True)

    def _hold_back(self, new: str) -> str:
        """Of all text that waits, what can be no part of a stop string."""
        if self.stopped:
            return ""
        text = self._waiting + new
        if found := [at for at in map(text.find, self._stop) if at >= 0]:
            self.stopped, self._waiting = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
