"""Sequences and batches: same prompts as at inference, only answers are learnt, packing changes nothing."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from emu35.configuration_emu35 import Emu35VisionTokenizerConfig
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.prompts_emu35 import get_template
from emu35.training.batches import BatchSource
from emu35.training.frame_codes import FrameEncoder
from emu35.training.play import user_message
from emu35.training.recipe import DataRecipe, StageRecipe, recipe_from_dict
from emu35.training.sequences import IGNORED, KINDS, SequenceWriter, TokenSequence
from emu35.training.shapes import (
    EPISODES,
    IMAGE_SIZE,
    Frame,
    GlobalThought,
    caption,
    sample_question,
    sample_scene,
    to_image,
)
from emu35.training.train import build_processor
from emu35.training.train_language_model import LanguageModelTrainer, build_model

VISION = {
    "codebook_size": 32,
    "embed_dim": 4,
    "latent_channels": 8,
    "base_channels": 8,
    "channel_multiplier": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "norm_num_groups": 1,
}
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
MIXTURE = {"t2i": 0.5, "vqa": 0.2, "caption_image": 0.1, "image_answers": 0.1, "text": 0.1}


@pytest.fixture(scope="module")
def recipe():
    stages = [{"name": "all", "steps": 3, "mixture": MIXTURE, "rows": 3}]
    return recipe_from_dict({"output_dir": "-", "model": MODEL, "vision_tokenizer": {}, "stages": stages})


@pytest.fixture(scope="module")
def vision_tokenizer():
    torch.manual_seed(0)
    return Emu35VisionTokenizer(Emu35VisionTokenizerConfig(**VISION)).eval()


@pytest.fixture(scope="module")
def processor(recipe, vision_tokenizer):
    return build_processor(recipe, vision_tokenizer)


@pytest.fixture(scope="module")
def writer(processor):
    return SequenceWriter(processor.tokenizer, processor.token_layout, DataRecipe(caption_dropout=0.0), factor=8)


def learnt(sequence):
    return [label for label in sequence.labels if label != IGNORED]


def test_t2i_prompt_is_the_processors(writer, processor):
    for seed in range(20):
        sequence = writer.draw("t2i", np.random.default_rng(seed))
        length = len(sequence) - len(learnt(sequence))
        text = processor.tokenizer.decode(sequence.input_ids[:length], skip_special_tokens=True)
        content = text.split(" USER: ")[1].removesuffix(" ASSISTANT: ")
        expected = processor(text=content, task="t2i", return_tensors=None)
        assert sequence.input_ids[:length] == expected["input_ids"][0]


def test_unconditional_prompt_is_the_processors(processor):
    recipe = DataRecipe(caption_dropout=1.0)
    writer = SequenceWriter(processor.tokenizer, processor.token_layout, recipe, factor=8)
    sequence = writer.draw("t2i", np.random.default_rng(0))
    expected = processor(text="a red circle", task="t2i", return_tensors=None)["negative_prompt_ids"][0]
    assert sequence.input_ids[: len(expected)] == expected
    assert sequence.labels[len(expected)] == processor.token_layout.boi_token_id


def test_vqa_prompt_is_the_processors(writer, processor):
    scene = sample_scene(np.random.default_rng(3))
    question = sample_question(scene, np.random.default_rng(4))
    sequence = TokenSequence()
    writer._ask(sequence, scene, question.text, question.answer)
    expected = processor(text=question.text, images=to_image(scene), task="vqa", return_tensors=None)["input_ids"][0]
    assert sequence.input_ids[: len(expected)] == expected
    layout = processor.token_layout
    assert learnt(sequence) == [*writer.text_ids(question.answer), layout.ess_token_id, layout.eos_token_id]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(writer, processor, kind):
    layout = processor.token_layout
    for seed in range(10):
        sequence = writer.draw(kind, np.random.default_rng(seed))
        again = writer.draw(kind, np.random.default_rng(seed))
        assert sequence == again
        assert len(sequence.labels) == len(sequence)
        assert sequence.input_ids[0] == layout.bos_token_id and sequence.labels[0] == IGNORED
        assert sequence.labels[-1] == layout.eos_token_id
        num_placeholders = sequence.input_ids.count(layout.image_placeholder_token_id)
        assert num_placeholders == len(sequence.frames) * (IMAGE_SIZE // 8) ** 2
        assert not any(o.held_out for frame in sequence.frames for o in frame.objects)
        assert len(sequence) <= (320 if kind == "images_answers" else 144)


def messages_of(episode):
    """The whole episode as chat messages, the assistant's turns with thoughts and images."""
    messages = []
    for turn in episode.turns:
        if turn.role == "user":
            messages.append(user_message(turn))
            continue
        content = []
        for piece in turn.content:
            if isinstance(piece, Frame):
                content.append({"type": "image", "image": to_image(piece)})
            elif isinstance(piece, str):
                content.append({"type": "text", "text": piece})
            else:
                kind = "global_thought" if isinstance(piece, GlobalThought) else "image_thought"
                content.append({"type": kind, "text": piece.text})
        messages.append({"role": "assistant", "content": content})
    return messages


