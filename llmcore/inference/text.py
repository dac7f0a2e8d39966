"""From tokens to text as they come: characters whose bytes are not all there wait, and strings that may begin a stop
string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llmcore.tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"  # what bytes that are no UTF-8 yet are shown as
_WINDOW = 16


class TextStream:
    """The text of one sequence: `feed` each token, show what it gives; `finish` gives what still waits.

    Special tokens are no text, but for those in `shown`; without a tokenizer nothing is. After a stop string `stopped`
    is True and no text follows; the string is left out.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = (), shown: Collection[int] = ()) -> None:
        self._tokenizer, self._stop, self._shown = tokenizer, tuple(stop), frozenset(shown)
        self._hidden = frozenset(tokenizer.special_tokens.values()) - self._shown if shown else frozenset()
        # The last tokens, since a token's text depends on those before it; and how much of their text was given. With
        # a byte-level tokenizer only those of a character that has begun.
        self._window: list[int] = []
        self._given = 0
        self._waiting = ""
        self._parts: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was given."""
        return "".join(self._parts)

    def feed(self, token: int, may_stop: bool = True) -> str:
        """The text that this token completes. Without `may_stop` a stop string that it completes is text."""
        if self._tokenizer is None:
            return ""
        text = None if token in self._shown else self._tokenizer.text_of(token)
        if text == "":
            return ""
        if text is not None and not self._window:
            return self._hold_back(text, may_stop)
        self._window.append(token)
        now = self._decode(self._window)
        whole = now.rstrip(_INCOMPLETE)
        new, self._given = whole[self._given :], max(self._given, len(whole))
        if whole == now and self._tokenizer.is_byte_level:
            self._window, self._given = [], 0
        elif whole == now and len(self._window) > _WINDOW:
            self._shorten()
        return self._hold_back(new, may_stop)

    def _shorten(self) -> None:
        """Keeps of the window the last tokens that are whole characters."""
        for count in range(1, 5):  # a character has up to 4 bytes
            text = self._decode(self._window[-count:])
            if _INCOMPLETE not in text:
                self._window, self._given = self._window[-count:], len(text)
                return

    def finish(self) -> str:
        """The text that waits."""
        if self.stopped:
            return ""
        waits = self._hold_back(self._decode(self._window)[self._given :] if self._window else "") + self._waiting
        self._parts.append(self._waiting)
        self._window, self._given, self._waiting = [], 0, ""
        return waits

    def _decode(self, ids: list[int]) -> str:
        if not self._shown:
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        return self._tokenizer.decode([token for token in ids if token not in self._hidden])

    def _hold_back(self, new: str, may_stop: bool = True) -> str:
        """Of all text that waits, what can be no part of a stop string."""
        if self.stopped:
            return ""
        if not self._stop:
            self._parts.append(new)
            return new
        text = self._waiting + new
        found = [at for at in map(text.find, self._stop) if at >= 0] if may_stop else []
        if found:
            self.stopped, self._waiting = True, ""
            text = text[: min(found)]
        else:
            held = max((overlap(text, stop) for stop in self._stop), default=0)
            text, self._waiting = text[: len(text) - held], text[len(text) - held :]
        self._parts.append(text)
        return text


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
