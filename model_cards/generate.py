"""Cards and tables from measured JSON, so that no number can differ from what was measured.

    python -m emu35.model_cards.generate

writes `model_cards/NAME/README.md` for each name in `CARDS`, from `templates/` and `model_cards/NAME/results/*.json`,
and what stands between `<!-- generated: NAME -->` and `<!-- end -->` in README.md and docs/*.md. After a new
measurement: put its JSON in the place of the old one, under the same name, and run it. The tests compare every file
with what it would write.

Results are what the commands write: `emu35 eval --task T --output T.json`, `--sweep`, `--compare-decoders`
(decoders.json), `emu35 bench --output bench.json`. In `emu35-tiny-dida/results/`, `T-ar.json` and `T-dida.json` are
`emu35 eval --task T` with either decoder, and `T-verified.json` with verified codes. Written by hand, as no command
does: balance.json, speculative.json, paths.json, attempts.json, training.json. So is
`emu35-tiny/results/finetuning-NAME.json`, which gets a section of the tiny model's card, and a table
where a page has `<!-- generated: fine-tuning -->`:

    {"title": "LoRA", "how": "300 steps, 6 minutes on 2 CPU cores, an adapter of 2 MB",
     "command": "emu35 train training/recipes/tiny-lora.yaml",
     "picture": "curves.png",   (may be left out: a file beside the card)
     "measured": [{"before": t2i.json, "after": after-t2i.json, both as `emu35 eval` writes them}, ...],
     "rows": [{"what": "what no such file says", "before": 0.153, "after": 0.9, "target": "80 %", "num": 150}, ...]}
"""

import json
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from emu35.configuration_emu35 import Emu35Config
from emu35.training.memory import count_parameters
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from . import tables
from .cards import render
from .index import accuracy, evaluated

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
ROOT = HERE.parent
RECIPES = ROOT / "training" / "recipes"
_BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_TAGS = ["emu3.5", "text-to-image", "image-editing", "visual-question-answering", "interleaved-generation"]


def image_tokens(token_height: int, token_width: int) -> int:
    """Tokens of one image: codes, ends of rows, size and control tokens."""
    digits = len(f"{token_height}{token_width}")
    return token_height * token_width + (token_height - 1) + digits + len(("BOI", "*", "IMG", "EOI"))


def _tokens_of_a_picture(config: Emu35Config) -> int:
    vision = config.vision_tokenizer_config
    side = vision.resolution // 2 ** (len(vision.channel_multiplier) - 1)
    return image_tokens(side, side)


def tiny_card() -> ModelCard:
    folder = HERE / "emu35-tiny"
    results, config = tables.read_results(folder / "results"), Emu35Config.from_pretrained(folder)
    numbers, recipe = count_parameters(config), _recipe("tiny")
    decoder = numbers["layers"] + numbers["embeddings"]
    data = ModelCardData(
        model_name="emu35-tiny",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="any-to-any",
        language="en",
        tags=[*_TAGS, "tiny"],
        metrics=["accuracy"],
        eval_results=evaluated(results, held_out=True),
    )
    restored, exact, balance = results["reconstruction"], results["speculative"], results["balance"]
    return render(
        "emu35-tiny",
        data,
        sizes={
            "all": tables.amount(decoder + numbers["vision"]),
            "decoder": tables.amount(decoder),
            "vision": f"{numbers['vision'] / 1e6:.2f} M",
        },
        scenes=tables.scenes_table(results["t2i"]),
        aspects=", ".join(f"{name} {tables.percent(rate)}" for name, rate in results["t2i"]["aspects"].items()),
        questions=tables.questions_table(results["vqa"]),
        tasks=tables.tasks_table(results),
        kinds=tables.kinds_list(results),
        restored={
            "num": restored["num"],
            "right": tables.percent(restored["whole_scene"]),
            "unseen": tables.percent(restored["held_out"]["whole_scene"]),
            "psnr": f"{restored['psnr']:.1f}",
        },
        guidance=tables.sweep_table(results["guidance"]),
        image_top_k=tables.sweep_table(results["image_top_k"]),
        text_tokens=config.token_layout.visual_token_offset,
        proofs=tables.proofs(results),
        file_size=tables.size((folder / "model.safetensors").stat().st_size),
        memory=tables.memory_table(config, _tokens_of_a_picture(config)),
        decode_repeats=results["decode"]["decode"]["repeats"],
        speculative=tables.speculative_table(results["decode"]),
        random=tables.random_speedups(results["decode"]),
        exactness={
            "num": f"{exact['num']:,}",
            "seeds": exact["seeds"],
            **{name: tables.percent(rate) for name, rate in exact["whole_scene"].items()},
        },
        stages=tables.stages_table(recipe),
        steps=f"{sum(stage['steps'] for stage in recipe['stages']):,}",
        balance={**balance["tokens"], "table": tables.balance_table(balance)},
    )


