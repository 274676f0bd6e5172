"""What the language model reads: scenes written as token sequences, and which of their tokens it learns to predict.

    kind            stage          sequence (bold: learnt)
    text            pre-training   BOS **caption EOS**
    text_answers    pre-training   BOS description (question **answer**)... **EOS**
    image           pre-training   BOS **image EOS**
    caption_image   alignment      BOS caption **image EOS**
    image_caption   alignment      BOS image **description EOS**
    image_answers   alignment      BOS image (question **answer**)... **EOS**
    images_answers  alignment      BOS image image [image] (question **answer**)... **EOS**
    t2i             instruction    prompt(caption) **image ESS EOS**, or the unconditional prompt
    vqa             instruction    prompt(image, question) **answer ESS EOS**
    describe        instruction    prompt(image, request) **description ESS EOS**
    x2i, story, howto, explore, vla, multi_vqa, chat
                    instruction    prompt **answer ESS EOS**, perhaps for several turns: see `shapes.EPISODES`

With `caption_dropout` a sequence that makes images has the unconditional prompt, and of its answer only the images:
what the unconditional stream of guidance sees.

What is given (captions before images, questions, images of the user) is not learnt: its entropy is the world's, and
predicting it would only cost capacity. A description is canonical, so all of it follows from the image.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from emu35 import prompts_emu35 as prompts
from emu35.configuration_emu35 import Emu35TokenLayout
from emu35.prompts_emu35 import Conversation, ImagePiece, Piece, get_template, unconditional_pieces
from transformers import PreTrainedTokenizerFast

from .layouts import canonical_scene, typical_layout
from .recipe import DataRecipe, StageRecipe
from .shapes import (
    EPISODES,
    IMAGE_SIZE,
    Episode,
    Frame,
    GlobalThought,
    ImageThought,
    Scene,
    Turn,
    caption,
    describe,
    describe_text,
    sample_question,
    sample_questions_about_images,
    sample_scene,
)

IGNORED = -100
"""Label of a token that is not learnt."""
MAX_ANSWERS = 6
"""Most questions of a `text_answers` or `image_answers` sequence."""


@dataclass
class TokenSequence:
    """Ids, labels and what the images show, in order; visual tokens are placeholders until images are encoded."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)

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
        self.typical_layouts = self.canonical_scenes = False
        self._encode = tokenizer.backend_tokenizer.encode
        side = IMAGE_SIZE // factor
        self._image = layout.image_token_ids([[layout.image_placeholder_token_id] * side] * side)
        self._objects = np.cumsum(recipe.objects) / sum(recipe.objects)
        self._start, self._end = [layout.bos_token_id], [layout.eos_token_id]
        self._answer_end = [layout.ess_token_id, layout.eos_token_id]
        self._mean_lengths: dict[str, float] = {}

    def for_stage(self, stage: StageRecipe) -> "SequenceWriter":
        """The same writer, but with captions as a stage wants them."""
        writer = copy.copy(self)
        writer.typical_layouts, writer.canonical_scenes = stage.typical_layouts, stage.canonical_scenes
        if stage.full_captions is not None:
            writer.full_captions = stage.full_captions
        return writer

    def draw(self, kind: str, rng: np.random.Generator, difficulty: float = 1.0) -> TokenSequence:
        """One sequence about a fresh scene or episode, without held-out combinations.

        Args:
            kind (`str`): a key of `KINDS` or of `shapes.EPISODES`.
            difficulty (`float`): in (0, 1]; of episodes.
        """
        if kind in EPISODES:
            return self.write(EPISODES[kind].sample(rng, held_out=False, difficulty=difficulty), rng)
        scene = sample_scene(rng, 1 + int(np.searchsorted(self._objects, rng.random(), side="right")), held_out=False)
        sequence = TokenSequence()
        KINDS[kind](self, sequence, scene, rng)
        return sequence

    def mean_length(self, kind: str) -> float:
        """Tokens of a sequence of a kind, on average; estimated once, at full difficulty."""
        if kind not in self._mean_lengths:
            rng = np.random.default_rng(0)
            self._mean_lengths[kind] = float(np.mean([len(self.draw(kind, rng)) for _ in range(100)]))
        return self._mean_lengths[kind]

    def text_ids(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False).ids

    def _add_text(self, sequence: TokenSequence, text: str, learn: bool):
        sequence.add(self.text_ids(text), learn)

    def _add_image(self, sequence: TokenSequence, scene: Frame, learn: bool):
        sequence.add(self._image, learn)
        sequence.frames.append(scene)

    def _caption(self, scene: Scene, rng: np.random.Generator) -> tuple[str, Scene]:
        """A caption and the scene to draw for it."""
        drawn = caption(scene, rng, full=bool(rng.random() < self.full_captions))
        if self.canonical_scenes:
            return drawn.text, canonical_scene(drawn.meaning)
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

    def _images_answers(self, sequence: TokenSequence, scene: Scene, rng: np.random.Generator):
        scenes, asked = sample_questions_about_images(rng, MAX_ANSWERS)
        sequence.add(self._start, False)
        for one in scenes:
            self._add_image(sequence, one, False)
        for question, answer in asked:
            self._add_text(sequence, f" {question}", False)
            self._add_text(sequence, f" {answer}", True)
        sequence.add(self._end, True)

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
            self._add_pieces(sequence, unconditional_pieces(self.layout))
        else:
            self._add_pieces(sequence, self._prompt("t2i", [text]))
        self._add_image(sequence, scene, True)
        sequence.add(self._answer_end, True)

    def _ask(self, sequence: TokenSequence, scene: Scene, text: str, answer: str):
        self._add_pieces(sequence, self._prompt("vqa", [ImagePiece(scene), text]))
        self._add_text(sequence, answer, True)
        sequence.add(self._answer_end, True)

    def _prompt(self, task: str, content: list[Piece]) -> list[Piece]:
        turn = Conversation([prompts.Turn("user", content)])
        return turn.pieces(get_template(task), self.layout, assistant_next=True)[0]

    def _add_pieces(self, sequence: TokenSequence, pieces: list[Piece], learnt: list[bool] | None = None):
        """The pieces as ids; neighbouring text is joined first, as the processor does.  Images hold frames."""
        marked = list(zip(pieces, learnt or [False] * len(pieces), strict=True))
        for (is_text, learn), group in itertools.groupby(marked, key=lambda item: (isinstance(item[0], str), item[1])):
            if is_text:
                self._add_text(sequence, "".join(piece for piece, _ in group), learn)
                continue
            for piece, _ in group:
                if isinstance(piece, ImagePiece):
                    self._add_image(sequence, piece.image, learn)
                else:
                    sequence.add([piece], learn)

    def write(self, episode: Episode, rng: np.random.Generator) -> TokenSequence:
        """A whole conversation; all that the assistant says is learnt."""
        sequence = TokenSequence()
        drawing = [index for index, turn in enumerate(episode.turns) if turn.role == "assistant" and turn.frames]
        if drawing and rng.random() < self.caption_dropout:
            self._add_unconditional(sequence, episode.turns[: drawing[int(rng.integers(len(drawing)))] + 1])
        else:
            turns = [prompts.Turn(turn.role, self._pieces(turn)) for turn in episode.turns]
            template = get_template(episode.task)
            self._add_pieces(sequence, *Conversation(turns).pieces(template, self.layout, assistant_next=False))
        return sequence

    def _add_unconditional(self, sequence: TokenSequence, turns: tuple[Turn, ...]):
        """The images of the last turn as the unconditional stream sees them."""
        earlier = [ImagePiece(frame) for turn in turns[:-1] for frame in turn.frames]
        self._add_pieces(sequence, unconditional_pieces(self.layout, earlier))
        for frame in turns[-1].frames:
            self._add_image(sequence, frame, True)

    def _pieces(self, turn: Turn) -> list[Piece]:
        layout, pieces = self.layout, []
        for piece in turn.content:
            if isinstance(piece, Frame):
                pieces.append(ImagePiece(piece))
            elif isinstance(piece, GlobalThought):
                pieces += [layout.bog_token_id, piece.text, layout.eog_token_id]
            elif isinstance(piece, ImageThought):
                pieces += [layout.boc_token_id, piece.text, layout.eoc_token_id]
            else:
                pieces.append(piece)
        return pieces

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
    "images_answers": SequenceWriter._images_answers,
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
