"""`generate` against a slow reference that keeps no state: no cache, no batch, no streams, one token at a time."""

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from emu35 import generation_loop_emu35
from emu35.sampling_emu35 import Sampler


@pytest.fixture(scope="module")
def model(make_tiny_model):
    """A random model that begins images, and stops, about as often as a trained one. Sizes have one digit a side."""
    model = make_tiny_model(token_layout={"size_digits": [1, 1]})
    layout = model.config.token_layout
    model.lm_head.weight.data[layout.boi_token_id] *= 4
    model.lm_head.weight.data[layout.eos_token_id] *= 2.5
    return model


@dataclass
class Reference:
    """What `generate` must compute for one prompt."""

    model: torch.nn.Module
    mode: str
    negative: list[int] | None = None
    negative_image: list[int] | None = None
    guidance_scale: float = 1.0
    image_guidance_scale: float | None = None
    grid: tuple[int, int] | None = None
    keep_image_size: bool = True
    max_images: int | None = None
    text: Sampler = field(default_factory=lambda: Sampler(do_sample=False))
    image: Sampler = field(default_factory=lambda: Sampler(do_sample=False))
    generator: torch.Generator | None = None

    @torch.no_grad()
    def __call__(self, prompt: list[int], max_new_tokens: int, guess: list[int]) -> list[int]:
        """The answer.  A right `guess` makes it fast: one pass over it gives the logits of all its prefixes."""
        self.layout = self.model.config.token_layout
        self.known = []
        self.ids, self.num_prompt = prompt + guess, len(prompt)
        self.compute(self.ids)
        if self.negative is not None:
            self.compute(self.negative + self.images())
        if self.negative_image is not None:
            boi, eoi = self.layout.boi_token_id, self.layout.eoi_token_id
            for begin in (index for index, token_id in enumerate(self.ids) if token_id == boi):
                end = self.ids.index(eoi, begin) if eoi in self.ids[begin:] else len(self.ids)
                self.compute(self.negative_image + self.ids[begin:end])
        self.ids = list(prompt)
        self.num_images = int(self.open_image() is not None)
        while len(self.ids) < len(prompt) + max_new_tokens:
            self.ids.append(self.next_token())
            self.num_images += self.ids[-1] == self.layout.boi_token_id
            if self.ids[-1] == self.layout.eos_token_id or (self.mode, self.ids[-1]) == (
                "image",
                self.layout.eoi_token_id,
            ):
                break
        return self.ids[len(prompt) :]

    def open_image(self) -> int | None:
        """Where the BOI of the unfinished image is."""
        for index in range(len(self.ids) - 1, -1, -1):
            if self.ids[index] == self.layout.eoi_token_id:
                return None
            if self.ids[index] == self.layout.boi_token_id:
                return index
        return None

    def next_token(self) -> int:
        layout, begin = self.layout, self.open_image()
        if begin is None:
            if self.mode == "image":
                return layout.boi_token_id
            scores = self.logits(self.ids)
            scores[layout.visual_token_offset : layout.visual_token_end] = float("-inf")
            scores[layout.image_placeholder_token_id] = float("-inf")
            if self.mode == "text" or self.num_images == self.max_images:
                scores[layout.boi_token_id] = float("-inf")
            return self.text(scores[None], self.generator).item()
        inside = self.ids[begin + 1 :]
        if layout.img_token_id not in inside:
            grid = self.grid if self.num_images == 1 or self.keep_image_size else None
            if grid is not None:
                return [*layout.size_token_ids(*grid), layout.img_token_id][len(inside)]
            if len(inside) in (1, 3):  # one digit a side
                return (layout.size_separator_token_id, layout.img_token_id)[len(inside) // 2]
            scores = torch.full_like(self.logits(self.ids), float("-inf"))
            digits = list(layout.digit_token_ids[1:])
            scores[digits] = self.logits(self.ids)[digits]
            return self.image(scores[None], self.generator).item()
        size, body = inside[: inside.index(layout.img_token_id)], inside[inside.index(layout.img_token_id) + 1 :]
        height, width = layout.digit_token_ids.index(size[0]), layout.digit_token_ids.index(size[2])
        self.grid = (height, width)
        if len(body) == height * (width + 1) - 1:
            return layout.eoi_token_id
        if len(body) % (width + 1) == width:
            return layout.eol_token_id
        scores = self.visual_logits(self.ids)
        if self.negative is not None:
            conditional, unconditional = (
                scores.log_softmax(-1),
                self.visual_logits(self.negative + self.images()).log_softmax(-1),
            )
            scores = unconditional + self.guidance_scale * (conditional - unconditional)
            if self.negative_image is not None:
                neither = self.visual_logits(self.negative_image + self.ids[begin:]).log_softmax(-1)
                scores = neither + self.image_guidance_scale * (unconditional - neither)
                scores += self.guidance_scale * (conditional - unconditional)
        return layout.visual_token_offset + self.image(scores[None], self.generator).item()

    def images(self) -> list[int]:
        """All image tokens of the answer, and of the image that the prompt ends in."""
        ids, inside = [], False
        for index, token_id in enumerate(self.ids):
            inside |= token_id == self.layout.boi_token_id
            if inside and (index >= self.num_prompt or self.prompt_is_open_at(index)):
                ids.append(token_id)
            inside &= token_id != self.layout.eoi_token_id
        return ids

    def prompt_is_open_at(self, index: int) -> bool:
        """Does this token of the prompt belong to the image that the prompt ends in?"""
        prompt = self.ids[: self.num_prompt]
        last = max(
            (i for i, token_id in enumerate(prompt) if token_id == self.layout.boi_token_id), default=len(prompt)
        )
        return index >= last and self.layout.eoi_token_id not in prompt[last:]

    def logits(self, ids: list[int]) -> torch.Tensor:
        for sequence, logits in self.known:
            if sequence[: len(ids)] == ids:
                return logits[len(ids) - 1].clone()
        self.compute(ids)
        return self.logits(ids)

    def compute(self, ids: list[int]):
        self.known.append((ids, self.model(torch.tensor([ids])).logits[0]))

    def visual_logits(self, ids: list[int]) -> torch.Tensor:
        return self.logits(ids)[self.layout.visual_token_offset : self.layout.visual_token_end]


def text_prompt(model, seed: int, length: int = 6) -> list[int]:
    layout = model.config.token_layout
    words = torch.randint(40, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [layout.bos_token_id, *words, layout.bss_token_id]


def image_ids(model, height: int, width: int, seed: int = 0) -> list[int]:
    layout = model.config.token_layout
    codes = torch.randint(layout.num_visual_tokens, (height, width), generator=torch.Generator().manual_seed(seed))
    return layout.image_token_ids((codes + layout.visual_token_offset).tolist())


def pad(model, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, prompts))
    pad_id = model.config.token_layout.pad_token_id
    return {
        "ids": torch.tensor([[pad_id] * (length - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def generate(model, prompts, negatives=None, negative_images=None, **settings):
    """Answers of a batch, without padding."""
    inputs = pad(model, prompts)
    inputs["input_ids"] = inputs.pop("ids")
    for name, rows in (("negative_prompt", negatives), ("negative_image_prompt", negative_images)):
        if rows is not None:
            inputs |= {f"{name}_{key}": value for key, value in pad(model, rows).items()}
    output = model.generate(**inputs, **settings)
    start = inputs["input_ids"].shape[1]
    rows = zip(output.sequences[:, start:], output.attention_mask[:, start:].bool(), strict=True)
    answers = [ids[mask].tolist() for ids, mask in rows]
    return answers, output


GUIDANCE = {
    "none": {},
    "one": {"guidance_scale": 2.5},
    "two": {"guidance_scale": 2.5, "image_guidance_scale": 1.4},
}


def streams_of(model, guidance: str, seed: int = 0):
    """Negative prompts of the guidance kind: `(negative, negative_image)`; the first holds an image in "two"."""
    negative = text_prompt(model, 90 + seed, 3 + seed % 2) if guidance != "none" else None
    if guidance == "two":
        negative = negative[:-1] + image_ids(model, 1, 2, seed) + negative[-1:]
    return negative, text_prompt(model, 80, 2) if guidance == "two" else None


def both(model, prompts, mode, guidance="none", generators=None, max_new_tokens=60, samplers=None, **settings):
    """Answers of one batch, and of the reference one by one."""
    text, image = samplers or (Sampler(do_sample=False), Sampler(do_sample=False))
    streams = [streams_of(model, guidance, row) for row in range(len(prompts))]
    grid = None
    if "height" in settings:
        grid = (settings["height"] // 4, settings["width"] // 4)
    references = []
    for row in range(len(prompts)):
        reference = Reference(
            model,
            mode,
            *streams[row],
            **GUIDANCE[guidance],
            grid=grid,
            text=text,
            image=image,
            generator=None if generators is None else torch.Generator().manual_seed(generators + row),
            **{name: settings[name] for name in ("max_images", "keep_image_size") if name in settings},
        )
        references.append(reference)
    negatives, negative_images = (list(rows) for rows in zip(*streams, strict=True))
    answers, output = generate(
        model,
        prompts,
        negatives if negatives[0] is not None else None,
        negative_images if negative_images[0] is not None else None,
        generation_mode=mode,
        generator=None
        if generators is None
        else [torch.Generator().manual_seed(generators + row) for row in range(len(prompts))],
        do_sample=text.do_sample,
        temperature=text.temperature,
        top_k=text.top_k,
        top_p=text.top_p,
        image_temperature=image.temperature,
        image_top_k=image.top_k,
        image_top_p=image.top_p,
        max_new_tokens=max_new_tokens,
        **GUIDANCE[guidance],
        **settings,
    )
    expected = [
        reference(prompt, max_new_tokens, guess)
        for reference, prompt, guess in zip(references, prompts, answers, strict=True)
    ]
    return answers, expected, output


SAMPLERS = (Sampler(True, 1.1, 200, 0.98), Sampler(True, 0.9, 30, 0.95))


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("samplers", [None, SAMPLERS], ids=["greedy", "sampled"])
def test_interleaved_batch_equals_the_reference(model, guidance, samplers):
    prompts = [text_prompt(model, 0), text_prompt(model, 4, 11), text_prompt(model, 5, 3)]
    answers, expected, _ = both(
        model, prompts, "interleaved", guidance, 7, max_new_tokens=120, samplers=samplers, max_images=3
    )
    assert answers == expected
    boi = model.config.token_layout.boi_token_id
    # The rows were in different phases, and at least one came back to text and to a second image.
    assert len({tuple(i for i, token_id in enumerate(answer) if token_id == boi) for answer in answers}) == 3
    assert max(answer.count(boi) for answer in answers) >= 2


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_image_batch_equals_the_reference(model, guidance):
    prompts = [text_prompt(model, 1), text_prompt(model, 2, 9)]
    answers, expected, output = both(model, prompts, "image", guidance, 1, samplers=SAMPLERS, height=12, width=16)
    assert answers == expected
    layout = model.config.token_layout
    for answer in answers:
        assert answer[:5] == [layout.boi_token_id, *layout.size_token_ids(3, 4), layout.img_token_id]
        assert answer[-1] == layout.eoi_token_id
        assert len(answer) == layout.num_image_tokens(3, 4)
    # BOI, the size, IMG, every EOL and EOI come without a pass of their own.
    assert output.num_forward_passes == 12
    assert [image.size for images in output.images for image in images] == [(16, 12), (16, 12)]


def test_text_batch_equals_the_reference(model):
    prompts = [text_prompt(model, seed, 3 + seed) for seed in range(4)]
    answers, expected, output = both(model, prompts, "text", generators=0, samplers=SAMPLERS, max_new_tokens=80)
    assert answers == expected
    assert output.num_forward_passes == max(map(len, answers))
    layout = model.config.token_layout
    made = set(itertools.chain(*answers))
    assert layout.boi_token_id not in made
    assert not any(layout.visual_token_offset <= token_id < layout.visual_token_end for token_id in made)
    assert any(answer[-1] == layout.eos_token_id for answer in answers)


def continued(model):
    """Prompts that end in an image, at every kind of place."""
    layout = model.config.token_layout
    image = image_ids(model, 3, 4)  # BOI 3 * 4 IMG, then rows of 4 and EOL
    lengths = {
        "BOI": 1,
        "height": 2,
        "*": 3,
        "size": 4,
        "IMG": 5,
        "code": 7,
        "row": 9,
        "EOL": 10,
        "late": 16,
        "all but EOI": 19,
    }
    assert image[9] == image[14] == layout.eol_token_id and len(image) == 20
    return {name: image[:length] for name, length in lengths.items()}


@pytest.mark.parametrize("guidance", ["none", "two"])
@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_prompts_that_end_in_an_image_are_continued(model, mode, guidance):
    prompts = [text_prompt(model, row, 2 + row % 3) + part for row, part in enumerate(continued(model).values())]
    generators = 30
    answers, expected, output = both(model, prompts, mode, guidance, generators, samplers=SAMPLERS, max_new_tokens=40)
    assert answers == expected
    layout = model.config.token_layout
    for prompt, answer, start, images in zip(
        prompts, answers, output.answer_start.tolist(), output.images, strict=True
    ):
        # The answer begins with the BOI in the prompt, and what was continued is one of its images.
        begin = max(index for index, token_id in enumerate(prompt) if token_id == layout.boi_token_id)
        assert output.sequences.shape[1] - start >= len(answer) + len(prompt) - begin
        assert output.sequences[len(images) and 0, 0] is not None
        if layout.eoi_token_id in answer:
            assert len(images) >= 1
    starts = [int(output.sequences[row, start]) for row, start in enumerate(output.answer_start.tolist())]
    assert set(starts) == {layout.boi_token_id}


def test_continuing_costs_no_pass_for_what_is_there(model):
    image = image_ids(model, 3, 4)
    for length, passes in ((5, 12), (7, 10), (9, 8), (10, 8), (18, 1), (19, 0)):
        _, output = generate(model, [text_prompt(model, 0) + image[:length]], generation_mode="image")
        assert output.num_forward_passes == passes


def test_a_continued_answer_equals_the_whole_one(model):
    settings = {"generation_mode": "interleaved", "do_sample": False, "guidance_scale": 2.0, "max_images": 3}
    prompt, negative = text_prompt(model, 1), text_prompt(model, 90, 3)
    whole, _ = generate(model, [prompt], [negative], max_new_tokens=110, **settings)
    assert whole[0].count(model.config.token_layout.boi_token_id) >= 2
    for cut in (1, 4, 5, 9, 30, 31, 50, 70, 97, 101):
        first, _ = generate(model, [prompt], [negative], max_new_tokens=cut, **settings)
        assert first[0] == whole[0][:cut]
        # The unconditional stream finds the answer's images in the prompt.
        rest, _ = generate(model, [prompt + first[0]], [negative], max_new_tokens=110 - cut, **settings)
        assert first[0] + rest[0] == whole[0], f"cut after {cut} tokens"


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_a_smaller_budget_gives_the_beginning(model, mode):
    prompt = text_prompt(model, 0)

    def answer(max_new_tokens):
        generator = torch.Generator().manual_seed(11)
        return generate(
            model,
            [prompt],
            [text_prompt(model, 90, 3)],
            generation_mode=mode,
            do_sample=True,
            guidance_scale=1.5,
            height=8,
            width=8,
            max_new_tokens=max_new_tokens,
            generator=generator,
        )[0][0]

    whole = answer(50)
    assert len(whole) == (50 if mode == "interleaved" else 11)
    for budget in {*range(1, min(12, len(whole))), *range(12, len(whole), 9)}:
        assert answer(budget) == whole[:budget]


def test_rows_with_different_budgets_left(model):
    """The context ends for the longer prompt first."""
    context = model.config.text_config.max_position_embeddings
    prompts = [text_prompt(model, 0, context - 30), text_prompt(model, 4)]
    answers, _ = generate(model, prompts, generation_mode="interleaved", do_sample=False)
    assert len(answers[0]) <= context - len(prompts[0])
    alone = [generate(model, [prompt], generation_mode="interleaved", do_sample=False)[0][0] for prompt in prompts]
    assert answers == alone


# --- seeds, copies ---


def test_same_seed_same_image_other_seed_other_image(model):
    def image(seed):
        return generate(
            model,
            [text_prompt(model, 0)],
            generation_mode="image",
            do_sample=True,
            height=24,
            width=24,
            generator=torch.Generator().manual_seed(seed),
        )[0][0]

    assert image(1) == image(1)
    assert image(1) != image(2)


def test_num_return_sequences(model):
    prompts = [text_prompt(model, 0), text_prompt(model, 4, 9)]
    negatives = [text_prompt(model, 90, 3), text_prompt(model, 91, 2)]
    settings = {"generation_mode": "image", "do_sample": True, "height": 8, "width": 8, "guidance_scale": 2.0}

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(6)]

    copies, output = generate(model, prompts, negatives, num_return_sequences=3, generator=generators(), **settings)
    repeated, _ = generate(
        model,
        [prompts[row // 3] for row in range(6)],
        [negatives[row // 3] for row in range(6)],
        generator=generators(),
        **settings,
    )
    assert copies == repeated
    assert output.sequences.shape[0] == len(output.images) == len(output.answer_start) == 6
    assert len({tuple(answer) for answer in copies[:3]}) == 3


@pytest.mark.parametrize("mode", ["image", "interleaved", "text"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_prompt_of_several_answers_is_computed_once(model, monkeypatch, mode, guidance_scale):
    prompts, negatives = [text_prompt(model, 0, 30), text_prompt(model, 4, 9)], [text_prompt(model, 90, 6)] * 2
    settings = {"generation_mode": mode, "do_sample": True, "guidance_scale": guidance_scale, "height": 8, "width": 8}
    counts = []

    def answers():
        counts.append(0)
        generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
        found, output = generate(
            model,
            prompts,
            negatives,
            num_return_sequences=3,
            generator=generators,
            max_new_tokens=40,
            return_past_key_values=True,
            **settings,
        )
        kept = output.past_key_values.rows[0][0].ids
        assert kept == [*prompts[0], *found[0]][: len(kept)] and len(kept) > len(prompts[0])
        return found

    def count(module, args, kwargs):
        counts[-1] += kwargs["input_ids"].numel()

    monkeypatch.setattr(generation_loop_emu35, "LEAST_SHARED", math.inf)
    hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
    expected = answers()
    monkeypatch.setattr(generation_loop_emu35, "LEAST_SHARED", 0)
    assert answers() == expected
    hook.remove()
    # Of the prompts, 32 and 11 tokens padded to 32, four of six copies; of their last tokens, six as before.
    assert counts[0] - counts[1] >= 4 * 31 - 6


def test_one_generator_for_a_batch(model):
    prompts = [text_prompt(model, 0), text_prompt(model, 4, 9)]
    settings = {"generation_mode": "interleaved", "do_sample": True, "max_new_tokens": 60}
    first, second = (
        generate(model, prompts, generator=torch.Generator().manual_seed(3), **settings)[0] for _ in range(2)
    )
    assert first == second


# --- structure of an answer ---


def test_max_images(model):
    layout = model.config.token_layout
    for most in (1, 2):
        answer, _ = generate(
            model,
            [text_prompt(model, 4)],
            generation_mode="interleaved",
            do_sample=False,
            max_images=most,
            max_new_tokens=200,
        )
        assert answer[0].count(layout.boi_token_id) == most


def test_eos_ends_an_answer_and_the_others_go_on(model):
    layout = model.config.token_layout
    prompts = [text_prompt(model, seed) for seed in range(6)]
    answers, output = generate(
        model, prompts, generation_mode="text", do_sample=True, max_new_tokens=80,
        generator=[torch.Generator().manual_seed(seed) for seed in range(6)],
    )  # fmt: skip
    ended = [answer for answer in answers if answer[-1] == layout.eos_token_id]
    assert ended and len({len(answer) for answer in answers}) > 1
    assert all(answer.count(layout.eos_token_id) <= 1 for answer in answers)
    # Behind an answer that is shorter than the longest there is only padding.
    row = min(range(6), key=lambda index: len(answers[index]))
    assert (output.sequences[row, len(prompts[0]) + len(answers[row]) :] == layout.pad_token_id).all()


def test_other_eos_ids(model):
    prompt = text_prompt(model, 1)
    whole, _ = generate(model, [prompt], generation_mode="text", do_sample=False, max_new_tokens=30)
    stop = whole[0][7]
    for eos in (stop, [stop, model.config.token_layout.eos_token_id]):
        answer, _ = generate(
            model, [prompt], generation_mode="text", do_sample=False, max_new_tokens=30, eos_token_id=eos
        )
        assert answer[0] == whole[0][: whole[0].index(stop) + 1]


def test_later_images_may_have_sizes_of_their_own(model):
    prompts = [text_prompt(model, seed) for seed in (0, 2, 4)]
    answers, expected, _ = both(
        model, prompts, "interleaved", "one", 2, max_new_tokens=150, samplers=SAMPLERS, keep_image_size=False
    )
    assert answers == expected
    layout = model.config.token_layout

    def sizes(answer):
        return [tuple(answer[i + 1 : i + 4]) for i, token_id in enumerate(answer) if token_id == layout.boi_token_id]

    assert any(len(set(sizes(answer))) > 1 for answer in answers)


def test_ids_after_the_visual_range(make_tiny_model, tiny_layout):
    """Text columns are no ids there: those after the visual range have moved."""
    layout = tiny_layout.to_dict()
    vocab_size = layout["visual_token_offset"] + layout["num_visual_tokens"] + 20
    model = make_tiny_model(vocab_size=vocab_size)
    model.lm_head.weight.data[-20:] *= 3
    answers, expected, _ = both(model, [text_prompt(model, 0)], "text", generators=0, samplers=SAMPLERS)
    assert answers == expected
    assert max(answers[0]) >= model.config.token_layout.visual_token_end


# --- streamer ---


class Recorder:
    def __init__(self):
        self.prompt, self.ids, self.ended = None, [], False

    def put(self, value):
        assert not self.ended
        if self.prompt is None:
            self.prompt = value.tolist()
        else:
            self.ids += value.tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_streamer_sees_the_answer_in_order(model, mode):
    recorder, prompt = Recorder(), text_prompt(model, 0)
    answers, _ = generate(
        model, [prompt], [text_prompt(model, 90)], generation_mode=mode, do_sample=False, guidance_scale=2.0,
        max_new_tokens=100, streamer=recorder,
    )  # fmt: skip
    assert recorder.prompt == [prompt]
    assert recorder.ids == answers[0]
    assert recorder.ended


def test_streamer_of_a_continued_image_and_of_a_cut_one(model):
    parts = continued(model)
    for name, budgets in {
        "BOI": (1, 4, 8, 9, 10),
        "height": (3, 24),
        "row": (1, 2, 5, 6, 11),
        "all but EOI": (1, 4),
    }.items():
        for budget in budgets:
            recorder, prompt = Recorder(), text_prompt(model, 0) + parts[name]
            answers, _ = generate(
                model,
                [prompt],
                generation_mode="interleaved",
                do_sample=False,
                max_new_tokens=budget,
                streamer=recorder,
            )
            assert recorder.ids == answers[0]


def test_streamer_gets_tokens_as_they_come(model):
    """At the time of the n-th visual token, not more than n passes have been made."""
    passes = []
    handle = model.model.register_forward_hook(lambda *_: passes.append(None))
    seen = []

    class Timer(Recorder):
        def put(self, value):
            super().put(value)
            seen.append(len(passes))

    try:
        generate(model, [text_prompt(model, 0)], generation_mode="image", height=8, width=12, streamer=Timer())
    finally:
        handle.remove()
    # prompt, BOI "2" "*" "3" IMG, three codes, EOL with the third, three codes, EOI
    assert seen == [0, 0, 0, 0, 0, 0, 1, 2, 3, 3, 4, 5, 6, 6]
