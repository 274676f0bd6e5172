"""Episodes played with an oracle: right answers, through tokens and pixels, are marked right."""

import emu35
import numpy as np
import pytest
import torch
from emu35 import Emu35ForConditionalGeneration, Emu35Processor
from emu35.generation_configuration_emu35 import Emu35GenerateOutput
from emu35.training.contact_sheet import episode_sheet
from emu35.training.play import play, said, user_message
from emu35.training.shapes import EPISODES, Frame, GlobalThought, ImageThought, to_image
from PIL import Image


@pytest.fixture(scope="module")
def processor():
    return Emu35Processor.from_pretrained(emu35.TINY)


class Oracle:
    """Answers each turn of the episodes rightly, in place of `generate`."""

    def __init__(self, episodes, processor):
        self.episodes, self.processor, self.number = episodes, processor, 0
        self.model = Emu35ForConditionalGeneration.from_pretrained(emu35.TINY)
        self.generation_config, self.device = self.model.generation_config, self.model.device
        self.modes = []

    def generate(self, input_ids, attention_mask, generation_config, generator=None, **inputs):
        self.modes.append(generation_config.generation_mode)
        layout = self.processor.token_layout
        turns = [episode.answers[self.number] for episode in self.episodes if len(episode.answers) > self.number]
        self.number += 1
        answers, images = [], []
        for turn in turns:
            ids = []
            for piece in turn.content:
                if isinstance(piece, Frame):
                    pixels = torch.from_numpy(np.array(to_image(piece))).permute(2, 0, 1)[None] / 127.5 - 1
                    codes = self.model.vision_tokenizer.encode(pixels)[0] + layout.visual_token_offset
                    ids += layout.image_token_ids(codes.tolist())
                    continue
                text = self.processor.tokenizer(getattr(piece, "text", piece)).input_ids
                around = {
                    GlobalThought: (layout.bog_token_id, layout.eog_token_id),
                    ImageThought: (layout.boc_token_id, layout.eoc_token_id),
                }.get(type(piece))
                ids += text if around is None else [around[0], *text, around[1]]
            answers.append([*ids, layout.ess_token_id, layout.eos_token_id])
            images.append([to_image(frame) for frame in turn.frames])
        longest = max(map(len, answers))
        rows = torch.tensor([answer + [layout.pad_token_id] * (longest - len(answer)) for answer in answers])
        starts = torch.full((len(answers),), input_ids.shape[1])
        return Emu35GenerateOutput(torch.cat([input_ids, rows], 1), starts, images)


def draw(kind, number=12, seed=0):
    rng = np.random.default_rng(seed)
    return [EPISODES[kind].sample(rng) for _ in range(number)]


@pytest.mark.parametrize("kind", EPISODES)
def test_right_answers_are_marked_right(processor, kind):
    episodes = draw(kind)
    played = play(oracle := Oracle(episodes, processor), processor, episodes)
    for episode, answers in zip(episodes, played, strict=True):
        marks = EPISODES[kind].check(episode.meaning, [[said(piece) for piece in answer] for answer in answers])
        assert all(value in (None, True, 1.0) for value in marks.values()), (episode, marks)
    assert set(oracle.modes) == {{"x2i": "image", "multi_vqa": "text"}.get(kind, "interleaved")}


def test_later_turns_see_the_model_s_own_answers(processor, monkeypatch):
    """A wrong picture made in the first turn stands in the prompt of the second."""
    episode = next(one for one in draw("explore", 50) if one.kind == "interactive" and len(one.turns) >= 4)
    oracle, prompts = Oracle([episode], processor), []
    answer = oracle.generate

    def generate(input_ids, **inputs):
        prompts.append(input_ids[0].tolist())
        output = answer(input_ids, **inputs)
        layout = processor.token_layout
        visual = (output.sequences >= layout.visual_token_offset) & (
            torch.arange(output.sequences.shape[1]) >= output.answer_start[0]
        )
        output.sequences[visual] = layout.visual_token_offset + 7
        return output

    monkeypatch.setattr(oracle, "generate", generate)
    play(oracle, processor, [episode])
    seven = processor.token_layout.visual_token_offset + 7
    assert prompts[1].count(seven) >= 36 > prompts[0].count(seven)


def test_what_cannot_be_a_picture_of_the_world_is_none(processor):
    from emu35.segments_emu35 import Image as ImageSegment

    codes = torch.zeros(6, 6, dtype=torch.long)
    assert said(ImageSegment(codes, Image.new("RGB", (48, 48)))).shape == (48, 48, 3)
    assert said(ImageSegment(codes, Image.new("RGB", (64, 48)))) is None
    assert said(ImageSegment(codes, Image.new("RGB", (48, 48)), complete=False, reason="cut")) is None


def test_user_message_keeps_the_order(processor):
    episode = next(one for one in draw("vla"))
    content = user_message(episode.turns[0])["content"]
    assert [item["type"] for item in content] == ["text", "image"]
    assert content[1]["image"].size == (48, 48)


def test_sheet_shows_what_was_asked_and_answered(processor, tmp_path):
    episodes = draw("story", 2)
    answers = play(Oracle(episodes, processor), processor, episodes)
    episode_sheet(
        [(one, said_, {"whole": True}) for one, said_ in zip(episodes, answers, strict=True)], tmp_path / "a.png"
    )
    page = np.asarray(Image.open(tmp_path / "a.png"))
    most = max(1 + len(one.answers[0].frames) for one in episodes)
    assert page.shape[1] == most * (48 * 4 + 12) + 12
    with pytest.raises(ValueError, match="`played` is empty"):
        episode_sheet([], tmp_path / "b.png")
