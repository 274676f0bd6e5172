"""The comparison of image decoders: what it measures, what it keeps, and what it draws."""

import json

import pytest
import torch
from emu35 import cli
from emu35.configuration_emu35 import Emu35VisionTokenizerConfig
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.modeling_emu35_vision_tokenizer import Emu35VisionTokenizer
from emu35.pipelines.scheduling_dida import DiDAScheduler
from emu35.processing_emu35 import Emu35Processor
from emu35.training import compare_decoders as module
from emu35.training.compare_decoders import EXACT, compare_decoders, format_comparison, plot_comparison
from emu35.training.export import export
from emu35.training.recipe import recipe_from_dict
from emu35.training.train import build_processor
from emu35.training.train_language_model import build_model
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_train_evaluate import VALUES, VISION

STEPS = (2, 4)
OPTIONS = {"num": 3, "num_timed": 2, "steps": STEPS, "progress": False}
NAMES = [*EXACT, "metric 2", "metric 4", "mixture 2", "mixture 4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model, exported."""
    torch.manual_seed(0)
    recipe = recipe_from_dict(VALUES)
    vision_tokenizer = Emu35VisionTokenizer(Emu35VisionTokenizerConfig(**VISION))
    processor = build_processor(recipe, vision_tokenizer)
    directory = tmp_path_factory.mktemp("model")
    settings = {"guidance_scale": 1.5, "image_top_p": 0.9, "height": 48, "width": 48, "max_new_tokens": 64}
    export(build_model(recipe, processor, vision_tokenizer), processor, directory, settings)
    return directory


@pytest.fixture
def model(checkpoint):
    return Emu35ForConditionalGeneration.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def processor(checkpoint):
    return Emu35Processor.from_pretrained(checkpoint)


@pytest.fixture
def adapters(checkpoint, tmp_path):
    """Folders of two random adapters, by path."""
    folders = {}
    for seed, path in enumerate(("metric", "mixture")):
        torch.manual_seed(seed)
        bare = Emu35ForConditionalGeneration.from_pretrained(checkpoint)
        adapted = get_peft_model(bare, LoraConfig(r=2, target_modules=r".*layers.*\.q_proj", init_lora_weights=False))
        folders[path] = tmp_path / path
        adapted.save_pretrained(folders[path])
        DiDAScheduler(VISION["codebook_size"], path=path).save_pretrained(folders[path])
    return folders


@pytest.fixture
def evaluated(monkeypatch):
    """The models and settings of each evaluation, which takes no time and marks none of its scenes."""
    calls = []

    def evaluate(model, task, num, seed, num_held_out, batch_size, processor, progress, **settings):
        calls.append((model, settings))
        return {"whole_scene": {"all": 0.1 * len(calls), "full": 0.5, "partial": 0.0}}

    monkeypatch.setattr(module, "evaluate", evaluate)
    return calls


def test_every_decoder_is_measured(model, processor, adapters):
    results = compare_decoders(model, processor, adapters, **{**OPTIONS, "steps": (2,)})
    entries = {entry["name"]: entry for entry in results["entries"]}
    assert list(entries) == [*EXACT, "metric 2", "mixture 2"]
    assert {"all", "1_objects", "2_objects", "3_objects", "full"} <= set(entries["metric 2"]["whole_scene"])
    passes = {name: entry["passes"] for name, entry in entries.items()}
    assert passes["ar"] == passes["ar, unfiltered"] == 36 and passes["metric 2"] == 3
    assert passes["speculative"] < 36
    for entry in entries.values():
        assert len(entry["seconds"]) == 2 and min(entry["seconds"]) > 0
        assert entry["seconds_per_image"] == sum(entry["seconds"]) / 2
    assert entries["ar"]["speedup"] == 1
    assert json.loads(json.dumps(results)) == results


def test_each_entry_has_its_model_and_settings(model, processor, adapters, evaluated, monkeypatch):
    monkeypatch.setattr(module, "_time", lambda *args: None)
    loaded = []
    load = model.load_dida_adapter
    monkeypatch.setattr(
        model, "load_dida_adapter", lambda folder: loaded.append(folder) or load(folder), raising=False
    )
    only = {"guidance_cutoff": 0.5}
    results = compare_decoders(model, processor, adapters, guidance_scale=1.0, dida_settings=only, **OPTIONS)
    assert results["dtype"] == str(model.dtype).removeprefix("torch.") and results["device"]
    for number, (used, settings) in enumerate(evaluated):
        assert settings["guidance_scale"] == 1.0
        if number < len(EXACT):  # as users have it who load no adapter
            assert used is not model and not hasattr(used.model.layers[0].self_attn.q_proj, "lora_A")
            assert used.model.norm.weight is model.model.norm.weight
            assert "guidance_cutoff" not in settings
        else:
            assert used is model and settings["image_decoder"] == "dida" and settings["guidance_cutoff"] == 0.5
    assert [settings["num_inference_steps"] for _, settings in evaluated[len(EXACT) :]] == [2, 4, 2, 4]
    assert loaded == list(adapters.values())
    assert evaluated[2][1]["image_top_p"] == 1.0 and evaluated[1][1]["image_top_k"] == 1


def test_what_is_known_is_not_measured_again(model, processor, adapters, evaluated, tmp_path):
    path = tmp_path / "results.json"
    first = compare_decoders(model, processor, adapters, path=path, **OPTIONS)
    assert len(evaluated) == len(NAMES) and json.loads(path.read_text()) == first
    assert compare_decoders(model, processor, adapters, path=path, **OPTIONS) == first
    assert len(evaluated) == len(NAMES)

    # An adapter that was trained again is another one.
    weights = adapters["mixture"] / "scheduler_config.json"
    weights.write_text(weights.read_text().replace('"alpha": 0.9', '"alpha": 0.8'))
    again = compare_decoders(model, processor, adapters, path=path, **OPTIONS)
    assert len(evaluated) == len(NAMES) + 2
    assert [entry["name"] for entry in again["entries"]] == NAMES
    # Times come from one run.
    assert all(new["seconds"] != old["seconds"] for new, old in zip(again["entries"], first["entries"], strict=True))

    compare_decoders(model, processor, adapters, path=path, **{**OPTIONS, "num": 4})
    assert len(evaluated) == 2 * len(NAMES) + 2
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    compare_decoders(model, processor, adapters, path=path, **{**OPTIONS, "num": 4})
    assert len(evaluated) == 3 * len(NAMES) + 2


def test_a_run_that_was_stopped_goes_on(model, processor, adapters, evaluated, monkeypatch, tmp_path):
    path, evaluate = tmp_path / "results.json", module.evaluate
    fail_at = [5]

    def stopped(*args, **options):
        if len(evaluated) == fail_at[0]:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr(module, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare_decoders(model, processor, adapters, path=path, **OPTIONS)
    assert [entry["name"] for entry in json.loads(path.read_text())["entries"]] == NAMES[:5]
    fail_at[0] = None
    results = compare_decoders(model, processor, adapters, path=path, **OPTIONS)
    assert len(evaluated) == len(NAMES) and list(tmp_path.glob(".*")) == []
    rates = [entry["whole_scene"]["all"] for entry in results["entries"]]
    assert rates == pytest.approx([0.1 * number for number in range(1, len(NAMES) + 1)])


def test_table_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    entries = []
    for number, name in enumerate(NAMES):
        settings = {"num_inference_steps": int(name[-1])} if number >= len(EXACT) else {}
        line = name if number < len(EXACT) else name[:-2]
        own = {"passes": 3.0, "seconds_per_image": 0.1 * (number + 1), "speedup": 1.5, "whole_scene": {"all": 0.876}}
        entries.append({"name": name, "line": line, "settings": settings, **own})
    results = {"num": 500, "threads": 2, "entries": entries}
    table = format_comparison(results).splitlines()
    assert len(table) == 2 + len(NAMES) and len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| ar | 3.0 | 0.100 | 1.50 | 87.6 |")
    plot_comparison(results, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        colors = {color[:3] for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colors  # a line for each adapter


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": {}}, "needs a model that was adapted"),
        ({"adapters": {"ar": "x"}}, "another decoder's"),
        ({"steps": ()}, "`steps` not empty"),
        ({"num_timed": 0}, "`num_timed` must be positive"),
    ],
)
def test_wrong_arguments(model, processor, adapters, options, message):
    with pytest.raises(ValueError, match=message):
        compare_decoders(model, processor, **{"adapters": adapters, **OPTIONS, **options})


def test_other_files_are_left_alone(model, processor, adapters, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"task": "t2i"}')
    with pytest.raises(ValueError, match="holds no comparison"):
        compare_decoders(model, processor, adapters, path=path, **OPTIONS)
    assert path.read_text() == '{"task": "t2i"}'
    with pytest.raises(FileNotFoundError, match="it lacks adapter_config"):
        compare_decoders(model, processor, {"metric": tmp_path}, **OPTIONS)


def test_command_line(checkpoint, adapters, monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    asked = []
    entry = {"name": "ar", "line": "ar", "settings": {}, "passes": 36, "seconds_per_image": 0.3, "speedup": 1.0}
    results = {"num": 3, "threads": 1, "entries": [{**entry, "whole_scene": {"all": 0.9}}]}
    monkeypatch.setattr(module, "compare_decoders", lambda *args, **options: asked.append((args, options)) or results)
    named = [f"{name}={folder}" for name, folder in adapters.items()]
    base = ["eval", "--model", str(checkpoint), "--device", "cpu"]
    files = ["--output", str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.png")]
    assert cli.main([*base, "--compare-decoders", *named, "--num", "3", "--seed", "1", *files]) == 0
    (arguments, options) = asked[0]
    assert arguments[2:] == ({name: str(folder) for name, folder in adapters.items()}, 3)
    assert options["seed"] == 1 and options["path"] == tmp_path / "r.json" and "guidance_scale" not in options
    assert (tmp_path / "p.png").is_file() and "p.png: written" in capsys.readouterr().out
    for wrong, message in (
        (["--compare-decoders", "--sweep", "guidance_scale=1,2"], "leave out --sweep"),
        (["--compare-decoders", "--image-decoder", "ar"], "leave out --image-decoder"),
        (["--compare-decoders", "--task", "vqa"], "leave out --task"),
        (["--compare-decoders", "--num-held-out", "3"], "leave out --num-held-out"),
        (["--compare-decoders", "runs/dida"], "names adapters like"),
    ):
        assert cli.main([*base, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert len(asked) == 1
