"""Cards and tables are what the measured JSON says, and have what the Hub and a reader look for."""

import json
import re
import shutil
from pathlib import Path

import emu35
import pytest
import torch
import yaml
from emu35.configuration_emu35 import Emu35Config
from emu35.model_cards import generate, tables
from emu35.model_cards.cards import finetuned_card
from emu35.model_cards.index import TASKS
from emu35.modeling_emu35 import Emu35ForConditionalGeneration
from emu35.training.memory import count_parameters
from huggingface_hub import EvalResult, ModelCard
from transformers import BitsAndBytesConfig

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
SECTIONS = ("Intended use", "Limits", "Risks", "Memory", "Training data", "Reproduce")
REPEAT = "run: python -m emu35.model_cards.generate"


@pytest.fixture(scope="module")
def files():
    return generate.generated_files()


def test_files_are_what_was_measured(files):
    assert {path.parent.name for path in files if path.is_relative_to(CARDS)} == set(generate.CARDS)
    assert ROOT / "README.md" in files and ROOT / "docs" / "performance.md" in files
    for path, text in files.items():
        assert path.read_text(encoding="utf-8") == text, f"{path} differs; {REPEAT}"


@pytest.mark.parametrize("name", generate.CARDS)
def test_front_matter_and_sections(name):
    card = ModelCard.load(CARDS / name / "README.md")
    data, original = card.data, name.removesuffix("-nf4")
    assert (data.pipeline_tag, data.license) == ("any-to-any", "apache-2.0")
    assert data.library_name == ("peft" if name == "emu35-tiny-dida" else "transformers")
    bases = {"emu35": "BAAI/Emu3.5", "emu35-image": "BAAI/Emu3.5-Image"}
    assert data.base_model == {**bases, "emu35-tiny-dida": "emu35-tiny"}.get(original)
    assert data.to_dict().get("base_model_relation") == (
        "quantized" if name != original else "adapter" if name == "emu35-tiny-dida" else None
    )
    for section in SECTIONS:
        assert f"\n## {section}\n\n" in card.text, section
    assert "{{" not in card.content and "\n\n\n" not in card.content and "None" not in card.text
    if original in bases:
        assert "have not been run" in card.text and data.eval_results is None
        release = data.base_model.split("/")[1]
        assert f"emu35 convert --model {release} " in card.text and f"--output {original}\n" in card.text
    else:
        assert data.model_name == name and data.eval_results


def test_model_index_is_what_was_measured():
    data = ModelCard.load(CARDS / "emu35-tiny" / "README.md").data
    measured = tables.read_results(CARDS / "emu35-tiny" / "results")
    values = {result.dataset_config: result.metric_value for result in data.eval_results}
    assert values["t2i"] == round(100 * measured["t2i"]["whole_scene"]["all"], 1)
    assert values["t2i, unseen pairs"] == round(100 * measured["t2i"]["held_out"]["whole_scene"]["all"], 1)
    assert values["vqa"] == round(100 * measured["vqa"]["accuracy"], 1)
    assert values["vla"] == round(100 * measured["vla"]["rates"]["success"], 1)
    assert len(values) == 2 * len(TASKS)


def test_another_measurement_is_another_card(tmp_path, monkeypatch):
    """Every result that is there is used: none can change without the card."""
    here = tmp_path / "model_cards"
    ignored = shutil.ignore_patterns("*.png", "model.safetensors", "adapter_model.safetensors")
    shutil.copytree(CARDS, here, ignore=ignored)
    for name in ("emu35-tiny/model.safetensors", "emu35-tiny-dida/adapter_model.safetensors"):
        (here / name).symlink_to(CARDS / name)
    monkeypatch.setattr(generate, "HERE", here)
    monkeypatch.setattr(tables, "memory_table", lambda *sizes: "")  # takes the longest, and reads no results

    def texts() -> list[str]:
        return [str(generate.tiny_card()), str(generate.dida_card()), *generate.generated_blocks().values()]

    before = texts()
    for path in sorted(here.glob("*/results/*.json")):
        original = path.read_text(encoding="utf-8")
        path.write_text(json.dumps(_changed(json.loads(original))), encoding="utf-8")
        assert texts() != before, path
        path.write_text(original, encoding="utf-8")
    assert texts() == before


