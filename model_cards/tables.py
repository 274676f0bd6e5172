"""Tables of the cards, of README.md and of docs/, from what was measured.  The only numbers of its own are targets."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from emu35.configuration_emu35 import Emu35Config
from emu35.training.bench_grpo import grpo_tables
from emu35.training.bench_train import train_tables
from emu35.training.memory import NF4_BYTES, count_parameters

Results = dict[str, Any]

#: What is counted in each task: name in tables, key of "rates", target of the project (in words; "" for none).
COUNTED = {
    "x2i": (
        ("edit right", "edit", "90 %"),
        ("preservation", "preservation", "95 %"),
        ("both, whole picture", "whole_scene", ""),
    ),
    "story": (
        ("narration true of its frame", "narration", "85 % of frames"),
        ("character consistent in all frames", "character_consistent", "90 %"),
        ("world as it should be", "world", ""),
        ("as many frames as asked for", "frames", ""),
        ("whole story", "whole", ""),
    ),
    "howto": (("whole plan right", "plan", "75 %"), ("steps legal", "legal", ""), ("goal reached", "goal", "")),
    "explore": (
        ("view right after a move", "view", "90 %"),
        ("place seen again equal", "return", ""),
        ("the same, six or more moves later", "return_after_6", "85 %"),
        ("start told in words: view right", "start", ""),
        ("moves against the border stay", "border", ""),
        ("own moves legal", "moves_legal", ""),
        ("whole walk", "whole", ""),
    ),
    "vla": (
        ("legal and goal reached", "success", "75 %"),
        ("sub-tasks legal", "legal", ""),
        ("goal reached", "goal", ""),
    ),
    "multi_vqa": (("question about two or three images right", "answer", ""),),
    "chat": (
        ("text turns right", "text", ""),
        ("picture turns right", "image", ""),
        ("whole conversation", "whole", ""),
    ),
}
#: The one rate of each task that means "all of it is right".
WHOLE = {
    "x2i": "whole_scene",
    "story": "whole",
    "howto": "plan",
    "explore": "whole",
    "vla": "success",
    "multi_vqa": "answer",
    "chat": "whole",
}
#: Denoising steps, points below `ar` at temperature 1 and at its best that were allowed, and speed-up asked for. The
#: first two are for at most a quarter of the passes of `ar`, the last for an eighth.
DIDA_TARGETS = ((8, 2, 5, 2.5), (4, 2, 5, 2.5), (3, 4, 8, None))
#: Points below `ar` that were allowed in other tasks.
DIDA_TASK_TARGET = 5
DECODER_NAMES = {"ar, likeliest codes": "ar, most probable codes", "ar, unfiltered": "ar, temperature 1, unfiltered"}
#: Bytes of one weight of a decoder layer's matrix. All else is bfloat16 where these are smaller; "4bit" has a float32
#: scale for 64 weights, which double quantisation makes smaller.
PRECISIONS = {
    "float32": 4,
    "bfloat16": 2,
    "8 bit": 1,
    "4 bit (nf4)": 0.5 + 4 / 64,
    "4 bit (nf4), double quantisation": NF4_BYTES,
}


def read_results(folder: str | os.PathLike) -> Results:
    """All JSON files of a folder by their names; `{}` if it is not there."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))}


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], numbers_from: int | None = None) -> str:
    """A Markdown table; columns from `numbers_from` on are set flush right."""
    first_number = len(head) if numbers_from is None else numbers_from
    rule = ["---" if column < first_number else "---:" for column in range(len(head))]
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def points(rate: float) -> str:
    """A rate in percent, without the sign."""
    return f"{100 * rate:.1f}"


def percent(rate: float) -> str:
    return f"{points(rate)} %"


