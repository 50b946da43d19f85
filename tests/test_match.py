"""Matching of answers, on cases where a careless rule goes wrong."""

from decimal import Decimal

import pytest

from collab_jax import match


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no number", None),
        ("He pays $1,234.50, tip included.", "1234.50"),
        ("1,2,3", "3"),
        ("about 12,34", "34"),
        ("x=-7", "-7"),
        ("7 - 3", "3"),
        ("(4)-5", "5"),
        ("in 2024-05", "05"),
        ("3.", "3"),
        ("v1.2.3", "3"),
        ("#### 18", "18"),
        ("10% of 50", "50"),
    ],
)
def test_the_last_number(text, expected):
    assert match.number(text) == (None if expected is None else Decimal(expected))


def test_last_number_compares_values():
    assert match.last_number("It is 5.50", "5.5")
    assert not match.last_number("It is 5.5 and not 6", "5.5")
    assert not match.last_number("", "5")
    assert not match.last_number("no", "none")


def test_contains_wants_whole_words_in_order():
    assert match.contains("In New York!", "new york")
    assert not match.contains("york new", "new york")
    assert not match.contains("anything", "the")  # nothing is left of it


def test_normal_form_folds_widths():
    assert match.normalised("\uff30aris", "paris")
    assert match.normalised("A an the", "")
