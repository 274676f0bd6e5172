"""Folders, files and datasets of users as rows; rows as messages and examples; what is wrong with bad ones."""

import json

import numpy as np
import pytest
from emu35.training.data import ExampleWriter, encode_images, labels_of, read_rows, to_messages, without_text
from emu35.training.data.examples import IGNORED
from PIL import Image


def picture(path, size=(16, 16)):
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def image_item(name):
    return {"type": "image", "image": name}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    return tmp_path


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_folder_with_captions_beside_the_images(folder):
    (folder / "a.txt").write_text("a red fox\n")
    (folder / "c.txt").write_text("a blue square")
    rows = read_rows(folder)
    assert [row.get("text") for row in rows] == ["a red fox", None, "a blue square"]
    with pytest.raises(ValueError, match=r"b\.png has no caption"):
        to_messages(rows[1])
    messages, task = to_messages(rows[0])
    assert task == "t2i"
    assert messages[1] == {"role": "assistant", "content": [image_item(str(folder / "a.png"))]}


def test_metadata_names_columns_as_datasets_does(folder):
    write_lines(
        folder / "metadata.jsonl",
        {"file_name": "a.png", "text": "a red fox"},
        {"file_name": "b.png", "input_image_file_name": "a.png", "instruction": "make it blue"},
        {"file_names": ["a.png", "b.png"], "question": "how many?", "answer": "two"},
        "{broken",
    )
    rows = read_rows(folder)
    assert to_messages(rows[1]) == (
        [
            {"role": "user", "content": [image_item(str(folder / "a.png")), "make it blue"]},
            {"role": "assistant", "content": [image_item(str(folder / "b.png"))]},
        ],
        "x2i",
    )
    messages, task = to_messages(rows[2])
    assert task == "vqa" and len(messages[0]["content"]) == 3 and messages[1]["content"] == "two"
    with pytest.raises(ValueError, match="line 4 is not JSON"):
        to_messages(rows[3])


def test_lines_and_cells_end_where_their_formats_say(folder):
    text = "a red\u2028fox, \x85 here"
    path = folder / "rows.jsonl"
    path.write_bytes(json.dumps({"text": text, "image": "a.png"}, ensure_ascii=False).encode() + b"\r\n{}\r\n")
    rows = read_rows(path)
    assert len(rows) == 2 and rows[0]["text"] == text
    table = folder / "rows.csv"
    table.write_text('text,image\r\n"a red fox,\nand a hen",a.png\r\na blue, big square,b.png\r\nowl,\r\nowl\r\n')
    rows = read_rows(table)
    assert rows[0] == {"text": "a red fox,\nand a hen", "image": str(folder / "a.png")}
    for row, reason in zip(rows[1:], ("line 4 has more cells than the header", "no answer", "no answer"), strict=True):
        with pytest.raises(ValueError, match=reason):
            to_messages(row)


def test_what_is_no_row_is_a_bad_one(folder):
    path = folder / "rows.json"
    path.write_text(json.dumps([{"text": "a fox", "image": "a.png"}, "a fox", None]))
    good, *bad = read_rows(path)
    assert to_messages(good)[1] == "t2i"
    for number, row in enumerate(bad, 1):
        with pytest.raises(ValueError, match=f"item {number} is no JSON object"):
            to_messages(row)
    path.write_text("[{")
    with pytest.raises(ValueError, match=r"rows\.json is not JSON"):
        read_rows(path)


def test_an_image_column_that_is_empty_is_a_missing_image(folder):
    question = {"question": "how many?", "answer": "two"}
    for missing in ({"image": None}, {"images": None}, {"image": None, "images": None}, {"images": ["a.png", None]}):
        with pytest.raises(ValueError, match=r"the row's image is missing: .*`image"):
            to_messages({**question, **missing})
    with pytest.raises(ValueError, match="the row's image is missing: `input_image` is empty"):
        to_messages({"instruction": "make it blue", "input_image": None, "image": "a.png"})
    path = folder / "rows.csv"
    path.write_text("question,answer,image\nhow many?,two,\n")
    with pytest.raises(ValueError, match="the row's image is missing: `image` is empty"):
        to_messages(read_rows(path)[0])
    # A table of several kinds of rows has all columns, and a question may show none at all.
    assert to_messages({**question, "image": "a.png", "images": None, "input_image": None})[1] == "vqa"
    assert to_messages({"text": "a fox", "image": "a.png", "input_image": None, "question": None})[1] == "t2i"
    assert to_messages(question)[1] == "chat"


