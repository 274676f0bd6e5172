"""The base of rewards, failures of single samples, and the mix: exact numbers, routing, what is refused."""

import logging
import pickle
from collections import defaultdict

import pytest
from emu35.training.rewards import Component, Reward, RewardMix, SampleReward
from emu35.training.rewards.base import import_extra, prompt_text
from PIL import Image


class Brightness(SampleReward):
    """Level of the first pixel of the first image; a column says where it is to fail."""

    name = "brightness"
    range = (0.0, 255.0)
    needs = ("images", "how")
    loaded = False

    def load(self):
        self.loaded = True

    def scores(self, samples):
        assert self.loaded
        return [self.score(sample) for sample in samples]

    def score(self, sample):
        if sample.columns["how"] == "raise":
            raise OSError("broken")
        if sample.columns["how"] == "nan":
            return float("nan")
        return sample.images[0].getpixel((0, 0))[0] if sample.images else 0.0


def make(name="half", low=0.0, high=1.0, value=0.5):
    """A reward as users write them: a function with two attributes."""

    def reward(prompts, completions, **columns):
        reward.seen.append((list(prompts), columns))
        return value(prompts, columns) if callable(value) else [value] * len(prompts)

    reward.name, reward.range, reward.seen = name, (low, high), []
    return reward


def appending(metrics):
    return lambda name, value: metrics[name].append(value)


def gray(level):
    return Image.new("L", (2, 2), level)


# --------------------------------------------------------------------------------------------------------- one reward


def test_failures_and_gaps_give_none_and_failures_are_counted(caplog):
    reward = Brightness()
    assert isinstance(reward, Reward) and reward.__name__ == "brightness"
    images, how = [[gray(40)], [gray(50)], [], [gray(60)], [gray(70)]], ["", "raise", "", "nan", None]
    with caplog.at_level(logging.WARNING):
        values = reward(["p"] * 5, [""] * 5, images=images, how=how, trainer_state=object())
    assert values == [40.0, None, 0.0, None, None]
    assert reward.num_failures == 2  # a gap in a column is no failure
    assert [record.exc_info[0] for record in caplog.records] == [OSError, ArithmeticError]


def test_a_long_run_of_failures_is_logged_ever_more_rarely(caplog):
    reward = Brightness()
    with caplog.at_level(logging.WARNING):
        assert reward(["p"] * 20, [""] * 20, images=[[]] * 20, how=["raise"] * 20) == [None] * 20
    assert reward.num_failures == 20 and len(caplog.records) == 5  # the 1st, 2nd, 4th, 8th and 16th


def test_weights_are_loaded_only_when_something_is_to_be_measured():
    reward = Brightness()
    assert reward(["p"], [""], images=[[gray(1)]], how=[None]) == [None]
    assert not reward.loaded
    reward(["p"], [""], images=[[gray(1)]], how=[""])
    assert reward.loaded


def test_missing_columns_and_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="'brightness' needs the column `how`; there are: images"):
        Brightness()(["p"], [""], images=[[]], trainer_state=None)
    with pytest.raises(ValueError, match="`how` must have one value for each of the 2 prompts, got 1"):
        Brightness()(["p"] * 2, [""] * 2, images=[[], []], how=[""])


def test_prompt_text_is_what_the_user_said_last():
    picture = {"type": "image", "image": gray(0)}
    said = [picture, {"type": "text", "text": "now"}, "red"]
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": said},
    ]
    assert [prompt_text(one) for one in ("plain", messages[:1], messages)] == ["plain", "first", "now red"]


def test_a_missing_package_names_its_extra():
    with pytest.raises(ImportError, match=r"Reading needs `no_such_module`: `pip install 'emu35\[rewards\]'`"):
        import_extra("no_such_module", "Reading")


# ------------------------------------------------------------------------------------------------------------ the mix


@pytest.mark.parametrize(
    ("low", "high", "value", "normal"),
    [(0, 1, 0.5, 5.5), (0, 1, 0, 1), (0, 1, 1, 10), (-1, 1, 0.5, 7.75), (1, 10, 4, 4), (0, 100, 20, 2.8)],
)
def test_a_signal_is_brought_to_one_to_ten(low, high, value, normal):
    assert RewardMix([make("one", low, high, value)])(["p"], [""]) == [pytest.approx(normal, abs=1e-12)]


def test_signals_are_normalised_before_they_are_weighed():
    mix = RewardMix([Component(make("small", 0, 1, 0.5), 3.0), Component(make("large", 0, 100, 80), 1.0)])
    # (3 * 5.5 + 1 * 8.2) / 4; weighing first would let the large range win
    assert mix(["p", "q"], ["", ""]) == [pytest.approx(6.175, abs=1e-12)] * 2
    assert (mix.report["large"].mean, mix.report["large"].raw_mean) == (pytest.approx(8.2), 80.0)


