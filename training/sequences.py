"""What the language model reads: scenes written as token sequences, and which of their tokens it learns to predict.

    kind            stage          sequence (bold: learnt)
    text            pre-training   BOS **caption EOS**
    text_answers    pre-training   BOS description (question **answer**)... **EOS**
    image           pre-training   BOS **image EOS**
    caption_image   alignment      BOS caption **image EOS**
    image_caption   alignment      BOS image **description EOS**
    image_answers   alignment      BOS image (question **answer**)... **EOS**
    t2i             instruction    prompt(caption) **image ESS EOS**, or the unconditional prompt
    vqa             instruction    prompt(image, question) **answer ESS EOS**
    describe        instruction    prompt(image, request) **description ESS EOS**

What is given (captions before images, questions, images of the user) is not learnt: its entropy is the world's, and
predicting it would only cost capacity. A description is canonical, so all of it follows from the image.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from emu35.configuration_emu35 import Emu35TokenLayout
from emu35.prompts_emu35 import Conversation, ImagePiece, Piece, Turn, get_template, unconditional_pieces
from transformers import PreTrainedTokenizerFast

from .layouts import typical_layout
from .recipe import DataRecipe, StageRecipe
from .shapes import IMAGE_SIZE, Scene, caption, describe, describe_text, sample_question, sample_scene

IGNORED = -100
"""Label of a token that is not learnt."""
MAX_ANSWERS = 6
"""Most questions of a `text_answers` or `image_answers` sequence."""


@dataclass
class TokenSequence:
    """Ids, labels and the scenes of the images in order; visual tokens are placeholders until images are encoded."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)

    def add(self, ids: list[int], learn: bool):
        self.input_ids += ids
        self.labels += ids if learn else [IGNORED] * len(ids)

    def __len__(self) -> int:
        return len(self.input_ids)