def test_messages_take_images_from_their_column_in_order(folder):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "tell a story"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "once"}, {"type": "image"}, {"type": "image"}]},
    ]
    path = write_lines(folder / "rows.jsonl", {"messages": messages, "images": ["a.png", "b.png"]})
    found, task = to_messages(read_rows(path)[0])
    assert task == "story"
    assert found[1]["content"][1:] == [image_item(str(folder / name)) for name in ("a.png", "b.png")]
    for given in (0, 1, 3):
        with pytest.raises(ValueError, match=f"the row has {given} images, but places for 2"):
            to_messages({"messages": messages, "images": ["a.png"] * given})


def test_images_without_a_place_are_not_dropped():
    def row(question, **images):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "red"}], **images}

    for images in ({"images": ["a.png"]}, {"image": "a.png"}):
        with pytest.raises(ValueError, match="the row has 1 images, but places for 0"):
            to_messages(row("what colour?", **images))
    with pytest.raises(ValueError, match="Give one of them"):
        to_messages(row("<image>", image="a.png", images=["a.png"]))
    own = row([image_item("a.png"), "what colour is <image>?"], images=["a.png"])
    assert to_messages(own)[0] == own["messages"]
    assert to_messages(row("what colour?", images=[]))[1] == "chat"


def test_a_marker_in_the_text_of_a_user_is_a_place():
    a, b = image_item("a.png"), image_item("b.png")
    for text, content in (
        ("<image>\nwhat colour?", [a, "what colour?"]),
        ("compare <image> with <image>.", ["compare ", a, " with ", b, "."]),
        ([{"type": "text", "text": "what colour?\n<image>"}], ["what colour?", a]),
    ):
        row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "it says <image>"}]}
        images = ["a.png", "b.png"][: sum(isinstance(item, dict) for item in content)]
        messages, task = to_messages({**row, "images": images})
        assert messages == [{"role": "user", "content": content}, row["messages"][1]] and task == "vqa"
        assert to_messages(row)[0] == row["messages"]  # without a column of images it is text like any other
        for wrong in ([*images, "c.png"], images[1:], None):
            with pytest.raises(ValueError, match=f"the row has {len(wrong or [])} images, but places for"):
                to_messages({**row, "images": wrong})
    asked = to_messages({"question": "<image>\nwhat colour?", "image": "a.png", "answer": "red"})[0][0]
    assert asked["content"] == [a, "what colour?"]
    drawn = to_messages({"text": "a page that says <image>", "image": "a.png"})[0][0]
    assert drawn["content"] == ["a page that says <image>"]


@pytest.mark.parametrize(
    ("column", "near"),
    [
        *(("imgae", "image"), ("img", "image"), ("Image", "image"), ("picture", "image"), ("photos", "images")),
        *(("image_path", "image"), ("input_img", "input_image")),
    ],
)
def test_a_column_of_images_with_a_wrong_name_is_not_dropped(column, near):
    talk = [{"role": "user", "content": "what colour?"}, {"role": "assistant", "content": "red"}]
    for row in ({"question": "what colour?", "answer": "red"}, {"messages": talk}):
        with pytest.raises(ValueError, match=f"'{column}' for '{near}'"):
            to_messages({**row, column: "a.png"})


def test_all_columns_of_images_are_read_and_other_columns_may_be_there():
    question, edit = {"question": "how many?", "answer": "two"}, {"instruction": "make it blue", "image": "a.png"}
    for row, reason in (
        ({**question, "input_image": "a.png"}, "nothing shows the images of `input_image`"),
        ({"text": "a fox", "image": "a.png", "input_image": "b.png"}, "nothing shows the images of `input_image`"),
        ({"text": "a fox", "image": "a.png", "input_img": "b.png"}, "'input_img' for 'input_image'"),
        ({**edit, "input_image": "b.png", "images": ["c.png"]}, "nothing shows the images of `images`"),
        ({**edit, "text": "a fox"}, "`instruction` needs the column `input_image`"),
    ):
        with pytest.raises(ValueError, match=reason):
            to_messages(row)
    others = {"image_id": "7", "image_path": "a.png", "image_size": [8, 8], "question_id": 7, "source": "mine"}
    assert to_messages({**question, "image": "a.png", **others})[1] == "vqa"
    assert to_messages({"text": "a fox", "image": "a.png", "images": [], **others})[1] == "t2i"
    assert to_messages({**question, "num_images": 0, "has_image": False})[1] == "chat"


