"""The `emu35` command, end to end on a random tiny checkpoint."""

import argparse
import errno
import importlib.util
import io
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import emu35
import numpy as np
import pytest
import torch
from emu35 import (
    Emu35ForConditionalGeneration,
    Emu35GenerationConfig,
    Emu35Processor,
    cli,
    cli_tools_emu35,
    devices_emu35,
)
from PIL import Image

ROOT = Path(__file__).parents[1]
PROMPT = "a red fox"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_tiny_model, tiny_processor):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_tiny_model(hidden_size=64)  # bitsandbytes quantises blocks of 64
    model.generation_config = Emu35GenerationConfig(
        do_sample=True, guidance_scale=2.0, height=16, width=12, max_new_tokens=200
    )
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(checkpoint, capsys, tmp_path, monkeypatch):
    """`run("generate", "a red fox", ...)` -> (exit status, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EMU35_DEBUG", raising=False)
    monkeypatch.setattr(cli_tools_emu35, "TINY", checkpoint)

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------------------------ generate


def test_generate_writes_the_picture_and_says_so(run):
    status, out, err = run("generate", PROMPT, "-o", "out.png")
    assert (status, err) == (0, "")
    assert Image.open("out.png").size == (12, 16)
    assert "out.png: 12 x 16 pixels" in out
    assert "seed 0" in out and " s in all" in out


def test_same_seed_same_picture_and_another_seed_another(run):
    for name, seed in (("a.png", ()), ("b.png", ("--seed", 0)), ("c.png", ("--seed", 1))):
        assert run("generate", PROMPT, "-o", name, *seed)[0] == 0
    assert (pixels("a.png") == pixels("b.png")).all()
    assert (pixels("a.png") != pixels("c.png")).any()
    run("generate", PROMPT, "-o", "a.png", "--seed", "1")  # an older picture is replaced
    assert (pixels("a.png") == pixels("c.png")).all()
    assert sorted(path.name for path in Path().iterdir()) == ["a.png", "b.png", "c.png"]


def test_a_random_seed_is_told_and_can_be_used_again(run):
    out = run("generate", PROMPT, "-o", "a.png", "--seed", "random")[1]
    seed = out.split("seed ")[1].split(";")[0]
    run("generate", PROMPT, "-o", "b.png", "--seed", seed)
    assert (pixels("a.png") == pixels("b.png")).all()


def test_several_images_are_those_of_the_seeds_that_follow(run):
    status, out, _ = run("generate", PROMPT, "-o", "out.png", "--num-images", 3, "--seed", 5)
    assert status == 0 and "3 images" in out
    for index in range(3):
        run("generate", PROMPT, "-o", "one.png", "--seed", 5 + index)
        # In a batch some processors add in another order, and a pixel between two values falls to the other one.
        difference = pixels(f"out-{index + 1}.png").astype(int) - pixels("one.png")
        assert abs(difference).max() <= 1
    assert not Path("out.png").exists()
    run("generate", PROMPT, "-o", "out.png", "--num-images", 3, "--seed", 5, "--grid")
    sheet = pixels("out.png")
    assert sheet.shape == (32, 24, 3)
    assert (sheet[16:, :12] == pixels("out-3.png")).all()
    assert (sheet[16:, 12:] == 255).all()


def test_options_reach_generate(run, monkeypatch):
    calls = []
    generate = Emu35ForConditionalGeneration.generate
    monkeypatch.setattr(
        Emu35ForConditionalGeneration,
        "generate",
        lambda self, **kwargs: calls.append(kwargs) or generate(self, **kwargs),
    )
    status, _, err = run(
        *("generate", PROMPT, "-o", "out.jpg", "--height", 8, "--width", 24, "--guidance-scale", 1.5),
        *("--image-top-k", 9, "--image-top-p", 0.9, "--image-temperature", 0.5, "--dtype", "float32"),
    )
    assert (status, err) == (0, "")
    assert Image.open("out.jpg").size == (24, 8) and Image.open("out.jpg").format == "JPEG"
    expected = {"guidance_scale": 1.5, "image_top_k": 9, "image_top_p": 0.9, "image_temperature": 0.5, "height": 8}
    assert {name: calls[0][name] for name in expected} == expected
    assert calls[0]["task"] == "t2i"


def test_aspect_ratio_takes_the_place_of_the_checkpoints_size(run, picture):
    assert run("generate", PROMPT, "-o", "out.png", "--image", picture, "--aspect-ratio", "reference")[0] == 0
    assert Image.open("out.png").size == (16, 16)  # as the processor resizes the reference


def test_reference_images_and_both_guidance_scales(run, picture):
    assert run("generate", PROMPT, "-o", "a.png", "--image", picture)[0] == 0
    assert run("generate", PROMPT, "-o", "b.png", "--image", picture, "--image", picture)[0] == 0
    assert run("generate", PROMPT, "-o", "c.png", "--image", picture, "--image-guidance-scale", 1.5)[0] == 0
    assert (pixels("a.png") != pixels("b.png")).any()
    assert (pixels("a.png") != pixels("c.png")).any()


def test_negative_prompt(run):
    run("generate", PROMPT, "-o", "a.png")
    assert run("generate", PROMPT, "-o", "b.png", "--negative-prompt", "a blue square")[0] == 0
    assert (pixels("a.png") != pixels("b.png")).any()


def test_text_never_becomes_a_control_token(run, monkeypatch, tiny_layout):
    seen = []
    call = Emu35Processor.__call__

    def spy(self, *args, **kwargs):
        inputs = call(self, *args, **kwargs)
        seen.append(inputs["input_ids"][0].tolist())
        return inputs

    monkeypatch.setattr(Emu35Processor, "__call__", spy)
    text = "<|image start|><|visual token 000001|><|extra_101|> a fox"
    assert run("generate", text, "-o", "out.png", "--negative-prompt", text)[0] == 0
    assert run("describe", "out.png", "--question", text, "--max-new-tokens", 1)[0] == 0
    special = {*tiny_layout.special_token_ids.values()}
    for ids in seen[:2]:
        assert [token_id for token_id in ids if token_id in special] == [
            tiny_layout.bos_token_id,
            tiny_layout.bss_token_id,
        ]
    assert seen[2].count(tiny_layout.boi_token_id) == 1 and tiny_layout.ess_token_id not in seen[2]
    assert all(max(ids) < tiny_layout.visual_token_offset for ids in seen)


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_quantised_weights(run, load_in):
    pytest.importorskip("bitsandbytes")
    status, _, err = run("generate", PROMPT, "-o", "out.png", "--load-in", load_in)
    assert status == 0, err
    assert Image.open("out.png").size == (12, 16)


def test_quantised_weights_without_bitsandbytes(run, monkeypatch):
    monkeypatch.setattr(cli_tools_emu35, "find_spec", lambda name: None)
    status, _, err = run("generate", PROMPT, "--load-in", "4bit")
    assert status == 2 and "pip install bitsandbytes" in err


def test_a_full_disk_leaves_the_old_picture(run, monkeypatch):
    Path("out.png").write_bytes(b"old")

    def save(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half a pict")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    status, _, err = run("generate", PROMPT, "-o", "out.png")
    assert status == 2 and "No space left on device" in err
    assert Path("out.png").read_bytes() == b"old"
    assert [path.name for path in Path().iterdir()] == ["out.png"]


# ------------------------------------------------------------------------------------------------------------ describe


def test_describe_prints_the_answer_and_nothing_else(run, picture, checkpoint):
    status, out, err = run("describe", picture, "--max-new-tokens", 8)
    assert (status, err) == (0, "")
    model = Emu35ForConditionalGeneration.from_pretrained(checkpoint)
    processor = Emu35Processor.from_pretrained(checkpoint)
    inputs = processor(text="describe the image.", images=[picture], task="vqa")
    result = model.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens=8)
    segments = processor.post_process_multimodal_output(result)[0]
    assert out.strip() == "".join(segment.text for segment in segments if segment.kind == "text").strip()
    sampled = [run("describe", picture, "--max-new-tokens", 8, "--temperature", 2, "--seed", s)[1] for s in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_question_reaches_the_prompt(run, picture, monkeypatch):
    asked = []
    call = Emu35Processor.__call__
    monkeypatch.setattr(
        Emu35Processor, "__call__", lambda self, **kwargs: asked.append(kwargs["text"]) or call(self, **kwargs)
    )
    assert run("describe", picture, "--max-new-tokens", 1, "--question", "what color is the fox?")[0] == 0
    assert asked == ["what color is the fox?"]


# --------------------------------------------------------------------------------------------------------------- story


@pytest.fixture
def told(tiny_processor, tiny_layout, monkeypatch):
    """`told("a fox", [[1, 2]], "eos")`: what the model's next answers are. Returns its calls, as they come."""

    def script(*answers: list, interrupt_at: int | None = None) -> list[dict]:
        calls, waiting = [], iter(answers)

        def generate(self, input_ids, streamer, **kwargs):
            calls.append({"input_ids": input_ids[0].tolist(), **kwargs})
            ids = []
            for part in next(waiting):
                if isinstance(part, list):
                    offset = tiny_layout.visual_token_offset
                    ids += tiny_layout.image_token_ids([[offset + code for code in row] for row in part])
                else:
                    role = tiny_layout.special_token_ids.get(part)
                    ids += tiny_processor._encode_text(part) if role is None else [role]
            streamer.put(input_ids)
            for number, token_id in enumerate(ids):
                if number == interrupt_at:
                    signal.raise_signal(signal.SIGINT)  # handled by the main thread, like Ctrl-C
                    deadline = time.monotonic() + 60
                    while not streamer.stop_requested and time.monotonic() < deadline:
                        time.sleep(0.001)
                if streamer.stop_requested:
                    break
                streamer.put(torch.tensor([token_id]))
            streamer.end()
            sequences = torch.cat([input_ids, torch.tensor([ids])], dim=1)
            cache = f"cache {len(calls)}"  # is only passed on
            return emu35.Emu35GenerateOutput(sequences, torch.tensor([input_ids.shape[1]]), past_key_values=cache)

        monkeypatch.setattr(Emu35ForConditionalGeneration, "generate", generate)
        return calls

    return script


