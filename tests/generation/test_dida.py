"""The `dida` decoder: its steps against uncached forward passes, its adapter, and what it shares with `ar`."""

import copy
import json

import pytest
import torch
from emu35 import Emu35ForConditionalGeneration, Emu35GenerationConfig, cli, dida_emu35
from emu35.dida_emu35 import dida_adapter
from emu35.image_tokens_emu35 import last_image
from emu35.pipelines.scheduling_dida import DiDAScheduler
from emu35.sampling_emu35 import Sampler, guide
from peft import LoraConfig, get_peft_model
from test_generation import GUIDANCE, Recorder, image_ids, streams_of, text_prompt
from test_image_mask import mask_of, random_codes
from test_interleaved import Stopper
from test_speculative import answer as answer_with

NUM_CODES = 48
SIZE = {"height": 12, "width": 16}
SAMPLED = {"do_sample": True, "image_temperature": 0.8, "image_top_k": 30, "image_top_p": 0.95, "temperature": 1.2}
#: Without chance: greedy predictions, from masks, the most confident first.
GREEDY = {"do_sample": False, "scheduler": DiDAScheduler(NUM_CODES, path="absorbing", jump="confidence")}


class Spy(DiDAScheduler):
    """Keeps what its steps, and those of its copies, were given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def step(self, logits, t, codes, *args, **kwargs):
        self.calls.append((logits.clone(), float(t), codes.clone()))
        return super().step(logits, t, codes, *args, **kwargs)


class Rows:
    """The number of rows, and of columns, of each pass through the decoder."""

    def __init__(self, model):
        self.shapes = []
        self.handle = model.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self):
        return self.shapes

    def __exit__(self, *_):
        self.handle.remove()


@pytest.fixture(scope="module")
def model(shared_tiny_model):
    return shared_tiny_model


@pytest.fixture(scope="module")
def talker(make_tiny_model):
    """A random model that begins images, and stops, about as often as a trained one. Sizes have one digit a side."""
    model = make_tiny_model(token_layout={"size_digits": [1, 1]})
    model.lm_head.weight.data[model.config.token_layout.boi_token_id] *= 4
    return model


@pytest.fixture(scope="module")
def save_adapter(tmp_path_factory):
    """`save_adapter(model, scheduler, seed)`: the folder of a random adapter that changes much."""

    def save(model, scheduler=None, seed=0, targets=r".*layers.*\.(q_proj|v_proj|down_proj)", folder=None):
        folder = tmp_path_factory.mktemp("adapter") if folder is None else folder
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(folder)
        (scheduler or DiDAScheduler(NUM_CODES)).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def adapter(save_adapter, model):
    return save_adapter(model)


@pytest.fixture
def adapted(tiny_model, adapter):
    tiny_model.load_dida_adapter(adapter)
    return tiny_model


def answer(model, **settings):
    return answer_with(
        model, "dida", **{"allow_unadapted": True, "num_inference_steps": 4, "do_sample": True, **settings}
    )


def grids(output, model):
    images = [last_image(ids.tolist(), model.config.token_layout) for ids in output.sequences]
    return torch.tensor([image.codes for image in images])


# --- a step ---


def block_logits(model, prefix, codes, grid):
    """Logits `(n, num_codes)` of one row's noisy codes: one pass over prefix, another clean image, and the block."""
    layout = model.config.token_layout
    image = layout.image_token_ids((codes.view(grid) + layout.visual_token_offset).tolist())
    block = image[image.index(layout.img_token_id) : -1]
    clean = image_ids(model, *grid, seed=9)[-1 - len(block) :]  # IMG, codes, EOLs and EOI
    start, end = len(prefix), len(prefix) + len(clean)
    ids = torch.tensor([*prefix, *clean, *block])
    sees = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    sees[end:, start:end] = False
    sees[end:, end:] = True
    positions = torch.cat([torch.arange(end), start + torch.arange(len(block))])
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    with torch.no_grad():
        hidden_states = model.model(
            input_ids=ids[None], position_ids=positions[None], attention_mask={"full_attention": mask[None, None]}
        ).last_hidden_state[0, end:]
    is_code = torch.tensor([layout.visual_token_offset <= one < layout.visual_token_end for one in block[1:]])
    return model.compute_logits(hidden_states[:-1][is_code], "visual")


