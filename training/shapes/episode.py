"""Episodes: what a user asks for and one right answer, as turns of texts, thoughts and frames.

The sampler of a task makes episodes, its checker marks answers. A checker is given `Episode.meaning` (what the prompt
says and shows) and what was answered; it never sees `Episode.turns`, where the right answer stands.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .checker import ReadScene, read_scenes
from .scene import Frame


@dataclass(frozen=True)
class GlobalThought:
    """The thought that opens an answer, for example the plan of a `howto`."""

    text: str


@dataclass(frozen=True)
class ImageThought:
    """The thought before one image."""

    text: str


Piece = str | Frame | GlobalThought | ImageThought
"""Plain text (no white space at its ends), a picture, or a thought."""

Said = str | np.ndarray | GlobalThought | ImageThought | None
"""A piece of an answer to be marked.  Pictures are uint8 `(IMAGE_SIZE, IMAGE_SIZE, 3)`; `None` is one that is damaged
or of another size."""


@dataclass(frozen=True)
class Turn:
    """What one side says: `role` is "user" or "assistant"."""

    role: str
    content: tuple[Piece, ...]

    @property
    def frames(self) -> tuple[Frame, ...]:
        return tuple(piece for piece in self.content if isinstance(piece, Frame))


@dataclass(frozen=True)
class Episode:
    """One conversation.

    Attributes:
        task (`str`): whose prompt it has: "x2i", "story", "howto", "explore", "vla", "vqa", "chat".
        kind (`str`): for results by kind, for example "recolor" of an edit.
        turns (`tuple[Turn, ...]`): user and assistant by turns, the user first; every assistant turn is right.
        meaning: what the prompts say and show; all that the checker is given.
    """

    task: str
    kind: str
    turns: tuple[Turn, ...]
    meaning: Any

    @property
    def answers(self) -> tuple[Turn, ...]:
        """The right answers, one for each turn of the user."""
        return self.turns[1::2]


def up_to(difficulty: float, least: int, most: int) -> int:
    """`least` at the smallest difficulty to `most` at 1.

    Raises:
        ValueError: if `difficulty` is not in `(0, 1]`.
    """
    if not 0 < difficulty <= 1:
        raise ValueError(f"`difficulty` must be in (0, 1], got {difficulty!r}.")
    return least + int((most - least) * difficulty + 0.5)


def read_told(answers: Sequence[Sequence[Said]]) -> tuple[list[tuple[str, ReadScene]], str]:
    """The pictures of an answer, each with the text since the one before, and the text after the last.

    Thoughts are left out. A damaged picture shows nothing: no object and no background.
    """
    told, texts = [], []
    for piece in itertools.chain.from_iterable(answers):
        if piece is None or isinstance(piece, np.ndarray):
            told.append((" ".join(texts), piece))
            texts = []
        elif isinstance(piece, str) and piece:
            texts.append(piece)
    pixels = [piece for _, piece in told if piece is not None]
    seen = iter(read_scenes(np.stack(pixels)) if pixels else ())
    return [(text, ReadScene((), None) if piece is None else next(seen)) for text, piece in told], " ".join(texts)
