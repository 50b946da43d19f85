"""Is a generated text the answer? Measures of agreement, from strict to lenient.

Each takes the generated text and one reference answer.
"""

import re
import string
import unicodedata
from decimal import Decimal

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# a minus belongs to the number unless it stands between two things, as in 3-4
_NUMBER = re.compile(r"(?:(?<![\w.)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def exact(text: str, answer: str) -> bool:
    """Equal but for white space around.

    >>> exact(" Paris", "Paris"), exact("Paris.", "Paris")
    (True, False)
    """
    return text.strip() == answer.strip()


def normal_form(text: str) -> str:
    """Lower case without punctuation, articles and surplus white space.

    Source: the evaluation of SQuAD, arXiv 1606.05250; with Unicode's NFKC before it.

    >>> normal_form("The  Eiffel-Tower, a tower.")
    'eiffeltower tower'
    """
    text = unicodedata.normalize("NFKC", text).lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", text).split())


def normalised(text: str, answer: str) -> bool:
    """Equal in normal form.

    >>> normalised("The Seine.", "seine")
    True
    """
    return normal_form(text) == normal_form(answer)


def contains(text: str, answer: str) -> bool:
    """The words of the answer stand in the text, in order and together.

    >>> contains("It is the river Seine, I think.", "Seine"), contains("scare", "car")
    (True, False)
    """
    wanted = normal_form(answer)
    return bool(wanted) and f" {wanted} " in f" {normal_form(text)} "


def number(text: str) -> Decimal | None:
    """The last number in a text; None where there is none.

    >>> number("so 3 * 1,200 = $3,600.00."), number("3-4"), number("minus -4%")
    (Decimal('3600.00'), Decimal('4'), Decimal('-4'))
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def last_number(text: str, answer: str) -> bool:
    """The last number of the text equals the last number of the answer.

    Source: how GSM8K is scored, arXiv 2110.14168; its answers end in `#### 18`.

    >>> last_number("That makes 18.0 dollars.", "9 * 2 = 18 #### 18")
    True
    """
    wanted = number(answer)
    return wanted is not None and number(text) == wanted