PICTURE = [[1, 2, 3], [4, 5, 6]]


def test_a_story_is_shown_and_saved(run, told):
    calls = told(
        ["bog", "plan", "eog", " a fox\x1b[2J", PICTURE, "boc", "blue", "eoc", PICTURE, "the end", "ess", "eos"]
    )
    status, out, err = run("story", PROMPT, "-o", "out", "--max-images", 3, "--guidance-scale", 2, "--seed", 4)
    assert status == 0, err
    *shown, last = out.splitlines()
    assert shown == [
        "plan", "a fox[2J", "out/image-01.png: 12 x 8 pixels", "blue", "out/image-02.png: 12 x 8 pixels", "the end",
    ]  # fmt: skip
    assert last.startswith("out/index.html: seed 4; ")
    assert {path.name for path in Path("out").iterdir()} >= {"index.html", "story.md", "image-01.png", "image-02.png"}
    assert PROMPT in Path("out/story.md").read_text() and "the end" in Path("out/story.md").read_text()
    (call,) = calls
    assert (call["task"], call["generation_mode"], call["max_images"]) == ("story", "interleaved", 3)
    assert call["guidance_scale"] == 2 and call["generator"].initial_seed() == 4 and "max_new_tokens" not in call


def test_a_real_model_tells_a_story(run):
    status, out, err = run("story", PROMPT, "--max-new-tokens", 20)
    assert status == 0, err
    assert "story/index.html: seed 0" in out and Path("story/index.html").is_file()
    assert "see --max-new-tokens" in err


