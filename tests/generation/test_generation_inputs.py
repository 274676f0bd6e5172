"""What goes into `generate`: settings, sizes, configuration files, and everything that must be refused."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from emu35 import Emu35ForConditionalGeneration, Emu35GenerateOutput, Emu35GenerationConfig
from emu35.generation_configuration_emu35 import grid_for_aspect_ratio
from emu35.generation_loop_emu35 import allowed_size_tokens
from emu35.image_tokens_emu35 import find_images, last_image, parse_size
from emu35.prompts_emu35 import TASK_TEMPLATES
from transformers import GenerationConfig, pipeline

FACTOR = 4  # pixels a side of one code of the tiny model


@pytest.fixture(scope="module")
def model(make_tiny_model):
    return make_tiny_model()


@pytest.fixture(scope="module")
def prompt(model):
    layout = model.config.token_layout
    return torch.tensor([[layout.bos_token_id, 60, 61, 62, layout.bss_token_id]])


def with_image(model, prompt, height, width, closed=True):
    layout = model.config.token_layout
    ids = layout.image_token_ids([[layout.visual_token_offset] * width for _ in range(height)])
    ids = torch.tensor([ids if closed else ids[:-1]])
    return torch.cat([prompt[:, :2], ids, prompt[:, 2:]] if closed else [prompt, ids], dim=1)


def size_of(model, prompt, **settings):
    output = model.generate(prompt, generation_mode="image", do_sample=False, **settings)
    image = last_image(output.sequences[0].tolist(), model.config.token_layout)
    assert image.complete
    return image.token_height, image.token_width


# --- sizes ---


@pytest.mark.parametrize(
    ("aspect_ratio", "grid"),
    [
        ("4:3", (55, 73)), ("21:9", (41, 97)), ("16:9", (47, 85)), ("3:2", (52, 78)),
        ("1:1", (64, 64)), ("3:4", (73, 55)), ("9:16", (85, 47)), ("2:3", (78, 52)),
    ],
)  # fmt: skip
def test_aspect_ratios_of_the_release(aspect_ratio, grid):
    assert grid_for_aspect_ratio(aspect_ratio, 1024 * 1024, 16) == grid


@pytest.mark.parametrize("aspect_ratio", ["16x9", "16:", ":9", "a:b", "0:1", "1:0", "-1:2", "1.5:1", "square", ""])
def test_bad_aspect_ratios(model, prompt, aspect_ratio):
    with pytest.raises(ValueError, match=r'"16:9".*"auto" or "reference"'):
        model.generate(prompt, generation_mode="image", aspect_ratio=aspect_ratio)


def test_aspect_ratio_that_leaves_no_code():
    with pytest.raises(ValueError, match="less than one code"):
        grid_for_aspect_ratio("100:1", 32 * 32, 16)


def test_given_sizes(model, prompt):
    assert size_of(model, prompt, height=12, width=20) == (3, 5)
    assert size_of(model, prompt, aspect_ratio="2:1", image_area=2 * 16 * 16) == (4, 8)
    # Given sizes may have more digits than the ones the model may write itself.
    layout = model.config.token_layout
    assert layout.size_digits[1] == 2
    assert size_of(model, prompt, height=FACTOR, width=101 * FACTOR) == (1, 101)


def test_reference_and_auto(model, prompt):
    one = with_image(model, prompt, 2, 3)
    two = with_image(model, one, 1, 4)
    assert size_of(model, one) == (2, 3)  # a single image: its size
    images = list(find_images(two[0].tolist(), model.config.token_layout))
    assert size_of(model, two, aspect_ratio="reference") == (images[-1].token_height, images[-1].token_width)
    for ids, settings in ((two, {}), (one, {"aspect_ratio": "auto"}), (prompt, {})):
        output = model.generate(ids, generation_mode="image", do_sample=False, max_new_tokens=8, **settings)
        # The model writes the size: at least one token of it is sampled, each by a pass.
        assert output.num_forward_passes >= 2
    with pytest.raises(ValueError, match="needs an image in every prompt"):
        model.generate(prompt, generation_mode="image", aspect_ratio="reference")


@pytest.mark.parametrize("digits", [(1, 2), (2, 2)])
def test_sizes_that_the_model_writes(make_tiny_model, prompt, digits):
    model = make_tiny_model(token_layout={"size_digits": list(digits)}, max_position_embeddings=20_000)
    layout = model.config.token_layout
    heights = set()
    for seed in range(8):
        ids = (
            model.generate(
                prompt,
                generation_mode="image",
                do_sample=True,
                max_new_tokens=7,
                generator=torch.Generator().manual_seed(seed),
            )
            .sequences[0, prompt.shape[1] :]
            .tolist()
        )
        end = ids.index(layout.img_token_id)
        height, width = parse_size(ids[1:end], layout)
        for side in (height, width):
            assert digits[0] <= len(str(side)) <= digits[1]
        heights.add(height)
    assert len(heights) > 1


def test_allowed_size_tokens(tiny_layout):
    digits, star, img = tiny_layout.digit_token_ids, tiny_layout.size_separator_token_id, tiny_layout.img_token_id
    assert list(tiny_layout.size_digits) == [1, 2]
    assert allowed_size_tokens([], tiny_layout) == digits[1:]
    assert allowed_size_tokens([digits[1]], tiny_layout) == [*digits, star]
    assert allowed_size_tokens([digits[1], digits[0]], tiny_layout) == [star]
    assert allowed_size_tokens([digits[1], star], tiny_layout) == digits[1:]
    assert allowed_size_tokens([digits[1], star, digits[5]], tiny_layout) == [*digits, img]
    assert allowed_size_tokens([digits[1], star, digits[5], digits[5]], tiny_layout) == [img]


def test_parse_size(tiny_layout):
    digits, star = tiny_layout.digit_token_ids, tiny_layout.size_separator_token_id
    assert parse_size(tiny_layout.size_token_ids(5, 123), tiny_layout) == (5, 123)
    for bad in ([], [star], [digits[1]], [digits[1], star], [star, digits[1]], [digits[0], star, digits[1]], [60]):
        assert parse_size(bad, tiny_layout) is None
    # Thousands of digits are more than Python reads as a number.
    assert parse_size([*[digits[1]] * 5000, star, digits[1]], tiny_layout) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 10, "width": 8}, "`height` must be a positive multiple of 4 pixels, got 10. Nearest: 8 or 12."),
        ({"height": 8, "width": 2}, "`width` must be a positive multiple of 4 pixels, got 2."),
        ({"height": 0, "width": 8}, "`height` must be a positive multiple of 4 pixels, got 0."),
        ({"height": 8, "width": -8}, "`width` must be a positive multiple of 4 pixels, got -8."),
        ({"height": 8.0, "width": 8}, "`height` must be a positive multiple of 4 pixels, got 8.0."),
        ({"height": 40_000, "width": 40_000}, "does not fit into the context of 512 tokens"),
        ({"height": 8}, "`height` and `width` together, got 8 and None"),
        ({"width": 8}, "`height` and `width` together, got None and 8"),
        ({"height": 8, "width": 8, "aspect_ratio": "1:1"}, "not both"),
        ({"height": 84, "width": 92}, "takes 511 more tokens, but after the prompt's 5 only 507 are left"),
    ],
)
@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_bad_sizes(model, prompt, settings, message, mode):
    if "takes" in message and mode == "interleaved":
        return  # the answer may be text
    with pytest.raises(ValueError) as error:
        model.generate(prompt, generation_mode=mode, **settings)
    assert message in str(error.value)


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": -0.1}, "`guidance_scale` must be at least 0"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be at least 0"),
        ({"image_guidance_scale": -1}, "`image_guidance_scale` must be at least 0"),
        ({"image_decoder": "fast"}, "`image_decoder` must be one of 'ar'"),
        ({"generation_mode": "video"}, "`generation_mode` must be one of"),
        ({"temperature": 0}, "`temperature` must be positive, got 0. For greedy decoding pass `do_sample=False`"),
        ({"image_temperature": -1.0}, "`image_temperature` must be positive"),
        ({"top_k": -1}, "`top_k` must be a whole number"),
        ({"image_top_k": 2.5}, "`image_top_k` must be a whole number"),
        ({"top_p": 0.0}, "`top_p` must lie in (0, 1]"),
        ({"image_top_p": 1.5}, "`image_top_p` must lie in (0, 1]"),
        ({"max_images": 0}, "`max_images` must be a whole number of at least 1"),
        ({"image_area": -4}, "`image_area` must be a whole number of at least 1"),
        ({"num_return_sequences": 0}, "`num_return_sequences` must be a whole number of at least 1"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens` must be a whole number"),
        ({"guidence_scale": 3.0}, "`generate` does not know `guidence_scale`. Did you mean `guidance_scale`?"),
        ({"max_tokens": 5}, "Did you mean `max_new_tokens`?"),
        ({"qqq": 5}, "`generate` does not know `qqq`. Settings: generation_mode"),
        ({"num_beams": 4}, "`generate` does not know `num_beams`"),
        ({"repetition_penalty": 1.2}, "`generate` does not know `repetition_penalty`"),
        ({"task": "t2v"}, "`task` must be one of"),
        ({"num_return_sequences": 2, "do_sample": False}, "num_return_sequences"),
    ],
)
def test_bad_settings(model, prompt, settings, message):
    with pytest.raises(ValueError) as error:
        model.generate(prompt, **{"max_new_tokens": 2, **settings})
    assert message in str(error.value)


def test_settings_that_change_nothing_are_welcome(model, prompt):
    model.generate(prompt, max_new_tokens=2, do_sample=False, use_cache=True, disable_compile=True, bos_token_id=1)


def test_task_defaults(make_tiny_model, prompt):
    model = make_tiny_model()
    defaults = {"t2i": {"generation_mode": "image", "height": 8, "width": 8}, "mine": {"max_new_tokens": 3}}
    model.generation_config = Emu35GenerationConfig(task_defaults=defaults, do_sample=False, max_new_tokens=5)
    answer = model.generate(prompt, task="t2i", max_new_tokens=50).sequences[0, prompt.shape[1] :]
    assert len(answer) == model.config.token_layout.num_image_tokens(2, 2)
    assert model.generate(prompt, task="mine").sequences.shape[1] == prompt.shape[1] + 3
    assert model.generate(prompt, task="vqa").sequences.shape[1] <= prompt.shape[1] + 5  # known, no defaults
    assert model.generation_config.max_new_tokens == 5  # a call leaves them as they are
    with pytest.raises(ValueError, match=r"`task_defaults\['t2i'\]` has an unknown setting `hieght`.*`height`"):
        Emu35GenerationConfig(task_defaults={"t2i": {"hieght": 8}})


# --- prompts ---


@pytest.mark.parametrize(
    "ids", [None, [[1, 2]], torch.tensor([1, 2]), torch.ones(1, 0).long(), torch.ones(0, 3).long()]
)
def test_input_ids_of_a_wrong_shape(model, ids):
    with pytest.raises(ValueError, match=r"`input_ids` must be a tensor of the shape \(batch, length\)"):
        model.generate(ids)


def test_ids_outside_the_vocabulary(model, prompt):
    size = model.config.text_config.vocab_size
    for bad in (-1, size):
        with pytest.raises(ValueError, match=rf"`input_ids` holds {bad}, but the model's ids lie in \[0, {size}\)"):
            model.generate(torch.cat([prompt, torch.tensor([[bad]])], dim=1))
    with pytest.raises(TypeError, match="`negative_prompt_ids` must be a tensor, got list"):
        model.generate(prompt, negative_prompt_ids=prompt.tolist(), generation_mode="image", guidance_scale=2.0)
    with pytest.raises(ValueError, match="`negative_prompt_ids` holds"):
        model.generate(prompt, negative_prompt_ids=prompt + size, generation_mode="image", guidance_scale=2.0)


def test_padding(model, prompt):
    pad = torch.full((1, 2), model.config.token_layout.pad_token_id)
    with pytest.raises(ValueError, match=r"begins with padding\. Pass `attention_mask`"):
        model.generate(torch.cat([pad, prompt], dim=1))
    with pytest.raises(ValueError, match=r"padding\. Pass `negative_prompt_attention_mask`"):
        model.generate(
            prompt, negative_prompt_ids=torch.cat([pad, prompt], dim=1), generation_mode="image", guidance_scale=2.0
        )
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(torch.cat([prompt, pad], dim=1), attention_mask=torch.tensor([[1] * 5 + [0] * 2]))
    with pytest.raises(ValueError, match="without any token"):
        model.generate(prompt, attention_mask=torch.zeros_like(prompt))
    with pytest.raises(ValueError, match=r"`attention_mask` has the shape \(1, 4\), `input_ids` \(1, 5\)"):
        model.generate(prompt, attention_mask=torch.ones(1, 4))
    # A pad id inside a prompt is a token like any other.
    inside = torch.cat([prompt, pad, prompt], dim=1)
    model.generate(inside, max_new_tokens=2)


def test_long_prompts(model, prompt):
    with pytest.raises(ValueError, match="the prompt has 515 tokens and the context 512"):
        model.generate(prompt.repeat(1, 103))
    full = model.generate(prompt.repeat(1, 102), do_sample=False)  # 510 of 512
    assert full.sequences.shape[1] <= 512


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 2.0}, "`guidance_scale`=2.0 needs `negative_prompt_ids`.*`guidance_scale=1`"),
        ({"image_guidance_scale": 2.0}, "needs `negative_prompt_ids`"),
    ],
)
def test_missing_negative_prompts(model, prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, generation_mode="image", **settings)
    model.generate(prompt, generation_mode="text", max_new_tokens=1, **settings)  # not needed there


def test_negative_prompts_of_a_wrong_number(model, prompt):
    with pytest.raises(ValueError, match=r"`negative_image_prompt_ids`.*`image_guidance_scale=None`"):
        model.generate(prompt, negative_prompt_ids=prompt, generation_mode="image", image_guidance_scale=2.0)
    with pytest.raises(ValueError, match="`negative_prompt_ids` has 2 rows for 1 prompts"):
        model.generate(
            prompt, negative_prompt_ids=prompt.repeat(2, 1), generation_mode="image", guidance_scale=2.0,
            num_return_sequences=2, do_sample=True,
        )  # fmt: skip


def test_generators_and_streamers(model, prompt):
    one = torch.Generator()
    with pytest.raises(ValueError, match="`generator` has 1 generators for 2 answers"):
        model.generate(prompt.repeat(2, 1), generator=[one], do_sample=True)
    with pytest.raises(ValueError, match=r"must hold a `torch[.]Generator` for each answer"):
        model.generate(prompt.repeat(2, 1), generator=[one, None], do_sample=True)
    with pytest.raises(ValueError, match="`streamer` works with one answer at a time, got a batch of 2"):
        model.generate(prompt.repeat(2, 1), streamer=object())


def test_prompts_that_end_in_an_image(model, prompt):
    layout = model.config.token_layout
    digits, star = layout.digit_token_ids, layout.size_separator_token_id
    boi, img, visual = layout.boi_token_id, layout.img_token_id, layout.visual_token_offset

    def end(*ids, **settings):
        ids = torch.cat([prompt, torch.tensor([[boi, *ids]])], dim=1)
        return model.generate(ids, **{"generation_mode": "image", "max_new_tokens": 4, **settings})

    with pytest.raises(ValueError, match="ends inside an image, which `generation_mode='text'` cannot finish"):
        end(generation_mode="text")
    with pytest.raises(ValueError, match=r"does not begin like 2\*2 codes.*Leave out `height`"):
        end(digits[3], height=8, width=8)
    for size in (
        [star],
        [digits[0]],
        [digits[1], star, star],
        [digits[1], star, digits[0]],
        [digits[1], star, digits[1], star],
    ):
        with pytest.raises(ValueError, match=r"cannot be continued: its size is not written as height\*width"):
            end(*size)
    for size in ([], [digits[1], star]):
        with pytest.raises(ValueError, match="cannot be continued"):
            end(*size, img)
    with pytest.raises(ValueError, match=r"cannot be continued: 3 codes in 1 rows instead of 1\*2"):
        end(digits[1], star, digits[2], img, visual, visual, visual)
    # A broken image that is closed, or further back, does no harm.
    end(digits[1], star, digits[2], img, visual, layout.eoi_token_id)
    end(digits[1], star, digits[2], img, visual, 60)


def test_an_explicit_size_that_fits_is_continued(model, prompt):
    layout = model.config.token_layout
    ids = torch.cat([prompt, torch.tensor([[layout.boi_token_id, layout.digit_token_ids[2]]])], dim=1)
    assert size_of(model, ids, height=8, width=12) == (2, 3)


def test_vocabularies_without_images(make_tiny_model, prompt):
    model = make_tiny_model(token_layout={"eol_token_id": None})
    model.generate(prompt, max_new_tokens=2)
    for mode in ("image", "interleaved"):
        with pytest.raises(ValueError, match="needs image tokens"):
            model.generate(prompt, generation_mode=mode)


@pytest.mark.parametrize("mode", ["text", "image"])
def test_damaged_weights(tiny_model, prompt, mode):
    tiny_model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinite logits in rows \[0\].*dtype"):
        tiny_model.generate(prompt, generation_mode=mode, height=8, width=8, max_new_tokens=9)


def enable_gradient_checkpointing(model):
    # Its name in transformers 5.23; the older one warns there.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def test_gradient_checkpointing_in_training(tiny_model, prompt):
    enable_gradient_checkpointing(tiny_model)
    tiny_model.generate(prompt, max_new_tokens=2)
    tiny_model.train()
    with pytest.raises(ValueError, match=r"gradient checkpointing.*`model.eval\(\)`"):
        tiny_model.generate(prompt)


def test_codes_outside_the_codebook(make_tiny_model, prompt, caplog):
    model = make_tiny_model()
    model.vision_tokenizer.config.codebook_size = 1
    with caplog.at_level(logging.WARNING):
        output = model.generate(prompt, generation_mode="image", height=12, width=12)
    assert output.images is None
    assert "outside the vision tokenizer's codebook of 1" in caplog.text


def test_without_vision_tokenizer(make_tiny_model, prompt):
    model = make_tiny_model(vision_tokenizer_config=None)
    output = model.generate(
        prompt, generation_mode="image", height=32, width=16
    )  # 16 pixels a code, as in the release
    assert output.images is None
    assert last_image(output.sequences[0].tolist(), model.config.token_layout).size_ids == (
        *model.config.token_layout.size_token_ids(2, 1),
    )


# --- images in the prompt ---


def test_images_in_the_prompt(model, tiny_processor):
    from PIL import Image

    images = [Image.new("RGB", (20, 12), "red"), Image.new("RGB", (16, 16), "blue")]
    inputs = tiny_processor(text=["make it blue", "and red"], images=images, task="x2i")
    settings = {
        "generation_mode": "image", "guidance_scale": 2.0, "image_guidance_scale": 1.5, "do_sample": False,
    }  # fmt: skip
    output = model.generate(**inputs, **settings)
    assert model.config.token_layout.image_placeholder_token_id not in output.sequences
    images = [last_image(ids, model.config.token_layout) for ids in output.sequences.tolist()]
    sizes = [(image.token_height, image.token_width) for image in images]
    assert sizes == [tuple(size) for size in (inputs["image_sizes"] // FACTOR).tolist()]
    resolved = model.resolve_image_tokens(**inputs)
    again = model.generate(**resolved, **settings)
    assert torch.equal(output.sequences, again.sequences)
    segments = tiny_processor.post_process_multimodal_output(output)
    assert segments[0][-1].complete


# --- configurations ---


def test_configuration_keeps_every_setting(tmp_path):
    settings = {
        "generation_mode": "image", "guidance_scale": 3.5, "image_guidance_scale": 1.5, "image_top_k": 7,
        "image_top_p": 0.9, "image_temperature": 0.8, "height": 8, "width": 16, "image_area": 64, "max_images": 3,
        "keep_image_size": False, "task_defaults": {"t2i": {"guidance_scale": 5.0}}, "max_new_tokens": 9,
        "do_sample": False, "temperature": 0.7, "top_k": 5, "top_p": 0.8, "eos_token_id": [1, 2], "pad_token_id": 3,
    }  # fmt: skip
    config = Emu35GenerationConfig(**settings)
    config.save_pretrained(tmp_path)
    for other in (
        config,
        Emu35GenerationConfig.from_pretrained(tmp_path),
        Emu35GenerationConfig.from_dict(config.to_dict()),
    ):
        assert {name: getattr(other, name) for name in settings} == settings
        assert other.return_dict_in_generate is True
    changed = config.with_settings("t2i", top_k=9)
    assert (changed.guidance_scale, changed.top_k, config.guidance_scale, config.top_k) == (5.0, 9, 3.5, 5)


def test_configurations_do_not_share_defaults():
    first = Emu35GenerationConfig.released()
    first.task_defaults["t2i"]["guidance_scale"] = 99.0
    assert Emu35GenerationConfig.released().task_defaults["t2i"]["guidance_scale"] == 5.0


def test_released_defaults():
    config = Emu35GenerationConfig.released()
    assert (config.guidance_scale, config.image_top_k, config.top_k, config.top_p) == (3.0, 5120, 1024, 0.9)
    assert config.with_settings("t2i").guidance_scale == 5.0
    assert config.with_settings("story").image_area == 720 * 720
    howto = config.with_settings("howto")
    assert (howto.image_top_k, howto.top_k, howto.top_p, howto.temperature) == (10240, 200, 0.8, 0.7)
    modes = {task: config.with_settings(task).generation_mode for task in TASK_TEMPLATES}
    images, interleaved = ("t2i", "x2i"), ("story", "howto", "explore", "vla", "chat")
    assert modes == {
        **dict.fromkeys(images, "image"), **dict.fromkeys(interleaved, "interleaved"), "vqa": "text",
    }  # fmt: skip
    assert config.with_settings("t2i", generation_mode="text").generation_mode == "text"


def test_the_task_names_the_mode(make_tiny_model, prompt):
    model = make_tiny_model()
    model.generation_config = Emu35GenerationConfig.released()
    output = model.generate(prompt, task="t2i", guidance_scale=1, height=8, width=8)
    assert last_image(output.sequences[0].tolist(), model.config.token_layout).complete
    text = model.generate(prompt, task="t2i", generation_mode="text", max_new_tokens=3)
    assert model.config.token_layout.boi_token_id not in text.sequences


def test_configuration_refuses_unknown_settings():
    with pytest.raises(ValueError, match=r"no setting `guidence_scale`\. Did you mean `guidance_scale`"):
        Emu35GenerationConfig(guidence_scale=2.0)
    with pytest.raises(ValueError, match=r"does not know `hight`\. Did you mean `height`"):
        Emu35GenerationConfig().with_settings(hight=8)


def test_configuration_with_settings_that_are_not_supported(model, prompt):
    for name, value in {
        "num_beams": 3,
        "repetition_penalty": 1.3,
        "suppress_tokens": [3],
        "min_new_tokens": 4,
    }.items():
        with pytest.raises(ValueError, match=f"`{name}`=.* is not supported"):
            model.generate(prompt, generation_config=GenerationConfig(**{name: value}))


def test_configuration_travels_with_the_model(tiny_model, tmp_path):
    assert isinstance(tiny_model.generation_config, Emu35GenerationConfig)
    tiny_model.generation_config.guidance_scale = 2.5
    tiny_model.generation_config.height = tiny_model.generation_config.width = 8
    tiny_model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["guidance_scale"], saved["height"], saved["image_decoder"]) == (2.5, 8, "ar")
    loaded = Emu35ForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, Emu35GenerationConfig)
    assert loaded.generation_config.guidance_scale == 2.5

    other = Emu35ForConditionalGeneration.from_pretrained(tmp_path, generation_config=GenerationConfig(top_k=3))
    assert isinstance(other.generation_config, Emu35GenerationConfig) and other.generation_config.top_k == 3
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(OSError, match="not a valid JSON"):
        Emu35ForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"guidence_scale": 3}')
    with pytest.raises(ValueError, match=r"Did you mean `guidance_scale`"):
        Emu35ForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert Emu35ForConditionalGeneration.from_pretrained(tmp_path).generation_config.guidance_scale is None


def test_a_plain_configuration_as_trainers_pass_it(tiny_model, prompt):
    """What TRL 1.x passes to `generate`; it slices what it gets as a tensor."""
    tiny_model.generation_config = Emu35GenerationConfig(image_top_k=7, do_sample=False)
    config = GenerationConfig(
        max_new_tokens=4, do_sample=True, pad_token_id=1, bos_token_id=2, eos_token_id=[3], temperature=0.9, top_p=1.0,
        top_k=0, min_p=None, repetition_penalty=1.0, cache_implementation=None, disable_compile=True,
    )  # fmt: skip
    sequences = tiny_model.generate(prompt, generation_config=config)
    assert isinstance(sequences, torch.Tensor)
    assert sequences.shape[1] <= prompt.shape[1] + 4
    config.return_dict_in_generate = True
    assert isinstance(tiny_model.generate(prompt, generation_config=config), Emu35GenerateOutput)
    # Ours holds wherever theirs says nothing.
    merged = tiny_model.generation_config.overridden_by(config)
    assert (merged.image_top_k, merged.do_sample, merged.max_new_tokens) == (7, True, 4)
    tiny_model.generation_config = config
    tiny_model.generate(prompt)


def test_settings_as_older_pipelines_ask_for_them(tiny_model):
    tiny_model.generation_config = Emu35GenerationConfig(guidance_scale=2.0, top_k=4)
    config, rest = tiny_model._prepare_generation_config(
        GenerationConfig(max_new_tokens=256), top_p=0.5, tokenizer="t"
    )
    assert isinstance(config, Emu35GenerationConfig)
    assert (config.guidance_scale, config.top_k, config.top_p, config.max_new_tokens) == (2.0, 4, 0.5, 256)
    assert rest == {"tokenizer": "t"}
    tiny_model.generation_config.max_new_tokens = 9
    config, _ = tiny_model._prepare_generation_config(GenerationConfig(max_new_tokens=256))
    assert config.max_new_tokens == 9


def test_output():
    output = Emu35GenerateOutput(torch.tensor([[1]]), torch.tensor([0]), [["image"]], 3)
    moved = output.to("meta")
    assert moved.sequences.device.type == moved.answer_start.device.type == "meta"
    assert (moved.images, moved.num_forward_passes) == ([["image"]], 3)
    assert len(output) == 1
    assert [ids.tolist() for ids in output] == [[1]]


def test_no_warnings(tiny_model, tiny_processor, tmp_path):
    """Importing, loading and generating is silent, even with a checkpoint made for sampling and a greedy call."""
    tiny_model.generation_config = Emu35GenerationConfig(temperature=0.7, top_k=3, top_p=0.9, image_top_k=2)
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    code = """
import sys, transformers
transformers.logging.disable_progress_bar()
from transformers import AutoModelForMultimodalLM, AutoProcessor
import emu35
model = AutoModelForMultimodalLM.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
inputs = processor(text="a red fox", task="t2i")
for sample in (True, False):
    output = model.generate(**inputs, generation_mode="image", height=8, width=8, guidance_scale=2.0, do_sample=sample)
    model.generate(**inputs, do_sample=sample, max_new_tokens=3)