def test_none_is_left_out_of_the_sample_and_of_the_mean():
    mix = RewardMix([make("whole", value=1.0), make("gaps", value=lambda prompts, _: [0.0, None, 0.5])])
    assert mix(["a", "b", "c"], [""] * 3) == [5.5, 10.0, 7.75]
    report = mix.report["gaps"]
    assert (report.mean, report.num_samples, report.num_missing) == (3.25, 3, 1)
    assert report.values == (1.0, None, 5.5)


def test_a_sample_without_any_reward_gets_none():
    mix = RewardMix([make("never", value=None)])
    assert mix(["a"], [""]) == [None]
    assert mix.report["never"].mean is None and mix.report["never"].num_missing == 1


def test_tasks_route():
    draw, both, ask = make("draw", value=1.0), make("both", value=0.0), make("ask", value=0.5)
    mix = RewardMix([Component(draw, tasks=["t2i", "x2i"]), both, Component(ask, 3.0, tasks=["vqa"])])
    columns = {"task": ["vqa", "t2i", "x2i", "vqa"], "images": [["a"], ["b"], ["c"], ["d"]], "trainer_state": "state"}
    assert mix(list("ABCD"), [""] * 4, **columns) == [4.375, 5.5, 5.5, 4.375]
    prompts, seen = draw.seen[0]
    assert prompts == ["B", "C"]
    assert seen == {"task": ["t2i", "x2i"], "images": [["b"], ["c"]], "trainer_state": "state"}
    assert mix.report["draw"].values == (None, 10.0, 10.0, None) and mix.report["draw"].num_missing == 0
    mix(["A"], [""], task=["vqa"])
    assert len(draw.seen) == 1  # a reward without samples is not asked
    assert mix.report["draw"].num_samples == 0


def test_without_tasks_only_rewards_for_all_count():
    assert RewardMix([make("all", value=1.0), Component(make("some"), tasks=["t2i"])])(["p"], [""]) == [10.0]


def test_components_are_logged_as_trl_takes_them():
    metrics, extra = defaultdict(list), {}
    mix = RewardMix([make("gaps", value=lambda prompts, _: [1.0, None]), Component(make("other"), tasks=["x2i"])])
    mix(["a", "b"], ["", ""], task=["t2i"] * 2, log_metric=appending(metrics), log_extra=extra.__setitem__)
    # One value for each sample: TRL takes the mean over those of all processes.
    names = {"rewards/gaps/mean": [10.0], "rewards/gaps/missing": [1.0, 0.0], "rewards/gaps/failed": [0.0, 0.0]}
    assert metrics == names
    assert extra == {"gaps": [10.0, None], "other": [None, None]}


def test_a_failing_sample_does_not_end_the_run():
    mix = RewardMix([Brightness(), make()])
    columns = {"images": [[gray(255)], [gray(255)]], "how": ["", "raise"]}
    assert mix(["a", "b"], ["", ""], **columns) == [7.75, 5.5]
    report = mix.report["brightness"]
    assert (report.num_missing, report.num_failures) == (1, 1)
    mix(["a"], [""], images=[[gray(0)]], how=[""])
    assert mix.report["brightness"].num_failures == 0  # of this call


def test_a_function_that_raises_is_kept_to_its_sample_too(caplog):
    def price(prompts, columns):
        return [1 / len(prompt) for prompt in prompts]

    fails = make("fails", value=lambda prompts, columns: [][0])
    mix = RewardMix([make("price", value=price), make("half"), fails])
    metrics = defaultdict(list)
    with caplog.at_level(logging.WARNING):
        assert mix(["ab", "", "a"], [""] * 3, log_metric=appending(metrics)) == [5.5, 5.5, 7.75]
    reports = [mix.report[name] for name in ("price", "half", "fails")]
    assert [(one.num_missing, one.num_failures) for one in reports] == [(1, 1), (0, 0), (3, 3)]
    assert sorted(metrics["rewards/price/failed"]) == [0, 0, 1]
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError, IndexError, IndexError]


def test_what_is_wrong_with_the_setup_is_no_failure_of_a_sample():
    with pytest.raises(ValueError, match="'brightness' needs the column `how`"):
        RewardMix([Brightness()])(["p"], [""], images=[[]])

    class TooFew(Brightness):
        def scores(self, samples):
            return [0.0]

    with pytest.raises(ValueError, match="'brightness' gave 1 scores for 2 samples"):
        RewardMix([TooFew()])(["p"] * 2, [""] * 2, images=[[]] * 2, how=[""] * 2)