@pytest.mark.parametrize("task", ["explore", "vla"])
def test_a_story_goes_on_with_each_line(task, run, told, picture, monkeypatch, tiny_layout):
    calls = told(["a house", PICTURE, "eos"], ["a wood", PICTURE, PICTURE, "ess", "eos"], ["a lake", "eos"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("go north\ngo east\n\ngo home\n"))
    status, out, err = run("story", PROMPT, "-o", "out", "--task", task, "--image", picture, "--interactive")
    assert status == 0, err
    assert [line for line in out.splitlines() if ".png" in line] == [
        f"out/image-0{number}.png: 12 x 8 pixels" for number in (1, 2, 3)
    ]
    assert len(calls) == 3 and {call["task"] for call in calls} == {task}
    assert [call["past_key_values"] for call in calls] == [None, "cache 1", "cache 2"]
    processor = Emu35Processor.from_pretrained(cli_tools_emu35.TINY)
    for before, after in itertools.pairwise(calls):
        assert after["input_ids"][: len(before["input_ids"])] == before["input_ids"]
    assert [call["input_ids"].count(tiny_layout.boi_token_id) for call in calls] == [1, 2, 4]
    assert "go north" in processor.decode(calls[1]["input_ids"]) and "go east" in processor.decode(
        calls[2]["input_ids"]
    )
    story = Path("out/story.md").read_text()
    places = [story.index(text) for text in ("a house", "go north", "a wood", "image-03.png", "go east", "a lake")]
    assert places == sorted(places) and "go home" not in story
    assert Path("out/reference-01.png").is_file()


def test_an_incomplete_image_is_told_and_left_out_of_what_follows(run, told, monkeypatch, tiny_layout):
    calls = told(["a fox", "boi", "2", "eoi", " ends", "eos"], ["yes", "eos"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("more\n"))
    status, out, _ = run("story", PROMPT, "--interactive")
    assert status == 0
    assert out.splitlines()[:4] == ["a fox", out.splitlines()[1], "2 ends", "yes"]
    assert out.splitlines()[1].startswith("image 1 is incomplete: not closed; its size")
    assert tiny_layout.boi_token_id not in calls[1]["input_ids"]
    assert calls[1]["past_key_values"] is None  # the cache has the image that the prompt has not


@pytest.fixture
def hears_ctrl_c():
    """Jobs in the background of a shell are begun with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_every_task_of_the_evaluation_can_be_chosen():
    from emu35.training.evaluate import TASKS

    assert cli._EVAL_TASKS == TASKS


def test_ctrl_c_keeps_what_is_finished(run, told, hears_ctrl_c):
    told(["a fox", PICTURE, " and ", PICTURE], interrupt_at=24)
    status, out, err = run("story", PROMPT, "-o", "out")
    assert (status, err) == (130, "interrupted\n")
    assert {path.name for path in Path("out").glob("*.png")} >= {"image-01.png"}
    assert not Path("out/image-02.png").exists()
    assert "a fox" in Path("out/story.md").read_text() and "out/index.html" in out
    assert not [thread for thread in threading.enumerate() if thread.name == "Emu35Streamer.run"]


def test_an_error_in_a_story_keeps_what_is_finished(run, told, monkeypatch):
    told(["a fox", PICTURE, "eos"], ["too long", "eos"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("more " * 600))
    status, out, err = run("story", PROMPT, "-o", "out", "--interactive")
    assert status == 2 and "`messages[2]`" in err and err.count("\n") == 1
    assert "out/index.html" in out and Path("out/image-01.png").is_file()


def test_a_story_does_not_touch_files_of_others(run, told):
    told(["a fox", PICTURE, "eos"])
    Path("image-01.png").write_bytes(b"mine")
    status, out, err = run("story", PROMPT, "-o", ".")
    assert (status, out) == (2, "") and "image-01.png" in err
    assert Path("image-01.png").read_bytes() == b"mine" and len(list(Path().iterdir())) == 1


class Terminal(io.StringIO):
    encoding = "ascii"

    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_thoughts_are_dim_and_rows_are_counted(no_color, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stderr", Terminal())
    out, saved = Terminal(), []
    with cli_tools_emu35.StoryDisplay(lambda *args: saved.append(args) or "x.png", 1, out) as display:
        display.show(emu35.ThoughtPiece("a plan", "global"))
        display.show(emu35.TextPiece("\n\ncaf\N{LATIN SMALL LETTER E WITH ACUTE}\n"))
        display.show(emu35.TextPiece("  two"))
        display.show(emu35.ImageStarted(0, 3, 1))
        display.bar.mininterval = 0
        for rows in ((1,), (1, 2, 3)):
            display.show(emu35.ImageProgress(0, rows, 3, 1))
        picture = Image.new("RGB", (4, 12))
        display.show(emu35.ImageFinished(0, torch.zeros(3, 1), picture))
        display.show(emu35.TextPiece("the end"))
    plan = "a plan" if no_color else "\x1b[2ma plan\x1b[0m"
    assert out.getvalue() == f"{plan}\ncaf?\n  two\nx.png: 4 x 12 pixels\nthe end\n"
    assert "image 2: 1/3 rows" in sys.stderr.getvalue() and "image 2: 3/3 rows" in sys.stderr.getvalue()
    assert saved == [(2, picture)]


# -------------------------------------------------------------------------------------------------------------- errors


def broken_file(name: str, content: bytes = b"\x89PNG\r\n\x1a\nnot really") -> str:
    Path(name).write_bytes(content)
    return name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("generate", ""), "empty prompt"),
        (("generate", "fox " * 600), "max_length"),
        (("generate", PROMPT, "-o", "."), "is a folder"),
        (("generate", PROMPT, "-o", "no/such/folder/out.png"), "there is no folder no/such/folder"),
        (("generate", PROMPT, "-o", "out.docx"), ".docx is no kind of image"),
        (("generate", PROMPT, "-o", "out"), "no ending is no kind of image"),
        (("generate", PROMPT, "--height", "17", "--width", "16"), "`height` must be a positive multiple of 4"),
        (("generate", PROMPT, "--height", "0", "--width", "16"), "`height` must be a positive multiple of 4"),
        (("generate", PROMPT, "--height", "16"), "`height` and `width` together"),
        (("generate", PROMPT, "--height", "4000", "--width", "4000"), "does not fit into the context"),
        (("generate", PROMPT, "--guidance-scale", "-1"), "`guidance_scale` must be at least 0"),
        (("generate", PROMPT, "--image-top-p", "0"), "`image_top_p`"),
        (("generate", PROMPT, "--image-temperature", "0"), "`image_temperature`"),
        (("generate", PROMPT, "--aspect-ratio", "banana"), "`aspect_ratio`"),
        (("generate", PROMPT, "--task", "x2i"), "needs an image"),
        (("generate", PROMPT, "--image", "missing.png"), "missing.png"),
        (("generate", PROMPT, "--image", "corrupt.png"), "corrupt.png"),
        (("generate", PROMPT, "--task", "t2i", "--image", "corrupt.png"), "takes no images"),
        (("generate", PROMPT, "--model", "no/such/checkpoint"), "no/such/checkpoint"),
        (("generate", PROMPT, "--model", "."), "no config.json"),
        (("generate", PROMPT, "--device", "quantum"), "no such kind of device"),
        (("generate", PROMPT, "--device", "cuda:99"), "cuda:99"),
        (("generate", PROMPT, "--vision-tokenizer", "."), "model.safetensors"),
        (("describe", "missing.png"), "missing.png"),
        (("describe", "corrupt.png", "--question", " "), "empty prompt"),
        (("story", ""), "empty"),
        (("story", PROMPT, "--image", "missing.png"), "missing.png"),
        (("story", PROMPT, "--guidance-scale", "-1"), "`guidance_scale` must be at least 0"),
        (("story", PROMPT, "-o", "corrupt.png"), "corrupt.png is a file"),
        (("story", PROMPT, "-o", "no/such"), "there is no folder no"),
        (("convert", "--model", ".", "--output", "new"), "model.safetensors"),
        (("train", "missing.yaml"), "missing.yaml"),
        (("train", "broken.yaml"), "broken.yaml"),
        (("eval", "--output", "."), "is a folder"),
        (("eval", "--plot", "plot.png"), "--sweep"),
        (("eval", "--task", "vqa", "--guidance-scale", "2"), "--guidance-scale"),
        (("eval", "--sweep", "guidence_scale=1,2", "--num", "3"), "guidence_scale"),
        (("bench", "imagge"), "imagge"),
        (("bench", "vision", "--size", "34b"), "34b"),
        (("bench", "--size", "34b", "--device", "cpu"), "needs a GPU"),
    ],
)
def test_mistakes_are_told_in_one_line(run, arguments, expected):
    broken_file("corrupt.png")
    broken_file("broken.yaml", b"stages: [")
    before = sorted(Path().iterdir())
    status, out, err = run(*arguments)
    assert status == 2, (out, err)
    assert expected in err
    assert err.startswith(f"emu35 {arguments[0]}: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert out == ""
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("generate",), "prompt"),
        (("generate", PROMPT, "--hight", "16"), "--hight"),
        (("generate", PROMPT, "--seed", "-3"), "--seed"),
        (("generate", PROMPT, "--seed", "abc"), "--seed"),
        (("generate", PROMPT, "--num-images", "0"), "--num-images"),
        (("generate", PROMPT, "--guidance-scale", "strong"), "--guidance-scale"),
        (("generate", PROMPT, "--task", "t2v"), "t2v"),
        (("generate", PROMPT, "--load-in", "2bit"), "2bit"),
        (("eval", "--task", "tale"), "tale"),
        (("story", PROMPT, "--task", "t2i"), "t2i"),
        (("story", PROMPT, "--max-images", "0"), "--max-images"),
        (("eval", "--sweep", "guidance_scale"), "--sweep"),
        (("convert", "--output", "new"), "--model"),
        (("convert", "--model", ".", "--output", "new", "--ouput", "x"), "--ouput"),
        (("paint",), "paint"),
        (("--colour",), "--colour"),
    ],
)
def test_mistyped_commands_are_told_in_one_line(run, arguments, expected):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert expected in err and err.count("\n") == 1 and "--help" in err


def test_a_missing_tiny_checkpoint_is_told(run, monkeypatch):
    monkeypatch.setattr(cli_tools_emu35, "TINY", "nowhere")
    status, _, err = run("generate", PROMPT)
    assert status == 2 and "emu35 train" in err and "--model" in err


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debugging_shows_where_an_error_comes_from(run, monkeypatch, how):
    arguments = ("generate", "")
    if how == "option":
        arguments += ("--debug",)
    else:
        monkeypatch.setenv("EMU35_DEBUG", "1")
    with pytest.raises(ValueError, match="empty prompt"):
        run(*arguments)


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(run, monkeypatch):
    def fail(self, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Emu35ForConditionalGeneration, "generate", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("generate", PROMPT)


def test_too_little_gpu_memory_is_told_with_a_way_out(run, monkeypatch):
    def fail(self, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 2 GiB.")

    monkeypatch.setattr(Emu35ForConditionalGeneration, "generate", fail)
    status, _, err = run("generate", PROMPT)
    assert status == 2 and "--load-in 4bit" in err and err.count("\n") == 1


def test_an_interrupt_is_no_crash(run, monkeypatch):
    def interrupt(self, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Emu35ForConditionalGeneration, "generate", interrupt)
    assert run("generate", PROMPT)[0] == 130
    assert list(Path().iterdir()) == []


# ------------------------------------------------------------------------------------------------------ other commands


def test_convert(run, checkpoint):
    status, _, err = run("convert", "--model", checkpoint, "--output", "new")
    assert status == 0, err
    before, after = (Emu35ForConditionalGeneration.from_pretrained(path) for path in (checkpoint, "new"))
    for (name, old), (_, new) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert torch.equal(old, new), name
    status, _, err = run("convert", "--model", checkpoint, "--output", "new")
    assert status == 2 and "exists and is not empty" in err and err.count("\n") == 1


def test_train_hands_over_to_training(run, monkeypatch):
    import emu35.training.train

    calls = []
    monkeypatch.setattr(
        emu35.training.train, "train", lambda *args, **kwargs: calls.append((args, kwargs)) or "export"
    )
    assert run("train", "recipe.yaml", "--output", "runs", "--restart")[:2] == (0, "export: the finished model\n")
    assert calls == [(("recipe.yaml", "runs", None), {"resume": False, "device": "cpu"})]


@pytest.mark.parametrize("task", ["t2i", "vqa", "reconstruction"])
def test_eval_writes_json(run, task):
    status, out, err = run("eval", "--task", task, "--num", 3, "--num-held-out", 1, "--seed", 2, "--output", "r.json")
    assert status == 0, err
    result = json.loads(Path("r.json").read_text())
    assert (result["task"], result["num"], result["seed"]) == (task, 3, 2)
    assert out == "r.json: written\n"


def test_eval_sweeps_a_setting(run):
    status, out, err = run("eval", "--sweep", "guidance-scale=1,1.5", "--num", 3)
    assert status == 0, err
    assert [point["guidance_scale"] for point in json.loads(out)] == [1, 1.5]


def test_bench_prints_a_table_and_writes_json(run, monkeypatch):
    from emu35 import bench_emu35

    results = {"environment": {}, "targets": []}
    calls = []

    def measure(*args, on_part):
        calls.append(args)
        on_part(results)
        return results

    monkeypatch.setattr(bench_emu35, "run_benchmark", measure)
    monkeypatch.setattr(bench_emu35, "format_results", lambda results: "a table")
    status, out, _ = run("bench", "image", "loss", "--quick", "--output", "bench.json", "--device", "cpu")
    assert (status, out) == (0, "bench.json: written\na table\n")
    assert json.loads(Path("bench.json").read_text()) == results
    assert calls == [(["image", "loss"], "tiny", True, "cpu", None, 0)]


def test_every_command_explains_itself_with_an_example(run):
    assert run()[0] == 0
    commands = next(
        action.choices for action in cli._build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    assert {"generate", "describe", "story", "convert", "train", "distill", "eval", "bench"} <= set(commands)
    for name in commands:
        status, out, _ = run(name, "--help")
        assert status == 0 and f"example:\n  emu35 {name} " in out, name


def test_help_does_not_wait_for_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('launcher', {str(ROOT / 'emu35_launcher.py')!r})\n"
        "launcher = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(launcher)\n"
        "sys.argv = ['emu35', 'generate', '--help']\n"
        "try:\n    launcher.main()\n"
        "finally:\n    assert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "emu35 generate" in run.stdout


def test_the_command_line_module_runs_on_its_own(checkpoint, tmp_path):
    command = [sys.executable, "-m", "emu35.cli", "generate", PROMPT, "-o", "out.png", "--model", checkpoint]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert Image.open(tmp_path / "out.png").size == (12, 16)


# --------------------------------------------------------------------------------------------------------------- parts


def test_progress_knows_how_long_an_image_is(tiny_layout):
    class Bar:
        n, total = 0, None

        def update(self):
            self.n += 1

    bar = Bar()
    progress = cli_tools_emu35.TokenProgress(bar, tiny_layout)
    rows = [[tiny_layout.visual_token_offset] * 3] * 2
    progress.put(torch.zeros(1, 7, dtype=torch.long))  # the prompt
    for token_id in [5, *tiny_layout.image_token_ids(rows)]:
        progress.put(torch.tensor([token_id]))
    progress.end()
    assert bar.n == bar.total == 1 + tiny_layout.num_image_tokens(2, 3)


def test_device_names():
    assert cli_tools_emu35.find_device("cpu") == "cpu"
    assert cli_tools_emu35.find_device("auto") in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="--device meta"):
        cli_tools_emu35.find_device("meta")


@pytest.mark.parametrize(
    ("is_fast", "limit", "dtype"),
    [(True, 2**30, torch.bfloat16), (False, 2**30, torch.float32), (False, 1000, torch.bfloat16)],
)
def test_a_small_model_is_float32_where_bfloat16_is_slow(is_fast, limit, dtype, monkeypatch):
    monkeypatch.setattr(cli_tools_emu35, "multiplies_bfloat16", lambda device: is_fast)
    monkeypatch.setattr(cli_tools_emu35, "SMALL_BYTES", limit)
    assert cli_tools_emu35.load(None, device="cpu")[0].dtype == dtype
    assert cli_tools_emu35.load(None, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_which_processors_multiply_bfloat16(monkeypatch):
    assert devices_emu35.multiplies_bfloat16("cuda")
    for machine, capability, is_fast in (
        ("x86_64", "AVX512", True),
        ("x86_64", "AVX2", False),
        ("x86_64", "DEFAULT", False),
        ("aarch64", "DEFAULT", True),
    ):
        monkeypatch.setattr(devices_emu35.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert devices_emu35.multiplies_bfloat16("cpu") is is_fast


def test_a_tokenizer_can_be_named(checkpoint, tmp_path, make_tiny_model, tiny_tokenizer):
    model = make_tiny_model()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="--tokenizer"):
        cli_tools_emu35.load(str(tmp_path / "model"), device="cpu")
    with pytest.raises(FileNotFoundError, match="Qwen2 or Qwen3"):
        cli_tools_emu35.load(str(tmp_path / "model"), device="cpu", tokenizer=str(tmp_path))
    loaded, processor = cli_tools_emu35.load(checkpoint, device="cpu")
    assert processor.image_processor.factor == loaded.config.vision_tokenizer_config.downsampling_factor


def test_the_package_finds_its_tiny_checkpoint():
    assert cli_tools_emu35.TINY == emu35.TINY
    assert importlib.util.find_spec("emu35.model_cards") is not None
