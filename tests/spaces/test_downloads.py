"""What visitors take along."""

import os
import time

import PIL.Image
import pytest
import torch
from emu35 import Image, Segments, Text
from emu35.spaces import downloads
from emu35.spaces.downloads import remove_downloads, remove_older_than, save_png, save_story
from emu35.spaces.turns import Visitor
from emu35.spaces.updates import UNFINISHED

VISITOR = Visitor("session", "1.1.1.1")
PICTURE = PIL.Image.new("RGB", (48, 48), (1, 2, 3))


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_root", lambda: tmp_path)
    return tmp_path


def test_a_png_says_how_it_was_made():
    prompt = "a red cross \N{SNOWMAN}\non a <b>black</b> background"
    path = save_png(PICTURE, VISITOR, prompt=prompt, seed=7, image_decoder="dida", num_inference_steps=8, nothing=None)
    with PIL.Image.open(path) as image:
        assert image.text == {
            "Software": "emu35", "prompt": prompt, "seed": "7", "image_decoder": "dida", "num_inference_steps": "8",
        }  # fmt: skip
        assert image.convert("RGB").tobytes() == PICTURE.tobytes()
    assert path.name == "a-red-cross-on-a-b-black-b-background-7.png"


def test_an_unfinished_picture_says_so():
    image = PICTURE.copy()
    image.info[UNFINISHED] = True
    path = save_png(image, VISITOR, prompt="a cross", seed=7, kind="dida")
    with PIL.Image.open(path) as image:
        assert image.text["unfinished"] == "stopped before its end"
    assert path.name == "a-cross-7-dida-unfinished.png"


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "", "\N{SNOWMAN}", "x" * 5000, "con\0", "..\\..\\x"])
def test_no_prompt_leaves_the_folder(root, prompt):
    path = save_png(PICTURE, VISITOR, prompt=prompt, seed=1)
    assert path.resolve().parent.parent == root.resolve()
    assert len(path.name) < 60


@pytest.mark.parametrize("session", ["../..", "/etc", "", "a/b"])
def test_no_session_name_leaves_the_folder(root, session):
    assert save_png(PICTURE, Visitor(session)).resolve().parent.parent == root.resolve()


def test_stories_are_a_page_and_a_video():
    story = Segments([Text("once <script>alert(1)</script>"), Image(torch.zeros(6, 6, dtype=torch.long), PICTURE)])
    files = save_story(story, VISITOR, prompt="tell a story")
    assert [path.name for path in files] == ["index.html", "story.mp4"]
    page = files[0].read_text()
    assert "tell a story" in page
    assert "<script>" not in page
    assert files[1].stat().st_size > 1000
    # A shorter one takes its place.
    assert [path.name for path in save_story(story[:1], VISITOR, prompt="tell")] == ["index.html"]


def test_sessions_are_apart_and_can_be_removed(root):
    mine, other = save_png(PICTURE, VISITOR), save_png(PICTURE, Visitor("another"))
    assert mine.parent != other.parent
    remove_downloads(VISITOR)
    assert not mine.exists()
    assert other.exists()


def test_old_files_are_removed(root):
    old, new = save_png(PICTURE, VISITOR), save_png(PICTURE, Visitor("another"))
    for path in (old, old.parent):
        os.utime(path, (time.time() - 1000,) * 2)
    remove_older_than(500)
    assert not old.parent.exists()
    assert new.exists()
