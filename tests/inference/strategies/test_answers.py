from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, strategies

from llmcore.inference.strategies import EXTRACTORS, extract_answer, normalize
from llmcore.inference.strategies.answers import MAX_DIGITS, parse_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{3}{4}}", "3/4"),
        (r"first \boxed{1}, then \boxed{ 2 }.", "2"),
        (r"\boxed{a{b}c} and", "a{b}c"),
        (r"\boxed{2} but \boxed{3", "2"),  # the last whose braces balance
        (r"\boxed{\text{Yes}}", "yes"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234.50 apples", "2469/2"),
        ("#### not sure", "not sure"),
        ("The answer is 12. No, the answer is 13.", "13"),
        ("Answer: $5.00 for 3 tickets", "5"),
        ("The final answer is: **18**", "18"),
        ("The answer is Paris. It is large.", "paris"),
        ("the answer is 3/4", "3/4"),
        (r"The answer is \frac{1}{2}", "1/2"),
        ("He has 3 and 4, so 3 + 4 = 7.", "7"),
        ("5-3", "3"),
        ("it is -$7", "-7"),
        ("-3.50 degrees", "-7/2"),
        ("1e999999999", "1e999999999"),  # at once, too
        ("1.5e3", "1500"),
        ("10/4", "5/2"),
        ("50\\%", "50"),
        ("only words", None),
        ("", None),
        (r"\boxed{}", None),
        ("the answer is", None),
    ],
)
def test_extract(text, answer):
    assert extract_answer(text) == answer


def test_ways_to_find():
    text = "There are 3. The answer is 4.\n#### 5\n\\boxed{6} and 7"
    found = {how: extract_answer(text, how) for how in EXTRACTORS}
    assert found == {
        "auto": "6", "boxed": "6", "hashes": "5", "phrase": "4", "number": "7", "text": normalize(text),
    }  # fmt: skip
    assert extract_answer("  Blue   Whale. ", "text") == "blue whale"


@given(strategies.integers(-(10**12), 10**12), strategies.integers(0, 6))
def test_equal_numbers_are_equal(number, places):
    value = Fraction(number, 10**places)
    digits = f"{abs(number):0{places + 1}d}"
    decimal = ("-" if number < 0 else "") + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)
    whole, _, rest = decimal.partition(".")
    with_commas = f"{int(whole.lstrip('-') or 0):,}" + ("." + rest if rest else "")
    forms = [decimal, decimal + ("0" if places else ".0"), ("-" if number < 0 else "") + "$" + with_commas,
             f"{value.numerator}/{value.denominator}", f"{number}/{10**places}"]  # fmt: skip
    assert {normalize(form) for form in forms} == {str(value)}
    if "/" not in str(value) and "e" not in decimal:
        assert extract_answer(f"So we get {decimal}.") == str(value)


@given(strategies.text(alphabet="\\boxed{}answer is:#0123456789.,/-+eE$% \nfrac", max_size=200))
def test_any_text(text):
    for how in EXTRACTORS:
        answer = extract_answer(text, how)
        assert answer is None or (answer and normalize(answer) is not None)


def test_many_open_braces():
    """In one pass, not one for each."""
    assert extract_answer("\\boxed{" * 100_000, "boxed") is None
    assert extract_answer("\\boxed{" * 100_000 + "7}", "boxed") == "7"


def test_huge_numbers_are_text():
    assert parse_number("1" * (MAX_DIGITS + 1)) is None
    assert parse_number("1e65") is None
    assert parse_number("1e64") == 10**64
    assert parse_number("1/0") is None
