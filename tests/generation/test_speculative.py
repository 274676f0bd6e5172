"""The speculative decoder: its distribution against the exact one, and all that it shares with `ar`."""

import emu35.speculative_emu35 as speculative
import pytest
import torch
from emu35.decoding_emu35 import IMAGE_DECODERS, ImageRequest, TokenStream, pad_left
from emu35.sampling_emu35 import Sampler, guide
from test_generation import GUIDANCE, generate, image_ids, streams_of, text_prompt

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
    "given": {"sampler": Sampler(temperature=1.3), "guidance_scale": 1.7, "given": torch.tensor([-1, 2, -1, -1, 0, -1])},
    "given row": {"sampler": Sampler(temperature=1.3), "given": torch.tensor([-1, -1, -1, 1, 0, 2])},
}  # fmt: skip


def check(small_model, case, coupling, window, count):
    exact = exact_distribution(small_model, **CASES[case])
    samples = sample(small_model, count, **CASES[case], coupling=coupling, speculative_window=window)
    assert is_drawn_from(samples, exact)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(("case", "window"), [("plain", 3), ("guidance", 6), ("top-k", 4), ("given", 2)])
def test_distribution_is_exact(small_model, case, window, coupling):
    check(small_model, case, coupling, window, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [1, 2, 4, 6])
def test_distribution_is_exact_in_many_samples(small_model, case, window, coupling):
    check(small_model, case, coupling, window, 100_000)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_without_the_residual_the_distribution_is_wrong(small_model, coupling, monkeypatch):
    """What the tests above can see: rejected guesses are replaced from p instead."""
    monkeypatch.setattr(speculative, "_residual", lambda p, q: p)
    exact = exact_distribution(small_model, **CASES["plain"])
    assert not is_drawn_from(sample(small_model, 10_000, **CASES["plain"], coupling=coupling), exact)


@pytest.mark.parametrize("case", CASES)
def test_ar_has_the_same_distribution(small_model, case):
    """The yardstick itself."""
    exact = exact_distribution(small_model, **CASES[case])
    assert is_drawn_from(sample(small_model, 10_000, **CASES[case], decoder="ar"), exact)