@pytest.mark.parametrize("kind", EPISODES)
def test_an_episode_is_what_the_processor_writes_and_its_answers_are_learnt(writer, processor, kind):
    for seed in range(5):
        episode = EPISODES[kind].sample(np.random.default_rng(seed))
        sequence = writer.write(episode, np.random.default_rng(0))
        expected = processor.apply_chat_template(
            messages_of(episode),
            task=episode.task,
            add_generation_prompt=False,
            return_assistant_tokens_mask=True,
        )
        assert sequence.input_ids == expected["input_ids"][0].tolist()
        learnt = [label != IGNORED for label in sequence.labels]
        assert learnt == expected["assistant_masks"][0].bool().tolist()
        assert len(sequence) <= 512


@pytest.mark.parametrize("kind", [kind for kind in EPISODES if kind != "multi_vqa"])
def test_dropout_leaves_what_the_unconditional_stream_sees(processor, kind):
    writer = SequenceWriter(processor.tokenizer, processor.token_layout, DataRecipe(caption_dropout=1.0), factor=8)
    layout = processor.token_layout
    for seed in range(5):
        episode = EPISODES[kind].sample(np.random.default_rng(seed))
        sequence = writer.write(episode, np.random.default_rng(seed))
        assert any(turn.frames for turn in episode.answers)
        learnt = [label for label in sequence.labels if label != IGNORED]
        assert learnt[0] == layout.boi_token_id and learnt[-1] == layout.eoi_token_id
        text = processor.tokenizer.decode(sequence.input_ids, skip_special_tokens=True)
        assert get_template("vqa").system in text and "USER" in text
        assert not any(word in text for word in ("circle", "square", "ring", "block", "east"))


def test_mixture_can_share_out_tokens(writer, vision_tokenizer):
    """Long sequences take most tokens where shares are of sequences, and no more than theirs otherwise."""

    def tokens(balance):
        stage = StageRecipe("a", 1, {"explore": 0.5, "vqa": 0.5}, rows=24, row_length=512, balance=balance)
        rows = BatchSource(writer, vision_tokenizer, 0)._draw_rows(np.random.default_rng(0), stage, 1.0)
        lengths = [len(sequence) for row in rows for sequence in row]
        return sum(length for length in lengths if length > 110) / sum(lengths)

    assert tokens("sequences") > 0.7
    assert abs(tokens("tokens") - 0.5) < 0.12


def test_a_sequence_longer_than_its_row_is_an_error(writer, vision_tokenizer):
    stage = StageRecipe("short", 1, {"explore": 1.0}, rows=2, row_length=144)
    with pytest.raises(ValueError, match="`row_length` of stage 'short' is 144, but a sequence of the kind 'explore'"):
        BatchSource(writer, vision_tokenizer, 0).batch(0, stage)


def test_difficulty_grows_over_the_stage(writer, vision_tokenizer):
    stage = StageRecipe("a", 10, {"story": 1.0}, rows=8, row_length=512, difficulty=[0.2, 1.0])
    source = BatchSource(writer, vision_tokenizer, 0)

    def mean_length(progress):
        rows = source._draw_rows(np.random.default_rng(0), stage, progress)
        return np.mean([len(sequence) for row in rows for sequence in row])

    assert mean_length(0.0) < 0.8 * mean_length(1.0)


