"""The speculative decoder: its distribution against the exact one, and all that it shares with `ar`."""

import emu35
import pytest
import torch
from emu35 import Emu35ForConditionalGeneration, Emu35Processor, speculative_emu35
from emu35.decoding_emu35 import IMAGE_DECODERS, ImageRequest, TokenStream, pad_left
from emu35.image_tokens_emu35 import last_image
from emu35.sampling_emu35 import Sampler, guide
from test_generation import GUIDANCE, Recorder, generate, streams_of, text_prompt
from test_image_mask import mask_of, random_codes
from test_interleaved import Stopper

COUPLINGS = ("none", "maximal", "gumbel")
NUM_CODES, GRID = 3, (2, 3)


def chi_square_limit(freedom):
    """The 99 % quantile (Wilson and Hilferty's approximation, good to 0.1 % from 30 degrees of freedom on)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 2.3263 * part**0.5) ** 3


def is_drawn_from(samples, probabilities, pool=5.0):
    """Whether cells `samples` `(n,)` pass the chi-square test at 1 %; rare cells are pooled."""
    counts = torch.bincount(samples, minlength=len(probabilities)).double()
    assert len(counts) == len(probabilities) and abs(float(probabilities.sum()) - 1) < 1e-6
    if counts[probabilities < 1e-12].sum() > 0:
        return False
    expected = probabilities * len(samples)
    rare = expected < pool
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 1e-9], expected[expected > 1e-9]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return statistic < chi_square_limit(len(expected) - 1)


@pytest.fixture(scope="module")
def small_model(make_tiny_model):
    """Three codes, so that all images of 2 x 3 can be listed."""
    return make_tiny_model(
        seed=3, token_layout={"num_visual_tokens": NUM_CODES}, vision_tokenizer_config=None, hidden_size=16,
        intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_hidden_layers=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(shared_tiny_model):
    return shared_tiny_model


def beginnings(model, num_streams):
    """What stands before the grid in each guidance stream; of different lengths."""
    layout = model.config.token_layout
    image = [layout.boi_token_id, *layout.size_token_ids(*GRID), layout.img_token_id]
    return [[*text_prompt(model, 7 + stream, 4 - stream), *image] for stream in range(num_streams)]


def exact_distribution(model, sampler, guidance_scale=1.0, image_guidance_scale=None, given=None):
    """Probabilities `(NUM_CODES ** 6,)` of all images, by a plain forward pass over each of them."""
    layout, total = model.config.token_layout, GRID[0] * GRID[1]
    grids = torch.cartesian_prod(*[torch.arange(NUM_CODES)] * total)
    ids = (grids + layout.visual_token_offset).view(-1, *GRID)
    ids = torch.cat([ids, torch.full_like(ids[:, :, :1], layout.eol_token_id)], dim=2).flatten(1)[:, :-1]
    num_streams = 1 if guidance_scale == 1 else 2 if image_guidance_scale is None else 3
    logits = []
    for beginning in beginnings(model, num_streams):
        whole = torch.cat([torch.tensor(beginning).expand(len(ids), -1), ids], dim=1)
        with torch.no_grad():
            all_logits = model(input_ids=whole, vocabulary="visual").logits
        places = torch.tensor([index + index // GRID[1] for index in range(total)])
        logits.append(all_logits[:, len(beginning) - 1 + places].flatten(0, 1))
    scores = guide(logits, guidance_scale, image_guidance_scale).double()
    steps = sampler.distribution(scores.float()).double().view(len(grids), total, NUM_CODES)
    steps = steps.gather(-1, grids[..., None])[..., 0]
    if given is not None:
        steps = torch.where(given < 0, steps, (grids == given).double())
    return steps.prod(-1)


def sample(
    model,
    count,
    sampler,
    guidance_scale=1.0,
    image_guidance_scale=None,
    given=None,
    seed=0,
    decoder="speculative",
    **settings,
):
    """Cells `(count,)` of as many images, which are rows of one batch."""
    num_streams = 1 if guidance_scale == 1 else 2 if image_guidance_scale is None else 3
    rows = [one for one in beginnings(model, num_streams) for _ in range(count)]
    total = GRID[0] * GRID[1]
    given = torch.full((total,), -1) if given is None else given
    request = ImageRequest(
        *GRID,
        given=given.expand(count, -1),
        num_cached=0,
        sampler=sampler,
        guidance_scale=guidance_scale,
        image_guidance_scale=image_guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        **settings,
    )
    codes = IMAGE_DECODERS[decoder](TokenStream(model, *pad_left(rows, "cpu")), request)
    if decoder == "speculative" and settings.get("speculative_window") != 1:
        assert sum(one.num_passes for one in request.statistics) < 0.9 * count * int((given < 0).sum())
    return (codes * NUM_CODES ** torch.arange(total - 1, -1, -1)).sum(-1)


CASES = {
    "plain": {"sampler": Sampler()},
    "guidance": {"sampler": Sampler(temperature=1.5), "guidance_scale": 1.7},
    "top-k": {"sampler": Sampler(temperature=2.0, top_k=2), "guidance_scale": 1.7},
    "two scales, top-p": {
        "sampler": Sampler(temperature=1.2, top_p=0.8), "guidance_scale": 1.5, "image_guidance_scale": 1.2
    },
    "given": {
        "sampler": Sampler(temperature=1.3), "guidance_scale": 1.7, "given": torch.tensor([-1, 2, -1, -1, 0, -1])
    },
    "given row": {"sampler": Sampler(temperature=1.3), "given": torch.tensor([-1, -1, -1, 1, 0, 2])},
}  # fmt: skip


def is_exact(small_model, case, coupling, window, seeds=(0,)):
    settings = {**CASES[case], "coupling": coupling, "speculative_window": window}
    samples = [sample(small_model, 10_000, **settings, seed=seed) for seed in seeds]
    return is_drawn_from(torch.cat(samples), exact_distribution(small_model, **CASES[case]))


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(("case", "window"), [("plain", 3), ("guidance", 6), ("top-k", 4), ("given", 2)])
def test_distribution_is_exact(small_model, case, window, coupling):
    assert is_exact(small_model, case, coupling, window)


@pytest.mark.slow
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [2, 6])
def test_distribution_is_exact_in_many_samples(small_model, case, window, coupling):
    # At 1 %, one of these 36 cases fails every third time with an exact decoder. It won't with as many new samples.
    assert is_exact(small_model, case, coupling, window, range(10)) or is_exact(
        small_model, case, coupling, window, range(10, 20)
    )


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_without_the_residual_the_distribution_is_wrong(small_model, coupling, monkeypatch):
    """What the tests above can see: rejected guesses are replaced from p instead."""
    monkeypatch.setattr(speculative_emu35._Distributions, "minus", lambda p, q, where: p)
    exact = exact_distribution(small_model, **CASES["plain"])
    assert not is_drawn_from(sample(small_model, 10_000, **CASES["plain"], coupling=coupling), exact)


@pytest.mark.parametrize("case", CASES)
def test_ar_has_the_same_distribution(small_model, case):
    """The yardstick itself."""
    exact = exact_distribution(small_model, **CASES[case])
    assert is_drawn_from(sample(small_model, 10_000, **CASES[case], decoder="ar"), exact)


@pytest.mark.parametrize("listed", [True, False])
def test_noise_of_a_place_draws_from_its_distribution(listed):
    """... and is the same in every pass, whatever other codes there are; that of places and codes is independent."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    codes = torch.tensor([131_071, 7, 0, 4000]) if listed else None
    seeds = torch.randint(2**48, (1, 100_000), generator=generator)

    def noisiest(probabilities, codes, seeds):
        shape = (*seeds.shape, len(probabilities))
        codes = None if codes is None else codes.expand(shape)
        of = speculative_emu35._Distributions(probabilities.expand(shape), codes, 131_072 if listed else 4)
        return speculative_emu35._noisiest(of, seeds)

    choices = noisiest(probabilities, codes, seeds)
    assert is_drawn_from(choices[0], probabilities.double())
    pairs = choices[0].view(-1, 2)
    assert is_drawn_from(pairs[:, 0] * 4 + pairs[:, 1], torch.outer(probabilities, probabilities).flatten().double())
    # Seeds in a row, as a bad hash would mix them up, and less than all of the codes.
    choices = noisiest(probabilities, codes, torch.arange(100_000)[None])
    assert is_drawn_from(choices[0], probabilities.double())
    if listed:
        fewer = noisiest(probabilities[[3, 2]], codes[[3, 2]], torch.arange(100_000)[None])
        stayed = (choices == 2) | (choices == 3)
        assert torch.equal(fewer[stayed], 3 - choices[stayed])


