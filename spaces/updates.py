"""What a request tells while it is worked on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import PIL.Image
from emu35 import Segments

#: In the `info` of a picture whose making was stopped before its end.
UNFINISHED = "emu35_unfinished"
Stage = Literal["queued", "prompt", "drawing", "writing", "done", "stopped", "error"]


@dataclass(frozen=True)
class Update:
    """How far a request has come.

    Attributes:
        stage (`str`):
            "queued"; "prompt" (reading what was said and shown), "drawing", "writing"; at the end "done", "stopped" or
            "error".
        fraction (`float`, *optional*):
            of the work, 0 to 1, where its end is known; in an answer of text and images, of the image that is drawn.
        seconds (`float`): on the model so far, without the making of previews; 0 while queued.
        remaining (`float`, *optional*): seconds to go, estimated.
        passes (`int`): through the decoder, so far.
        images (`list[PIL.Image.Image]`): made so far; unfinished ones as previews.
        segments (`Segments`): answer of text and images so far; an unfinished image has its preview.
        message (`str`): a sentence for people.
        seed (`int`): that it is made with.
    """

    stage: Stage = "queued"
    fraction: float | None = None
    seconds: float = 0.0
    remaining: float | None = None
    passes: int = 0
    images: Sequence[PIL.Image.Image] = field(default_factory=list, repr=False)
    segments: Segments = field(default_factory=Segments, repr=False)
    message: str = ""
    seed: int = 0

    @property
    def text(self) -> str:
        """What was written, without thoughts."""
        return "".join(segment.text for segment in self.segments if segment.kind == "text").strip()

    @property
    def is_last(self) -> bool:
        return self.stage in ("done", "stopped", "error")


__all__ = ["UNFINISHED", "Stage", "Update"]
