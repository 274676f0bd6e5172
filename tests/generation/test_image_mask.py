"""Images that are partly given: rows kept, holes, and larger canvases."""

import PIL.Image
import pytest
import torch
from emu35.image_tokens_emu35 import last_image
from test_generation import GUIDANCE, continued, generate, image_ids, streams_of, text_prompt

FACTOR = 4
SAMPLING = {"generation_mode": "image", "do_sample": True, "image_top_k": 30, "image_temperature": 1.2}


@pytest.fixture(scope="module")
def model(shared_tiny_model):
    return shared_tiny_model


def random_codes(model, height, width, seed=0):
    size = model.config.token_layout.num_visual_tokens
    return torch.randint(size, (height, width), generator=torch.Generator().manual_seed(seed))


def complete(model, rows=(0,), guidance="none", seed=5, **settings):
    """Grids of codes for prompts of different lengths, and the output."""
    streams = [streams_of(model, guidance, row) for row in rows]
    negatives, negative_images = (list(column) for column in zip(*streams, strict=True))
    answers, output = generate(
        model,
        [text_prompt(model, row, 3 + row) for row in rows],
        negatives if guidance != "none" else None,
        negative_images if guidance == "two" else None,
        generator=[torch.Generator().manual_seed(seed + row) for row in rows],
        **SAMPLING,
        **GUIDANCE[guidance],
        **settings,
    )
    images = [last_image(answer, model.config.token_layout) for answer in answers]
    assert all(image.complete for image in images)
    return [torch.tensor(image.codes).view(image.token_height, image.token_width) for image in images], output


def mask_of(text):
    """`"..x/xxx"`: rows of codes, x where one is to be made."""
    return torch.tensor([[character == "x" for character in row] for row in text.split("/")])


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_leading_rows_equal_a_continued_prompt(model, guidance):
    codes = random_codes(model, 3, 4)
    made, output = complete(model, guidance=guidance, image=codes, mask=mask_of("..../..xx/xxxx"))
    layout = model.config.token_layout
    begin = layout.image_token_ids((codes + layout.visual_token_offset).tolist())[: 5 + 4 + 1 + 2]
    negative, negative_image = streams_of(model, guidance, 0)
    answers, again = generate(
        model,
        [text_prompt(model, 0, 3) + begin],
        None if negative is None else [negative],
        None if negative_image is None else [negative_image],
        generator=torch.Generator().manual_seed(5),
        **SAMPLING,
        **GUIDANCE[guidance],
    )
    assert output.sequences[0].tolist() == again.sequences[0].tolist()
    assert output.num_forward_passes == again.num_forward_passes == 6
    assert torch.equal(made[0][0], codes[0]) and len(answers[0]) == 8


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_given_codes_stay_and_change_what_follows_only(model, guidance):
    codes, mask = random_codes(model, 4, 5), mask_of("xxxxx/x...x/x...x/xxxxx")
    (made,), output = complete(model, guidance=guidance, image=codes, mask=mask)
    (free,), _ = complete(model, guidance=guidance, height=16, width=20)
    assert torch.equal(made[~mask], codes[~mask])
    # Up to the first given code the image is what it would have been without any.
    assert torch.equal(made.flatten()[:6], free.flatten()[:6])
    assert not torch.equal(made[mask], free[mask])
    # A given code costs no pass of its own.
    assert output.num_forward_passes == int(mask.sum())


def test_all_streams_see_given_codes(model):
    """Changing a given code changes what follows through the unconditional stream alone, too."""
    settings = {"guidance": "one", "mask": mask_of("..../xxxx"), "do_sample": False}
    settings.pop("do_sample")
    codes = random_codes(model, 2, 4)
    reference, _ = complete(model, image=codes, **settings)
    layout = model.config.token_layout
    negative, _ = streams_of(model, "one", 0)
    body = image_ids(model, 2, 4)[:5] + (codes[0] + layout.visual_token_offset).tolist() + [layout.eol_token_id]
    prompt = text_prompt(model, 0, 3)
    logits = [model(torch.tensor([ids + body])).logits[0, -1] for ids in (prompt, negative)]
    visual = [one[layout.visual_token_offset : layout.visual_token_end] for one in logits]
    scores = visual[1] + GUIDANCE["one"]["guidance_scale"] * (visual[0] - visual[1])
    values, columns = (scores / SAMPLING["image_temperature"]).topk(SAMPLING["image_top_k"])
    number = torch.rand(1, generator=torch.Generator().manual_seed(5))
    first = columns[int(torch.searchsorted(values.softmax(-1).cumsum(-1), number, right=True))]
    assert int(reference[0][1, 0]) == int(first)