def dida_card() -> ModelCard:
    folder, base = HERE / "emu35-tiny-dida", HERE / "emu35-tiny"
    results, recipe = tables.read_results(folder / "results"), _recipe("tiny-dida")
    compared, config = results["decoders"], Emu35Config.from_pretrained(base)
    entries = {entry["name"]: entry for entry in compared["entries"]}
    shown = entries["dida 8"]["whole_scene"]["all"]
    index = [
        accuracy(
            "text-to-image", "t2i", entries[f"dida {steps}"]["whole_scene"]["all"], f"whole scene right, {steps} steps"
        )
        for steps, *_ in tables.DIDA_TARGETS
    ]
    data = ModelCardData(
        model_name="emu35-tiny-dida",
        license="apache-2.0",
        library_name="peft",
        pipeline_tag="any-to-any",
        base_model="emu35-tiny",
        base_model_relation="adapter",
        language="en",
        tags=["emu3.5", "dida", "discrete-diffusion", "text-to-image", "image-editing", "lora", "tiny"],
        metrics=["accuracy"],
        eval_results=index,
    )
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)
    weights = sum(a * b for a, b in shapes)
    return render(
        "emu35-tiny-dida",
        data,
        num=compared["num"],
        threads=compared["threads"],
        device=compared["device"],
        dtype=compared["dtype"],
        num_timed=compared["num_timed"],
        decoders=tables.decoders_table(compared),
        ar_passes=round(entries["ar"]["passes"]),
        targets=tables.dida_targets(compared),
        standard_error=f"{100 * (shown * (1 - shown) / compared['num']) ** 0.5:.1f}",
        attempts={**results["attempts"], "table": tables.attempts_table(results["attempts"])},
        paths={**results["paths"], "table": tables.paths_table(results["paths"])},
        tasks=tables.dida_tasks(results),
        task_target=tables.DIDA_TASK_TARGET,
        adapter_size=tables.size((folder / "adapter_model.safetensors").stat().st_size),
        adapter_parameters=tables.amount(weights),
        memory=tables.memory_table(config, _tokens_of_a_picture(config), weights),
        distilled_num="4,096",
        distilled_share=f"{100 * recipe['distilled']['share']:.0f} %",
        rank=recipe["lora"]["rank"],
        steps=f"{sum(stage['steps'] for stage in recipe['stages']):,}",
        stages=tables.stages_table(recipe),
        training=results["training"],
        bench={
            "cpu": results["bench"]["environment"]["name"],
            "repeats": results["bench"]["dida"]["repeats"],
            "layers": tables.amount(results["bench"]["dida"]["random"][0]["parameters_of_layers"]),
            "batches": tables.dida_batches_table(results["bench"]),
            "grids": tables.dida_grids_table(results["bench"]),
        },
        scheduler=json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8")),
    )