def expected_scores(model, rows, guidance, codes, grid, guidance_scale):
    layout = model.config.token_layout
    size = [layout.boi_token_id, *layout.size_token_ids(*grid)]
    scores = []
    for row, own in zip(rows, codes, strict=True):
        streams = [text_prompt(model, row, 3 + row), *(one for one in streams_of(model, guidance, row) if one)]
        logits = [block_logits(model, stream + size, own, grid) for stream in streams]
        scores.append(guide(logits, guidance_scale, GUIDANCE[guidance].get("image_guidance_scale")).log_softmax(-1))
    return torch.stack(scores)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_a_step_equals_an_uncached_pass(model, guidance, attention):
    spy = Spy(NUM_CODES)
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    rows = (0, 1, 2) if guidance != "none" else (1,)  # one row alone has no padding, so that there is no mask
    answers, output = answer(model, rows=rows, guidance=guidance, seed=0, scheduler=spy, num_inference_steps=2, **SIZE)
    assert output.num_forward_passes == 3 and [t for _, t, _ in spy.calls] == [0, 0.5]
    scale = GUIDANCE[guidance].get("guidance_scale", 1)
    for scores, _, codes in spy.calls:
        expected = expected_scores(model, rows, guidance, codes, (3, 4), scale)
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-4)
    assert {len(ids) for ids in answers} == {model.config.token_layout.num_image_tokens(3, 4)}


def test_filters_come_before_the_step(model):
    spy = Spy(NUM_CODES)
    answer(model, guidance="one", seed=0, scheduler=spy, **SIZE, do_sample=True, image_top_k=5, image_temperature=0.5)
    scores, _, codes = spy.calls[0]
    expected = expected_scores(model, (0, 1, 2), "one", codes, (3, 4), 2.5)
    assert (scores.isfinite().sum(-1) == 5).all()
    expected = torch.where(scores.isfinite(), expected / 0.5, float("-inf")).log_softmax(-1)
    torch.testing.assert_close(scores, expected, atol=5e-5, rtol=1e-4)


def test_guidance_moves_with_time_and_ends(model):
    spy = Spy(NUM_CODES)
    settings = {"guidance": "one", "seed": 0, "scheduler": spy, **SIZE}
    with Rows(model) as shapes:
        answer(model, **settings, guidance_scale_end=4.5, guidance_cutoff=0.75)
    assert [rows for rows, _ in shapes] == [6, 6, 6, 6, 3] and {columns for _, columns in shapes[1:]} == {15}
    assert [t for _, t, _ in spy.calls] == [0, 0.25, 0.5, 0.75]
    for (scores, _, codes), scale in zip(spy.calls, (2.5, 3.0, 3.5, 1.0), strict=True):
        expected = expected_scores(model, (0, 1, 2), "one", codes, (3, 4), scale)
        torch.testing.assert_close(scores, expected, atol=5e-5, rtol=1e-4)
    # A scale that only ends above 1 is guidance as well.
    with Rows(model) as shapes:
        answer(model, **settings, guidance_scale=1, guidance_scale_end=2.0)
    assert {rows for rows, _ in shapes} == {6}


@pytest.mark.parametrize(("steps", "cutoff", "guided"), [(10, 0.7, 7), (20, 0.35, 7), (4, 0.76, 4), (4, 1.0, 4)])
def test_guidance_ends_with_the_step_that_begins_at_the_cutoff(model, steps, cutoff, guided):
    """0.7 in float32 is less than 0.7."""
    with Rows(model) as shapes:
        answer(model, guidance="two", seed=0, num_inference_steps=steps, guidance_cutoff=cutoff, **SIZE)
    assert [rows for rows, _ in shapes[1:]] == [9] * guided + [3] * (steps - guided)


# --- images ---


@pytest.mark.parametrize("path", ["metric", "mixture", "absorbing"])
def test_batched_equals_single(model, path):
    scheduler = DiDAScheduler(NUM_CODES, path=path)
    settings = {**SAMPLED, **SIZE, "guidance": "two", "scheduler": scheduler}
    together, output = answer(model, **settings, seed=3)
    single = [answer(model, **settings, seed=3, rows=(row,)) for row in range(3)]
    assert together == [answers[0] for answers, _ in single]
    assert output.num_forward_passes == 5 == output.image_statistics[0][0].num_passes
    assert together == answer(model, **settings, seed=3)[0] != answer(model, **settings, seed=4)[0]


