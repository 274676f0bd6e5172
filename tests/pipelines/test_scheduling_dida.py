"""[`DiDAScheduler`] against distributions that are known exactly: the paths and posteriors here are computed anew."""

import json

import pytest
import torch
from emu35.pipelines import scheduling_dida
from emu35.pipelines.scheduling_dida import JUMPS, PATHS, DiDAScheduler

NUM_CODES = 4
#: Rows of different lengths: only their directions count.
CODEBOOK = torch.tensor([[2.0, 0.0, 0.3], [1.0, 1.2, 0.0], [-0.5, 1.0, 0.7], [0.1, -0.4, -3.0]])
#: Upper 1 % points of chi-square by degrees of freedom.
CHI_SQUARE_1_PERCENT = {1: 6.63, 3: 11.34, 4: 13.28, 15: 30.58}


def make(path="metric", num_codes=NUM_CODES, codebook=CODEBOOK, steps=None, **config):
    scheduler = DiDAScheduler(num_codes=num_codes, path=path, **config)
    scheduler.set_codebook(codebook)
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def path_matrix(path: str, t: float, codebook=CODEBOOK, alpha=0.9, c=3.0) -> torch.Tensor:
    """p_t(x | x1): `(num_codes, states)`, float64, a row for each x1."""
    size = len(codebook)
    if path == "metric":
        rows = codebook.double() / codebook.double().norm(dim=-1, keepdim=True)
        distances = ((rows[:, None] - rows[None]) ** 2).sum(-1)
        return (-c * (t / (1 - t)) ** alpha * distances).softmax(-1) if t < 1 else torch.eye(size).double()
    noise = torch.full((size, size), 1 / size).double()
    data = torch.eye(size).double()
    if path == "absorbing":
        noise, data = (torch.nn.functional.pad(x, (0, 1)) for x in (torch.zeros_like(noise), data))
        noise[:, size] = 1
    return t * data + (1 - t) * noise