def test_the_table_of_codes_is_used_only_where_it_is_exact(vision_tokenizer):
    """Random weights look across cells, so the encoder stays; a tokenizer of single cells is replaced exactly."""
    frames = [sample_scene(np.random.default_rng(seed)) for seed in range(8)]
    pixels = torch.stack([torch.from_numpy(np.array(to_image(frame))).permute(2, 0, 1) for frame in frames])
    expected = vision_tokenizer.encode(pixels.float() / 127.5 - 1).numpy()
    encoder = FrameEncoder(vision_tokenizer)
    assert not encoder.exact_table
    np.testing.assert_array_equal(encoder(frames), expected)

    class OfSingleCells(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def encode(self, pixels):
            levels = ((pixels + 1) * 127.5).round().long()
            return levels.unfold(2, 8, 8).unfold(3, 8, 8).sum((1, 4, 5))

    tokenizer = OfSingleCells()
    encoder = FrameEncoder(tokenizer)
    assert encoder.exact_table
    np.testing.assert_array_equal(encoder(frames), tokenizer.encode(pixels.float() / 127.5 - 1).numpy())


def test_number_of_objects_follows_the_recipe(processor):
    recipe = DataRecipe(objects=[0, 0, 1])
    writer = SequenceWriter(processor.tokenizer, processor.token_layout, recipe, factor=8)
    rng = np.random.default_rng(0)
    assert all(len(writer.draw("image", rng).frames[0].objects) == 3 for _ in range(20))


def test_batches_depend_on_seed_step_and_stream_alone(writer, vision_tokenizer, recipe):
    stage = recipe.stages[0]

    def ids(seed=0, step=0, stream=0):
        return BatchSource(writer, vision_tokenizer, seed).batch(step, stage, stream).input_ids

    source = BatchSource(writer, vision_tokenizer, 0)
    source.batch(5, stage)
    assert torch.equal(source.batch(0, stage).input_ids, ids())
    for other in (ids(seed=1), ids(step=1), ids(stream=1)):
        assert not torch.equal(other, ids())


def test_rows_are_well_filled(writer, vision_tokenizer):
    stage = StageRecipe("a", 1, {"t2i": 0.7, "vqa": 0.3}, rows=16, row_length=224)
    batch = BatchSource(writer, vision_tokenizer, 0).batch(0, stage)
    assert batch.num_tokens > 0.75 * batch.input_ids.numel()


def test_images_become_their_codes(writer, vision_tokenizer, processor):
    stage = StageRecipe("a", 1, {"image": 1.0}, rows=2)
    source = BatchSource(writer, vision_tokenizer, 0)
    batch = source.batch(0, stage)
    layout = processor.token_layout
    rows = source._draw_rows(np.random.default_rng((0, 2, 0, 0)), stage, 1.0)
    scene = rows[0][0].frames[0]
    pixels = torch.from_numpy(np.array(to_image(scene))).permute(2, 0, 1)[None].float() / 127.5 - 1
    codes = vision_tokenizer.encode(pixels)[0] + layout.visual_token_offset
    assert batch.input_ids[0, 1 : len(rows[0][0]) - 1].tolist() == layout.image_token_ids(codes.tolist())
    assert not (batch.input_ids == layout.image_placeholder_token_id).any()
    assert not (batch.labels == layout.image_placeholder_token_id).any()


def test_packed_rows_give_the_loss_of_single_sequences(recipe, processor, vision_tokenizer, writer):
    model = build_model(recipe, processor, vision_tokenizer).eval()
    model.set_attn_implementation("eager")
    batch = BatchSource(writer, vision_tokenizer, 0).batch(0, recipe.stages[0])
    packed = model.model(batch.input_ids, batch.attention_mask, batch.position_ids, use_cache=False).last_hidden_state
    starts = (batch.input_ids[0] == processor.token_layout.bos_token_id).nonzero()[:, 0].tolist()
    assert len(starts) > 1
    for start, end in itertools.pairwise(starts):
        alone = model.model(batch.input_ids[:1, start:end], use_cache=False).last_hidden_state
        torch.testing.assert_close(packed[:1, start:end], alone, atol=1e-4, rtol=1e-4)


def test_text_vocabulary_has_whole_words(processor):
    rng = np.random.default_rng(0)
    texts = [f" {caption(sample_scene(rng), rng).text}" for _ in range(100)]
    words = sum(len(text.replace(",", " ,").split()) for text in texts)
    assert sum(len(processor.tokenizer.encode(text)) for text in texts) < 1.05 * words


def test_a_stage_may_weigh_pictures_otherwise(recipe, processor, vision_tokenizer):
    trainer = LanguageModelTrainer(dataclasses.replace(recipe, compile=False, bf16=False), processor, vision_tokenizer)
    batch = trainer.source.batch(0, recipe.stages[0])
    layout = processor.token_layout
    num_visual = int((batch.labels >= layout.visual_token_offset).sum())
    num_text = int((batch.labels != IGNORED).sum()) - num_visual
    losses = {}
    with torch.no_grad():
        for weight in (0.25, 4.0):
            found = trainer.losses(batch, weight)
            losses[weight] = found["loss"]
            mean = (weight * num_visual * found["visual"] + num_text * found["text"]) / (
                weight * num_visual + num_text
            )
            torch.testing.assert_close(found["loss"], mean)
    assert abs(losses[0.25] - losses[4.0]) > 1e-4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"balance": "tasks"}, '`balance` must be "sequences" or "tokens", got \'tasks\''),
        ({"difficulty": [0.0, 1.0]}, r"`difficulty` must be two values in \(0, 1\]"),
        ({"difficulty": [0.5]}, "`difficulty` must be two values"),
        ({"visual_loss_weight": 0.0}, "`visual_loss_weight` must be positive"),
    ],
)
def test_settings_of_a_stage_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        StageRecipe("a", 1, {"story": 1.0}, row_length=512, **setting)
