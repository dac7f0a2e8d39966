"""The answer in a text, in a form in which equal answers are equal."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

MAX_DIGITS = 64  # of a number, and its largest exponent; one beyond that is text, for 10 ** 10 ** 9 takes for ever

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?"  # 1,234.5
    r"(?:[eE][-+]?\d+\b|\s?/\s?\d+)?"  # e3 or /2
)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_PHRASE = re.compile(r"\banswer(?:\s+is|\s*:)[ \t]*:?\s*", re.IGNORECASE)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")
_PLAIN = re.compile(r"([-+]?)(\d*)(?:\.(\d*))?(?:[eE]([-+]?\d+)|/(\d+))?")


def normalize(answer: str) -> str:
    """An answer in its usual form: numbers as lowest fractions ("1,234.50" and "2469/2" are "2469/2"), without currency
    and percent signs; other text in lower case, without the full stop at its end and with single spaces."""
    text = _plain(answer.strip())
    text = _WRAPPED.sub(r"\1", text)
    text = re.sub(r"\\[,;! ]|\\left|\\right", "", text)
    text = text.replace("\\$", "$").replace("\\%", "%").replace("−", "-").strip("*$ \t\n`\"'").rstrip(".,;:!")
    value = parse_number(text)
    return " ".join(text.lower().split()) if value is None else str(value)


def parse_number(text: str) -> Fraction | None:
    """The number that a text is: whole, decimal (maybe with an exponent) or a fraction, maybe with thousands separators
    and signs of currency or percent; None for other text, a division by 0, and more than MAX_DIGITS digits."""
    text = re.sub(r"[\s$€£%]", "", text)
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text):
        text = text.replace(",", "")
    match = _PLAIN.fullmatch(text)
    if match is None or len(text) > MAX_DIGITS:
        return None
    sign, before, after, exponent, divisor = match.groups()
    before, after, exponent, divisor = before or "", after or "", int(exponent or 0), int(divisor or 1)
    if not before + after or divisor == 0 or abs(exponent) > MAX_DIGITS:
        return None
    value = Fraction(int(before + after), 10 ** len(after) * divisor) * Fraction(10) ** exponent
    return -value if sign == "-" else value


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds whose braces balance."""
    closed_at: dict[int, int] = {}
    opened: list[int] = []
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closed_at[opened.pop()] = brace.start()
    whole = [m.end() for m in re.finditer(r"\\boxed\s*(?=\{)", text) if m.end() in closed_at]
    return text[whole[-1] + 1 : closed_at[whole[-1]]] if whole else None


def hashes(text: str) -> str | None:
    """What follows the last "####", as in GSM8K (arXiv 2110.14168): the number there, or the line's rest."""
    found = _HASHES.findall(text)
    if not found:
        return None
    number = _NUMBER.match(found[-1])
    return number[0] if number else found[-1]


def phrase(text: str) -> str | None:
    """What follows the last "the answer is" or "Answer:": its first number, or the sentence's rest."""
    begins = [match.end() for match in _PHRASE.finditer(text)]
    if not begins:
        return None
    rest = _plain(text[begins[-1] :].split("\n", 1)[0])
    number = _NUMBER.search(rest)
    return number[0] if number else re.split(r"[.!?](?:\s|$)", rest)[0]


def last_number(text: str) -> str | None:
    found = _NUMBER.findall(_plain(text))
    return found[-1] if found else None


def _plain(text: str) -> str:
    """With fractions on one line."""
    return _FRACTION.sub(r"\1/\2", text)


def auto(text: str) -> str | None:
    r"""The first that there is of: \boxed{...}, "#### ...", "the answer is ...", the last number."""
    for find in (boxed, hashes, phrase, last_number):
        if (found := find(text)) is not None and found.strip():
            return found
    return None


def _normalized(find: Callable[[str], str | None]) -> Callable[[str], str | None]:
    def extract(text: str) -> str | None:
        found = find(text)
        return (normalize(found) or None) if found is not None else None

    extract.__doc__ = find.__doc__
    return extract


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "auto": _normalized(auto),
    "boxed": _normalized(boxed),
    "hashes": _normalized(hashes),
    "phrase": _normalized(phrase),
    "number": _normalized(last_number),
    "text": _normalized(lambda text: text),
}


def extract_answer(text: str, how: str = "auto") -> str | None:
    """The normalised answer in a text; None when there is none."""
    return EXTRACTORS[how](text)
