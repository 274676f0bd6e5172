"""The sampler against distributions that are known exactly, and guidance against its formula."""

import pytest
import torch
from emu35.sampling_emu35 import Sampler, check_scores, draw, guide, is_damaged, uniform

NUM_DRAWS = 20_000


def chi_square(counts, probabilities):
    """Pearson's statistic over the columns that can be drawn, and its degrees of freedom."""
    expected = probabilities[probabilities > 0] * counts.sum()
    observed = counts[probabilities > 0]
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def assert_drawn_from(draws, probabilities):
    counts = torch.bincount(draws, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    statistic, freedom = chi_square(counts, probabilities)
    # Mean `freedom`, variance 2 * freedom: five standard deviations, and the seed is fixed.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sampler(), [0.4, 0.3, 0.2, 0.1]),
        (Sampler(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (Sampler(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Sampler(top_k=1, temperature=9.0), [1, 0, 0, 0]),
        (Sampler(do_sample=False), [1, 0, 0, 0]),
        (Sampler(top_k=0), [0.4, 0.3, 0.2, 0.1]),
        (Sampler(top_k=100, top_p=1.0), [0.4, 0.3, 0.2, 0.1]),
        (Sampler(top_p=0.6), [4 / 7, 3 / 7, 0, 0]),  # 0.4 is not enough, 0.4 + 0.3 is
        (Sampler(top_p=0.01), [1, 0, 0, 0]),
        (Sampler(top_k=3, top_p=0.7), [4 / 7, 3 / 7, 0, 0]),  # of 4/9, 3/9, 2/9: 4/9 is not enough, 7/9 is
        (Sampler(temperature=0.5, top_k=3, top_p=0.9), [16 / 29, 9 / 29, 4 / 29, 0]),
    ],
)
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_distribution(sampler, expected, order):
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1])[order].log() + 7.0
    expected = torch.tensor(expected, dtype=torch.float64)[order]
    torch.testing.assert_close(sampler.distribution(logits).double(), expected, atol=1e-6, rtol=0)
    draws = sampler(logits.expand(NUM_DRAWS, 4), torch.Generator().manual_seed(0))
    if expected.max() < 1:
        assert_drawn_from(draws, expected)
    else:
        assert (draws == expected.argmax()).all()


def test_many_columns_chi_square():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, generator=generator)
    draws = Sampler(temperature=1.3)(logits.expand(NUM_DRAWS, 200), generator)
    assert_drawn_from(draws, (logits.double() / 1.3).softmax(-1))


def test_rare_columns_of_a_large_vocabulary_are_drawn():
    # In float32 the cumulative sum of 131,072 columns is off by more than one of them weighs.
    logits = torch.zeros(1, 131_072)
    numbers = torch.tensor([(131_000 + 0.5) / 131_072])
    assert draw(logits.softmax(-1), numbers).item() == 131_000


@pytest.mark.parametrize(
    "sampler", [Sampler(do_sample=False), Sampler(do_sample=False, temperature=2.0, top_k=9), Sampler(top_k=1)]
)
def test_greedy(sampler):
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 4.9]])
    state = torch.random.get_rng_state()
    assert sampler(logits).tolist() == [1, 0]
    assert torch.equal(torch.random.get_rng_state(), state)  # no draw is spent


def test_ties_keep_exactly_top_k_columns():
    probabilities, columns = Sampler(top_k=2).probabilities(torch.zeros(1, 5))
    assert probabilities.tolist() == [[0.5, 0.5]]
    assert len(set(columns[0].tolist())) == 2
    # Five equal columns of 0.2 each: three of them reach 0.5.
    probabilities, _ = Sampler(top_p=0.5).probabilities(torch.zeros(1, 5))
    assert (probabilities > 0).sum() == 3


def test_impossible_columns_are_never_drawn():
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf"), 1.0, float("-inf")]])
    for sampler in (Sampler(), Sampler(top_k=4), Sampler(top_p=0.999), Sampler(top_k=5, top_p=0.999)):
        draws = sampler(logits.expand(2000, 5), torch.Generator().manual_seed(0))
        assert set(draws.tolist()) == {1, 3}
    ends = torch.tensor([0.0, 0.5, 1.0 - 2**-24])
    assert draw(torch.tensor([[0.0, 0.5, 0.5, 0.0]]).expand(3, 4), ends).tolist() == [1, 2, 2]


def test_every_row_has_a_generator_of_its_own():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = Sampler()(logits, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = [Sampler()(logits[row : row + 1], torch.Generator().manual_seed(5 + row)).item() for row in range(3)]
    assert together.tolist() == alone


def test_a_row_without_generator_needs_no_draw():
    generator, same = (torch.Generator().manual_seed(3) for _ in range(2))
    numbers = uniform(3, [None, generator, None], torch.device("cpu"))
    assert numbers.tolist() == [0.0, torch.rand(1, generator=same).item(), 0.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_draws_come_from_the_generators_device():
    logits = torch.randn(4, 50)
    on_cpu = Sampler()(logits, torch.Generator().manual_seed(0))
    assert Sampler()(logits.cuda(), torch.Generator().manual_seed(0)).tolist() == on_cpu.tolist()
    Sampler()(logits, [torch.Generator("cuda").manual_seed(0)] * 4)


def test_numbers_are_drawn_where_the_generator_lives(monkeypatch):
    seen = []

    def rand(*shape, generator, device, dtype):
        seen.append(device)
        return torch.zeros(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "rand", rand)
    uniform(2, torch.Generator(), torch.device("meta"))
    uniform(2, None, torch.device("meta"))
    uniform(2, [torch.Generator(), torch.Generator()], torch.device("cpu"))
    assert [torch.device(device).type for device in seen] == ["cpu", "meta", "cpu", "cpu"]


# --- guidance ---


def test_guidance_formulas():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 9, generator=generator) for _ in range(3)]
    c, u, n = (one.log_softmax(-1) for one in logits)

    def same_distribution(scores, expected):
        torch.testing.assert_close(scores.log_softmax(-1), expected.log_softmax(-1), atol=1e-5, rtol=0)

    same_distribution(guide(logits[:1], 4.0), c)
    same_distribution(guide(logits[:2], 3.0), u + 3.0 * (c - u))
    same_distribution(guide(logits[:2], 1.0), c)
    same_distribution(guide(logits[:2], 0.0), u)
    same_distribution(guide(logits, 3.0, 1.5), n + 1.5 * (u - n) + 3.0 * (c - u))
    same_distribution(guide(logits, 1.0, 1.0), c)


def test_guidance_of_half_precision_is_computed_in_float32():
    logits = [torch.full((1, 2), 300.0, dtype=torch.float16), torch.full((1, 2), -300.0, dtype=torch.float16)]
    guided = guide(logits, 200.0)
    assert guided.dtype == torch.float32
    assert guided.isfinite().all()


# --- damage ---


def test_damaged_rows_are_found():
    scores = torch.tensor(
        [[0.0, 1.0], [float("nan"), 0.0], [float("inf"), 0.0], [float("-inf"), 0.0], [float("-inf")] * 2]
    )
    assert is_damaged(scores).tolist() == [False, True, True, False, True]
    check_scores(is_damaged(scores[:1]))
    with pytest.raises(ValueError, match=r"NaN or infinite logits in rows \[1, 2, 4\].*dtype"):
        check_scores(is_damaged(scores))