def test_an_image_that_cannot_be_opened_costs_one_sample(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    gray(9).save(tmp_path / "good.png")
    reward = Brightness()
    images = [[str(tmp_path / name)] for name in ("good.png", "broken.png", "missing.png")]
    assert reward(["p"] * 3, [""] * 3, images=images, how=[""] * 3) == [9.0, None, None]
    assert reward.num_failures == 2


def test_what_rounding_adds_to_a_range_is_cut_off():
    assert RewardMix([make(value=1 + 1e-7)])(["p"], [""]) == [10.0]


def test_a_function_that_returns_nan_has_failed_on_that_sample(caplog):
    mix = RewardMix([make(value=lambda prompts, _: [0.5, float("nan")]), make("other", value=1.0)])
    with caplog.at_level(logging.WARNING):
        assert mix(["p", "q"], ["", ""]) == [7.75, 10.0]
    assert (mix.report["half"].num_missing, mix.report["half"].num_failures) == (1, 1)
    assert "'half' failed" in caplog.text


@pytest.mark.parametrize("value", [1.01, -0.5, float("inf")])
def test_a_value_out_of_range_names_reward_value_and_way_out(value):
    with pytest.raises(ValueError, match=rf"'half' returned {value} \(value 1\), out of its range \[0.0, 1.0\]. Corr"):
        RewardMix([make(value=lambda prompts, _: [0.5, value])])(["p", "q"], ["", ""])


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([0.5], ValueError, "'half' returned 1 values for 2 completions. Return one for each"),
        ([0.5, "good"], TypeError, r"'half' returned 'good' \(value 1\), which is no number"),
        (0.5, TypeError, "'half' must return a list, got float"),
        (None, TypeError, "'half' must return a list, got NoneType"),
    ],
)
def test_wrong_returns_are_refused(returned, error, message):
    with pytest.raises(error, match=message):
        RewardMix([make(value=lambda prompts, _: returned)])(["p", "q"], ["", ""])


def test_bad_components_are_refused():
    with pytest.raises(TypeError, match=r"must be a callable with `name` and `range`.*set `function.name`"):
        RewardMix([lambda prompts, completions: [0.0]])

    def without_columns(prompts, completions):
        return [0.5] * len(prompts)

    without_columns.name, without_columns.range = "plain", (0, 1)
    with pytest.raises(TypeError, match=r"'plain' must take all columns.*\(prompts, completions\)"):
        RewardMix([without_columns])
    with pytest.raises(ValueError, match=r"`range` of the reward 'half' must be two rising numbers, got \(1, 1\)"):
        Component(make(low=1, high=1))
    with pytest.raises(ValueError, match="`range`"):
        Component(make(high=float("inf")))
    for weight in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`weight` of the reward 'half' must be positive"):
            Component(make(), weight)
    for tasks in ("t2i", []):
        with pytest.raises(ValueError, match="`tasks` of the reward 'half' must be a list of tasks or None"):
            Component(make(), tasks=tasks)
    with pytest.raises(ValueError, match="`components` is empty"):
        RewardMix([])
    with pytest.raises(ValueError, match="different names, got half more than once"):
        RewardMix([make(), make()])
    with pytest.raises(ValueError, match="`task` must have one value for each of the 2 prompts, got 1"):
        RewardMix([make()])(["p", "q"], ["", ""], task=["t2i"])


def test_tasks_are_checked_before_training():
    mix = RewardMix([Component(make(), tasks=["t2i", "x2i"])])
    mix.check_tasks(["t2i", "x2i", "t2i"])
    with pytest.raises(ValueError, match="No reward counts for the task 'vqa'"):
        mix.check_tasks(["t2i", "x2i", "vqa"])
    with pytest.raises(ValueError, match="'half' is for the tasks x2i, which are none of the data's: t2i"):
        mix.check_tasks(["t2i"])


def test_a_rehearsal_finds_what_no_sample_would_mend():
    def misspelt(prompts, completions, **columns):
        return [leng(prompt) for prompt in prompts]  # noqa: F821

    def unpacked(prompts, completions, **columns):
        import a_package_that_is_not_there

        return a_package_that_is_not_there.score(prompts)

    class Slip(Brightness):
        name, needs = "slip", ()

        def score(self, sample):
            return nothing  # noqa: F821

    for function in (misspelt, unpacked):
        function.name, function.range = "mine", (0.0, 1.0)
    for reward, message in ((misspelt, "leng"), (unpacked, "a_package_that_is_not_there")):
        with pytest.raises(ValueError, match=rf"'mine' cannot work: .*{message}"):
            RewardMix([make(), reward]).rehearse(["p"], [""])
    RewardMix([Slip()]).rehearse(["p"], [""])  # it has weights, and is asked when they are loaded
    with pytest.raises(ValueError, match=r"'slip' cannot work: .*nothing"):
        RewardMix([make(), Slip()]).rehearse(["p"], [""], loaded=True)
    failing = make(value=lambda prompts, _: 1 / 0)  # may be the blank picture's fault
    RewardMix([failing]).rehearse(["p"], [""])


def test_load_loads_every_reward_and_the_mix_pickles():
    mix = RewardMix([Component(Brightness(), 2.0, ["t2i"])])
    again = pickle.loads(pickle.dumps(mix))
    again.load()
    assert again.components[0].reward.loaded and again.components[0].weight == 2.0
    assert not mix.components[0].reward.loaded