def difference(number_of_points: float) -> str:
    """With its sign; no sign where nothing is left of it."""
    rounded = round(number_of_points, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def amount(number: float) -> str:
    """6,085,331 as "6.1 M"."""
    power = max(0, min(3, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**power:.{0 if power == 0 else 1}f}{('', ' k', ' M', ' B')[power]}"


def size(number_of_bytes: float) -> str:
    """13693052 as "14 MB", decimal units, two figures or whole numbers."""
    power = 3 if number_of_bytes >= 1e9 else 2
    value = number_of_bytes / 1000**power
    return f"{value:.{1 if value < 10 else 0}f} {('', 'kB', 'MB', 'GB')[power]}"


# --------------------------------------------------------------------------------------------------------------- tasks


def scenes_table(t2i: Results) -> str:
    """Text to image, by number of objects and kind of caption."""
    right, unseen = t2i["whole_scene"], t2i["held_out"]["whole_scene"]
    names = {
        "1_objects": "1 object",
        "2_objects": "2 objects",
        "3_objects": "3 objects",
        "full": "full captions",
        "partial": "partial captions",
        "all": "all",
    }
    head = (
        "text to image, whole scene right",
        f"held-out scenes (N = {t2i['num']})",
        f"with unseen pairs (N = {t2i['held_out']['num']})",
    )
    return table(head, [(name, percent(right[key]), percent(unseen[key])) for key, name in names.items()])


def questions_table(vqa: Results) -> str:
    rows = [("**all**", percent(vqa["accuracy"]))]
    rows += [(name.replace("_", "/"), percent(rate)) for name, rate in vqa["by_kind"].items()]
    rows += [("whole description exact", percent(vqa["describe"]))]
    rows += [("all, scenes with unseen pairs", percent(vqa["held_out"]["accuracy"]))]
    return table((f"questions (N = {vqa['num']})", "right"), rows)


def tasks_table(results: Results) -> str:
    rows = []
    for task, counted in COUNTED.items():
        measured, unseen = results[task], results[task]["held_out"]["rates"]
        for number, (name, key, target) in enumerate(counted):
            rates = (percent(measured["rates"][key]), target, measured["marked"].get(key, 0), percent(unseen[key]))
            rows.append((f"**{task}**" if number == 0 else "", name, *rates))
    return table(("task", "what is counted", "right", "target", "N", "with unseen pairs"), rows)


def kinds_list(results: Results) -> str:
    """Each task's whole answers by kind, a line a task."""
    lines = []
    for task, key in WHOLE.items():
        kinds = [f"{name.replace('_', ' ')} {percent(rates[key])}" for name, rates in _kinds(results[task], key)]
        lines.append(f"- {task} ({key.replace('_', ' ')}): {', '.join(kinds)}")
    return "\n".join(lines)


def _kinds(measured: Results, key: str) -> list[tuple[str, Results]]:
    return [(name, rates) for name, rates in measured["by_kind"].items() if key in rates]


def sweep_table(entries: list[Results]) -> str:
    """What `emu35 eval --sweep` has measured."""
    setting = next(name for name in entries[0] if name != "whole_scene")
    keys = ("1_objects", "2_objects", "3_objects", "all")
    rows = [(entry[setting], *(percent(entry["whole_scene"][key]) for key in keys)) for entry in entries]
    return table((setting, "1 object", "2 objects", "3 objects", "all"), rows)


def balance_table(balance: Results) -> str:
    """The same run with shares of tokens and of sequences."""

    def losses(run: str, task: str) -> str:
        loss = balance[run]["loss"][task]
        kinds = ("visual", "text") if task in balance[run]["right"] else ("visual",) if loss["visual"] else ("text",)
        kinds = ("visual", "text") if task == "chat" else kinds
        return " / ".join(f"{loss[kind]:.3f}" for kind in kinds)

    def right(run: str, task: str) -> str:
        rate = balance[run]["right"].get(task)
        return "" if rate is None else f"{100 * rate:.0f} %"

    runs = ("tokens", "sequences")
    rows = [
        (task, *(losses(run, task) for run in runs), *(right(run, task) for run in runs))
        for task in balance["tokens"]["loss"]
    ]
    return table(("", "balanced by tokens", "by sequences", "balanced: right", "by sequences: right"), rows)


def overview_table(results: Results) -> str:
    """README: every task, with the command that measures it."""
    scenes, rate = results["t2i"]["whole_scene"], lambda task, key: results[task]["rates"][key]

    def both(task: str, *keys: str) -> str:
        return f"{' / '.join(points(rate(task, key)) for key in keys)} %"

    def command(task: str) -> str:
        return f"`--task {task} --num {results[task]['num']}`"

    by_number = " / ".join(points(scenes[f"{number}_objects"]) for number in (1, 2, 3))
    rows = (
        ("text to image, whole scene, 1 / 2 / 3 objects", f"{by_number} %", "95 / 95 / 85 %", command("t2i")),
        ("questions about images", percent(results["vqa"]["accuracy"]), "95 %", command("vqa")),
        ("edits: done / all else preserved", both("x2i", "edit", "preservation"), "90 / 95 %", command("x2i")),
        (
            "stories: narration true of the frame / character consistent",
            both("story", "narration", "character_consistent"),
            "85 / 90 %",
            command("story"),
        ),
        ("step-by-step guidance: whole plan right", both("howto", "plan"), "75 %", command("howto")),
        (
            "exploration: view right after a move / same place again equal after six moves",
            both("explore", "view", "return_after_6"),
            "90 / 85 %",
            command("explore"),
        ),
        ("manipulation: legal and goal reached", both("vla", "success"), "75 %", command("vla")),
        ("conversations, every turn right", both("chat", "whole"), "", command("chat")),
        ("questions about two or three images", both("multi_vqa", "answer"), "", command("multi_vqa")),
        (
            "vision tokenizer, whole scene restored",
            percent(results["reconstruction"]["whole_scene"]),
            "98 %",
            command("reconstruction"),
        ),
    )
    return table(("held-out scenes", "right", "target", "`emu35 eval --seed 1` and"), rows)


# ------------------------------------------------------------------------------------------------------- speed, memory


def bench_table(bench: Results) -> str:
    """README: what `emu35 bench image vision loss` has measured."""
    speed = {batch["batch_size"]: batch["speedup"] for batch in bench["image"]["batches"]}
    vision, loss = bench["vision"], bench["loss"]
    rows = (
        ("image tokens a second with guidance, batch 1", f"{speed[1]:.1f}x", "3x", "`emu35 bench image`"),
        ("the same, batch 8", f"{speed[8]:.0f}x", "10x", ""),
        (
            f"quantising {' x '.join(map(str, vision['codes']))} codes of {vision['codebook'][0]:,}: extra memory",
            f"{vision['extra_bytes'] / 2**30:.3f} GiB",
            "0.3 GiB",
            "`emu35 bench vision`",
        ),
        ("the same, time", f"{vision['speedup']:.1f}x (1)", "4x", ""),
        (
            f"loss of {loss['tokens']:,} tokens over {loss['vocabulary']:,} logits: extra memory",
            f"1/{1 / loss['memory_ratio']:.0f}",
            "1/10",
            "`emu35 bench loss`",
        ),
    )
    cores = f"{bench['environment']['threads']} CPU cores"
    return table((f"against the straightforward way ({cores}, released vocabulary)", "", "target", "command"), rows)


def training_tables(bench: Results) -> str:
    """What steps of fine-tuning and of GRPO take, beside plain ones."""
    where = bench["environment"]
    blocks = [f"{where['name']}, {where['threads']} threads, {where['dtype']}, torch {where['torch']}."]
    for title, head, rows in (*train_tables(bench["train"]), *grpo_tables(bench["grpo"])):
        name, _, more = title.strip().partition("\n")
        blocks.append(f"**{name}**" + (f": {more}" if more else ""))
        blocks.append(table(head, rows, 1))
    return "\n\n".join(blocks)


def speculative_table(decode: Results) -> str:
    """What `emu35 bench decode` has measured on the tiny checkpoint."""

    def speedup(decoder: Results, batch_size: int) -> str:
        value = next(batch["speedup"] for batch in decoder["batches"] if batch["batch_size"] == batch_size)
        return "1" if decoder["name"] == "ar" else f"{value:.2f}"

    def name(decoder: Results) -> str:
        window = f", window {decoder['speculative_window']}" if "speculative_window" in decoder else ""
        return f"{decoder.get('coupling', decoder['name'])}{window}"

    rows = [
        (
            name(decoder),
            decoder["passes"] if decoder["name"] == "ar" else f"{decoder['passes']:.1f}",
            speedup(decoder, 1),
            speedup(decoder, 8),
        )
        for decoder in decode["decode"]["tiny"]["decoders"]
    ]
    return table(("decoder", "passes", "speed-up, batch 1", "speed-up, batch 8"), rows)


def random_speedups(decode: Results) -> Results:
    """Of `emu35 bench decode` on random weights: windows, speed-ups at batch 1 and 8, and the projected ones."""
    decoders = [one for one in decode["decode"]["random"]["decoders"] if one["name"] != "ar"]

    def values(key: str, batch_size: int, digits: int) -> str:
        batches = [batch for one in decoders for batch in one["batches"] if batch["batch_size"] == batch_size]
        return " / ".join(f"{batch[key]:.{digits}f}" for batch in batches if key in batch)

    return {
        "windows": " / ".join(str(one["speculative_window"]) for one in decoders),
        "batch_1": values("speedup", 1, 2),
        "batch_8": values("speedup", 8, 2),
        "projected": values("projected_speedup", 1, 1),
    }


def decoder_name(entry: Results) -> str:
    """A decoder of a comparison or a benchmark, as tables name it."""
    return DECODER_NAMES.get(entry["name"], entry["name"].replace("dida ", "dida, N = "))


def decoders_table(compared: Results) -> str:
    """What `emu35 eval --compare-decoders` has measured."""
    keys = ("all", "1_objects", "2_objects", "3_objects", "full", "partial")
    rows = []
    for entry in compared["entries"]:
        measured = (f"{entry['passes']:.1f}", f"{entry['seconds_per_image']:.3f}", f"{entry['speedup']:.2f}")
        rows.append((decoder_name(entry), *measured, *(points(entry["whole_scene"][key]) for key in keys)))
    head = ("decoder", "passes", "seconds", "speed-up", "all", "1 object", "2 objects", "3 objects")
    return table((*head, "full captions", "partial captions"), rows, numbers_from=1)


def dida_batches_table(bench: Results) -> str:
    """What `emu35 bench dida` has measured on the tiny checkpoint, image by image and in batches."""
    rows = []
    for decoder in bench["dida"]["tiny"]["decoders"]:
        cells = [decoder_name(decoder), f"{decoder['passes']:.1f}"]
        for batch in decoder["batches"]:
            cells += [f"{batch['seconds_per_image']:.3f}", f"{batch['speedup']:.2f}"]
        rows.append(cells)
    sizes = [batch["batch_size"] for batch in bench["dida"]["tiny"]["decoders"][0]["batches"]]
    head = [part for size in sizes for part in (f"seconds, batch {size}", "speed-up")]
    return table(("decoder", "passes", *head), rows, numbers_from=1)


def dida_grids_table(bench: Results) -> str:
    """What `emu35 bench dida` has measured on random weights: seconds of an image, by its size; and how many times as
    fast as `ar` the fewer steps could be, if they took no longer than their arithmetic."""
    rows = []
    for measured in bench["dida"]["random"]:
        for row in measured["grids"]:
            ar, (few, many) = row["ar"], row["dida"]
            cells = [f"{measured['num_codes']:,}", " x ".join(map(str, row["grid"]))]
            cells += [f"{'' if own['whole'] else '~'}{own['seconds']:.3g}" for own in (ar, few, many)]
            at_most = ar["seconds"] / few["limit_seconds"]
            rows.append((*cells, f"{few['ratio']:.2f}", f"{at_most:.2f}", f"{many['ratio']:.2f}"))
    few, many = (own["steps"] for own in bench["dida"]["random"][0]["grids"][0]["dida"])
    head = ("codebook", "codes", "ar, s", f"dida {few}, s", f"dida {many}, s")
    head += (f"ar by dida {few}", "at most", f"ar by dida {many}")
    return table(head, rows, numbers_from=2)


def decoders_overview_table(compared: Results, cores: int) -> str:
    """README: the image decoders, and what was asked of them."""
    entries = {entry["name"]: entry for entry in compared["entries"]}
    fast, base = entries["speculative"], entries["ar"]
    rows = [("`ar`", "", ""), ("`speculative`: the same distribution", "passes 1/2.5, 1.6x", "")]
    reached = [base["passes"] / fast["passes"] >= 2.5 and fast["speedup"] >= 1.6]
    measured = [base, fast]
    for target in dida_targets(compared):
        asked = f"at most {target['unfiltered']} points below `ar` at temperature 1"
        rows.append(
            (f"`dida`, {target['steps']} steps", asked + (f", {target['speed']}x" * bool(target["speed"])), "")
        )
        reached.append(target["reached"])
        measured.append(entries[f"dida {target['steps']}"])
    rows = [
        (
            name,
            f"{entry['passes']:.1f}".removesuffix(".0"),
            "1" if entry is base else f"{entry['speedup']:.1f}x",
            percent(entry["whole_scene"]["all"]),
            asked,
            "" if entry is base else "yes" if well else "no",
        )
        for (name, asked, _), entry, well in zip(rows, measured, [True, *reached], strict=True)
    ]
    head = f"image decoders ({cores} CPU cores, batch 1; {compared['num']} prompts)"
    return table((head, "passes", "speed-up", "whole scene right", "target", "reached"), rows)


def dida_targets(compared: Results) -> list[Results]:
    """How far DiDA is from each of `DIDA_TARGETS`; differences in points."""
    entries = {entry["name"]: entry for entry in compared["entries"]}

    def right(name: str) -> float:
        return 100 * entries[name]["whole_scene"]["all"]

    unfiltered, best = right("ar, unfiltered"), max(right("ar"), right("ar, likeliest codes"))
    targets = []
    for steps, below_unfiltered, below_best, speed in DIDA_TARGETS:
        entry, own = entries[f"dida {steps}"], right(f"dida {steps}")
        targets.append(
            {
                "steps": steps,
                "passes": round(entry["passes"]),
                "unfiltered": below_unfiltered,
                "best": below_best,
                "speed": speed,
                "from_unfiltered": difference(own - unfiltered),
                "from_best": difference(own - best),
                "speedup": f"{entry['speedup']:.1f}",
                "reached": own - unfiltered >= -below_unfiltered
                and own - best >= -below_best
                and (speed is None or entry["speedup"] >= speed),
            }
        )
    return targets


def dida_tasks(results: Results) -> Results:
    """Other tasks with `ar`, with `dida` and with verified codes (`NAME-ar.json`, `NAME-dida.json`,
    `NAME-verified.json`): a table, and what is beyond the target with either."""
    rows, beyond, measured_with = [], {"dida": [], "verified": []}, {"dida": [], "verified": []}
    steps = None
    for task, counted in COUNTED.items():
        ways = [way for way in beyond if f"{task}-{way}" in results]
        if f"{task}-ar" not in results or not ways:
            continue
        exact = results[f"{task}-ar"]
        for way in ways:
            measured_with[way].append(task)
            steps = results[f"{task}-{way}"]["settings"]["num_inference_steps"]
        first = True
        for name, key, _ in counted:
            if key not in exact["rates"]:
                continue
            cells = []
            for way in beyond:
                rates = results[f"{task}-{way}"]["rates"] if way in ways else {}
                if key not in rates:
                    cells += ["", ""]
                    continue
                loss = 100 * (exact["rates"][key] - rates[key])
                cells += [points(rates[key]), difference(-loss)]
                if loss > DIDA_TASK_TARGET:
                    beyond[way].append(f"{task}: {name} ({difference(-loss)})")
            number = exact["marked"].get(key, exact["num"])
            rows.append((task if first else "", name, points(exact["rates"][key]), *cells, number))
            first = False
    head = ("task", "what is counted", "ar", f"dida, N = {steps}", "difference", "verified", "difference", "N")
    tasks = ("x2i", "story", "howto", "explore", "vla", "chat")
    missing = [task for task in tasks if task not in measured_with["dida"] + measured_with["verified"]]
    return {"table": table(head, rows, 2), "beyond": beyond, "missing": missing, "steps": steps}


def paths_table(paths: Results) -> str:
    head = ("path", "jump", *(f"N = {number}" for number in paths["steps"]))
    rows = [(row["path"], row["jump"], *map(points, row["all"])) for row in paths["rows"]]
    return table(head, rows, numbers_from=2)


def attempts_table(attempts: Results) -> str:
    rows = [
        (row["images"], row["path"], f"{row['training_steps']:,}", points(row["full"]), points(row["partial"]))
        for row in attempts["rows"]
    ]
    return table(("images learnt from", "path", "steps of training", "full captions", "partial captions"), rows)


def stages_table(recipe: Results) -> str:
    """Of a recipe: the stages, their steps, and what they show."""
    rows = []
    for stage in recipe["stages"]:
        shares = ", ".join(f"{name} {100 * share:.3g} %" for name, share in stage["mixture"].items())
        rows.append((stage["name"], f"{stage['steps']:,}", shares))
    return table(("stage", "steps", "shares"), rows)


def memory_parts(config: Emu35Config, image_tokens: int, adapter: int = 0) -> dict[str, dict[str, float]]:
    """Bytes by precision and part.  What is not quantised is bfloat16; the vision tokenizer is float32 always.

    Args:
        image_tokens (`int`): of a picture; one with guidance has two streams of them in the cache.
        adapter (`int`): weights of an adapter; 0: none.
    """
    text, numbers = config.text_config, count_parameters(config)
    rest = numbers["layers"] - numbers["linear"] + numbers["embeddings"]
    keys = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    parts = {}
    for name, weight in PRECISIONS.items():
        other = max(weight, 2)
        parts[name] = {
            "decoder": weight * numbers["linear"] + other * rest,
            **({"adapter": other * adapter} if adapter else {}),
            "vision tokenizer": 4 * numbers["vision"],
            "cache of a picture with guidance": 2 * image_tokens * keys * other,
        }
    return parts


def memory_table(config: Emu35Config, image_tokens: int, adapter: int = 0) -> str:
    """[`memory_parts`] and their sums."""
    parts = memory_parts(config, image_tokens, adapter)
    rows = [(name, *map(size, (*one.values(), sum(one.values())))) for name, one in parts.items()]
    return table(("weights in", *parts["bfloat16"], "sum"), rows, numbers_from=1)


# --------------------------------------------------------------------------------------------------------- fine-tuning


def whole_rate(measured: Results, task: str) -> float:
    """How many of the answers are right as a whole, of what `emu35 eval` has measured or of its "held_out"."""
    if "whole_scene" in measured:
        return measured["whole_scene"]["all"]
    return measured["accuracy"] if "accuracy" in measured else measured["rates"][WHOLE[task]]


def _compared(before: Results, after: Results) -> list[Results]:
    """Rows of a table from `emu35 eval` of the same task before and after.

    Raises:
        ValueError: if they were not measured alike.
    """
    for name in ("task", "num", "seed"):
        if before[name] != after[name]:
            raise ValueError(f"`{name}` is {before[name]!r} before and {after[name]!r} after. Measure both alike.")
    task = before["task"]
    rows = []
    for what, old, new in (
        ("held-out scenes", before, after),
        ("with unseen pairs", before["held_out"], after["held_out"]),
    ):
        if old["num"] > 1:  # `emu35 eval --num-held-out 1` where nobody asks
            rates = {"before": whole_rate(old, task), "after": whole_rate(new, task)}
            rows.append({"what": f"{task}, {what}", "num": old["num"], **rates})
    return rows


def proofs(results: Results) -> list[Results]:
    """The `finetuning-*.json` among results, each with its "table"; see `generate` for what they hold."""
    found = []
    for name, proof in results.items():
        if name.startswith("finetuning-"):
            rows = [row for pair in proof.get("measured", ()) for row in _compared(pair["before"], pair["after"])]
            cells = [
                (row["what"], percent(row["before"]), percent(row["after"]), row.get("target", ""), row["num"])
                for row in (*rows, *proof.get("rows", ()))
            ]
            found.append({**proof, "table": table(("wholly right", "before", "after", "target", "N"), cells)})
    return found