@pytest.mark.parametrize("guidance", ["none", "two"])
def test_batches_equal_single_rows(model, guidance):
    """One image for all, or one each with masks and grids of their own."""
    images = [random_codes(model, 2, 3), random_codes(model, 2, 3, 1), random_codes(model, 3, 2)]
    masks = [mask_of(".../x.x"), mask_of("x../.xx"), mask_of("xx/../x.")]
    together, _ = complete(model, (0, 1, 2), guidance, image=images, mask=masks)
    for row in range(3):
        alone, _ = complete(model, (row,), guidance, image=images[row], mask=masks[row])
        assert torch.equal(together[row], alone[0])
        assert torch.equal(alone[0][~masks[row]], images[row][~masks[row]])
    shared, _ = complete(model, (0, 1), guidance, image=images[0], mask=masks[0])
    each, _ = complete(model, (0, 1), guidance, image=images[:1] * 2, mask=masks[:1] * 2)
    assert all(torch.equal(one, other) for one, other in zip(shared, each, strict=True))
    assert not torch.equal(shared[0], shared[1])


def test_copies_complete_the_same_image(model):
    codes, mask = random_codes(model, 2, 3), mask_of(".../xxx")
    output = model.generate(
        torch.tensor([text_prompt(model, 0)]), image=[codes], mask=[mask], num_return_sequences=3,
        generator=torch.Generator().manual_seed(0), **SAMPLING,
    )  # fmt: skip
    grids = [last_image(ids, model.config.token_layout).codes for ids in output.sequences.tolist()]
    assert [grid[:3] for grid in grids] == [tuple(codes[0].tolist())] * 3
    assert len(set(grids)) > 1


def test_larger_canvas(model):
    codes = random_codes(model, 2, 3)
    for offset in ((0, 0), (1, 2), (2, 1)):
        (made,), output = complete(model, image=codes, height=16, width=20, image_offset=offset)
        top, left = offset
        assert made.shape == (4, 5)
        assert torch.equal(made[top : top + 2, left : left + 3], codes)
        assert output.num_forward_passes == 20 - 6
        assert output.images[0][0].size == (20, 16)
    mask = mask_of("..x/...")
    (made,), _ = complete(model, image=codes, mask=mask, aspect_ratio="1:1", image_area=16 * 16)
    assert made.shape == (4, 4) and torch.equal(made[:2, :3][~mask], codes[~mask])


def test_a_size_among_the_defaults_does_not_enlarge(make_tiny_model):
    model = make_tiny_model()
    model.generation_config.height = model.generation_config.width = 24
    (made,), _ = complete(model, image=random_codes(model, 2, 3), mask=mask_of("..x/xxx"))
    assert made.shape == (2, 3)


