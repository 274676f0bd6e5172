"""Episodes: what a user asks for and one right answer, as turns of texts, thoughts and frames.

The sampler of a task makes episodes, its checker marks answers. A checker is given `Episode.meaning` (what the prompt
says and shows) and what was answered; it never sees `Episode.turns`, where the right answer stands.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

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