def test_an_answer_may_be_a_number():
    for answer, said in ((3, "3"), (0, "0"), (2.5, "2.5"), ("three", "three")):
        assert to_messages({"question": "how many?", "answer": answer})[0][1]["content"] == said
    for answer in (True, float("nan"), ["two", "three"]):
        with pytest.raises(ValueError, match="`answer` must be a text or a number, got"):
            to_messages({"question": "how many?", "answer": answer})


def test_files_that_are_not_utf8_are_named(folder):
    latin = "a fox in a caf\xe9".encode("latin-1")
    (folder / "a.txt").write_bytes(latin)
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfan owl")  # as Notepad saves it
    bad, good, _ = read_rows(folder)
    assert good["text"] == "an owl"
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        to_messages(bad)
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        (folder / name).write_bytes(latin)
        with pytest.raises(ValueError, match=f"{name} is not UTF-8"):
            read_rows(folder / name)


def test_datasets_with_images_in_them_are_not_decoded_before_their_turn(folder):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": (folder / "a.png").read_bytes()}, {"bytes": b"no image"}], "text": ["fox", "square"]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(folder / "saved")
    dataset.to_parquet(folder / "rows.parquet")
    for found in (read_rows(folder / "saved"), read_rows(folder / "rows.parquet", streaming=True)):
        good, bad = (to_messages(row)[0][1]["content"][0]["image"] for row in found)
        assert good == (folder / "a.png").read_bytes() and bad == b"no image"


def nested(folder, *images, large=False):
    """A dataset of `datasets` with images inside of messages, saved."""
    datasets = pytest.importorskip("datasets")
    many = datasets.LargeList if large else datasets.List
    item = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    message = {"role": datasets.Value("string"), "content": many(item)}
    features = datasets.Features({"messages": many(message), "images": many(datasets.Image())})
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red", "image": None}]}
    shown = [[{"type": "image", "text": None, "image": {"bytes": image, "path": None}}] for image in images]
    rows = {
        "messages": [[{"role": "user", "content": content}, answer] for content in shown],
        "images": [[{"bytes": image, "path": None}] for image in images],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "saved")
    return datasets.load_from_disk(folder / "saved")


@pytest.mark.parametrize("large", [False, True])
def test_images_inside_of_messages_are_not_decoded_either(folder, large):
    image = (folder / "a.png").read_bytes()
    nested(folder, image, b"no image", large=large).to_parquet(folder / "rows.parquet")
    for rows in (read_rows(folder / "saved"), read_rows(folder / "rows.parquet", streaming=True)):
        rows = list(rows)
        assert [row["images"][0]["bytes"] for row in rows] == [image, b"no image"]
        assert [to_messages(row)[0][0]["content"][0]["image"] for row in rows] == [image, b"no image"]


