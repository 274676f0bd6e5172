"""Data of the tiny world in the form that users have: pictures, captions and conversations in a folder.

python -m emu35.training.data.world runs/pairs      # what training/recipes/tiny-lora.yaml learns from

DIR/new/    t2i: scenes with pairs of colour and shape that the tiny model was never shown (`shapes.HELD_OUT`)
DIR/old/    all its tasks, without those pairs, so that they are not forgotten
DIR/eval/   new/ and old/ once more, of other scenes
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from emu35.training.layouts import typical_layout
from emu35.training.shapes import (
    EPISODES,
    Frame,
    GlobalThought,
    ImageThought,
    Scene,
    Turn,
    caption,
    describe,
    sample_question,
    sample_scene,
    to_image,
)

#: Examples of each kind among the old ones, in turn. Half are pictures: where those with new pairs are most of what is
#: drawn, a new pair's colour comes to be drawn wherever its shape is asked for.
OLD_KINDS = (
    *("t2i", "vqa", "t2i", "describe", "t2i", "x2i", "t2i", "story"),
    *("t2i", "x2i", "t2i", "multi_vqa", "t2i", "chat", "t2i", "explore", "t2i", "howto", "t2i", "vla"),
)


class _Folder:
    """Writes pictures and `metadata.jsonl`."""

    def __init__(self, directory: Path):
        self.directory, self.rows, self.num_images = directory, [], 0
        directory.mkdir(parents=True, exist_ok=True)

    def image(self, frame: Frame | Scene) -> str:
        name = f"{self.num_images:05d}.png"
        to_image(frame).save(self.directory / name)
        self.num_images += 1
        return name

    def close(self):
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        (self.directory / "metadata.jsonl").write_text(lines, encoding="utf-8")


def write_pairs(
    directory: str | os.PathLike, num_new: int = 180, num_old: int = 320, num_eval: int = 64, seed: int = 0
):
    """Writes the folders of the table above.

    Args:
        num_new (`int`), num_old (`int`): examples to learn from.
        num_eval (`int`): examples of either kind to measure losses on.
        seed (`int`): of all scenes and sentences; those of `emu35 eval` come from another stream.
    """
    for part, new, old in (("", num_new, num_old), ("eval", num_eval, num_eval)):
        folder = Path(directory, part)
        rng = np.random.default_rng((seed, 77, len(part)))
        _write(folder / "new", [_draw_scene(rng, index, held_out=True) for index in range(new)])
        _write(folder / "old", [_draw(rng, OLD_KINDS[index % len(OLD_KINDS)], index) for index in range(old)])


def _write(directory: Path, rows: list):
    folder = _Folder(directory)
    folder.rows = [make(folder) for make in rows]
    folder.close()


def _draw(rng: np.random.Generator, kind: str, index: int):
    if kind in EPISODES:
        episode = EPISODES[kind].sample(rng, held_out=False)
        return lambda folder: {
            "messages": [_message(folder, turn) for turn in episode.turns],
            "task": episode.task,
        }
    if kind == "t2i":
        return _draw_scene(rng, index, held_out=False)
    scene = sample_scene(rng, held_out=False)
    asked = describe(scene, rng) if kind == "describe" else sample_question(scene, rng)
    return lambda folder: {"file_name": folder.image(scene), "question": asked.text, "answer": asked.answer}


def _draw_scene(rng: np.random.Generator, index: int, held_out: bool):
    scene = sample_scene(rng, 1 + index % 3, held_out=held_out)
    drawn = caption(scene, rng, full=bool(index // 3 % 2))
    shown = typical_layout(scene, drawn.meaning, rng)
    return lambda folder: {"file_name": folder.image(shown), "text": drawn.text}


def _message(folder: _Folder, turn: Turn) -> dict[str, Any]:
    content: list[dict[str, str]] = []
    for piece in turn.content:
        if isinstance(piece, Frame):
            content.append({"type": "image", "image": folder.image(piece)})
        elif isinstance(piece, GlobalThought | ImageThought):
            kind = "global_thought" if isinstance(piece, GlobalThought) else "image_thought"
            content.append({"type": kind, "text": piece.text})
        else:
            content.append({"type": "text", "text": piece})
    return {"role": turn.role, "content": content}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--new", type=int, default=180, help="examples with new pairs (default: %(default)s)")
    parser.add_argument("--old", type=int, default=320, help="examples of old skills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_pairs(args.directory, args.new, args.old, seed=args.seed)