def chi_square(samples: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom; states that cannot occur must not."""
    counts = torch.bincount(samples.flatten(), minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    return float(((counts[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1


def assert_distributed(samples: torch.Tensor, probabilities: torch.Tensor):
    statistic, freedom = chi_square(samples, probabilities)
    assert statistic < CHI_SQUARE_1_PERCENT[freedom]


class Posterior:
    """p(x1_i | x_t, t) of a known joint distribution of `positions` codes.

    `independent=True`: what a model says that does not look at other positions.
    """

    def __init__(self, path: str, positions: int, independent: bool = False):
        self.path, self.positions = path, positions
        joint = torch.rand(NUM_CODES**positions, generator=seeded(1)).double() ** 3 + 0.02
        self.target = joint / joint.sum()
        shape = (NUM_CODES,) * positions
        self.prior = self.target.view(shape)
        if independent:
            self.prior = self.prior.sum(1, keepdim=True) * self.prior.sum(0, keepdim=True)

    def logits(self, x_t: torch.Tensor, t: float) -> torch.Tensor:
        """`(batch, positions, num_codes)`"""
        noise = path_matrix(self.path, t)  # (x1, x)
        if self.positions == 1:
            return (self.prior[:, None] * noise).T[x_t].log()
        joint = torch.einsum("ab,ax,by->xyab", self.prior, noise, noise)[x_t[:, 0], x_t[:, 1]]
        return torch.stack([joint.sum(2), joint.sum(1)], 1).log()

    def index(self, codes: torch.Tensor) -> torch.Tensor:
        """Which of the joint states `(batch, positions)` is."""
        return (codes * NUM_CODES ** torch.arange(self.positions - 1, -1, -1)).sum(-1)


def run(scheduler: DiDAScheduler, predict, shape, generator, dtype=torch.float64, **masks) -> torch.Tensor:
    codes, kept = scheduler.initial_codes(shape, generator), None
    for t in scheduler.timesteps:
        output = scheduler.step(predict(codes, float(t)).to(dtype), t, codes, generator, kept=kept, **masks)
        codes, kept = output.prev_sample, output.kept
    return codes


# Distributions


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.0, 0.05, 0.4, 0.8, 1.0])
def test_add_noise_follows_the_path(path, t):
    scheduler, expected = make(path), path_matrix(path, t)
    x1 = torch.arange(NUM_CODES).expand(2500, -1)
    x_t = scheduler.add_noise(x1, t, seeded(3))
    for code in range(NUM_CODES):
        if t in (0.0, 1.0) and (t or path == "absorbing"):  # nothing is left to chance
            assert (x_t[:, code] == expected[code].argmax()).all()
        else:
            assert_distributed(x_t[:, code], expected[code])


@pytest.mark.parametrize("alpha, c", [(0.5, 1.0), (1.5, 6.0)])
def test_metric_constants(alpha, c):
    x_t = make(alpha=alpha, c=c).add_noise(torch.full((5000, 1), 2), 0.3, seeded())
    assert_distributed(x_t, path_matrix("metric", 0.3, alpha=alpha, c=c)[2])
    assert chi_square(x_t, path_matrix("metric", 0.3)[2])[0] > 4 * CHI_SQUARE_1_PERCENT[3]


@pytest.mark.parametrize("path", PATHS)
def test_times_differ_in_a_batch(path):
    times = torch.tensor([0.0, 0.3, 0.9, 1.0])
    x_t = make(path).add_noise(torch.full((4, 3000), 1), times, seeded())
    for row, t in zip(x_t, times.tolist(), strict=True):
        expected = path_matrix(path, t)[1]
        if (expected > 0).sum() > 2:
            assert_distributed(row, expected)
        else:
            assert (row == 1).double().mean() == pytest.approx(float(expected[1]), abs=0.03)


@pytest.mark.parametrize("path, jump", [*((path, "kinetic") for path in PATHS), ("metric", "maximal")])
@pytest.mark.parametrize("positions", [1, 2])
def test_many_steps_reach_the_target(path, jump, positions):
    posterior = Posterior(path, positions)
    codes = run(make(path, steps=100, jump=jump), posterior.logits, (5000, positions), seeded(5))
    assert_distributed(posterior.index(codes), posterior.target)


def test_a_time_shift_does_not_move_the_target():
    posterior = Posterior("metric", 2)
    codes = run(make(steps=100, time_shift=1 / 3), posterior.logits, (5000, 2), seeded(6))
    assert_distributed(posterior.index(codes), posterior.target)


@pytest.mark.parametrize(
    "path, jump", [*((path, "maximal") for path in PATHS), *((path, "renoise") for path in PATHS)]
)
def test_few_steps_are_exact_for_one_position(path, jump):
    posterior = Posterior(path, 1)
    codes = run(make(path, steps=3, jump=jump), posterior.logits, (6000, 1), seeded())
    assert_distributed(codes, posterior.target)


@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_posterior_misses_the_target(path):
    """The tests above can fail: predictions that miss the other position, and one step where many are needed."""
    posterior, wrong = Posterior(path, 2), Posterior(path, 2, independent=True)
    for steps, predict in ((100, wrong.logits), (1, posterior.logits)):
        codes = run(make(path, steps=steps), predict, (5000, 2), seeded(5))
        assert chi_square(posterior.index(codes), posterior.target)[0] > 10 * CHI_SQUARE_1_PERCENT[15]


@pytest.mark.parametrize("jump", ["kinetic", "maximal", "renoise"])
@pytest.mark.parametrize("path", PATHS)
def test_a_step_ends_on_the_path(path, jump):
    """From p_t(. | x1) to p_t'(. | x1), with x1 known."""
    scheduler = make(path, steps=4, jump=jump)
    x1 = torch.full((6000, 1), 2)
    x_t = scheduler.add_noise(x1, 0.25, seeded())
    logits = torch.nn.functional.one_hot(x1, NUM_CODES).float().log()
    x_next = scheduler.step(logits, 0.25, x_t, seeded(1)).prev_sample
    expected = path_matrix(path, 0.5)[2]
    if path == "absorbing":
        assert (x_next == 2).double().mean() == pytest.approx(0.5, abs=0.02)
    elif path == "metric" and jump == "kinetic":  # the midpoint rule is no exact integral
        counts = torch.bincount(x_next.flatten(), minlength=NUM_CODES) / len(x_next)
        assert (counts - expected).abs().sum() / 2 < 0.05
    else:
        assert_distributed(x_next, expected)


def test_kinetic_integral_beats_dt_times_velocity():
    """As in the class's docstring: 8 steps, mean total variation to p_t'."""
    generator = seeded()
    codebook = torch.randn(128, 16, generator=generator)
    rows = torch.nn.functional.normalize(codebook.double(), dim=-1)
    distances = ((rows[3] - rows) ** 2).sum(-1)
    scheduler = make(num_codes=128, codebook=codebook, steps=8)
    x1 = torch.full((20000, 1), 3)
    logits = torch.nn.functional.one_hot(x1, 128).float().log()
    ours = theirs = scheduler.initial_codes(x1.shape, generator)
    distance = {"ours": 0.0, "theirs": 0.0}
    for t in scheduler.timesteps.tolist()[:-1]:
        ours = scheduler.step(logits, t, ours, generator).prev_sample
        velocity = path_matrix("metric", t, codebook)[3] * (distances[theirs] - distances).relu()
        speed = 3.0 * 0.9 * (t / (1 - t)) ** -0.1 / (1 - t) ** 2 if t else 0.0
        moves = torch.rand(len(x1), generator=generator) < 1 - (-speed / 8 * velocity.sum(-1)).exp()
        landed = torch.multinomial(velocity + 1e-30, 1, generator=generator)
        theirs = torch.where(moves[:, None], landed, theirs)
        expected = path_matrix("metric", t + 1 / 8, codebook)[3]
        for name, codes in {"ours": ours, "theirs": theirs}.items():
            share = torch.bincount(codes.flatten(), minlength=128) / len(codes)
            distance[name] += float((share - expected).abs().sum() / 2) / 7
    assert distance["ours"] < 0.05  # of which .02 is the noise of 20000 draws
    assert distance["theirs"] > 0.1


# Times


@pytest.mark.parametrize("shift", [1 / 3, 1.0, 4.0])
def test_timesteps(shift):
    scheduler = make(steps=5, time_shift=shift)
    sigma = 1 - torch.arange(5) / 5
    torch.testing.assert_close(scheduler.timesteps, 1 - shift * sigma / (1 + (shift - 1) * sigma))
    assert scheduler.timesteps[0] == 0
    assert (scheduler.num_inference_steps, scheduler.timesteps.dtype) == (5, torch.float32)


@pytest.mark.parametrize("shift, training_shift, median", [(1.0, None, 0.5), (1 / 3, None, 0.75), (1 / 3, 3.0, 0.25)])
def test_training_times(shift, training_shift, median):
    times = make(time_shift=shift, training_time_shift=training_shift).sample_times(4000, seeded())
    assert times.shape == (4000,)
    assert 0 <= times.min() <= times.max() <= 1
    assert (times < median).double().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("path", PATHS)
def test_initial_codes(path):
    codes = make(path).initial_codes((2, 50, 40), seeded())
    if path == "absorbing":
        assert (codes == make(path).mask_code).all()
    else:
        assert make(path).mask_code is None
        assert_distributed(codes, torch.full((NUM_CODES,), 1 / NUM_CODES).double())


# One step

ALL = [(path, jump) for path in PATHS for jump in JUMPS]


def logits_for(shape, seed=7, num_codes=NUM_CODES):
    return torch.randn(*shape, num_codes, generator=seeded(seed)) * 2


@pytest.mark.parametrize("path, jump", ALL)
def test_the_last_step_returns_the_prediction(path, jump):
    scheduler = make(path, jump=jump, steps=2)
    codes = scheduler.add_noise(torch.full((3, 2, 5), 1), 0.5, seeded())
    output = scheduler.step(logits_for(codes.shape), 0.5, codes, seeded())
    assert torch.equal(output.prev_sample, output.pred_original_sample)
    assert output.prev_sample.shape == codes.shape
    assert output.prev_sample.max() < NUM_CODES


@pytest.mark.parametrize("path, jump", ALL)
def test_inputs_are_left_alone(path, jump):
    scheduler = make(path, jump=jump, steps=4)
    codes, logits = scheduler.initial_codes((2, 6), seeded()), logits_for((2, 6))
    fixed = torch.zeros(2, 6, dtype=torch.bool)
    before = codes.clone(), logits.clone(), fixed.clone()
    for _ in range(2):  # nothing is kept of the first call either
        output = scheduler.step(logits, 0.0, codes, seeded(), fixed=fixed)
        again = scheduler.step(logits, 0.0, codes, seeded(), fixed=fixed)
        assert torch.equal(output.prev_sample, again.prev_sample)
    noisy = torch.randint(NUM_CODES, (2, 6), generator=seeded())
    untouched = noisy.clone()
    scheduler.add_noise(noisy, 0.3, seeded())
    assert torch.equal(noisy, untouched)
    assert all(torch.equal(a, b) for a, b in zip(before, (codes, logits, fixed), strict=True))


@pytest.mark.parametrize("path, jump", ALL)
def test_a_row_does_not_depend_on_its_batch(path, jump):
    scheduler = make(path, jump=jump, steps=4, confidence_noise=1.0)
    logits, seeds = logits_for((3, 8)), (11, 12, 13)

    def generate(rows):
        generators = [seeded(seeds[row]) for row in rows]
        codes = scheduler.initial_codes((len(rows), 8), generators)
        for t in scheduler.timesteps[:3]:
            codes = scheduler.step(logits[rows], t, codes, generators).prev_sample
        times = scheduler.sample_times(len(rows), generators)
        return codes, scheduler.add_noise(codes.clamp(max=NUM_CODES - 1), times, generators), times

    together = generate([0, 1, 2])
    for row in range(3):
        for batched, alone in zip(together, generate([row]), strict=True):
            assert torch.equal(batched[row], alone[0])


def test_a_row_without_generator_leaves_the_others():
    scheduler = make(steps=4)
    logits, codes = logits_for((2, 8)), scheduler.initial_codes((2, 8), seeded())
    both = scheduler.step(logits, 0.0, codes, [seeded(1), seeded(2)]).prev_sample
    one = scheduler.step(logits, 0.0, codes, [None, seeded(2)]).prev_sample
    assert torch.equal(both[1], one[1])


@pytest.mark.parametrize("path, jump", ALL)
def test_rows_may_be_at_different_times(path, jump):
    scheduler = make(path, jump=jump, steps=4)
    codes = scheduler.add_noise(torch.full((2, 8), 2), 0.5, seeded())
    logits = logits_for((2, 8))
    times = torch.tensor([0.25, 0.75])
    both = scheduler.step(logits, times, codes, [seeded(1), seeded(2)]).prev_sample
    for row, t in enumerate(times):
        alone = scheduler.step(logits[row, None], t, codes[row, None], [seeded(row + 1)]).prev_sample
        assert torch.equal(both[row], alone[0])


@pytest.mark.parametrize("path, jump", ALL)
@pytest.mark.parametrize("positions_per_block", [1, 3, 8])
def test_blocks_do_not_matter(path, jump, positions_per_block, monkeypatch):
    scheduler = make(path, jump=jump, steps=3)
    codes, logits = scheduler.add_noise(torch.full((3, 5), 1), 1 / 3, seeded()), logits_for((3, 5))
    whole = scheduler.step(logits, 1 / 3, codes, seeded()), scheduler.add_noise(torch.full((3, 5), 1), 0.4, seeded())
    monkeypatch.setattr(scheduling_dida, "BLOCK_BYTES", 8 * NUM_CODES * positions_per_block)
    assert torch.equal(scheduler.step(logits, 1 / 3, codes, seeded()).prev_sample, whole[0].prev_sample)
    assert torch.equal(scheduler.add_noise(torch.full((3, 5), 1), 0.4, seeded()), whole[1])


@pytest.mark.parametrize("path, jump", ALL)
def test_half_precision_and_small_integers(path, jump):
    scheduler = make(path, jump=jump, steps=3)
    codes = scheduler.initial_codes((2, 64), seeded())
    logits = logits_for((2, 64)).bfloat16()
    full = scheduler.step(logits.float(), 0.0, codes, seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = scheduler.step(logits, 0.0, codes.to(torch.int32), seeded())
    assert half.prev_sample.dtype == torch.int32
    assert torch.equal(full.prev_sample, half.prev_sample.long())
    assert torch.equal(full.pred_original_sample, half.pred_original_sample.long())


def test_distances_are_not_autocast():
    scheduler = make(num_codes=64, codebook=torch.randn(64, 16, generator=seeded()))
    x1 = torch.arange(64).expand(200, -1)
    expected = scheduler.add_noise(x1, 0.6, seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scheduler.add_noise(x1, 0.6, seeded()), expected)


@pytest.mark.parametrize("path, jump", ALL)
def test_fixed_codes_stay(path, jump):
    scheduler = make(path, jump=jump, steps=4, temperature=0.0)
    fixed = torch.tensor([[True, False, True, False, False, False]] * 2)
    codes = torch.where(fixed, 3, scheduler.initial_codes((2, 6), seeded()))
    logits = torch.full((2, 6, NUM_CODES), float("nan"))  # at fixed positions they are not looked at
    logits[~fixed] = torch.tensor([0.0, 9.0, 0.0, 0.0])
    for t in scheduler.timesteps:
        output = scheduler.step(logits, t, codes, seeded(), fixed=fixed)
        codes = output.prev_sample
        assert (codes[fixed] == 3).all()
        assert (output.pred_original_sample[fixed] == 3).all()
    assert (codes[~fixed] == 1).all()


@pytest.mark.parametrize("jump", ["kinetic", "maximal"])
def test_codes_only_come_nearer(jump):
    scheduler = make(steps=6, jump=jump)
    distances = -path_matrix("metric", 0.5).log()  # grows with the distance
    x1 = torch.arange(NUM_CODES).expand(400, -1)
    logits = torch.nn.functional.one_hot(x1, NUM_CODES).float().log()
    codes = scheduler.initial_codes(x1.shape, seeded())
    for t in scheduler.timesteps:
        moved = scheduler.step(logits, t, codes, seeded()).prev_sample
        assert (distances[x1, moved] <= distances[x1, codes]).all()
        codes = moved


def test_unmasked_codes_are_data():
    codes = torch.tensor([[0, 4, 2, 4]])
    output = make("absorbing", steps=2).step(logits_for((1, 4)), 0.5, codes, seeded())
    assert output.prev_sample[0, [0, 2]].tolist() == [0, 2]


def test_renoise_masks_again():
    codes = torch.full((1, 2000), 3)
    output = make("absorbing", steps=4, jump="renoise").step(logits_for((1, 2000)), 0.25, codes, seeded())
    assert (output.pred_original_sample == 3).all()
    assert (output.prev_sample == 4).double().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_temperature(temperature):
    logits = torch.tensor([0.3, 1.0, float("-inf"), 0.0])
    codes = make("mixture", steps=1, temperature=temperature).step(
        logits.expand(6000, 1, -1), 0.0, torch.zeros(6000, 1, dtype=torch.long), seeded()
    )
    if temperature == 0:
        assert (codes.prev_sample == 1).all()
    else:
        expected = (logits.double() / temperature).softmax(-1)
        counts = torch.bincount(codes.prev_sample.flatten(), minlength=4) / 6000
        assert counts[2] == 0
        assert (counts - expected).abs().max() < 0.02


# The order of confidence


@pytest.mark.parametrize("path", PATHS)
def test_one_confident_step_is_one_shot(path):
    scheduler = make(path, jump="confidence", steps=1, temperature=0.0)
    logits = logits_for((2, 9))
    output = scheduler.step(logits, 0.0, scheduler.initial_codes((2, 9), seeded()), seeded())
    assert torch.equal(output.prev_sample, logits.argmax(-1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("revise", [False, True])
def test_as_many_are_kept_as_scheduled(path, revise):
    scheduler = make(path, jump="confidence", revise=revise, steps=5, temperature=0.0)
    logits = logits_for((3, 40))
    codes, kept, greedy = scheduler.initial_codes((3, 40), seeded()), None, logits.argmax(-1)
    for k, t in enumerate(scheduler.timesteps):
        output = scheduler.step(logits, t, codes, seeded(k), kept=kept)
        shares = torch.full((3, 40), (k + 1) / 5).double()
        if path == "metric":
            shares = path_matrix("metric", (k + 1) / 5).diagonal()[greedy]
        number = shares.sum(-1).round().long()
        most_confident = logits.log_softmax(-1).amax(-1).argsort(-1, descending=True)
        for row in range(3):
            expected = torch.zeros(40, dtype=torch.bool)
            expected[most_confident[row, : number[row]]] = True
            right = output.prev_sample[row] == greedy[row]
            assert right[expected].all()
            if path != "mixture":  # there, noise may hit
                assert torch.equal(right, expected)
            if not revise:
                assert torch.equal(output.kept[row], expected)
        codes, kept = output.prev_sample, output.kept
        assert (kept is None) == revise


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("revise", [False, True])
def test_what_was_kept(path, revise):
    """The predictions of the second step are others, and confident elsewhere."""
    scheduler = make(path, jump="confidence", revise=revise, steps=2, temperature=0.0, c=1.0)
    first, second = torch.zeros(1, 8, NUM_CODES), torch.zeros(1, 8, NUM_CODES)
    first[..., 1], second[..., 2] = 5.0, 6.0
    first[0, :3, 1] = 9.0
    output = scheduler.step(first, 0.0, scheduler.initial_codes((1, 8), seeded()), seeded())
    assert (output.prev_sample[0, :3] == 1).all()
    output = scheduler.step(second, 0.5, output.prev_sample, seeded(), kept=output.kept)
    assert (output.prev_sample[0, :3] == (2 if revise else 1)).all()
    assert output.prev_sample[0, -1] == 2


def test_what_was_kept_outranks_noise():
    scheduler = make("absorbing", jump="confidence", revise=False, steps=4, confidence_noise=5.0)
    codes, kept = scheduler.initial_codes((2, 40), seeded()), None
    for k, t in enumerate(scheduler.timesteps):
        output = scheduler.step(logits_for((2, 40), seed=k), t, codes, seeded(k), kept=kept)
        codes, kept = output.prev_sample, output.kept
        assert kept.sum(-1).tolist() == [10 * (k + 1)] * 2


@pytest.mark.parametrize("path", PATHS)
def test_rest_of_a_confident_step_is_noise_of_the_path(path):
    scheduler = make(path, jump="confidence", steps=2, temperature=0.0, c=0.5)
    logits = torch.zeros(1, 8000, NUM_CODES)
    logits[..., 1] = 1.0
    codes = scheduler.step(logits, 0.0, scheduler.initial_codes((1, 8000), seeded()), seeded()).prev_sample
    expected = path_matrix(path, 0.5, c=0.5)[1]
    counts = torch.bincount(codes.flatten(), minlength=len(expected)) / 8000
    assert (counts - expected).abs().max() < 0.02


def test_confidence_noise_decays():
    logits = logits_for((1, 400))
    best = logits.softmax(-1).amax(-1)[0]

    def order(noise, t):
        scheduler = make(
            "absorbing", jump="confidence", steps=4, temperature=0.0, confidence_noise=noise, revise=False
        )
        codes = scheduler.initial_codes((1, 400), seeded())
        kept = scheduler.step(logits, t, codes, seeded()).kept[0]
        return float(best[kept].mean() - best[~kept].mean())

    assert order(0.0, 0.0) > order(3.0, 0.0) + 0.1
    assert order(3.0, 0.5) > order(3.0, 0.0)


@pytest.mark.parametrize("path", PATHS)
def test_greedy_confidence_is_deterministic(path):
    """Without noise of their own, all seeds agree on what is kept."""
    scheduler = make(path, jump="confidence", steps=3, temperature=0.0, revise=False)
    logits, codes = logits_for((1, 12)), scheduler.initial_codes((1, 12), seeded())
    one, two = (scheduler.step(logits, 0.0, codes, seeded(seed)) for seed in (1, 2))
    assert torch.equal(one.kept, two.kept)
    assert torch.equal(one.prev_sample[one.kept], two.prev_sample[two.kept])


# Files, and bad input


def test_save_and_load(tmp_path):
    scheduler = DiDAScheduler(NUM_CODES, "mixture", time_shift=0.5, jump="confidence", revise=False)
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert (saved["_class_name"], saved["num_codes"], saved["path"]) == ("DiDAScheduler", NUM_CODES, "mixture")
    loaded = DiDAScheduler.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(scheduler.config)
    assert scheduler.compatibles == [DiDAScheduler]


def test_from_config_changes_one_thing():
    scheduler = DiDAScheduler(NUM_CODES, "mixture", time_shift=0.5)  # positional arguments are remembered too
    swapped = DiDAScheduler.from_config(scheduler.config, path="absorbing")
    assert (swapped.config.num_codes, swapped.config.time_shift, swapped.mask_code) == (NUM_CODES, 0.5, NUM_CODES)
    assert scheduler.config.path == "mixture"


def test_tuple():
    scheduler = make("mixture", steps=2)
    arguments = logits_for((1, 3)), 0.0, torch.zeros(1, 3, dtype=torch.long)
    output = scheduler.step(*arguments, seeded())
    codes, x1 = scheduler.step(*arguments, seeded(), return_dict=False)
    assert torch.equal(codes, output.prev_sample)
    assert torch.equal(x1, output.pred_original_sample)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"path": "metrik"}, "Did you mean 'metric'"),
        ({"path": "x"}, "Choices: metric, mixture, absorbing"),
        ({"jump": "confident"}, "Did you mean 'confidence'"),
        ({"num_codes": 1}, "`num_codes` must be a whole number of at least 2"),
        ({"num_codes": 4.0}, "`num_codes` must be a whole number"),
        ({"alpha": 0.0}, "`alpha` must be positive"),
        ({"c": float("nan")}, "`c` must be positive"),
        ({"time_shift": -1.0}, "`time_shift` must be positive"),
        ({"training_time_shift": 0.0}, "`training_time_shift` must be positive"),
        ({"temperature": -0.1}, "`temperature` must be at least 0"),
        ({"confidence_noise": -1.0}, "`confidence_noise` must be at least 0"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        DiDAScheduler(**config)


@pytest.mark.parametrize("steps", [0, -3, 2.5, None])
def test_bad_number_of_steps(steps):
    with pytest.raises(ValueError, match="`num_inference_steps` must be a whole number of at least 1"):
        make().set_timesteps(steps)


@pytest.mark.parametrize("shape", [(5, 3), (4,)])
def test_codebook_of_another_size(shape):
    with pytest.raises(ValueError, match="num_codes=4"):
        DiDAScheduler(NUM_CODES).set_codebook(torch.ones(shape))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_codebook_without_directions(value):
    codebook = CODEBOOK.clone()
    codebook[2] = value
    with pytest.raises(ValueError, match="1 rows that are zero or not finite, the first is 2"):
        DiDAScheduler(NUM_CODES).set_codebook(codebook)


def test_missing_codebook_and_timesteps():
    scheduler = DiDAScheduler(NUM_CODES)
    codes = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="set_codebook"):
        scheduler.add_noise(codes, 0.5)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(logits_for((1, 3)), 0.0, codes)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="set_codebook"):
        scheduler.step(logits_for((1, 3)), 0.0, codes)


@pytest.mark.parametrize(
    "t, message",
    [
        (-0.1, r"`t` must lie in \[0, 1\]"),
        (1.5, r"`t` must lie in \[0, 1\]"),
        (float("nan"), r"`t` must lie in \[0, 1\]"),
        (torch.zeros(3), "one time or one a row"),
        (torch.zeros(1, 2), "one time or one a row"),
    ],
)
def test_bad_times(t, message):
    with pytest.raises(ValueError, match=message):
        make().add_noise(torch.zeros(2, 3, dtype=torch.long), t)
    with pytest.raises(ValueError, match=message):
        make(steps=2).step(logits_for((2, 3)), t, torch.zeros(2, 3, dtype=torch.long))


def test_a_time_between_steps():
    with pytest.raises(ValueError, match=r"one of the 4 `timesteps` from 0 to 0\.7500"):
        make(steps=4).step(logits_for((1, 3)), 0.3, torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    "codes, message",
    [
        (torch.tensor([[0, 4]]), r"0\.\.3, got 0\.\.4"),
        (torch.tensor([[-1, 2]]), r"0\.\.3, got -1\.\.2"),
        (torch.tensor([[0.0, 1.0]]), "must be integers"),
        (torch.tensor([1, 2]), "must be integers"),
    ],
)
def test_bad_codes(codes, message):
    with pytest.raises(ValueError, match=message):
        make().add_noise(codes, 0.5)
    with pytest.raises(ValueError, match=message):
        make(steps=2).step(logits_for(codes.shape), 0.0, codes)


def test_the_mask_is_a_state_but_no_data():
    scheduler = make("absorbing", steps=2)
    mask = torch.full((1, 3), scheduler.mask_code)
    scheduler.step(logits_for((1, 3)), 0.0, mask, seeded())
    with pytest.raises(ValueError, match=r"0\.\.3, got 4\.\.4"):
        scheduler.add_noise(mask, 0.5)
    with pytest.raises(ValueError, match="Only given codes can be fixed"):
        scheduler.step(logits_for((1, 3)), 0.0, mask, fixed=torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(1, 3, 5), (1, 2, 4), (3, 4)])
