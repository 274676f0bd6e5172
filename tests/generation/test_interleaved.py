"""Answers cut anywhere and continued, with and without a cache; limits, stops, and models that never end."""

import itertools

import pytest
import torch
from emu35.decoding_emu35 import GenerationCache
from emu35.image_tokens_emu35 import find_images, last_image
from test_generation import GUIDANCE, generate, pad, streams_of, text_prompt
from transformers import DynamicCache, MaxLengthCriteria, StoppingCriteriaList

LENGTH = 50
SAMPLING = {
    "generation_mode": "interleaved", "do_sample": True, "temperature": 1.1, "top_k": 200, "image_top_k": 30,
    "max_images": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(make_tiny_model):
    """Begins images, and stops, about as often as a trained one. Sizes have one digit a side."""
    model = make_tiny_model(token_layout={"size_digits": [1, 1]})
    layout = model.config.token_layout
    model.lm_head.weight.data[layout.boi_token_id] *= 4
    model.lm_head.weight.data[layout.eos_token_id] *= 2.5
    return model


def inputs_of(model, guidance, rows):
    """Arguments for prompts of different lengths, and a generator a row."""
    prompts = [text_prompt(model, (4, 0, 5)[row], (11, 6, 3)[row]) for row in rows]
    streams = [streams_of(model, guidance, row) for row in rows]
    arguments = {"input_ids": prompts}
    if guidance != "none":
        arguments["negative_prompt_ids"] = [negative for negative, _ in streams]
    if guidance == "two":
        arguments["negative_image_prompt_ids"] = [negative for _, negative in streams]
    inputs = {}
    for name, ids in arguments.items():
        padded = pad(model, ids)
        mask = "attention_mask" if name == "input_ids" else f"{name.removesuffix('_ids')}_attention_mask"
        inputs |= {name: padded["ids"], mask: padded["attention_mask"]}
    generators = [torch.Generator().manual_seed(42 + row) for row in rows]
    return inputs, generators


def kept(output):
    """Prompts and answers without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(output.sequences, output.attention_mask, strict=True)]


class Columns:
    """Counts the token columns that the decoder computes."""

    def __init__(self, model):
        self.count = 0
        self.handle = model.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.count += kwargs["input_ids"].numel()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


# --- continuation ---


@pytest.mark.parametrize(
    ("rows", "cached"), [((0,), True), ((0, 1, 2), True), ((0, 1, 2), False)], ids=["single", "batch", "no-cache"]
)
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_an_answer_made_token_by_token_equals_the_whole(model, rows, guidance, cached):
    """Cut after every token: in text, in sizes, in rows of images."""
    settings = {**SAMPLING, **GUIDANCE[guidance], "keep_image_size": len(rows) > 1}
    inputs, generators = inputs_of(model, guidance, rows)
    whole = model.generate(**inputs, **settings, max_new_tokens=LENGTH, generator=generators)
    layout = model.config.token_layout
    assert max(ids.count(layout.boi_token_id) for ids in kept(whole)) >= 2

    inputs, generators = inputs_of(model, guidance, rows)
    for _ in range(LENGTH):
        output = model.generate(
            **inputs, **settings, max_new_tokens=1, generator=generators, return_past_key_values=cached
        )
        inputs = output.next_inputs()
        assert ("past_key_values" in inputs) == cached
    assert kept(output) == kept(whole)
    assert output.finished.tolist() == whole.finished.tolist()


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_rows_in_different_phases_equal_single_rows(model, guidance):
    """Batched = one by one, where the batch is itself continued in the middle of its images."""
    settings = {**SAMPLING, **GUIDANCE[guidance], "return_past_key_values": True}

    def answers(rows):
        inputs, generators = inputs_of(model, guidance, rows)
        for length in (19, 17, 34):
            output = model.generate(**inputs, **settings, max_new_tokens=length, generator=generators)
            inputs = output.next_inputs()
        return kept(output)

    together = answers((0, 1, 2))
    assert together == list(itertools.chain(*[answers((row,)) for row in range(3)]))
    boi = model.config.token_layout.boi_token_id
    assert len({tuple(place for place, one in enumerate(ids) if one == boi) for ids in together}) == 3


def test_one_generator_continues_a_single_row(model):
    inputs, _ = inputs_of(model, "one", (0,))
    settings = {**SAMPLING, **GUIDANCE["one"]}
    whole = model.generate(**inputs, **settings, max_new_tokens=40, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    first = model.generate(**inputs, **settings, max_new_tokens=23, generator=generator)
    inputs["input_ids"], inputs["attention_mask"] = first.sequences, None
    rest = model.generate(**inputs, **settings, max_new_tokens=17, generator=generator)
    assert torch.equal(rest.sequences, whole.sequences)


def test_image_rows_of_different_sizes_stay_finished(model):
    """In image mode the end of the image ends the answer, also of a row that is continued with others."""
    prompts = [text_prompt(model, row) for row in range(3)]
    settings = {"generation_mode": "image", "do_sample": False}
    whole, full = generate(model, prompts, **settings)
    assert len(set(map(len, whole))) > 1 and full.finished.all()
    cut = min(map(len, whole))
    _, output = generate(model, prompts, max_new_tokens=cut, **settings)
    assert output.finished.tolist() == [len(answer) == cut for answer in whole]
    output = model.generate(**output.next_inputs(), **settings)
    assert kept(output) == kept(full) and output.finished.all()
    assert model.generate(**output.next_inputs(), **settings).num_forward_passes == 0


def test_a_later_image_cut_in_its_size_is_free_to_differ(model):
    """Sizes of later images are free with `keep_image_size=False`, also where the first one begins with that digit."""
    layout = model.config.token_layout
    image = layout.image_token_ids([[layout.visual_token_offset] * 2])  # 1*2
    prompt = text_prompt(model, 0) + image
    settings = {"generation_mode": "interleaved", "do_sample": False, "max_new_tokens": 2}
    ends = []
    for keep in (True, False):
        model.lm_head.weight.data[layout.digit_token_ids[2]], old = (
            0,
            model.lm_head.weight.data[layout.digit_token_ids[2]].clone(),
        )
        answers, _ = generate(model, [prompt + image[:3]], keep_image_size=keep, **settings)
        model.lm_head.weight.data[layout.digit_token_ids[2]] = old
        ends.append(answers[0][0])
    assert ends[0] == layout.digit_token_ids[2] != ends[1]


# --- cache ---


def test_a_cache_saves_the_prefix(model):
    settings = {**SAMPLING, **GUIDANCE["two"], "generator": None, "do_sample": False, "height": 12, "width": 16}
    inputs, _ = inputs_of(model, "two", (0, 1, 2))
    first = model.generate(**inputs, **settings, max_new_tokens=40, return_past_key_values=True)
    again = first.next_inputs()
    with Columns(model) as with_cache:
        one = model.generate(**again, **settings, max_new_tokens=20)
    with Columns(model) as second:
        two = model.generate(**again, **settings, max_new_tokens=20)  # the cache is as it was
    cache = again.pop("past_key_values")
    with Columns(model) as without:
        plain = model.generate(**again, **settings, max_new_tokens=20)
    assert kept(one) == kept(two) == kept(plain)
    held = sum(len(prefix.ids) for prefixes in cache.rows for prefix in prefixes)
    assert with_cache.count == second.count < without.count - 0.8 * held
    assert one.num_forward_passes <= plain.num_forward_passes


def test_a_cached_unconditional_stream_costs_no_pass(model):
    """Without it, its beginning is computed in a pass of its own when the text before an image is cached."""
    layout = model.config.token_layout
    inputs, _ = inputs_of(model, "one", (1,))
    settings = {**GUIDANCE["one"], "generation_mode": "interleaved", "do_sample": False, "height": 8, "width": 12}
    first = model.generate(**inputs, **settings, max_new_tokens=60, max_images=1, return_past_key_values=True)
    prefixes = first.past_key_values.rows[0]
    assert len(prefixes) == 2
    # It has seen its prompt and the image made so far.
    image = last_image(first.sequences[0].tolist(), layout)
    assert image.complete
    made = first.sequences[0, image.begin : image.end].tolist()
    negative = inputs["negative_prompt_ids"][0].tolist()
    assert prefixes[1].ids == (negative + made)[: len(prefixes[1].ids)] and len(prefixes[1].ids) > len(negative)
    # Another image follows at once: one pass a code, and none for what was there.
    following = first.next_inputs([[layout.boi_token_id]])
    with Columns(model) as columns:
        output = model.generate(**following, **{**settings, "generation_mode": "image"})
    assert output.num_forward_passes == 6
    del following["past_key_values"]
    plain = model.generate(**following, **{**settings, "generation_mode": "image"})
    assert kept(output) == kept(plain)
    # Two streams: what was pending, BOI 2 * 3 IMG, six codes and an EOL (the last code is not computed).
    assert columns.count <= 2 * 2 * (2 + 5 + 6)


def test_a_finished_answer_is_continued_by_a_new_turn(model):
    layout = model.config.token_layout
    inputs, _ = inputs_of(model, "one", (0, 1))
    settings = {**SAMPLING, **GUIDANCE["one"], "do_sample": False, "height": 8, "width": 8}
    first = model.generate(**inputs, **settings, max_new_tokens=45, return_past_key_values=True)
    still = model.generate(**first.next_inputs(), **settings, max_new_tokens=3, return_past_key_values=True)
    turns = [[layout.ess_token_id, layout.eos_token_id, 50 + row, *range(60, 60 + 4 * row), layout.bss_token_id]
             for row in range(2)]  # fmt: skip
    ended = still.next_inputs([turn[:2] for turn in turns])
    untouched = model.generate(**ended, **settings)
    assert untouched.finished.all() and untouched.num_forward_passes == 0
    assert torch.equal(untouched.sequences, ended["input_ids"])

    following = untouched.next_inputs([turn[2:] for turn in turns])
    following["past_key_values"] = still.past_key_values
    with Columns(model) as columns:
        output = model.generate(**following, **settings, max_new_tokens=30)
    del following["past_key_values"]
    with Columns(model) as all_columns:
        plain = model.generate(**following, **settings, max_new_tokens=30)
    assert kept(output) == kept(plain)
    assert columns.count < all_columns.count
    assert not torch.equal(output.sequences, following["input_ids"])


def test_a_cache_survives_a_call_that_adds_nothing(model):
    layout = model.config.token_layout
    prompt = torch.tensor([text_prompt(model, 0)])
    first = model.generate(prompt, do_sample=False, max_new_tokens=5, return_past_key_values=True)
    ended = first.next_inputs([[layout.eos_token_id]])
    second = model.generate(**ended, return_past_key_values=True)
    assert second.past_key_values.rows[0][0].ids == first.past_key_values.rows[0][0].ids


def test_a_prompt_may_end_before_its_cache(model):
    prompt = torch.tensor([text_prompt(model, 0)])
    settings = {"do_sample": False, "generation_mode": "image", "height": 8, "width": 12}
    first = model.generate(prompt, **settings, return_past_key_values=True)
    for length in (prompt.shape[1] - 2, prompt.shape[1] + 2, prompt.shape[1] + 7):
        shorter = first.sequences[:, :length]
        with Columns(model) as columns:
            again = model.generate(shorter, **settings, past_key_values=first.past_key_values)
        plain = model.generate(shorter, **settings)
        assert torch.equal(again.sequences, plain.sequences)
        assert columns.count < again.sequences.shape[1] - 3


def test_bad_caches(model, make_tiny_model):
    prompt = torch.tensor([text_prompt(model, 0)])
    cache = model.generate(prompt, max_new_tokens=3, return_past_key_values=True).past_key_values
    assert isinstance(cache, GenerationCache) and len(cache) == 1
    other = prompt.clone()
    other[0, 3] = 55
    message = rf"`past_key_values` does not belong.*row 0 differs at position 3.*id {int(prompt[0, 3])} and .* 55"
    with pytest.raises(ValueError, match=message):
        model.generate(other, past_key_values=cache)
    padded = pad(model, [other[0].tolist(), [1] * 12])
    with pytest.raises(ValueError, match="has 1 rows for 2 prompts"):
        model.generate(padded["ids"], attention_mask=padded["attention_mask"], past_key_values=cache)
    with pytest.raises(ValueError, match=r"`past_key_values` must be the one of an earlier output.*DynamicCache"):
        model.generate(prompt, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"of another model: .* \(2, 2, 16\), here \(3, 2, 16\)"):
        make_tiny_model(num_hidden_layers=3).generate(prompt, past_key_values=cache)


def test_copies_share_a_cache(model):
    prompt = torch.tensor([text_prompt(model, 0)])
    first = model.generate(prompt, do_sample=False, max_new_tokens=4, return_past_key_values=True)
    results = []
    for inputs in (first.next_inputs(), {"input_ids": first.sequences}):
        generators = [torch.Generator().manual_seed(row) for row in range(2)]
        output = model.generate(
            **inputs, do_sample=True, num_return_sequences=2, max_new_tokens=8, generator=generators
        )
        results.append(kept(output))
    assert results[0] == results[1] and results[0][0] != results[0][1]


def test_next_inputs(model):
    prompts = [text_prompt(model, 0, 3), text_prompt(model, 1, 6)]
    answers, output = generate(model, prompts, [prompts[0], prompts[1]], do_sample=False, max_new_tokens=4)
    inputs = output.next_inputs([[7], [8, 9, 10]])
    expected = pad(model, [prompts[0] + answers[0] + [7], prompts[1] + answers[1] + [8, 9, 10]])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    assert torch.equal(inputs["input_ids"], expected["ids"])
    assert set(inputs) == {
        "input_ids", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask",
    }  # fmt: skip
    assert output.past_key_values is None
    with pytest.raises(ValueError, match="`new_ids` has 1 rows for 2 answers"):
        output.next_inputs([[7]])
    assert output.to("meta").attention_mask.device.type == "meta"


# --- models that never end ---


def force(model, monkeypatch, choose):
    """Makes text logits prefer `choose()`; visual ones stay."""
    original = model.compute_logits

    def compute_logits(hidden_states, vocabulary="all"):
        logits = original(hidden_states, vocabulary)
        if vocabulary == "text":
            logits = logits.clone()
            logits[:, choose()] = 1e4
        return logits

    monkeypatch.setattr(model, "compute_logits", compute_logits)


def test_a_model_that_never_stops(model, monkeypatch):
    force(model, monkeypatch, lambda: 60)
    prompt = torch.tensor([text_prompt(model, 0)])
    for settings, length in (({"max_new_tokens": 9}, 9), ({}, 512 - prompt.shape[1])):
        output = model.generate(prompt, generation_mode="interleaved", do_sample=False, **settings)
        assert output.sequences[0, prompt.shape[1] :].tolist() == [60] * length
        assert output.finished.tolist() == [False] and output.images == [[]]


def test_a_model_that_only_opens_images(model, monkeypatch):
    layout = model.config.token_layout
    force(model, monkeypatch, lambda: layout.boi_token_id)
    prompt = torch.tensor([text_prompt(model, 0)])
    one = layout.num_image_tokens(2, 2)
    settings = {"generation_mode": "interleaved", "do_sample": False, "height": 8, "width": 8}
    output = model.generate(prompt, **settings, max_new_tokens=3 * one + 7)
    assert [len(images) for images in output.images] == [3]
    images = list(find_images(output.sequences[0].tolist(), layout))
    assert [image.complete for image in images] == [True, True, True, False]
    assert len(images[-1].codes) == 2 and output.sequences.shape[1] == prompt.shape[1] + 3 * one + 7
    # An image is never opened in an image, and after `max_images` there is text.
    output = model.generate(prompt, **settings, max_new_tokens=60, max_images=2)
    answer = output.sequences[0, prompt.shape[1] :].tolist()
    assert answer.count(layout.boi_token_id) == len(output.images[0]) == 2
    assert all(one < layout.visual_token_offset for one in answer[2 * one :])


def test_a_model_that_writes_endless_sizes(make_tiny_model, monkeypatch):
    model = make_tiny_model(token_layout={"size_digits": [1, 2]})
    layout = model.config.token_layout
    answer = iter(range(10**6))
    nine = layout.digit_token_ids[9]
    force(model, monkeypatch, lambda: nine if next(answer) else layout.boi_token_id)
    prompt = torch.tensor([text_prompt(model, 0)])
    output = model.generate(prompt, generation_mode="interleaved", do_sample=False)
    image = last_image(output.sequences[0].tolist(), layout)
    assert (image.token_height, image.token_width, image.state) == (99, 99, "rows")
    assert output.sequences.shape[1] == 512 and not output.finished.any()
    assert output.images == [[]]


def test_placeholders_are_never_written(model, monkeypatch):
    """`input_ids` with one would ask for `pixel_values`."""
    layout = model.config.token_layout
    force(model, monkeypatch, lambda: layout.image_placeholder_token_id)
    output = model.generate(torch.tensor([text_prompt(model, 0)]), do_sample=False, max_new_tokens=3)
    assert layout.image_placeholder_token_id not in output.sequences
    model.generate(**output.next_inputs(), max_new_tokens=1)


# --- stops ---


class Stopper:
    """A streamer that wants to stop after `limit` tokens."""

    def __init__(self, limit):
        self.limit, self.ids, self.stop_requested = limit, None, limit == 0

    def put(self, value):
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.tolist()
        self.stop_requested = len(self.ids) >= self.limit

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_a_streamer_stops_at_the_next_token(model, mode):
    inputs, _ = inputs_of(model, "one", (0,))
    settings = {**GUIDANCE["one"], "generation_mode": mode, "do_sample": False, "height": 12, "width": 12}
    whole = model.generate(**inputs, **settings, max_new_tokens=40).sequences
    start = inputs["input_ids"].shape[1]
    length = whole.shape[1] - start
    for limit in (0, 1, 6, 8, 11, 13):
        streamer = Stopper(limit)
        output = model.generate(**inputs, **settings, max_new_tokens=40, streamer=streamer)
        made = output.sequences.shape[1] - start
        # Forced tokens come along with the one before them: BOI, size and IMG; an EOL.
        assert min(limit, length) <= made <= limit + 5 and streamer.ended
        assert torch.equal(output.sequences, whole[:, : start + made])
        assert streamer.ids == output.sequences[0, start:].tolist()
        assert made == length or not output.finished.any()
        rest = model.generate(**output.next_inputs(), **settings, max_new_tokens=40 - made)
        assert torch.equal(rest.sequences, whole)


def test_a_stop_in_an_image_keeps_what_is_there(model):
    prompt = torch.tensor([text_prompt(model, 0)])
    passes = []
    handle = model.model.register_forward_hook(lambda *_: passes.append(None))
    try:
        output = model.generate(
            prompt, generation_mode="image", do_sample=False, height=32, width=32, streamer=Stopper(5 + 20)
        )
    finally:
        handle.remove()
    image = last_image(output.sequences[0].tolist(), model.config.token_layout)
    assert image.state == "rows" and len(passes) == len(image.codes) == output.num_forward_passes
    assert 17 <= len(image.codes) <= 20


def test_stopping_criteria_are_asked_row_by_row(model):
    prompts = [text_prompt(model, row, 4 + row) for row in range(3)]
    settings = {"generation_mode": "image", "do_sample": False, "height": 16, "width": 16}
    whole, _ = generate(model, prompts, **settings)
    criteria = StoppingCriteriaList([MaxLengthCriteria(17)])
    answers, output = generate(model, prompts, stopping_criteria=criteria, **settings)
    # The EOL that follows the last code of a row comes along.
    assert all(len(prompt) + len(own) in (17, 18) for prompt, own in zip(prompts, answers, strict=True))
    assert answers == [answer[: len(own)] for answer, own in zip(whole, answers, strict=True)]
    # The rows end at different codes, and nothing is computed after the last of them.
    image = [last_image(ids, model.config.token_layout) for ids in kept(output)]
    assert output.num_forward_passes == max(len(one.codes) for one in image)
    assert len({len(one.codes) for one in image}) > 1
    output = model.generate(**output.next_inputs(), **settings)
    assert [ids[len(prompt) :] for prompt, ids in zip(prompts, kept(output), strict=True)] == whole


def test_stopping_criteria_see_prompt_and_answer(model):
    seen = []

    def record(input_ids, scores, **kwargs):
        seen.append(input_ids[0].tolist())
        return torch.tensor([len(seen) == 12])

    prompt = text_prompt(model, 0)
    output = model.generate(
        torch.tensor([prompt]), generation_mode="image", do_sample=False, height=12, width=20,
        stopping_criteria=[record],
    )  # fmt: skip
    assert len(seen) == 12 and seen[-1] == output.sequences[0].tolist()
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(seen))
    with pytest.raises(ValueError, match="`stopping_criteria` must be a `StoppingCriteriaList`"):
        model.generate(torch.tensor([prompt]), stopping_criteria=record)
    with pytest.raises(ValueError, match="`stopping_criteria` must be a `StoppingCriteriaList`"):
        model.generate(torch.tensor([prompt]), stopping_criteria=[3])


def test_an_interrupt_is_passed_on(model):
    def interrupt(input_ids, scores, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(torch.tensor([text_prompt(model, 0)]), stopping_criteria=[interrupt])
