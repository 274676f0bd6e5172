"""Text in pictures: distances and overlaps by hand, then rapidocr on rendered text, where it is installed."""

import sys
from pathlib import Path

import pytest
from emu35.training.rewards import RapidOCRReader, RewardMix, TextFidelity, TextLayout, TextLine
from emu35.training.rewards.text_rendering import edit_distance, intersection_over_union
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

FONT = ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 40)
CHINESE = ImageFont.truetype(str(Path(__file__).parents[1] / "fixtures/fonts/DroidSansFallback-subset.ttf"), 40)
SIGN = Image.new("RGB", (64, 32), "white")


def reader(*lines):
    """Reads the same lines in every picture."""
    return lambda image: [TextLine(text, box) for text, box in lines]


def read_as(text):
    return reader((text, (0.0, 0.0, 1.0, 0.5)))


def ask(reward, number=1, images=None, prompts=None, **columns):
    return reward(prompts or ["a sign"] * number, [""] * number, images=images or [[SIGN]] * number, **columns)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("open", "open", 0), ("open", "opan", 1), ("kitten", "sitting", 3), ("ab", "ba", 2)],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("wanted", "found", "value"),
    [
        ("open", "open", 1.0),
        ("open", "opan", 0.75),
        ("open", "open today", 4 / 9),  # text too much counts
        ("grand opening", "GRAND\u3000OPENING", 1.0),  # capitals and white space do not
        ("open", "\uff2f\uff30\uff25\uff2e", 1.0),  # full width
        (["grand", "opening"], "grandopenin", 11 / 12),
        ("欢迎光临", "欢迎光监", 0.75),
        ("open", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_fidelity_is_one_minus_the_normalised_distance(wanted, found, value):
    assert ask(TextFidelity(reader=read_as(found)), ocr_text=[wanted]) == [pytest.approx(value)]


def test_capitals_count_if_wanted():
    assert ask(TextFidelity(reader=read_as("OPen"), case=True), ocr_text=["open"]) == [0.5]


def test_no_image_shows_no_text_and_a_row_without_text_has_no_reward():
    reward = TextFidelity(reader=read_as("open"))
    images = [[], [SIGN], [SIGN, SIGN]]
    assert ask(reward, 3, images, ocr_text=["open", None, "openopen"]) == [0.0, None, 1.0]


def test_text_in_quotes_of_the_prompt():
    reward = TextFidelity(column=None, reader=read_as("open now"))
    prompts = ['a sign "open"', 'two signs, "open" and “now”', "a sign"]
    assert ask(reward, 3, prompts=prompts) == [pytest.approx(4 / 7), 1.0, None]


def test_a_reader_that_fails_costs_one_sample():
    def read(image):
        if image.width < 10:
            raise OSError("too small")
        return [TextLine("open", (0, 0, 1, 1))]

    reward = TextFidelity(reader=read)
    images = [[SIGN], [Image.new("RGB", (4, 4))]]
    assert RewardMix([reward])(["p"] * 2, [""] * 2, images=images, ocr_text=["open"] * 2) == [10.0, None]
    assert reward.num_failures == 1


# ------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 1.0),
        ((0, 0, 0.5, 1), (0.5, 0, 1, 1), 0.0),
        ((0, 0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75), 1 / 7),
        ((0.1, 0.1, 0.5, 0.3), (0.1, 0.1, 0.5, 0.4), 2 / 3),
        ((0, 0, 0.2, 0.2), (0.7, 0.7, 0.9, 0.9), 0.0),
    ],
)
def test_intersection_over_union(a, b, value):
    assert intersection_over_union(a, b) == intersection_over_union(b, a) == pytest.approx(value)


TOP, BOTTOM, BELOW = [0.0, 0.0, 1.0, 0.4], [0.0, 0.6, 1.0, 1.0], [0.0, 0.4, 1.0, 0.8]