def _changed(value):
    """All fractions are others, and numbers of minutes."""
    if isinstance(value, dict):
        return {name: value[name] + 1 if name == "minutes" else _changed(value[name]) for name in value}
    if isinstance(value, list):
        return [_changed(one) for one in value]
    return value * 0.5 if isinstance(value, float) else value


def test_proofs_get_their_section(tmp_path, monkeypatch):
    before = {"task": "t2i", "num": 600, "seed": 1, "whole_scene": {"all": 0.97}}
    before["held_out"] = {"num": 150, "whole_scene": {"all": 0.153}}
    after = {**before, "held_out": {"num": 150, "whole_scene": {"all": 0.9}}}
    proof = {
        "title": "LoRA",
        "how": "300 steps",
        "command": "emu35 train lora.yaml",
        "picture": "curves.png",
        "measured": [{"before": before, "after": after}],
        "rows": [{"what": "something else", "before": 0.5, "after": 0.6, "target": "80 %", "num": 7}],
    }
    read = tables.read_results
    monkeypatch.setattr(tables, "read_results", lambda folder: {**read(folder), "finetuning-x": proof})
    lines = [
        "| t2i, held-out scenes | 97.0 % | 97.0 % |  | 600 |",
        "| t2i, with unseen pairs | 15.3 % | 90.0 % |  | 150 |",
        "| something else | 50.0 % | 60.0 % | 80 % | 7 |",
    ]
    assert "\n".join(lines) in str(generate.tiny_card()).partition("## Fine-tuned")[2]
    assert "![LoRA: curves](curves.png)" in str(generate.tiny_card())
    block = generate.generated_blocks()["fine-tuning"]
    assert "\n".join(lines) in block and "(../model_cards/emu35-tiny/curves.png)" in block
    proof["measured"][0]["after"] = {**after, "seed": 2}
    with pytest.raises(ValueError, match="`seed` is 1 before and 2 after"):
        tables.proofs({"finetuning-x": proof})


def test_blocks_are_filled_and_unknown_ones_refused():
    text = "a\n<!-- generated: x -->\nold\n<!-- end -->\nb <!-- end -->"
    filled = generate.fill(text, {"x": "new\nlines"})
    assert filled == "a\n<!-- generated: x -->\nnew\nlines\n<!-- end -->\nb <!-- end -->"
    assert generate.fill(filled, {"x": "new\nlines"}) == filled
    with pytest.raises(ValueError, match="`<!-- generated: x -->` is not one of y"):
        generate.fill(text, {"y": ""})


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "precision", ["float32", "bfloat16", "8 bit", "4 bit (nf4)", "4 bit (nf4), double quantisation"]
)
def test_memory_is_that_of_the_loaded_model(precision):
    options = {"dtype": torch.float32 if precision == "float32" else torch.bfloat16}
    if "bit" in precision:
        pytest.importorskip("bitsandbytes")
        bits = {"load_in_8bit": True}
        if precision != "8 bit":
            bits = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": "double" in precision,
            }
        options |= {"quantization_config": BitsAndBytesConfig(**bits), "device_map": "cpu"}
    model = Emu35ForConditionalGeneration.from_pretrained(emu35.TINY, **options)
    vision = sum(one.numel() * one.element_size() for one in model.vision_tokenizer.parameters())
    loaded = -vision
    for parameter in model.parameters():
        loaded += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            loaded += state.absmax.numel() * state.absmax.element_size()
            if state.nested:
                loaded += state.state2.absmax.numel() * state.state2.absmax.element_size()
    parts = tables.memory_parts(Emu35Config.from_pretrained(emu35.TINY), generate.image_tokens(6, 6))[precision]
    assert parts["decoder"] == pytest.approx(loaded, rel=0.002)
    assert parts["vision tokenizer"] == vision