def released_card(name: str) -> ModelCard:
    """A card for released weights, converted: of "emu35", "emu35-image", or either with "-nf4"."""
    original, quantized = name.removesuffix("-nf4"), name.endswith("-nf4")
    interleaved = original == "emu35"
    release = "Emu3.5" if interleaved else "Emu3.5-Image"
    config = Emu35Config()
    tokens, numbers = image_tokens(64, 64), count_parameters(config)
    parts = tables.memory_parts(config, tokens)
    cache_of_a_token = parts["bfloat16"]["cache of a picture with guidance"] / (2 * tokens)
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="any-to-any",
        base_model=f"BAAI/{release}",
        tags=(_TAGS if interleaved else _TAGS[:3]) + (["4-bit", "nf4", "bitsandbytes"] if quantized else []),
        **({"base_model_relation": "quantized"} if quantized else {}),
    )
    return render(
        "released",
        data,
        name=name,
        original=original,
        release=release,
        quantized=quantized,
        interleaved=interleaved,
        image_tokens=f"{tokens:,}",
        codes=f"{64 * 64:,}",
        memory=tables.memory_table(config, tokens),
        sizes={
            "decoder": tables.amount(numbers["layers"] + numbers["embeddings"]),
            "bfloat16": tables.size(parts["bfloat16"]["decoder"]),
            "nf4": tables.size(parts["4 bit (nf4), double quantisation"]["decoder"]),
            "context": tables.size(cache_of_a_token * config.text_config.max_position_embeddings),
        },
    )


CARDS = {
    "emu35-tiny": tiny_card,
    "emu35-tiny-dida": dida_card,
    **{
        name: lambda name=name: released_card(name)
        for name in ("emu35", "emu35-image", "emu35-nf4", "emu35-image-nf4")
    },
}


def _recipe(name: str) -> dict:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


def _gallery() -> str:
    """The Space's screenshots, small, side by side."""
    pictures = sorted((ROOT / "docs" / "images").glob("space-*.png"))
    names = [path.stem.removeprefix("space-") for path in pictures]
    return "\n".join(
        f'<a href="docs/images/{path.name}"><img src="docs/images/{path.name}" alt="the tab {name}" width="24%"></a>'
        for path, name in zip(pictures, names, strict=True)
    )


def generated_blocks() -> dict[str, str]:
    """What README.md and docs/ say between `<!-- generated: NAME -->` and `<!-- end -->`."""
    tiny = tables.read_results(HERE / "emu35-tiny" / "results")
    dida = tables.read_results(HERE / "emu35-tiny-dida" / "results")
    released = Emu35Config()
    proofs = [
        f"**{one['title']}** ({one['how']}; `{one['command']}`):\n\n{one['table']}"
        + (f"\n\n![curves](../model_cards/emu35-tiny/{one['picture']})" if "picture" in one else "")
        for one in tables.proofs(tiny)
    ]
    return {
        "tasks": tables.overview_table(tiny),
        "bench": tables.bench_table(tiny["bench"]),
        "bench-training": tables.training_tables(tiny["bench_training"]),
        "decoders": tables.decoders_overview_table(dida["decoders"], dida["decoders"]["threads"]),
        "decoders-all": tables.decoders_table(dida["decoders"]),
        "memory": tables.memory_table(released, image_tokens(64, 64)),
        "space": _gallery() or "(no screenshots yet)",
        "fine-tuning": "\n\n".join(proofs) or "Not measured yet.",
    }


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """Puts `blocks` between their marks.

    Raises:
        ValueError: for a name that is not among `blocks`.
    """

    def replace(match: re.Match) -> str:
        if match[2] not in blocks:
            raise ValueError(f"`<!-- generated: {match[2]} -->` is not one of {', '.join(blocks)}.")
        return f"{match[1]}{blocks[match[2]]}\n{match[3]}"

    return _BLOCK.sub(replace, text)


def generated_files() -> dict[Path, str]:
    """Every file that is made here, whole or in part, and what it must be."""
    files = {HERE / name / "README.md": f"{str(make()).rstrip()}\n" for name, make in CARDS.items()}
    blocks = generated_blocks()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        files[path] = fill(path.read_text(encoding="utf-8"), blocks)
    return files


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for path, text in generated_files().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            logger.info("wrote %s", path)


if __name__ == "__main__":
    main()