class SequenceWriter:
    """Draws scenes and writes them down.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): see [`~emu35.tokenization_emu35.train_small_tokenizer`].
        layout ([`Emu35TokenLayout`]): which id means what.
        recipe ([`DataRecipe`]): how scenes and captions are drawn.
        factor (`int`): pixels a side of one visual code.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, layout: Emu35TokenLayout, recipe: DataRecipe, factor: int):
        self.layout = layout
        self.full_captions, self.caption_dropout = recipe.full_captions, recipe.caption_dropout
        self.typical_layouts = False
        self._encode = tokenizer.backend_tokenizer.encode
        side = IMAGE_SIZE // factor
        self._image = layout.image_token_ids([[layout.image_placeholder_token_id] * side] * side)
        self._objects = np.cumsum(recipe.objects) / sum(recipe.objects)
        self._start, self._end = [layout.bos_token_id], [layout.eos_token_id]
        self._answer_end = [layout.ess_token_id, layout.eos_token_id]

    def for_stage(self, stage: StageRecipe) -> "SequenceWriter":
        """The same writer, but with captions as a stage wants them."""
        writer = copy.copy(self)
        writer.typical_layouts = stage.typical_layouts
        if stage.full_captions is not None:
            writer.full_captions = stage.full_captions
        return writer

    def draw(self, kind: str, rng: np.random.Generator) -> TokenSequence:
        """One sequence about a fresh scene, without held-out combinations."""
        scene = sample_scene(rng, 1 + int(np.searchsorted(self._objects, rng.random(), side="right")), held_out=False)
        sequence = TokenSequence()
        KINDS[kind](self, sequence, scene, rng)
        return sequence

    def text_ids(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False).ids

    def _add_text(self, sequence: TokenSequence, text: str, learn: bool):
        sequence.add(self.text_ids(text), learn)

    def _add_image(self, sequence: TokenSequence, scene: Scene, learn: bool):
        sequence.add(self._image, learn)
        sequence.scenes.append(scene)

    def _caption(self, scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
        """A caption and the scene to draw for it."""
        drawn = caption(scene, rng, full=bool(rng.random() < self.full_captions))
        return drawn.text, typical_layout(scene, drawn.meaning, rng) if self.typical_layouts else scene

    # ------------------------------------------------------------------------------------------ single modality

    def _text(self, sequence: TokenSequence, scene: Scene, rng: np.random.Generator):
        sequence.add(self._start, False)
        self._add_text(sequence, f" {self._caption(scene, rng)[0]}", True)
        sequence.add(self._end, True)

    def _text_answers(self, sequence: TokenSequence, scene: Scene, rng: np.random.Generator):
        sequence.add(self._start, False)
        self._add_text(sequence, f" {caption(scene, rng, full=True).text}", False)
        self._add_answers(sequence, scene, rng)

    def _image_only(self, sequence: TokenSequence, scene: Scene, rng: np.random.Generator):
        sequence.add(self._start, False)
        self._add_image(sequence, scene, True)
        sequence.add(self._end, True)

    # ------------------------------------------------------------------------------------------------ alignment

    def _caption_image(self, sequence: TokenSequence, scene: Scene, rng: np.random.Generator):
        sequence.add(self._start, False)
        text, scene = self._caption(scene, rng)
        self._add_text(sequence, f" {text}", False)
        self._add_image(sequence, scene, True)
        sequence.add(self._end, True)

    def _image_caption(self, sequence: TokenSequence, scene: Scene, rng: np.random.Generator):
        sequence.add(self._start, False)
        self._add_image(sequence, scene, False)
        self._add_text(sequence, f" {describe_text(scene)}", True)
        sequence.add(self._end, True)

    def _image_answers(self, sequence: TokenSequence, scene: Scene, rng: np.random.Generator):
        sequence.add(self._start, False)
        self._add_image(sequence, scene, False)
        self._add_answers(sequence, scene, rng)

    def _add_answers(self, sequence: TokenSequence, scene: Scene, rng: np.random.Generator):
        for _ in range(int(rng.integers(MAX_ANSWERS // 2, MAX_ANSWERS + 1))):
            question = sample_question(scene, rng)
            self._add_text(sequence, f" {question.text}", False)
            self._add_text(sequence, f" {question.answer}", True)
        sequence.add(self._end, True)

    # ---------------------------------------------------------------------------------------------- instruction

    def _t2i(self, sequence: TokenSequence, scene: Scene, rng: np.random.Generator):
        text, scene = self._caption(scene, rng)
        if rng.random() < self.caption_dropout:
            self._add_prompt(sequence, unconditional_pieces(self.layout), scene)
        else:
            self._add_prompt(sequence, self._pieces("t2i", [text]), scene)
        self._add_image(sequence, scene, True)
        sequence.add(self._answer_end, True)

    def _ask(self, sequence: TokenSequence, scene: Scene, text: str, answer: str):
        self._add_prompt(sequence, self._pieces("vqa", [ImagePiece(), text]), scene)
        self._add_text(sequence, answer, True)
        sequence.add(self._answer_end, True)

    def _pieces(self, task: str, content: list[Piece]) -> list[Piece]:
        turn = Conversation([Turn("user", content)])
        return turn.pieces(get_template(task), self.layout, assistant_next=True)[0]

    def _add_prompt(self, sequence: TokenSequence, pieces: list[Piece], scene: Scene):
        """The pieces as ids; neighbouring text is joined first, as the processor does."""
        for is_text, group in itertools.groupby(pieces, key=lambda piece: isinstance(piece, str)):
            if is_text:
                self._add_text(sequence, "".join(group), False)
                continue
            for piece in group:
                if isinstance(piece, ImagePiece):
                    self._add_image(sequence, scene, False)
                else:
                    sequence.add([piece], False)

    def _vqa(self, sequence: TokenSequence, scene: Scene, rng: np.random.Generator):
        question = sample_question(scene, rng)
        self._ask(sequence, scene, question.text, question.answer)

    def _describe(self, sequence: TokenSequence, scene: Scene, rng: np.random.Generator):
        request = describe(scene, rng)
        self._ask(sequence, scene, request.text, request.answer)


KINDS: dict[str, Callable[[SequenceWriter, TokenSequence, Scene, np.random.Generator], None]] = {
    "text": SequenceWriter._text,
    "text_answers": SequenceWriter._text_answers,
    "image": SequenceWriter._image_only,
    "caption_image": SequenceWriter._caption_image,
    "image_caption": SequenceWriter._image_caption,
    "image_answers": SequenceWriter._image_answers,
    "t2i": SequenceWriter._t2i,
    "vqa": SequenceWriter._vqa,
    "describe": SequenceWriter._describe,
}
"""Kind of sequence -> how it is written (see the table at the top)."""


def sample_texts(number: int, seed: int = 0) -> list[str]:
    """Captions, questions, answers and prompts of training scenes, for the tokenizer."""
    rng = np.random.default_rng((seed, 1))
    texts = []
    for _ in range(number):
        scene = sample_scene(rng, held_out=False)
        question, request = sample_question(scene, rng), describe(scene, rng)
        texts.append(f"{get_template('t2i').system} USER: {caption(scene, rng).text} ASSISTANT: ")
        texts += [f" {question.text} {question.answer}", question.answer, f" {request.text}", request.answer]
    return texts