def test_memory_of_the_released_size():
    parts = tables.memory_parts(Emu35Config(), generate.image_tokens(64, 64))
    assert generate.image_tokens(64, 64) == 4167 and generate.image_tokens(45, 45) == 2077
    assert parts["bfloat16"]["decoder"] == pytest.approx(68.2e9, rel=0.002)
    assert parts["bfloat16"]["cache of a picture with guidance"] == 2 * 4167 * 2**18
    row = next(line for line in tables.memory_table(Emu35Config(), 4167).splitlines() if line.startswith("| 8 bit"))
    assert row == "| 8 bit | 37 GB | 1.8 GB | 2.2 GB | 41 GB |"


def test_sizes_that_the_first_page_names():
    numbers = count_parameters(Emu35Config.from_pretrained(emu35.TINY))
    parameters = tables.amount(numbers["layers"] + numbers["embeddings"] + numbers["vision"])
    file = tables.size((CARDS / "emu35-tiny" / "model.safetensors").stat().st_size)
    assert f"the tiny model ({parameters} parameters, {file})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_numbers_in_words():
    assert [tables.amount(number) for number in (7, 1200, 6_085_331, 34.1e9)] == ["7", "1.2 k", "6.1 M", "34.1 B"]
    assert [tables.size(number) for number in (568_000, 13_693_052, 1.8e9, 68e9)] == [
        "0.6 MB",
        "14 MB",
        "1.8 GB",
        "68 GB",
    ]
    assert [tables.difference(number) for number in (0.4, -7, -0.04)] == ["+0.4", "-7.0", "0.0"]


# --------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("is_adapter", [True, False])
@pytest.mark.parametrize("model, base", [("tiny", None), ("BAAI/Emu3.5", "BAAI/Emu3.5"), ("a/folder", None)])
def test_card_of_a_fine_tuned_model(model, base, is_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a/folder").mkdir(parents=True)
    card = finetuned_card(
        model,
        title="Mine",
        description="It draws.",
        is_adapter=is_adapter,
        data="- 12 pictures of mine",
        results="| loss | 1 |\n|---|---|\n",
        recipe="method: sft\n",
        tags=["mine"],
    )
    card.save(tmp_path / "README.md")
    metadata, text = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1:]
    metadata = yaml.safe_load(metadata)
    assert metadata.get("base_model") == base  # the Hub refuses what is no name of a repository
    assert metadata.get("base_model_relation") == (base and ("adapter" if is_adapter else "finetune"))
    assert metadata["license"] == ("other" if model == "a/folder" else "apache-2.0")
    assert ("license_name" in metadata) == (model == "a/folder") and "model-index" not in metadata
    assert metadata["library_name"] == ("peft" if is_adapter else "transformers")
    assert metadata["tags"] == ["emu35", *(["lora"] if is_adapter else []), "mine"]
    shown = "emu35.TINY" if model == "tiny" else f'"{model}"'
    assert (f"from_pretrained({shown}" in text) == ("load_adapter(" in text) == is_adapter
    for part in ("# Mine\n\nIt draws.\n", "- 12 pictures of mine\n", "| loss | 1 |", "```yaml\nmethod: sft\n```\n"):
        assert part in text, part
    for section in ("Use", "Intended use", "Limits", "Risks", "Memory", "Training data", "Results", "Reproduce"):
        assert f"\n## {section}\n" in text, section
    assert not re.search(r"{{|\bNone\b|\n\n\n", text)


def test_card_of_a_fine_tuned_model_has_what_was_measured(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A base\n")
    measured = EvalResult(
        task_type="text-to-image",
        dataset_type="mine",
        dataset_name="My pictures",
        metric_type="accuracy",
        metric_value=91.5,
    )
    about = {"title": "Mine", "description": "", "is_adapter": True, "data": "-", "results": "-", "recipe": "-"}
    card = finetuned_card(str(tmp_path), **about, eval_results=[measured])
    assert card.data.license == "cc-by-4.0"  # of the base's own card
    (entry,) = yaml.safe_load(card.content.split("---\n")[1])["model-index"]
    assert entry["name"] == "Mine" and entry["results"][0]["metrics"][0]["value"] == 91.5
    assert f"torch {torch.__version__}" in card.text