def test_one_greedy_step_takes_the_likeliest_codes(model):
    settings = {**GREEDY, **SIZE, "guidance": "one", "num_inference_steps": 1}
    spy = Spy(NUM_CODES, path="absorbing")
    _, output = answer(model, **{**settings, "scheduler": spy}, seed=0)
    assert (spy.calls[0][2] == NUM_CODES).all()
    assert torch.equal(grids(output, model), spy.calls[0][0].argmax(-1))
    assert torch.equal(grids(answer(model, **settings, seed=5)[1], model), grids(output, model))


def test_given_codes_stay_and_are_seen_from_above(model):
    codes, mask = random_codes(model, 4, 5), mask_of("x...x/xxxxx/.xxx./x....")
    for settings in (SAMPLED, GREEDY):
        _, output = answer(model, image=codes, mask=mask, guidance="one", seed=1, **settings)
        made = grids(output, model).view(3, 4, 5)
        assert all(torch.equal(one[~mask], codes[~mask]) for one in made)
    other = codes.clone()
    other[3, 4] = (other[3, 4] + 1) % NUM_CODES  # the last one
    _, changed = answer(model, image=other, mask=mask, guidance="one", seed=1, **GREEDY)
    assert (grids(changed, model).view(3, 4, 5) != made)[:, :2].any()


def test_rows_with_different_codes_given(model):
    codes = [random_codes(model, 3, 4, seed) for seed in range(3)]
    masks = [mask_of("..../..xx/xxxx"), mask_of("xxxx/xxxx/xxx."), mask_of("..../..../.x..")]
    settings = {"guidance": "one", "seed": 2, **SAMPLED}
    together, _ = answer(model, image=codes, mask=masks, **settings)
    for row in range(3):
        own = {"image": codes[row], "mask": masks[row], **settings}
        assert answer(model, rows=(row,), **own)[0] == [together[row]]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("guidance", ["none", "two"])
def test_answers_cut_anywhere_are_continued(model, guidance, cached):
    settings = {**SAMPLED, **SIZE, "guidance": guidance, "rows": (1,)}
    (whole,), _ = answer(model, **settings, seed=7)
    for cut in (5, 6, 9, 10, 11, 18, 19):
        (first,), output = answer(model, **settings, seed=7, max_new_tokens=cut, return_past_key_values=cached)
        assert first == whole[:cut] and not output.finished.any()
        rest = [
            model.generate(
                **(output.next_inputs() | ({} if use else {"past_key_values": None})),
                **{"generation_mode": "image", **GUIDANCE[guidance], **SAMPLED, **SIZE, "image_decoder": decoder},
                allow_unadapted=True,
                generator=torch.Generator().manual_seed(1),
            )
            for decoder in ("dida", "ar")
            for use in {False, cached}
        ]
        assert all(one.finished.all() for one in rest)
        for one in rest:
            assert one.sequences[0, -len(whole) :][:cut].tolist() == first
        assert len({tuple(one.sequences[0].tolist()) for one in rest}) <= 2  # the same with and without the cache
        if cut == 19:
            assert rest[0].sequences[0, -len(whole) :].tolist() == whole and rest[0].num_forward_passes == 0


def test_steps_are_shown(model):
    for path in ("metric", "absorbing"):
        seen = []
        scheduler = DiDAScheduler(NUM_CODES, path=path)
        _, output = answer(
            model, **SIZE, seed=0, scheduler=scheduler, on_step=lambda *step, seen=seen: seen.append(step)
        )
        assert [step for step, _ in seen] == [0, 1, 2, 3] and {codes.shape for _, codes in seen} == {(3, 3, 4)}
        assert all(codes.min() >= 0 and codes.max() < NUM_CODES for _, codes in seen)
        assert torch.equal(seen[-1][1].flatten(1), grids(output, model))


# --- verified codes ---