def test_a_row_of_a_dataset_that_cannot_be_read_is_a_bad_one(folder):
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["a fox", "an owl"], "image": ["a.png"] * 2, "seen": [0, 10**12]}  # no year that Python has
    features = datasets.Features(
        {"text": datasets.Value("string"), "image": datasets.Value("string"), "seen": datasets.Value("int64")}
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.cast_column("seen", datasets.Value("timestamp[s]")).save_to_disk(folder / "saved")
    good, bad = read_rows(folder / "saved")
    assert to_messages(good)[1] == "t2i"
    with pytest.raises(ValueError, match="the row cannot be read: date value out of range"):
        to_messages(bad)


ROLES, SAID = ("user", "assistant") * 2, ("hello", " ", "well?", "yes")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a fox"}, "no answer: there is no column `image`"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "no answer: its last message"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": []}]}, "no answer"),
        ({"question": "how many?", "answer": " ", "image": "a.png"}, "no answer"),
        (
            {"messages": [{"content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]},
            "no ans",
        ),
        (
            {"messages": [{"role": role, "content": text} for role, text in zip(ROLES, SAID, strict=True)]},
            "no answer: message 2 of 4, the assistant's, is empty",
        ),
        ({"question": "how many?", "text": "two foxes", "image": "a.png"}, "no answer: there is no column `answer`"),
        ({"question": "how many?", "anwser": "two"}, "no answer: .* A slip, perhaps: 'anwser' for 'answer'"),
        ({"prompt": "how many?", "answer": "two", "image": "a.png"}, "no question: there is no column `question`"),
        ({"instruction": "make it blue", "input_image": "a.png", "text": "a fox"}, "no answer: there is no column"),
        ({"messages": "hello"}, "`messages` must be a list of dicts"),
        ({"captoin": "a fox", "image": "a.png"}, "A slip, perhaps: 'captoin' for 'caption'"),
    ],
)
def test_rows_that_make_no_conversation(row, message):
    with pytest.raises(ValueError, match=message):
        to_messages(row)


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_rows(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no metadata\.jsonl"):
        read_rows(tmp_path)
    with pytest.raises(ValueError, match=r"none of \.jsonl"):
        read_rows(picture(tmp_path / "a.png"))


# ----------------------------------------------------------------------------------------------------------- examples


def conversation(folder):
    """Two turns: an edit with two pictures in the answer, and one more."""
    return {
        "task": "chat",
        "messages": [
            {"role": "user", "content": [image_item(str(folder / "a.png")), "two blue ones"]},
            {
                "role": "assistant",
                "content": ["here", image_item(str(folder / "b.png")), image_item(str(folder / "c.png"))],
            },
            {"role": "user", "content": "a red one"},
            {"role": "assistant", "content": [image_item(str(folder / "a.png"))]},
        ],
    }


def test_the_assistants_words_are_learnt_and_codes_stand_where_the_model_would_put_them(
    folder, tiny_processor, shared_tiny_model
):
    layout = tiny_processor.token_layout
    example = ExampleWriter(tiny_processor)(conversation(folder))
    assert len(example.pixel_values) == 4
    inputs = tiny_processor.apply_chat_template(
        conversation(folder)["messages"], task="chat", add_generation_prompt=False
    )
    resolved = shared_tiny_model.resolve_image_tokens(**inputs)["input_ids"][0]
    encode_images([example], shared_tiny_model.vision_tokenizer.encode, layout)
    assert not example.pixel_values and example.input_ids.tolist() == resolved.tolist()
    labels = labels_of(example)
    ends = np.flatnonzero(example.input_ids == layout.eos_token_id)
    begins = np.flatnonzero(example.input_ids == layout.bss_token_id)
    for begin, end in zip(begins, ends, strict=True):
        assert (
            labels[begin] == IGNORED and (labels[begin + 1 : end + 1] == example.input_ids[begin + 1 : end + 1]).all()
        )
    assert (labels != IGNORED).sum() == sum(ends - begins)
    everything = labels_of(example, everything=True)
    assert everything[0] == IGNORED and (everything[1:] == example.input_ids[1:]).all()


def test_without_text_an_answers_images_follow_the_unconditional_prompt(folder, tiny_processor, shared_tiny_model):
    example = ExampleWriter(tiny_processor)(conversation(folder))
    encode_images([example], shared_tiny_model.vision_tokenizer.encode, tiny_processor.token_layout)
    lengths = set()
    for seed in range(8):
        bare = without_text(example, tiny_processor, np.random.default_rng(seed))
        asked = bare.input_ids[~bare.spoken]
        messages = conversation(folder)["messages"][: 1 if (~bare.spoken).sum() < 60 else 3]
        inputs = tiny_processor.apply_chat_template(messages, task="chat")
        resolved = shared_tiny_model.resolve_image_tokens(**inputs)["negative_prompt_ids"][0]
        assert asked.tolist() == resolved.tolist()
        size = tiny_processor.token_layout.num_image_tokens(4, 4)
        lengths.add((len(asked), bare.spoken.sum() // size))
    assert {images for _, images in lengths} == {1, 2} and len(lengths) == 2


def test_an_example_without_images_in_an_answer_keeps_its_text(folder, tiny_processor):
    example = ExampleWriter(tiny_processor)({"question": "how many?", "image": str(folder / "a.png"), "answer": "two"})
    assert without_text(example, tiny_processor, np.random.default_rng(0)) is example


def test_bad_rows_say_what_is_wrong(folder, tiny_processor):
    write = ExampleWriter(tiny_processor, max_length=20)
    with pytest.raises(ValueError, match="`max_length`=20"):
        write({"text": "a red fox", "image": str(folder / "a.png")})
    write = ExampleWriter(tiny_processor)
    with pytest.raises(ValueError, match="no such file"):
        write({"text": "a red fox", "image": str(folder / "z.png")})
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"broken\.png"):
        write({"text": "a red fox", "image": str(folder / "broken.png")})
    with pytest.raises(TypeError, match="must be a dict with `role`"):
        write({"messages": [{"content": "hi"}, {"role": "assistant", "content": "hello"}]})
    with pytest.raises(ValueError, match="`task` must be one of"):
        write({"text": "a red fox", "image": str(folder / "a.png"), "task": "t2j"})
