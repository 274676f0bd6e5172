"""`emu35 prepare`: shards that a stopped run does not make again, and a report of what was left out."""

import copy
import json

import numpy as np
import pytest
import torch
from emu35.training.data import (
    ExampleWriter,
    PreparedRows,
    encode_images,
    is_prepared,
    prepare,
    read_example,
    read_rows,
)
from PIL import Image

pytest.importorskip("datasets")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for index in range(7):
        size = (16, 16) if index % 2 else (32, 16)
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": f"a red fox {index}"})
    (folder / "3.png").write_bytes(b"no image")
    rows[5] = {"text": "no answer"}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(data, tmp_path, shared_tiny_model, tiny_processor):
    def call(**options):
        options = {"data": data, "vision_tokenizer": shared_tiny_model.vision_tokenizer, **options}
        options = {"rows_per_shard": 3, "progress": False, **options}
        return prepare(directory=tmp_path / options.pop("out", "out"), processor=tiny_processor, **options)

    return call


def test_shards_hold_what_rows_give_and_bad_rows_are_reported(run, data, tmp_path, shared_tiny_model, tiny_processor):
    summary = run()
    out = tmp_path / "out"
    assert summary["examples"] == 5 and summary["left_out"] == 2 and summary["tasks"] == {"t2i": 5}
    report = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    assert [line["row"] for line in report] == [3, 5]
    assert "3.png" in report[0]["reason"] and "no answer" in report[1]["reason"]
    rows, write = PreparedRows(out, tiny_processor), ExampleWriter(tiny_processor)
    assert len(rows) == 5
    expected = [write(row) for index, row in enumerate(read_rows(data)) if index not in (3, 5)]
    for one in expected:
        encode_images([one], shared_tiny_model.vision_tokenizer.encode, tiny_processor.token_layout)
    for found, one in zip(map(read_example, rows), expected, strict=True):
        assert found.input_ids.tolist() == one.input_ids.tolist() and found.spoken.tolist() == one.spoken.tolist()
    assert summary["tokens"] == sum(map(len, expected)) and summary["longest"] == max(map(len, expected))


def test_a_stopped_run_goes_on_where_it_was(run, tmp_path):
    first = run()
    shards = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(shards) == 3
    before = [path.stat().st_mtime_ns for path in shards]
    shards[1].unlink()
    (tmp_path / "out" / "prepared.json").unlink()
    assert run() == first
    after = [path.stat().st_mtime_ns for path in shards]
    assert before[::2] == after[::2] and before[1] != after[1]


def test_what_changed_since_is_prepared_again(run, data, tmp_path):
    before = run()

    def written():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}

    def changed(earlier):
        now = written()
        return sorted(name for name in now if now[name] != earlier.get(name))

    first = written()
    lines = (data / "metadata.jsonl").read_text()
    fresh = [{"file_name": f"{index}.png", "text": "one more"} for index in range(3)]
    (data / "metadata.jsonl").write_text(lines + "".join(json.dumps(row) + "\n" for row in fresh))
    after = run()  # rows 7 to 9: two in the last shard, which had one, and one in the next
    assert after["examples"] == before["examples"] + 3
    assert changed(first) == ["shard-00002.parquet", "shard-00003.parquet"]
    second = written()
    Image.new("RGB", (16, 16)).save(data / "3.png")  # a broken one
    assert run()["examples"] == after["examples"] + 1 and changed(second) == ["shard-00001.parquet"]
    (data / "metadata.jsonl").write_text("".join(lines.splitlines(keepends=True)[:4]))
    assert run()["examples"] == 4 and len(written()) == 2
    assert is_prepared(tmp_path / "out")


