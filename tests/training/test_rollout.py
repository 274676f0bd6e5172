"""Answers drawn for GRPO: their log-probabilities are the sampler's, and forced tokens have none."""

import pytest
import torch
from emu35.sampling_emu35 import Sampler
from emu35.training import rollout
from emu35.training.rollout import (
    RolloutSettings,
    TokenKind,
    add_answer_scores,
    answer_seed,
    draw_answers,
    score_answers,
    token_kinds,
)
from PIL import Image

SMALL = {"height": 8, "width": 12}
GENERATE = {
    "t2i": {"generation_mode": "image", **SMALL},
    "x2i": {"generation_mode": "image", **SMALL},
    "vqa": {"generation_mode": "text", "max_new_tokens": 9},
    "story": {"generation_mode": "interleaved", "max_new_tokens": 60, "max_images": 2, **SMALL},
}
PICTURE = Image.new("RGB", (16, 16), (200, 30, 60))
ASKED = {"type": "image", "image": PICTURE}
PROMPTS = [
    ("t2i", "a red fox"),
    ("x2i", [{"role": "user", "content": [ASKED, {"type": "text", "text": "make it blue"}]}]),
    ("vqa", [{"role": "user", "content": [ASKED, {"type": "text", "text": "what?"}]}]),
    ("story", "a fox"),
]


@pytest.fixture(scope="module")
def model(make_tiny_model, tiny_layout):
    model = make_tiny_model()
    model.lm_head.weight.data[tiny_layout.boi_token_id] *= 4  # so that a story soon has pictures
    return model


def draw(model, processor, prompts, seeds, settings):
    tasks, texts = zip(*prompts, strict=True)
    return draw_answers(model, processor, texts, tasks, seeds, settings)


def pad(answers):
    """Ids and mask, prompts padded on the left and answers on the right, and kinds."""
    left, right = (max(len(getattr(one, name)) for one in answers) for name in ("prompt_ids", "ids"))
    ids = [[0] * (left - len(a.prompt_ids)) + a.prompt_ids + a.ids + [0] * (right - len(a.ids)) for a in answers]
    mask = [
        [0] * (left - len(a.prompt_ids)) + [1] * (len(a.prompt_ids) + len(a.ids)) + [0] * (right - len(a.ids))
        for a in answers
    ]
    return torch.tensor(ids), torch.tensor(mask), torch.tensor([a.kinds + [0] * (right - len(a.ids)) for a in answers])


def draw_and_spy(model, processor, settings):
    """Four answers, each with the log-probabilities and entropies that the sampler itself had, in order."""
    original, answers, spied = Sampler.__call__, [], []

    def spy(self, logits, generator=None):
        choice = original(self, logits, generator)
        own = self.distribution(logits)[0].double()
        values.append((float(own[choice[0]].log()), float(torch.special.entr(own).sum())))
        return choice

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "__call__", spy)
        for seed, prompt in enumerate(PROMPTS):
            values = []
            answers += draw(model, processor, [prompt], [seed], settings)
            spied.append(values)
    return answers, spied


@pytest.fixture(scope="module")
def drawn(model, tiny_processor):
    settings = RolloutSettings(temperature=0.8, image_temperature=1.3, generate=GENERATE)
    return settings, *draw_and_spy(model, tiny_processor, settings)