def test_bad_logits_shape(shape):
    with pytest.raises(ValueError, match=r"`logits` must have shape .* = \(1, 3, 4\)"):
        make(steps=2).step(torch.zeros(shape), 0.0, torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("path, jump", ALL)
@pytest.mark.parametrize("t", [0.0, 0.5])
@pytest.mark.parametrize("damage", ["nan", "inf", "-inf"])
def test_damaged_logits(path, jump, t, damage):
    scheduler = make(path, jump=jump, steps=2)
    logits = logits_for((2, 3))
    logits[1, 2, slice(None) if damage == "-inf" else 0] = float(damage)
    with pytest.raises(ValueError, match=r"in rows \[1\]"):
        scheduler.step(logits, t, scheduler.initial_codes((2, 3), seeded()), seeded())


@pytest.mark.parametrize("name", ["fixed", "kept"])
@pytest.mark.parametrize("mask", [torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 3)])
def test_bad_masks(name, mask):
    scheduler = make(steps=2, jump="confidence", revise=False)
    with pytest.raises(ValueError, match=f"`{name}` must be a bool mask of shape"):
        scheduler.step(logits_for((1, 3)), 0.0, torch.zeros(1, 3, dtype=torch.long), **{name: mask})


def test_kept_is_missing():
    scheduler = make(steps=2, jump="confidence", revise=False)
    codes = torch.zeros(1, 3, dtype=torch.long)
    scheduler.step(logits_for((1, 3)), 0.0, codes, seeded())
    with pytest.raises(ValueError, match="`kept` is missing"):
        scheduler.step(logits_for((1, 3)), 0.5, codes, seeded())


