"""The closed vocabulary of captions, questions and answers, and how phrases are put together."""

import numpy as np

from .meaning import Described
from .scene import BACKGROUNDS, COLORS, SHAPES, SIZES

NUMBER_WORDS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The index is the value."""
NUMBERS = NUMBER_WORDS[:4]
"""Those that captions, questions and answers hold."""
NOUNS: dict[str, str | None] = {**{shape: shape for shape in SHAPES}, "object": None}
"""Noun to the shape it says; "object" leaves the shape open."""
PLURALS: dict[str, str] = {noun + ("es" if noun.endswith("s") else "s"): noun for noun in NOUNS}
"""Plural to noun."""
SIZE_WORDS: dict[str, str] = {"small": "small", "tiny": "small", "large": "large", "big": "large"}
"""Word to the size it says."""
PLACES: dict[str, tuple[str, ...]] = {
    "top left": ("in the top left",),
    "top": ("at the top",),
    "top right": ("in the top right",),
    "left": ("on the left",),
    "center": ("in the center", "in the middle"),
    "right": ("on the right",),
    "bottom left": ("in the bottom left",),
    "bottom": ("at the bottom",),
    "bottom right": ("in the bottom right",),
}
"""Position to its phrases, the canonical one first."""
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "above": ("above",),
    "below": ("below",),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
"""Relation to its phrases, the canonical one first."""

_FUNCTION_WORDS = (
    "a an the and on in at to of with it is are there image picture background "
    "describe this what which color shape size where how many or yes no"
)

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            *_FUNCTION_WORDS.split(),
            *(word for phrases in PLACES.values() for phrase in phrases for word in phrase.split()),
            *(word for phrases in RELATION_PHRASES.values() for phrase in phrases for word in phrase.split()),
            *NUMBERS,
            *NOUNS,
            *PLURALS,
            *SIZE_WORDS,
            *SIZES,
            *COLORS,
            *BACKGROUNDS,
        }
    )
)
"""Every word a caption, question or answer may hold, sorted. Punctuation is "," "." and "?"."""


def with_article(phrase: str) -> str:
    """ "a red circle", "an orange circle": the first letter decides, which is enough for this vocabulary."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def noun_phrase(described: Described, size_word: str | None = None, number: int = 1) -> str:
    """Size, colour and noun without an article, e.g. "small red circle" or "red objects"; the position is left out.

    Args:
        described (`Described`): what to say.
        size_word (`str`, *optional*): a word of [`SIZE_WORDS`] in place of the size's own name.
        number (`int`, defaults to 1): more than 1 gives the plural.
    """
    noun = described.shape or "object"
    if number != 1:
        noun = next(plural for plural, singular in PLURALS.items() if singular == noun)
    return " ".join(word for word in (size_word or described.size, described.color, noun) if word)


def choose(rng: np.random.Generator, options):
    """One of the options (a sequence), uniformly. `rng.choice` would turn them into an array."""
    return options[int(rng.integers(len(options)))]