def test_the_distribution_over_a_few_codes_is_that_over_all():
    """Rejected guesses are replaced from the same distribution, whether top-k lists its codes or not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 9, generator=generator)
    sampler = Sampler(top_k=5, top_p=0.8)
    p, q = (speculative_emu35._Distributions.of_scores(one, sampler) for one in logits)
    dense = [sampler.distribution(one) for one in logits]
    slots = torch.tensor([[0, 3], [1, 1], [3, 2]])
    where = torch.tensor([[True, False], [True, True], [False, True]])
    left = p.take(slots).minus(q.take(slots), where)
    expected = [one.gather(1, slots[..., None].expand(-1, -1, 9)) for one in dense]
    expected = torch.where(where[..., None], (expected[0] - expected[1]).clamp(min=0), expected[0])
    torch.testing.assert_close(torch.zeros(3, 2, 9).scatter_(-1, left.columns, left.values), expected)
    codes = torch.randint(9, (3, 4), generator=generator)
    torch.testing.assert_close(p.of(codes), dense[0].gather(-1, codes[..., None])[..., 0])
    same = p.minus(p, torch.ones(3, 4, dtype=torch.bool))
    assert torch.equal(same.values, p.values)


# --- in `generate` ---

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "image_temperature": 0.7, "image_top_k": 20, "temperature": 1.2}


def answer(model, decoder="speculative", rows=(0, 1, 2), guidance="none", seed=None, suffixes=None, **settings):
    """Answers to prompts of different lengths, and the output."""
    streams = [streams_of(model, guidance, row) for row in rows]
    negatives, negative_images = (list(column) for column in zip(*streams, strict=True))
    return generate(
        model,
        [text_prompt(model, row, 3 + row) + (suffixes or {}).get(row, []) for row in rows],
        negatives if guidance != "none" else None,
        negative_images if guidance == "two" else None,
        image_decoder=decoder,
        generator=None if seed is None else [torch.Generator().manual_seed(seed + row) for row in rows],
        **{"generation_mode": "image", **GUIDANCE[guidance], **settings},
    )


@pytest.mark.parametrize("window", [1, 5, None])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("size", [{"height": 16, "width": 20}, {"height": 4, "width": 20}], ids=str)
def test_greedy_equals_ar(model, guidance, window, size):
    settings = {**GREEDY, **size, "guidance": guidance, "speculative_window": window}
    expected, slow = answer(model, "ar", **settings)
    answers, output = answer(model, **settings)
    assert answers == expected
    assert slow.image_statistics[0][0].num_passes == slow.num_forward_passes
    assert output.num_forward_passes <= slow.num_forward_passes
    # With less guesses than codes left, every pass but the last settles one more than it has accepted.
    for (one,) in output.image_statistics:
        left = size["height"] * size["width"] // 16 - one.num_passes - one.num_accepted
        assert left in (0, -1) and one.num_drafted <= one.num_passes * (window or 16)
        assert sorted(one.accepted_at, reverse=True) == list(one.accepted_at)


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("limit", [{"image_top_k": 1}, {"image_temperature": 1e-6}, {"image_top_p": 1e-6}], ids=str)
def test_limits_of_sampling_equal_greedy_ar(model, guidance, limit):
    size = {"height": 12, "width": 16, "guidance": guidance}
    expected, _ = answer(model, "ar", **GREEDY, **size)
    for coupling in COUPLINGS:
        assert answer(model, seed=1, do_sample=True, **limit, **size, coupling=coupling)[0] == expected


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_greedy_interleaved_equals_ar(make_tiny_model, guidance):
    """Text and further images go on from what the stream holds."""
    model = make_tiny_model(token_layout={"size_digits": [1, 1]})
    layout = model.config.token_layout
    model.lm_head.weight.data[layout.boi_token_id] *= 4
    settings = {
        "generation_mode": "interleaved",
        "max_new_tokens": 90,
        "max_images": 3,
        "guidance": guidance,
        **GREEDY,
    }
    expected, _ = answer(model, "ar", **settings)
    answers, output = answer(model, **settings)
    assert answers == expected
    assert max(ids.count(layout.eoi_token_id) for ids in answers) >= 2
    assert [len(one) for one in output.image_statistics] == [ids.count(layout.boi_token_id) for ids in answers]


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_batched_equals_single(model, coupling):
    settings = {**SAMPLED, "guidance": "two", "seed": 5, "height": 16, "width": 20, "coupling": coupling}
    together, output = answer(model, **settings, speculative_window=6)
    single = [answer(model, **settings, rows=(row,), speculative_window=6) for row in range(3)]
    assert together == [answers[0] for answers, _ in single]
    assert output.image_statistics == [one.image_statistics[0] for _, one in single]
    # A batch takes as long as its slowest row.
    passes = [one.num_forward_passes for _, one in single]
    assert output.num_forward_passes == max(passes) and len(set(passes)) > 1
    assert together != answer(model, **{**settings, "seed": 6}, speculative_window=6)[0]


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_given_codes_stay(model, coupling):
    codes, mask = random_codes(model, 4, 5), mask_of("x...x/xxxxx/.xxx./x....")
    settings = {"image": codes, "mask": mask, "guidance": "one", "speculative_window": 4}
    answers, _ = answer(model, **settings, **SAMPLED, seed=1, coupling=coupling)
    for ids in answers:
        image = last_image(ids, model.config.token_layout)
        assert image.complete and torch.equal(torch.tensor(image.codes).view(4, 5)[~mask], codes[~mask])
    assert answer(model, **settings, **GREEDY)[0] == answer(model, "ar", **settings, **GREEDY)[0]


def test_rows_with_different_codes_given(model):
    codes = [random_codes(model, 3, 4, seed) for seed in range(3)]
    masks = [mask_of("..../..xx/xxxx"), mask_of("xxxx/xxxx/xxx."), mask_of("..../..../.x..")]
    settings = {"image": codes, "mask": masks, "guidance": "one", **GREEDY}
    answers, output = answer(model, **settings, speculative_window=3)
    assert answers == answer(model, "ar", **settings)[0]
    assert output.image_statistics[2][0].num_passes == 1


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("guidance", ["none", "two"])
def test_answers_cut_anywhere_are_continued(model, guidance, cached):
    settings = {"generation_mode": "image", **GREEDY, **GUIDANCE[guidance], "height": 12, "width": 16}
    (whole,), slow = answer(model, "ar", rows=(1,), guidance=guidance, height=12, width=16, **GREEDY)
    for cut in (5, 6, 9, 10, 11, 18, 19):
        (first,), output = answer(
            model, rows=(1,), guidance=guidance, height=12, width=16, max_new_tokens=cut, **GREEDY,
            return_past_key_values=cached,
        )  # fmt: skip
        assert first == whole[:cut] and not output.finished.any()
        for decoder in ("speculative", "ar"):
            rest = model.generate(**output.next_inputs(), **settings, image_decoder=decoder)
            assert torch.equal(rest.sequences, slow.sequences)


def test_a_streamer_gets_every_token_and_stops_anywhere(model):
    prompt = torch.tensor([text_prompt(model, 0)])
    settings = {"generation_mode": "image", **GREEDY, "height": 16, "width": 16, "image_decoder": "speculative"}
    recorder = Recorder()
    whole = model.generate(prompt, **settings, streamer=recorder).sequences
    assert recorder.ids == whole[0, prompt.shape[1] :].tolist() and recorder.ended
    for limit in (6, 12, 13, 20):
        stopper = Stopper(limit)
        output = model.generate(prompt, **settings, streamer=stopper, return_past_key_values=True)
        made = output.sequences.shape[1] - prompt.shape[1]
        assert limit <= made <= limit + 1 and torch.equal(output.sequences, whole[:, : output.sequences.shape[1]])
        assert stopper.ids == output.sequences[0, prompt.shape[1] :].tolist()
        settings["image_decoder"] = "ar"
        assert torch.equal(model.generate(**output.next_inputs(), **settings).sequences, whole)
        settings["image_decoder"] = "speculative"


def test_one_row_of_a_batch_is_stopped(model):
    def third_code(ids, scores):
        return torch.tensor([len(ids[0]) >= 5 + 4 + 5 + 3])  # a prompt of five tokens; the others go on longer

    settings = {**GREEDY, "height": 12, "width": 16, "stopping_criteria": [third_code]}
    expected, _ = answer(model, "ar", **settings)
    assert answer(model, **settings)[0] == expected
    assert len({len(ids) for ids in expected}) > 1


def test_truncated_rows_compute_what_fresh_ones_do(model):
    """Masked columns, dropped ones, and those that have been moved together."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (3, 400), generator=generator)
    stream = TokenStream(model, ids[:, :4], torch.ones(3, 4, dtype=torch.bool))
    kept = [4, 4, 4]
    widest = 0
    for step in range(40):
        stream.append(torch.stack([ids[row, length : length + 8] for row, length in enumerate(kept)]))
        stream.advance()
        steps = torch.randint(1, 9, (3,), generator=generator).tolist()
        kept = [length + (steps[row] if row == step % 3 else 1) for row, length in enumerate(kept)]
        stream.truncate(torch.tensor(kept))
        assert stream.lengths.tolist() == kept
        widest = max(widest, stream.num_cached - max(kept))
    assert widest > 0 and stream.num_cached <= max(kept) + max(32, max(kept) // 4)
    following = torch.tensor([[7], [8], [9]])
    stream.append(following)
    for row, hidden_state in enumerate(stream.advance()):
        whole = torch.cat([ids[row : row + 1, : kept[row]], following[row : row + 1]], dim=1)
        with torch.no_grad():
            expected = model.model(whole).last_hidden_state[0, -1]
        torch.testing.assert_close(hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_the_shipped_model_in_fewer_passes():
    model = Emu35ForConditionalGeneration.from_pretrained(emu35.TINY).eval()
    processor = Emu35Processor.from_pretrained(emu35.TINY)
    inputs = processor(text=["a small red circle above a large blue square"] * 4, task="t2i", return_tensors="pt")
    output = model.generate(
        **inputs, task="t2i", image_decoder="speculative", generator=torch.Generator().manual_seed(0)
    )
    assert [[image.size for image in images] for images in output.images] == [[(48, 48)]] * 4
    # `ar` takes 36.
    assert sum(one.num_passes for (one,) in output.image_statistics) / 4 < 36 / 2.5
    assert all(0 < one.acceptance < 1 for (one,) in output.image_statistics)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculative_window": 0}, "`speculative_window` must be a whole number of at least 1"),
        ({"speculative_window": 2.5}, "`speculative_window` must be a whole number of at least 1"),
        ({"speculative_window": 13}, "at most the 12 codes of the image (3*4), got 13"),
        ({"coupling": "jacobi"}, "`coupling` must be one of ('none', 'maximal', 'gumbel'), got 'jacobi'"),
        ({"image_temperature": 0.0}, "`image_temperature` must be positive, got 0.0. For greedy decoding"),
        ({"image_temperature": float("nan")}, "`image_temperature` must be positive, got nan"),
        ({"image_top_p": 0.0}, "`image_top_p` must lie in (0, 1], got 0.0"),
        ({"image_top_k": -1}, "`image_top_k` must be a whole number, 0 or None"),
    ],
)
def test_bad_settings(model, settings, message):
    with pytest.raises(ValueError) as error:
        answer(model, **settings, height=12, width=16)
    assert message in str(error.value)


def test_damaged_logits_are_told(tiny_model):
    tiny_model.lm_head.weight.data[tiny_model.config.token_layout.visual_token_offset] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite logits in rows"):
        answer(tiny_model, height=12, width=16)