@pytest.mark.parametrize("generator, message", [([seeded()], "1 generators for a batch of 2"), (7, "got 7")])
def test_bad_generators(generator, message):
    scheduler, codes = make(steps=2), torch.zeros(2, 3, dtype=torch.long)
    for call in (
        lambda: scheduler.step(logits_for((2, 3)), 0.0, codes, generator),
        lambda: scheduler.add_noise(codes, 0.5, generator),
        lambda: scheduler.initial_codes((2, 3), generator),
        lambda: scheduler.sample_times(2, generator),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_greedy_form_is_a_copy():
    scheduler = DiDAScheduler(num_codes=5, path="absorbing", temperature=0.7)
    greedy = scheduler.greedy()
    assert (greedy.config.temperature, scheduler.config.temperature) == (0.0, 0.7)
    assert greedy.greedy() is greedy
    for one in (scheduler, greedy):
        one.set_timesteps(1)
    logits = torch.tensor([[[0.0, 0.1, 0.3, 0.2, 0.1]]]).expand(1, 200, 5)
    codes = torch.full((1, 200), 5)
    made = [one.step(logits, 0.0, codes, torch.Generator().manual_seed(0)).prev_sample for one in (greedy, scheduler)]
    assert (made[0] == 2).all() and (made[1] != 2).any()