def test_pixels_and_pil_images(model):
    image = PIL.Image.new("RGB", (12, 8))
    image.putdata([(20 * (i % 12), 12 * i // 5, 255 - 2 * i) for i in range(96)])
    pixels = torch.tensor(list(image.getdata())).view(8, 12, 3).permute(2, 0, 1) / 127.5 - 1
    codes = model.encode_image([pixels])[0]
    assert codes.shape == (2, 3)
    results = [
        complete(model, image=one, mask=mask_of(".../x.x"))[0][0] for one in (image, pixels, codes, codes.int())
    ]
    assert all(torch.equal(one, results[0]) for one in results)
    assert torch.equal(results[0][0], codes[0])


def test_a_cut_image_is_completed_like_the_whole(model):
    """The prompt's own codes and the kept ones together."""
    codes, mask = random_codes(model, 3, 4), mask_of("x.xx/..x./xxxx")
    prompt = torch.tensor([text_prompt(model, 0)])
    settings = {"image": codes, "mask": mask, **SAMPLING}
    whole = model.generate(prompt, generator=torch.Generator().manual_seed(2), **settings).sequences
    inputs, generator = {"input_ids": prompt}, torch.Generator().manual_seed(2)
    for _ in range(whole.shape[1] - prompt.shape[1]):
        output = model.generate(
            **inputs, max_new_tokens=1, generator=generator, return_past_key_values=True, **settings
        )
        inputs = output.next_inputs()
    assert torch.equal(output.sequences, whole) and output.finished.all()


def test_the_streamer_sees_given_codes_too(model):
    class Recorder:
        ids = None

        def put(self, value):
            self.ids = [] if self.ids is None else self.ids + value.tolist()

        def end(self):
            pass

    prompt, codes = torch.tensor([text_prompt(model, 0)]), random_codes(model, 3, 4)
    for mask, length in (("..../..x./x...", None), ("xxxx/x..x/....", None), ("..../..../...x", 9)):
        recorder = Recorder()
        output = model.generate(
            prompt, image=codes, mask=mask_of(mask), streamer=recorder, max_new_tokens=length, **SAMPLING
        )
        assert recorder.ids == output.sequences[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_mode": "interleaved"}, "`image` is completed with `generation_mode`='image' only, got 'inter"),
        ({"mask": mask_of("xx/xx")}, "`mask` has 2*2 codes, but `image` 2*3"),
        ({"mask": mask_of("x.x/...").int()}, "`mask` must be a bool tensor (height, width)"),
        ({"mask": mask_of("x.x/...")[None]}, "got torch.bool (1, 2, 3)"),
        ({"mask": [[True]]}, "`mask` must be a bool tensor (height, width), one value a code, got list"),
        ({"mask": torch.zeros(0, 0, dtype=torch.bool)}, "`mask` has 0*0 codes, but `image` 2*3"),
        ({"mask": mask_of(".../...")}, "all 2*3 codes of the image are kept"),
        ({"mask": None}, "all 2*3 codes of the image are kept"),
        ({"mask": [mask_of("..x/...")] * 2}, "`mask` has 2 items for 1 prompts"),
        ({"image": [torch.zeros(2, 3).long()] * 2}, "`image` has 2 items for 1 prompts"),
        ({"image": None}, "`mask` needs the `image`"),
        ({"image": None, "mask": None, "image_offset": (1, 0)}, "`image_offset` needs the `image`"),
        ({"height": 8, "width": 8}, "an image of 2*3 codes at `image_offset`=(0, 0) does not fit into the 2*2 codes"),
        ({"height": 12, "width": 16, "image_offset": (0, 2)}, "at `image_offset`=(0, 2) does not fit into the 3*4"),
        ({"height": 12, "width": 16, "image_offset": (-1, 0)}, "`image_offset`=(-1, 0) does not fit"),
        ({"image_offset": (0.5, 0)}, "`image_offset` must be a row and a column"),
        ({"image_offset": (0, 0, 0)}, "`image_offset` must be a row and a column"),
        ({"image": torch.full((2, 3), 48)}, "`image` has the code 48, but codes lie in [0, 48)"),
        ({"image": torch.full((2, 3), -1)}, "`image` has the code -1"),
        ({"image": torch.zeros(2, 3)}, "`image` must be codes (h, w) of an integer type"),
        ({"image": torch.zeros(2, 0).long()}, "`image` must be codes (h, w) of an integer type"),
        ({"image": "photo.png"}, "or a PIL image, got str"),
        ({"image": torch.zeros(3, 8, 10)}, "`image` has 8*10 pixels; both must be multiples of 4"),
        ({"image": PIL.Image.new("RGB", (9, 8))}, "`image` has 8*9 pixels"),
        ({"image": torch.zeros(60, 60).long(), "mask": torch.ones(60, 60).bool()}, "takes 3667 more tokens"),
    ],
)
def test_bad_images_and_masks(model, settings, message):
    settings = {"image": torch.zeros(2, 3).long(), "mask": mask_of("..x/..."), "generation_mode": "image", **settings}
    with pytest.raises(ValueError) as error:
        model.generate(torch.tensor([text_prompt(model, 0)]), **settings)
    assert message in str(error.value)


def test_a_prompt_that_contradicts_the_image(model):
    part = continued(model)["code"]  # an image of 3*4 codes, two of them there
    prompt = torch.tensor([text_prompt(model, 0) + part])
    codes = torch.tensor(last_image(part, model.config.token_layout).codes)
    image = torch.zeros(3, 4).long()
    image[0, :2] = (codes + 1) % 48
    mask = mask_of("..../xxxx/xxxx")
    with pytest.raises(ValueError, match=rf"whose code 0 is {codes[0]}, but `image` keeps {image[0, 0]} there"):
        model.generate(prompt, image=image, mask=mask, generation_mode="image")
    with pytest.raises(ValueError, match=r"does not begin like 2\*4 codes.*and `image`"):
        model.generate(prompt, image=image[:2], mask=mask[:2], generation_mode="image")