@pytest.mark.parametrize(
    ("wanted", "found", "value"),
    [
        ([("open", TOP)], [("open", TOP)], 1.0),
        ([("open", TOP), ("now", BOTTOM)], [("now", BOTTOM), ("open", TOP)], 1.0),
        ([("open", TOP), ("now", BOTTOM)], [("now", TOP), ("open", BOTTOM)], 0.0),  # each where the other should be
        ([("open", TOP), ("now", BOTTOM)], [("opem", TOP)], 0.5),  # read a little wrongly
        ([("open", TOP)], [("open", TOP), ("sale", BOTTOM)], 0.5),  # a line too many
        ([(None, TOP), ("", BOTTOM)], [("any", TOP), ("other", BELOW)], (1 + 1 / 3) / 2),
        ([("open", BOTTOM)], [("open", BELOW), ("open", TOP)], 1 / 6),
        ([("open", TOP)], [], 0.0),
        ([], [], 1.0),
    ],
)
def test_layout_is_the_overlap_of_lines_that_belong_together(wanted, found, value):
    lines = [{"text": text, "box": box} for text, box in wanted]
    assert ask(TextLayout(reader=reader(*found)), text_boxes=[lines]) == [pytest.approx(value)]


def test_layout_pairs_the_largest_overlap_first():
    near, nearer = [0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 1.0, 0.45]
    wanted = [{"box": near}, {"box": nearer}]
    # 0.45 with 0.4 is 8/9 and goes first; what is left is 0.5 with nothing
    assert ask(TextLayout(reader=reader(("a", TOP))), text_boxes=[wanted]) == [pytest.approx(8 / 9 / 2)]


def test_layout_without_an_image_or_with_bad_boxes():
    reward = TextLayout(reader=read_as("open"))
    boxes = [[{"box": TOP}], [{"box": [10, 10, 50, 30]}], [{"box": [0.5, 0, 0.5, 1]}], None]
    assert ask(reward, 4, [[], [SIGN], [SIGN], [SIGN]], text_boxes=boxes) == [0.0, None, None, None]
    assert reward.num_failures == 2


# ----------------------------------------------------------------------------------------------------------- rapidocr


def render(lines, size=(480, 200), font=FONT):
    """Lines of text at given places."""
    image = Image.new("RGB", size, "white")
    for text, place in lines:
        ImageDraw.Draw(image).text(place, text, font=font, fill="black")
    return image


@pytest.fixture(scope="module")
def rapidocr():
    pytest.importorskip("rapidocr", reason="comes with emu35[rewards]")
    pytest.importorskip("onnxruntime", reason="comes with emu35[rewards]")
    return RapidOCRReader({"EngineConfig.onnxruntime.intra_op_num_threads": 1, "Det.limit_side_len": 200})


@pytest.mark.parametrize(
    ("wanted", "image"),
    [
        ("Grand Opening", render([("Grand Opening", (30, 20))])),
        ("Größe und Übung", render([("Größe und Übung", (30, 20))])),
        ("欢迎光临新店开业", render([("欢迎光临新店开业", (30, 20))], font=CHINESE)),
    ],
    ids=["english", "german", "chinese"],
)
def test_rapidocr_reads_rendered_text(rapidocr, wanted, image):
    reward = TextFidelity(reader=rapidocr, case=True)
    value = ask(reward, images=[[image]], ocr_text=[wanted[:-1] + "?"])  # all letters but the last are as wanted
    assert value == [pytest.approx(1 - 1 / len(wanted.replace(" ", "")))]


def test_rapidocr_finds_lines_where_they_stand(rapidocr):
    lines = (("Hello World", (30, 20)), ("grand opening", (90, 110)))
    draw, boxes = ImageDraw.Draw(Image.new("RGB", (1, 1))), []
    for text, place in lines:
        left, top, right, bottom = draw.textbbox(place, text, font=FONT)
        boxes.append([left / 480, top / 200, right / 480, bottom / 200])
    found = rapidocr(render(lines))
    assert [line.text for line in found] == [text for text, _ in lines]
    overlaps = [[intersection_over_union(line.box, box) for box in boxes] for line in found]
    assert min(overlaps[0][0], overlaps[1][1]) > 0.4  # a reader's boxes are wider than the letters
    assert max(overlaps[0][1], overlaps[1][0]) < 0.1


def test_rapidocr_reads_nothing_in_an_empty_picture(rapidocr):
    assert rapidocr(Image.new("RGB", (96, 96), "white")) == []


@pytest.mark.parametrize("missing", ["rapidocr", "onnxruntime"])
def test_without_rapidocr_the_extra_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "rapidocr":
        monkeypatch.setitem(sys.modules, "onnxruntime", sys)
    with pytest.raises(ImportError, match=rf"Reading text in images needs `{missing}`.*emu35\[rewards\]"):
        ask(TextFidelity(), ocr_text=["open"])