def test_a_stream_is_prepared_like_a_table(run, data, tmp_path):
    pictures = [{"image": str(data / f"{index}.png"), "text": f"a fox {index}"} for index in range(7) if index != 3]
    import datasets

    datasets.Dataset.from_list(pictures).to_parquet(tmp_path / "data.parquet")
    found = []
    for streaming in (True, False):
        found.append(run(data=tmp_path / "data.parquet", out=f"out-{streaming}", streaming=streaming))
        tables = [PreparedRows(tmp_path / f"out-{streaming}")[index]["input_ids"].tolist() for index in range(6)]
        found[-1]["tables"] = tables
    assert found[0] == found[1]


def test_processes_share_the_shards(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run()["examples"] == 1  # rows 3 to 5, of which two are bad
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["shard-00001.parquet"]
    with pytest.raises(ValueError, match=r"out is not finished. Run `emu35 prepare` again"):
        is_prepared(tmp_path / "out")
    monkeypatch.setenv("RANK", "0")
    assert run()["examples"] == 5 and is_prepared(tmp_path / "out")


def test_other_settings_need_another_folder(run, tmp_path, tiny_processor, shared_tiny_model):
    run()
    with pytest.raises(ValueError, match="prepared with other settings: max_length was 512, now 100"):
        run(max_length=100)
    other = copy.deepcopy(shared_tiny_model.vision_tokenizer)
    PreparedRows(tmp_path / "out", tiny_processor, other.to(torch.bfloat16))  # the same, however it was loaded
    torch.nn.init.normal_(other.quantize.embedding.weight)
    with pytest.raises(ValueError, match="another vision tokenizer, whose codes mean other images"):
        PreparedRows(tmp_path / "out", tiny_processor, other)
    with pytest.raises(ValueError, match="prepared with other settings: codebook was"):
        run(vision_tokenizer=other.float())
    settings = tmp_path / "out" / "prepared.json"
    summary = json.loads(settings.read_text())
    summary["settings"]["num_visual_tokens"] = 7
    settings.write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="another vocabulary"):
        PreparedRows(tmp_path / "out", tiny_processor)


def test_the_limit_leaves_long_rows_out(run, tmp_path):
    summary = run(max_length=40)
    assert summary["examples"] == 0 and summary["left_out"] == 7
    with pytest.raises(ValueError, match=r"has no examples; .*report.jsonl tells why"):
        PreparedRows(tmp_path / "out")


def test_a_broken_image_inside_of_messages_is_a_bad_row(run, data, tmp_path):
    import datasets

    item = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    message = {"role": datasets.Value("string"), "content": datasets.List(item)}
    rows = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": {"bytes": image}}, {"type": "text", "text": "what colour?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ]
        for image in ((data / f"{index}.png").read_bytes() for index in (2, 3, 4))
    ]
    features = datasets.Features({"messages": datasets.List(message)})
    datasets.Dataset.from_dict({"messages": rows}, features=features).save_to_disk(tmp_path / "saved")
    summary = run(data=tmp_path / "saved")
    assert summary["examples"] == 2 and summary["tasks"] == {"vqa": 2}
    report = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert [line["row"] for line in report] == [1] and "is not an image file" in report[0]["reason"]
    before = (tmp_path / "out" / "shard-00000.parquet").stat().st_mtime_ns
    assert run(data=tmp_path / "saved") == summary  # rows are known again
    assert (tmp_path / "out" / "shard-00000.parquet").stat().st_mtime_ns == before


def test_a_shard_that_another_process_deletes_is_not_missed(run, tmp_path, monkeypatch):
    import pyarrow.parquet

    whole = run()
    report, read = (tmp_path / "out" / "report.jsonl").read_text(), pyarrow.parquet.read_table

    def delete_first(path, **options):
        if path.name == "shard-00001.parquet":
            path.unlink()
        return read(path, **options)

    monkeypatch.setattr(pyarrow.parquet, "read_table", delete_first)
    assert run()["examples"] == whole["examples"] - 1
    assert (tmp_path / "out" / "report.jsonl").read_text() == report
    monkeypatch.undo()
    assert run() == whole