def test_log_probabilities_are_those_of_the_sampler(model, drawn):
    settings, answers, spied = drawn
    ids, mask, kinds = pad(answers)
    scores = score_answers(model, ids, mask, kinds, settings)
    assert {int(kind) for kind in kinds.unique()} == {0, 1, 2, 3}
    for row, values in enumerate(spied):
        own = kinds[row] != TokenKind.FORCED
        expected = torch.tensor(values)
        torch.testing.assert_close(scores["log_probs"][row, own], expected[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(scores["entropies"][row, own], expected[:, 1], atol=1e-5, rtol=0)
        assert not scores["log_probs"][row, ~own].any()


@pytest.mark.parametrize("image_decoder", ["ar", "speculative"])
def test_codes_are_drawn_from_what_is_scored(model, tiny_processor, image_decoder):
    """On average, the log-probability of what is drawn from a distribution is the negative of its entropy."""
    settings = RolloutSettings(image_temperature=1.0, image_decoder=image_decoder, generate=GENERATE)
    answers = draw(model, tiny_processor, PROMPTS[:1] * 64, range(64), settings)
    assert len({tuple(answer.ids) for answer in answers}) > 50
    ids, mask, kinds = pad(answers)
    surprise = {}
    for temperature in (1.0, 1.4, 0.8):
        settings.image_temperature = temperature
        with torch.no_grad():
            scores = score_answers(model, ids, mask, kinds, settings)
        values = (scores["log_probs"] + scores["entropies"])[kinds == TokenKind.VISUAL].double()
        surprise[temperature] = float(values.sum() / values.square().sum().sqrt())  # about normal, if drawn from it
    assert abs(surprise[1.0]) < 3 and surprise[0.8] < -4 and surprise[1.4] > 4


def test_in_bfloat16_they_differ_by_rounding_only(model, tiny_processor):
    """What is drawn in float32 is of another distribution. Token by token or all at once, only sums' order differs."""
    settings = RolloutSettings(generate=GENERATE)
    distances = []
    for bf16 in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            answers, spied = draw_and_spy(model, tiny_processor, settings)
        ids, mask, kinds = pad(answers)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            log_probs = score_answers(model, ids, mask, kinds, settings)["log_probs"]
        expected = torch.tensor([value for values in spied for value, _ in values])
        distances.append((log_probs[kinds != TokenKind.FORCED] - expected).abs())
    alike, unlike = distances
    assert alike.max() < 0.03  # bfloat16 has steps of 2**-6 for logits of 2 to 4, as they are here
    assert alike.mean() < 0.6 * unlike.mean()


def test_forced_tokens_are_the_structure_of_images(model, drawn, tiny_layout):
    _, answers, _ = drawn
    size = [tiny_layout.boi_token_id, *tiny_layout.size_token_ids(2, 3), tiny_layout.img_token_id]
    forced = [[i for i, kind in zip(a.ids, a.kinds, strict=True) if kind == TokenKind.FORCED] for a in answers]
    one = [*size, tiny_layout.eol_token_id, tiny_layout.eoi_token_id]
    assert forced[0] == forced[1] == one
    assert forced[2] == []
    assert forced[3] == one[1:] * 2  # in a story, an image is the model's choice


def test_an_answer_does_not_depend_on_the_batch(model, tiny_processor, drawn):
    settings, answers, _ = drawn
    together = draw(model, tiny_processor, [*PROMPTS, *PROMPTS[::-1]], [0, 1, 2, 3, 3, 2, 1, 0], settings)
    assert [one.ids for one in together] == [one.ids for one in [*answers, *answers[::-1]]]
    assert [one.prompt_ids for one in together[:4]] == [one.prompt_ids for one in answers]
    assert all(one.images[0].size == (12, 8) for one in (answers[0].segments, answers[3].segments))


def test_token_kinds(tiny_layout):
    layout = tiny_layout
    image = layout.image_token_ids([[layout.visual_token_offset + code for code in row] for row in ([1, 2], [3, 4])])
    ids = [7, *image, 8, *image, 9, layout.eos_token_id]
    inside = [TokenKind.FORCED if one < layout.visual_token_offset else TokenKind.VISUAL for one in image[1:]]
    kinds = token_kinds(ids, layout, max_images=2)
    assert kinds == [1, 1, *inside, 1, 1, *inside, 2, 2]
    assert token_kinds(ids, layout) == [1, 1, *inside, 1, 1, *inside, 1, 1]
    assert token_kinds(image, layout, image_mode=True) == [0, *inside]
    assert token_kinds([7, 8], layout, max_images=0) == [2, 2]


def test_chunks_change_neither_values_nor_gradients(model, drawn, monkeypatch):
    settings, answers, _ = drawn
    batch = pad(answers)

    def run():
        model.zero_grad()
        scores = score_answers(model, *batch, settings)
        scores["log_probs"].sum().backward()
        return scores, model.lm_head.weight.grad.clone(), model.model.layers[0].mlp.up_proj.weight.grad.clone()

    whole = run()
    monkeypatch.setattr(rollout, "LOSS_CHUNK_BYTES", 3 * 4 * 400)  # some three positions
    for expected, found in zip(whole[0].values(), run()[0].values(), strict=True):
        torch.testing.assert_close(found, expected)
    for expected, found in zip(whole[1:], run()[1:], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_forward_is_as_before_without_kinds(tiny_model, drawn):
    settings, answers, _ = drawn
    ids, mask, kinds = pad(answers)
    expected = tiny_model(ids[:, :9]).logits
    add_answer_scores(tiny_model, settings)
    torch.testing.assert_close(tiny_model(ids[:, :9]).logits, expected)
    scores = tiny_model(input_ids=ids, attention_mask=mask, token_kinds=kinds)
    assert scores["log_probs"].shape == scores["entropies"].shape == kinds.shape


def test_a_model_in_training_draws_without_dropout_and_stays_in_training(make_tiny_model, tiny_processor):
    settings = RolloutSettings(generate=GENERATE)
    plain = draw(make_tiny_model(), tiny_processor, PROMPTS[:1], [5], settings)
    model = make_tiny_model(residual_dropout=0.3, embedding_dropout=0.3).train()
    model.gradient_checkpointing_enable()
    assert draw(model, tiny_processor, PROMPTS[:1], [5], settings)[0].ids == plain[0].ids
    assert model.training


def test_images_of_a_group_are_encoded_once(model, tiny_processor, monkeypatch):
    original, seen = type(model).encode_image, []

    def encode(self, pixel_values):
        seen.append(len(pixel_values))
        return original(self, pixel_values)

    monkeypatch.setattr(type(model), "encode_image", encode)
    answers = draw(model, tiny_processor, [PROMPTS[2]] * 4, range(4), RolloutSettings(generate=GENERATE))
    assert seen == [1]
    assert len({tuple(one.prompt_ids) for one in answers}) == 1
    assert len({tuple(one.ids) for one in answers}) == 4


def test_seeds_differ():
    assert len({answer_seed(a, b, c) for a in range(3) for b in range(5) for c in range(20)}) == 300
    assert 0 <= answer_seed(1, 2, 3) == answer_seed(1, 2, 3) < 2**63


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "`rollout.temperature` must be positive, got 0.0"),
        ({"batch_size": 0}, "`rollout.batch_size` must be positive"),
        ({"image_decoder": "dida"}, '"ar" or "speculative".*got \'dida\''),
        ({"generate": {"t2i": {"guidance_scale": 3.0}}}, "`rollout.generate.t2i.guidance_scale` would change"),
        ({"generate": {"vqa": {"temperature": 0.5}}}, "set `rollout.temperature`"),
        ({"generate": {"vqaa": {"max_new_tokens": 3}}}, "`rollout.generate.vqaa`: .*Did you mean 'vqa'"),
        ({"generate": {"vqa": {"max_new_tokns": 3}}}, "`rollout.generate.vqa`: .*Did you mean `max_new_tokens`"),
        ({"generate": {"vqa": {"max_new_tokens": 0}}}, "`rollout.generate.vqa`: .*max_new_tokens"),
    ],
)
def test_settings_that_would_change_the_distribution(values, message):
    with pytest.raises(ValueError, match=message):
        RolloutSettings(**values)
