"""What the last number of a text is, and when two are the same."""

from __future__ import annotations

from fractions import Fraction

import pytest

from rlhf_lightning.rewards.checkers import exact_answer
from rlhf_lightning.rewards.numbers import last_number

VALUES: dict[str, Fraction | float | str | None] = {
    # signs
    "the answer is -5": -5, "the answer is −5": -5, "it is –5 degrees": -5, "-$5": -5, "$-5": -5, "+7": 7,
    "10-3=7": 7, "10 - 3": 3, "(2)-3": 3, "x = -.5": -0.5, "the answer—5": 5,
    # separators, decimals, the end of a sentence
    "1,234,567.50": Fraction("1234567.5"), "-1,234": -1234, "1\u202f234\u202f567": 1234567, "1{,}234": 1234, "1, 2, 3": 3,
    "1,2,3": 3, "It is 1,000.": 1000, "It is 18.": 18, "0.50": 0.5, ".5": 0.5, "3,5": 5, "1,2345": 2345, "18.00": 18,
    # exponents
    "1e5": 100_000, "1.5e-3": Fraction(15, 10_000), "2E+2": 200, "3 x 10^4": 30_000, "3×10⁴": 30_000, "1.2 * 10^{-1}": 0.12,
    r"3 \times 10^{8}": 300_000_000, "2^10": 1024, "10⁻²": Fraction(1, 100), "0^-1": "0^-1", "1e999999999": "1e999999999",
    "-2^2": -4,
    # fractions
    "3/4": 0.75, "-3/4": -0.75, "1 3/4": 1.75, "½": 0.5, "1½": 1.5, "-½": -0.5, r"\frac{3}{4}": 0.75,
    r"-\frac{3}{4}": -0.75, r"1\frac{1}{2}": 1.5, r"\boxed{\dfrac{1}{3}}": Fraction(1, 3), "3/0": "3/0", "60 km/h": 60,
    # what is not one number
    "3-5": "3-5", "between 3 and 5": 5, "2024-03-05": "2024-03-05", "03/05/2024": "03/05/2024", "5.3.2024": "5.3.2024",
    "10:30": "10:30", "version 1.2.3": "1.2.3", "3–5 apples": "3-5",
    # units
    "5 apples": 5, "5kg": 5, "25 m^2": 25, "25 m²": 25, "25 cm2": 25, "9.8 m/s^2": 9.8, "9.8 m s^{-2}": 9.8, "2nd": 2,
    "CO2": None, "12 g of H2O": 12, "100°": 100, "50%": 50, r"50\%": 50, "50 percent": 50, "Rs.500": 500, "答案是5": 5,
    "no number": None, "": None, "９": 9, "#### 42": 42, r"\boxed{-42}": -42, "9" * 500: "9" * 500,
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_the_last_number(text: str) -> None:
    found, expected = last_number(text), VALUES[text]
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found.value == (expected if isinstance(expected, str) else Fraction(str(expected)))


SAME = [("50%", "50"), ("50%", "0.5"), ("0.5", "50%"), ("1/2", "0.5"), ("1e3", "1,000"), ("3-5", "3–5"), ("7.0", "7")]
DIFFERENT = [
    ("5", "3-5"), ("5", "2024-03-05"), ("0.5", "50"), ("5", "-5"), ("0.33", "1/3"), ("1234", "1.234"), ("30", "10:30"),
    ("50%", "5000%"), ("2", "25 m^2"), ("5", "no idea"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "response"), SAME)
def test_equal_answers(answer: str, response: str) -> None:
    assert exact_answer(["?"], [response], [{"answer": answer}]) == [1.0]


@pytest.mark.parametrize(("answer", "response"), DIFFERENT)
def test_different_answers(answer: str, response: str) -> None:
    assert exact_answer(["?"], [response], [{"answer": answer}]) == [0.0]


def test_hostile_texts_take_no_time() -> None:
    for text in (
        "1," * 20_000,
        "1.1" * 20_000,
        "9" * 50_000,
        "1-" * 20_000,
        "1/" * 20_000,
        "1 " * 20_000,
        "^" * 20_000,
    ):
        last_number(text)