assert len(processor.post_process_multimodal_output(output)) == 1
model.save_pretrained(sys.argv[1] + "/again")
"""
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "" and run.stderr == ""


# --- transformers.pipeline ---


@pytest.fixture
def any_to_any(tiny_model, tiny_processor, monkeypatch):
    # The pipeline wants torchvision for videos, which this model does not take.
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *_: None)
    return pipeline("any-to-any", model=tiny_model, processor=tiny_processor)


def test_pipeline_text(any_to_any):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a red fox"}]}]
    for text in ("a red fox", messages):
        result = any_to_any(text=text, max_new_tokens=4, generate_kwargs={"do_sample": False}, return_full_text=False)
        assert isinstance(result[0]["generated_text"], str)


def test_pipeline_tensors(any_to_any):
    result = any_to_any(text="a red fox", max_new_tokens=4, return_tensors=True)
    assert result[0]["generated_token_ids"].ndim == 1


def test_pipeline_image(any_to_any):
    from PIL import Image

    result = any_to_any(
        text="a red fox",
        generation_mode="image",
        generate_kwargs={"height": 8, "width": 12, "do_sample": False, "guidance_scale": 2.0},
    )
    assert isinstance(result[0]["generated_image"], Image.Image)
    assert result[0]["generated_image"].size == (12, 8)
    message = "row 0 of `sequences` has no image, or the last one is not complete"
    with pytest.raises(ValueError, match=message):
        any_to_any(
            text="a red fox", generation_mode="image", max_new_tokens=4, generate_kwargs={"height": 8, "width": 12}
        )


def test_pipeline_understands_an_image(any_to_any):
    from PIL import Image

    result = any_to_any(
        text="what is it?",
        images=Image.new("RGB", (16, 16), "red"),
        task="vqa",
        max_new_tokens=3,
        return_full_text=False,
    )
    assert isinstance(result[0]["generated_text"], str)
