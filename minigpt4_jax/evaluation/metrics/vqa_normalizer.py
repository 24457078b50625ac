"""The answer normalizer of the VQA evaluation (vqaEval.py of the VQA API), with its oddities.

VQA accuracy is defined by this code, so it is reproduced exactly, including what was not intended: a
misplaced argument limits the deletion of periods to 32, and contractions with capital letters never
match because the text is lower-cased first.
"""

import re

PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_NUMBER_WORDS.split())}
MAX_PERIODS = 32  # re.sub gets re.UNICODE, which is 32, as its count

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

# The contractions of vqaEval.py. Most only lost their apostrophe; the others are listed in pairs.
_WITH_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll
that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll
what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's
won't would've wouldn't y'all you'd you'll you're you've
"""
# Two apostrophes: either of them may be missing.
_WITH_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
_OTHERS = {
    "somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've",
}  # fmt: skip


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()} | _OTHERS
    for word in _WITH_TWO_APOSTROPHES.split():
        first, second, third = word.split("'")
        table[f"{first}{second}'{third}"] = table[f"{first}'{second}{third}"] = word
    return table


CONTRACTIONS = _contractions()


def process_punctuation(text: str) -> str:
    """Delete or replace punctuation.

    A mark becomes a space. It is deleted instead if it touches a space anywhere in `text`, and all marks
    are deleted if a comma stands between two digits. Periods are deleted unless a digit follows.
    """
    number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if number or touches_space else " ")
    return _PERIOD.sub("", result, count=MAX_PERIODS)


def process_digits_articles(text: str) -> str:
    """Lower case; number words to digits, without articles, contractions with their apostrophe."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize(text: str) -> str:
    """Both steps, as the VQA evaluation applies them."""
    return process_digits_articles(process_punctuation(text))