GREEDY_AR = {"do_sample": False}
VERIFIED = {**GREEDY, "verify_codes": True}


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_verified_greedy_images_are_those_of_ar(talker, save_adapter, guidance, mode):
    """Whatever a random adapter proposes; in answers with text, too, and with the cache of the clean tokens."""
    model = copy.deepcopy(talker)
    model.load_dida_adapter(save_adapter(model))
    settings = {"guidance": guidance, "generation_mode": mode, "return_past_key_values": True}
    settings |= SIZE if mode == "image" else {"max_new_tokens": 90, "max_images": 2}
    expected, exact = answer_with(model, "ar", **GREEDY_AR, **settings)
    answers, output = answer(model, **VERIFIED, **settings)
    assert answers == expected
    assert sum(map(len, output.image_statistics)) == sum(map(len, exact.image_statistics)) >= 3
    for one, other in zip(keys_and_values(output), keys_and_values(exact), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_what_the_filters_allow_stays(model):
    """Without filters nothing is excluded: the same images, for one pass more."""
    settings = {**SIZE, "guidance": "one", "seed": 0}
    plain, output = answer(model, **settings)
    verified, checked = answer(model, **settings, verify_codes=True)
    assert verified == plain
    assert checked.num_forward_passes == output.num_forward_passes + 1


@pytest.mark.parametrize("filters", [{"image_top_k": 3}, {"image_top_p": 0.2}], ids=str)
def test_no_verified_code_is_outside_the_filters(model, filters):
    settings = {**SIZE, "guidance": "one", "seed": 0, "image_temperature": 0.8, **filters}
    settings |= {"scheduler": DiDAScheduler(NUM_CODES, path="absorbing", temperature=1.0)}

    def excluded(verify_codes):
        """Codes of all images that the sampler gives no probability after those before them."""
        answers, output = answer(model, **settings, verify_codes=verify_codes)
        count = 0
        for row, codes in enumerate(grids(output, model)):
            for place in range(len(codes)):
                streams = [[*prompt, *answers[row][: place + place // 4 + 5]] for prompt in prompts_of(model, row)]
                with torch.no_grad():
                    hidden = [model.model(torch.tensor([ids])).last_hidden_state[:, -1] for ids in streams]
                logits = model.compute_logits(guide(hidden, 2.5), vocabulary="visual")
                count += float(sampler_of(settings).distribution(logits)[0, codes[place]]) == 0
        return count

    assert excluded(True) == 0 < excluded(False)


def prompts_of(model, row):
    """The conditional and the unconditional prompt of `answer(guidance="one")`."""
    return text_prompt(model, row, 3 + row), streams_of(model, "one", row)[0]


def sampler_of(settings):
    return Sampler(True, settings["image_temperature"], settings.get("image_top_k"), settings.get("image_top_p"))


def test_verified_rows_do_not_depend_on_their_batch(model):
    settings = {**SIZE, "guidance": "two", "do_sample": True, "image_top_k": 4, "seed": 5, "verify_codes": True}
    together, _ = answer(model, **settings)
    assert together == [answer(model, rows=(row,), **settings)[0][0] for row in range(3)]


def test_given_codes_are_not_verified(model):
    codes, mask = random_codes(model, 4, 5), mask_of("x...x/xxxxx/.xxx./x....")
    expected = answer_with(model, "ar", image=codes, mask=mask, guidance="one", **GREEDY_AR)[0]
    answers, output = answer(model, image=codes, mask=mask, guidance="one", **VERIFIED)
    assert answers == expected
    assert all(torch.equal(one[~mask], codes[~mask]) for one in grids(output, model).view(3, 4, 5))


@pytest.mark.parametrize("cut", [5, 6, 9, 10, 11, 18, 19])
def test_verified_answers_may_be_cut(model, cut):
    settings = {**SIZE, "guidance": "one", **VERIFIED}
    whole = answer_with(model, "ar", guidance="one", **SIZE, **GREEDY_AR)[0]
    first, output = answer(model, max_new_tokens=cut, return_past_key_values=True, **settings)
    assert first == [ids[:cut] for ids in whole]
    rest = model.generate(
        **output.next_inputs(),
        **{"generation_mode": "image", **GUIDANCE["one"], **SIZE, **VERIFIED},
        image_decoder="dida",
        allow_unadapted=True,
    )
    ends = [ids[-len(own) :].tolist() for ids, own in zip(rest.sequences, whole, strict=True)]
    assert ends == whole


@pytest.mark.parametrize("after", [3, 6, 7])
def test_a_stop_while_codes_are_verified(model, after):
    """During the first steps, and after each step of the second round. Before that are 1 + 4 passes and a check."""
    prompt = torch.tensor([text_prompt(model, 0)])
    settings = {"generation_mode": "image", **VERIFIED, **SIZE, "image_decoder": "dida", "allow_unadapted": True}
    passes, streamer = [], Recorder()

    def count(*_):
        passes.append(0)
        streamer.stop_requested = len(passes) > after

    hook = model.model.register_forward_hook(count)
    output = model.generate(prompt, **settings, streamer=streamer, num_inference_steps=4, return_past_key_values=True)
    hook.remove()
    assert not output.finished.any() and len(passes) == after + 1
    whole = model.generate(prompt, **settings, num_inference_steps=4)
    rest = model.generate(**output.next_inputs(), **settings, num_inference_steps=4)
    assert torch.equal(rest.sequences, whole.sequences)


# --- streaming and stops ---


def test_a_streamer_gets_every_token_and_stops_anywhere(model):
    prompt = torch.tensor([text_prompt(model, 0)])
    settings = {"generation_mode": "image", **GREEDY, **SIZE, "image_decoder": "dida", "allow_unadapted": True}
    recorder = Recorder()
    whole = model.generate(prompt, **settings, streamer=recorder).sequences
    assert recorder.ids == whole[0, prompt.shape[1] :].tolist() and recorder.ended
    for limit in (6, 9, 10, 18):
        stopper = Stopper(limit)
        output = model.generate(prompt, **settings, streamer=stopper, return_past_key_values=True)
        made = output.sequences.shape[1] - prompt.shape[1]
        assert limit <= made <= limit + 1 and torch.equal(output.sequences, whole[:, : output.sequences.shape[1]])
        assert stopper.ids == output.sequences[0, prompt.shape[1] :].tolist()
        rest = model.generate(**output.next_inputs(), **settings)
        assert rest.finished.all() and torch.equal(rest.sequences[:, : output.sequences.shape[1]], output.sequences)


@pytest.mark.parametrize("given", [False, True])
def test_a_stop_between_steps(model, given):
    prompt = torch.tensor([text_prompt(model, 0)])
    settings = {"generation_mode": "image", **GREEDY, "image_decoder": "dida", "allow_unadapted": True}
    settings |= {"image": random_codes(model, 3, 4), "mask": mask_of("..../..xx/xxxx")} if given else SIZE
    streamer = Recorder()

    def stop(step, codes):
        streamer.stop_requested = step == 1

    output = model.generate(prompt, **settings, streamer=streamer, on_step=stop, return_past_key_values=True)
    assert output.num_forward_passes == 3 and not output.finished.any()
    assert output.sequences.shape[1] - prompt.shape[1] == (5 + 4 + 1 + 2 if given else 5)
    assert streamer.ids == output.sequences[0, prompt.shape[1] :].tolist()
    whole = model.generate(prompt, **settings)
    settings = {name: value for name, value in settings.items() if name not in ("image", "mask")}
    assert torch.equal(model.generate(**output.next_inputs(), **settings).sequences, whole.sequences)


# --- interleaved answers ---


def interleaved(model, **settings):
    options = {"generation_mode": "interleaved", "max_new_tokens": 90, "max_images": 3, "rows": (0, 1, 2), "seed": 0}
    return answer(model, **{**options, **SAMPLED, **settings})


@pytest.mark.parametrize(("guidance", "cutoff"), [*((guidance, None) for guidance in GUIDANCE), ("two", 0.5)])
def test_the_cache_is_that_of_the_clean_tokens(talker, save_adapter, guidance, cutoff):
    """Of all streams, those that the last steps of an image left out, too."""
    model = copy.deepcopy(talker)
    model.load_dida_adapter(save_adapter(model))
    settings = {"max_new_tokens": 250, "return_past_key_values": True, "guidance_cutoff": cutoff}
    answers, output = interleaved(model, guidance=guidance, **settings)
    layout = model.config.token_layout
    assert max(ids.count(layout.eoi_token_id) for ids in answers) >= 2
    computed = 0
    for streams in output.past_key_values.rows:
        for prefix in streams:
            with torch.no_grad():
                expected = model.model(torch.tensor([prefix.ids]), use_cache=True).past_key_values
            for layer, own in zip(expected.layers, prefix.cache.layers, strict=True):
                torch.testing.assert_close(own.keys, layer.keys, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(own.values, layer.values, atol=1e-5, rtol=1e-4)
            computed += prefix.ids.count(layout.eoi_token_id)
    assert computed >= 2  # images and what follows them are in it


def test_text_goes_on_from_the_clean_image(talker):
    """What follows a dida image is what follows the same image in the prompt."""
    (ids,), output = interleaved(talker, rows=(1,), max_images=1, do_sample=False)
    end = ids.index(talker.config.token_layout.eoi_token_id) + 1
    assert end < len(ids)
    prompt = [*text_prompt(talker, 1, 4), *ids[:end]]
    rest = talker.generate(
        torch.tensor([prompt]), generation_mode="interleaved", do_sample=False, max_images=1, max_new_tokens=90 - end
    )
    assert rest.sequences[0, len(prompt) :].tolist() == ids[end:]
    # A pass for each token of the text (the one after the image is over all of that), one for the prefix of the
    # image, and four steps. What the size forces comes without a pass.
    text = ids.index(talker.config.token_layout.boi_token_id) + 1 + 2 + len(ids) - end
    assert output.num_forward_passes == text + 1 + 4


# --- the adapter ---


def keys_and_values(output):
    return [
        tensor
        for streams in output.past_key_values.rows
        for prefix in streams
        for layer in prefix.cache.layers
        for tensor in (layer.keys, layer.values)
    ]


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_text_and_ar_images_are_the_same_to_the_bit(model, adapted, mode):
    settings = {**SAMPLED, "generation_mode": mode, "seed": 0, "guidance": "one", "return_past_key_values": True}
    settings |= {"max_new_tokens": 40, "max_images": 2} if mode != "image" else SIZE
    expected, plain = answer_with(model, "ar", **settings)
    answer(adapted, seed=1, guidance="one", **SIZE)
    answers, output = answer_with(adapted, "ar", **settings)
    assert answers == expected
    assert all(torch.equal(*pair) for pair in zip(keys_and_values(plain), keys_and_values(output), strict=True))
    ids = torch.tensor([expected[0]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, adapted(ids).logits)


def test_the_adapter_changes_images_only_in_their_steps(model, adapted):
    spy = Spy(NUM_CODES)
    settings = {**SIZE, **SAMPLED, "seed": 0, "guidance": "one", "scheduler": spy, "return_past_key_values": True}
    _, plain = answer(model, **settings)
    _, output = answer(adapted, **settings, allow_unadapted=False)
    assert (grids(plain, model) != grids(output, model)).any()
    first, fourth = spy.calls[0], spy.calls[4]
    assert torch.equal(first[2], fourth[2]) and not torch.equal(first[0], fourth[0])  # the first step of each
    assert all(torch.equal(*pair) for pair in zip(keys_and_values(plain), keys_and_values(output), strict=True))


def test_other_adapters_stay_as_they_are(tiny_model, adapter, save_adapter):
    other = save_adapter(tiny_model, seed=1)
    tiny_model.load_adapter(str(other), adapter_name="user", is_trainable=True)
    tiny_model.set_adapter("user")
    before, _ = answer_with(tiny_model, "ar", **SIZE, do_sample=False)
    alone, _ = answer(tiny_model, **SIZE, **GREEDY)
    tiny_model.load_dida_adapter(adapter)

    def state():
        return tiny_model.active_adapters(), [parameter.requires_grad for parameter in tiny_model.parameters()]

    now = state()
    assert now[0] == ["user"]
    assert answer_with(tiny_model, "ar", **SIZE, do_sample=False)[0] == before
    both, _ = answer(tiny_model, **SIZE, **GREEDY)
    assert state() == now and both != alone
    with dida_adapter(tiny_model):
        assert tiny_model.active_adapters() == ["user", "dida"]
        with dida_adapter(tiny_model):
            assert tiny_model.active_adapters()[0] == "user"
        assert tiny_model.active_adapters() == ["user", "dida"]
    tiny_model.disable_adapters()
    with dida_adapter(tiny_model):
        assert tiny_model.active_adapters() == ["dida"]
    assert answer(tiny_model, **SIZE, **GREEDY)[0] not in (both, alone)
    assert all(layer.disable_adapters for layer in tiny_model.modules() if hasattr(layer, "lora_A"))


def test_the_adapter_is_off_after_an_error(adapted, monkeypatch):
    forward = adapted.model.layers[1].forward

    def fail_in_steps(*args, **kwargs):
        if adapted.active_adapters() == ["dida"]:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(adapted.model.layers[1], "forward", fail_in_steps)
    with pytest.raises(KeyboardInterrupt):
        answer(adapted, **SIZE)
    assert adapted.active_adapters() == []


def test_adapters_are_replaced_and_saved_schedulers_used(adapted, save_adapter, model):
    first, _ = answer(adapted, **SIZE, seed=0)
    adapted.load_dida_adapter(save_adapter(model, DiDAScheduler(NUM_CODES, path="mixture", time_shift=0.5), seed=2))
    assert adapted.dida_scheduler.config.path == "mixture" and adapted.dida_scheduler.config.time_shift == 0.5
    second, _ = answer(adapted, **SIZE, seed=0)
    assert first != second and list(adapted.peft_config) == ["dida"]


def test_a_checkpoint_that_was_adapted_as_a_whole(tiny_model, tmp_path):
    tiny_model.config.dida_adapted = True
    tiny_model.save_pretrained(tmp_path)
    model = Emu35ForConditionalGeneration.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="has no scheduler_config"):
        answer(model, **SIZE, allow_unadapted=False)
    DiDAScheduler(NUM_CODES, path="mixture").save_pretrained(tmp_path)
    answers, _ = answer(model, **SIZE, seed=0, allow_unadapted=False)
    scheduler = DiDAScheduler(NUM_CODES, path="mixture")
    assert answers == answer(tiny_model, **SIZE, seed=0, scheduler=scheduler, allow_unadapted=False)[0]


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` must be a whole number of at least 1, got 0"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` must be a whole number of at least 1"),
        ({"num_inference_steps": None}, "`num_inference_steps` must be a whole number of at least 1"),
        ({"guidance_cutoff": 0}, "`guidance_cutoff` must lie in (0, 1], got 0"),
        ({"guidance_cutoff": 1.5}, "`guidance_cutoff` must lie in (0, 1], got 1.5"),
        ({"guidance_scale_end": -1}, "`guidance_scale_end` must be at least 0"),
        ({"allow_unadapted": False}, "`model.load_dida_adapter(FOLDER)`"),
        ({"scheduler": DiDAScheduler(32)}, "`num_codes`=32, but the model 48 visual tokens"),
        ({"scheduler": object()}, "`scheduler` must be a `DiDAScheduler`, got object"),
        ({"scheduler": DiDAScheduler(NUM_CODES), "decoder": "ar"}, "`scheduler` is for making images with"),
        ({"on_step": print, "decoder": "ar"}, "`on_step` is for making images with"),
        ({"image": torch.zeros(3, 4).long(), "mask": torch.ones(2, 4).bool(), **GREEDY}, "`mask` has 2*4 codes"),
    ],
)
def test_bad_settings(model, settings, message):
    with pytest.raises(ValueError) as error:
        answer_with(model, **{"decoder": "dida", "allow_unadapted": True, **SIZE, **settings})
    assert message in str(error.value)


def test_damaged_logits_are_told(tiny_model):
    tiny_model.lm_head.weight.data[tiny_model.config.token_layout.visual_token_offset] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite logits in rows"):
        answer(tiny_model, **SIZE)


def test_bad_adapters(tiny_model, adapter, save_adapter, make_tiny_model, tmp_path):
    before, _ = answer_with(tiny_model, "ar", **SIZE, do_sample=False)
    with pytest.raises(FileNotFoundError, match="it lacks adapter_config"):
        tiny_model.load_dida_adapter(tmp_path)
    with pytest.raises(ValueError, match="may change the decoder only"):
        tiny_model.load_dida_adapter(save_adapter(tiny_model, targets=["lm_head"]))
    with pytest.raises(ValueError, match="`num_codes`=32, but the model 48"):
        tiny_model.load_dida_adapter(save_adapter(tiny_model, DiDAScheduler(32)))
    for other in ({"hidden_size": 48}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}):
        with pytest.raises(ValueError, match="does not fit this model"):
            tiny_model.load_dida_adapter(save_adapter(make_tiny_model(**other)))
        with pytest.raises(ValueError, match="this one has no adapter"):
            answer(tiny_model, **SIZE, allow_unadapted=False)
    assert answer_with(tiny_model, "ar", **SIZE, do_sample=False)[0] == before
    tiny_model.load_dida_adapter(adapter)


# --- the command line ---


@pytest.fixture(scope="module")
def checkpoint(model, tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = copy.deepcopy(model)
    model.generation_config = Emu35GenerationConfig(do_sample=True, guidance_scale=2.0, height=16, width=12)
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("decoder", [("speculative", "--window", 3, "--coupling", "none"), ("dida", "--steps", 3)])
def test_commands_pass_settings_on(checkpoint, adapter, decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls = []
    generate = Emu35ForConditionalGeneration.generate
    monkeypatch.setattr(
        Emu35ForConditionalGeneration,
        "generate",
        lambda self, **kwargs: calls.append(kwargs) or generate(self, **kwargs),
    )
    options = ["--model", checkpoint, "--image-decoder", *decoder]
    options += ["--adapter", adapter] if decoder[0] == "dida" else []
    assert cli.main([str(one) for one in ("generate", "a red fox", *options)]) == 0
    evaluation = ("eval", "--num", 1, "--output", "result.json")
    assert cli.main([str(one) for one in (*evaluation, *options)]) == 0
    story = ("story", "a red fox", "--max-new-tokens", 30)
    assert cli.main([str(one) for one in (*story, *options)]) == 0
    expected = {"image_decoder": decoder[0]}
    expected |= {"speculative_window": 3, "coupling": "none"} if len(decoder) > 3 else {"num_inference_steps": 3}
    settings = json.loads((tmp_path / "result.json").read_text())["settings"]
    assert {name: settings[name] for name in expected} == expected
    told = [calls[0], vars(calls[1]["generation_config"]), calls[-1]]
    assert [{name: one[name] for name in expected} for one in told] == [expected] * 3


def test_options_of_other_decoders_are_refused(checkpoint, adapter, capsys):
    for options, name in (
        (("--steps", "3"), "--steps is for --image-decoder dida"),
        (("--adapter", str(adapter), "--image-decoder", "ar"), "--adapter is for --image-decoder dida"),
        (("--window", "3", "--image-decoder", "dida"), "--window is for --image-decoder speculative"),
        (("--image-decoder", "dida"), "this one has no adapter"),
    ):
        assert cli.main(["generate", "a red fox", "--model", checkpoint, *options]) == 2
        assert name in capsys.readouterr().err
    assert cli.main(["eval", "--task", "vqa", "--model", checkpoint, "--image-decoder", "dida"]) == 2
    assert "--image-decoder is about making images" in capsys.readouterr().err


@pytest.mark.parametrize("delete", [False, True])
def test_a_model_is_saved_without_the_adapter(adapted, model, delete, tmp_path):
    if delete:
        adapted.delete_adapter("dida")
    adapted.save_pretrained(tmp_path)
    again = Emu35ForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    if not delete:  # and it is still there
        assert answer(adapted)[0] != answer(model)[0]


def test_weights_with_the_adapter_in_them_do_what_the_adapter_does(adapted, monkeypatch):
    ids = torch.arange(40, 60)[None]
    plain = adapted(ids).logits
    with dida_adapter(adapted):
        merged = adapted(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(dida_emu35, "MERGED_BYTES", 0)
        with dida_adapter(adapted):
            apart = adapted(ids).logits
    assert (apart - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, apart, atol=1e-4, rtol=1e-4)
    assert torch.equal(adapted(ids).logits, plain)
    # Another adapter under the same name, or one that was trained on, is noticed.
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    with dida_adapter(adapted):
        assert (adapted(ids).logits - merged).abs().max() > 0.1


def test_the_weights_of_a_replaced_adapter_are_not_used_again(adapted, save_adapter, model):
    ids = torch.arange(40, 60)[None]
    for seed in range(3, 7):  # a new adapter may lie in memory where the old one was
        adapted.load_dida_adapter(save_adapter(model, seed=seed))
        with dida_adapter(adapted):
            merged = adapted(ids).logits
        adapted._dida_weights = (None, {})
        with dida_adapter(adapted):
            assert torch.equal(adapted(ids).logits, merged)
