"""Numbers in text, with signs, separators, exponents, fractions and percent; a range, date or time is one token."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
UNSIGNED = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+"
TOKEN = re.compile(
    rf"""(?<![A-Za-zµ^_\d])(?:                           # digits of H2O, x1 and m^2 are no numbers
      (?P<compound>\d+(?:[.:]\d+){{2,}}                  # 10.12.2024, 1.2.3, 10:30:00
        |\d+:\d+                                         # times and ratios
        |\d{{4}}-\d{{1,2}}-\d{{1,2}}(?!\d)               # dates
        |\d{{1,4}}/\d{{1,2}}/\d{{1,4}}(?!\d)
        |(?:{UNSIGNED})(?:-(?:{UNSIGNED}))+)             # ranges: 3-5
      |(?P<sign>(?:(?<![\w)\]%}}])[-+])?(?:[$€£¥]-?)?)
       (?:(?P<whole>\d+)\s+)?(?P<over>\d+)\s*/\s*(?P<under>\d+)(?!\d|\.\d|/)
      |(?P<sign2>(?:(?<![\w)\]%}}])[-+])?(?:[$€£¥]-?)?)(?P<number>{UNSIGNED})
       (?:[eE](?P<exponent>[-+]?\d+)(?!\w)
         |\s*[×x*]\s*10\s*\^\s*(?P<scale>[-+]?\d+)
         |\^(?P<power>[-+]?\d+))?
    )(?P<percent>\s?(?:%|percent\b))?""",
    re.VERBOSE,
)
LARGEST = 400
"""Digits, and decimal exponents, beyond which a number is compared as text: computing it may take for ever."""


@dataclass(frozen=True)
class Number:
    """A number in a text: its exact value, or as text what is no single number, such as a range or a date."""

    value: Fraction | str
    percent: bool = False

    def matches(self, other: Number) -> bool:
        """Return whether both are the same; 50% is 0.5, and also 50, as "how many percent" is answered."""
        if self.value == other.value:
            return True
        if isinstance(self.value, str) or isinstance(other.value, str) or self.percent == other.percent:
            return False
        return self.value / (100 if self.percent else 1) == other.value / (100 if other.percent else 1)


def last_number(text: str) -> Number | None:
    """Return the last number in a text, or None."""
    last = None
    for last in TOKEN.finditer(plain(text)):  # noqa: B007
        pass
    if last is None:
        return None
    value = last["compound"]
    if value is None and sum(map(str.isdigit, last[0])) <= LARGEST:
        value = fraction(last) if last["over"] else decimal(last)
    return Number(last[0].strip() if value is None else value, bool(last["percent"]))


def plain(text: str) -> str:
    """Return a text whose minus signs, fractions, powers and separators, of Unicode and LaTeX, are those of ASCII."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda match: "^" + match[0].translate(SUPERSCRIPTS), text)
    text = re.sub("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒]", lambda match: " " + unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub(r"(?<=[-+−]) (?=\d+⁄)", "", text)
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", ",", text)
    text = unicodedata.normalize("NFKC", text).translate(str.maketrans("−–‐‑‒⁄∕·", "-----//×"))
    text = re.sub(r"(\d?)\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1 \2/\3", text)
    text = re.sub(r"(?<=[-+]) (?=\d+/)", "", text)
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "").replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"\\(?:times|cdot)\b", "×", text)
    text = re.sub(r"\^\{\s*([-+]?\d+)\s*\}", r"^\1", text)
    return re.sub(r"(?<=[A-Za-zµ])\^[-+]?\d+", "", text)  # of a unit


def fraction(match: re.Match[str]) -> Fraction | None:
    """Return the value of 3/4 or 1 3/4, None where the denominator is 0."""
    if not int(match["under"]):
        return None
    value = int(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"]))
    return -value if "-" in match["sign"] else value


def decimal(match: re.Match[str]) -> Fraction | None:
    """Return the value of 1,234.5, 1.5e-3, 3 × 10^8 or 2^10, None where it is too large to compute."""
    value = Fraction(match["number"].replace(",", ""))
    exponent = int(match["exponent"] or match["scale"] or match["power"] or 0)
    if abs(exponent) > LARGEST or (match["power"] and not value and exponent < 0):
        return None
    value = value**exponent if match["power"] else value * Fraction(10) ** exponent
    return -value if "-" in match["sign2"] else value
