"""`Emu35Streamer`: the events of an answer agree with the finished answer, and no thread is left behind."""

import random
import threading
import time

import emu35
import pytest
import torch
from emu35 import (
    Emu35ForConditionalGeneration,
    Emu35Processor,
    Emu35Streamer,
    End,
    ImageFinished,
    ImageProgress,
    ImageStarted,
    TextPiece,
    ThoughtPiece,
)

TIMEOUT = 20


@pytest.fixture
def ids_of(tiny_processor, tiny_layout):
    """`ids_of("a fox", "boc", [[1, 2], [3, 4]])`: text, the names of control tokens, and images as rows of codes."""

    def encode(*parts) -> list[int]:
        ids = []
        for part in parts:
            if isinstance(part, list):
                ids += tiny_layout.image_token_ids(
                    [[tiny_layout.visual_token_offset + code for code in row] for row in part]
                )
            elif part in tiny_layout.special_token_ids:
                ids.append(tiny_layout.special_token_ids[part])
            else:
                ids += tiny_processor._encode_text(part)
        return ids

    return encode


@pytest.fixture
def stream_ids(tiny_processor):
    """All events of some ids, fed without a thread."""

    def feed(ids: list[int], vision_tokenizer=None, **kwargs) -> list:
        streamer = Emu35Streamer(tiny_processor, vision_tokenizer, max_queue=10**6, timeout=TIMEOUT, **kwargs)
        streamer.put(torch.zeros(1, 3, dtype=torch.long))
        for token_id in ids:
            streamer.put(torch.tensor([token_id]))
        streamer.end()
        return list(streamer)

    return feed


class Scripted:
    """A model that writes given ids, one every `pause` seconds, and stops like `generate`."""

    def __init__(self, ids, pause=0.0, error=None):
        self.ids, self.pause, self.error = ids, pause, error
        self.num_put = 0

    def generate(self, streamer):
        streamer.put(torch.zeros(1, 3, dtype=torch.long))
        for token_id in self.ids:
            if streamer.stop_requested:
                break
            self.num_put += 1
            streamer.put(torch.tensor([token_id]))
            time.sleep(self.pause)
        if self.error is not None:
            raise self.error
        streamer.end()
        return "the output"


def outline(events) -> list:
    """What events or segments say, neighbours of the same kind joined."""
    parts = []
    for event in events:
        if isinstance(event, TextPiece) or getattr(event, "kind", "") == "text":
            parts.append(["text", event.text])
        elif isinstance(event, ThoughtPiece):
            parts.append([event.kind, event.text])
        elif isinstance(event, emu35.ImageThought):
            parts.append(["image", event.text])
        elif isinstance(event, emu35.GlobalThought):
            parts += [["global" if kind == "text" else kind, what] for kind, what in outline(event.segments)]
        elif isinstance(event, (ImageFinished, emu35.Image)):
            parts.append(["picture", (event.codes.tolist(), event.complete, event.reason)])
    joined = []
    for kind, what in parts:
        if kind != "picture" and joined and joined[-1][0] == kind:
            joined[-1][1] += what
        elif what:
            joined.append([kind, what])
    return joined


# ------------------------------------------------------------------------------------------------------------- grammar


def test_an_interleaved_answer_event_by_event(ids_of, stream_ids, tiny_processor, shared_tiny_model):
    picture = [[1, 2, 3], [4, 5, 6]]
    ids = ids_of("bog", "plan", "eog", " a fox", "boc", "red", "eoc", picture, " \n", picture, "ess", "eos")
    events = stream_ids(ids, shared_tiny_model)
    assert outline(events) == outline(tiny_processor.decode_multimodal(ids))
    assert [type(event) for event in events if not isinstance(event, (TextPiece, ThoughtPiece))] == [
        *[ImageStarted, ImageProgress, ImageProgress, ImageFinished] * 2,
        End,
    ]
    assert [part[0] for part in outline(events)] == ["global", "text", "image", "picture", "picture"]
    started = [event for event in events if isinstance(event, ImageStarted)]
    assert started == [ImageStarted(0, 2, 3), ImageStarted(1, 2, 3)]
    progress = [event for event in events if isinstance(event, ImageProgress)]
    assert [(one.index, one.num_codes, one.num_rows, one.total) for one in progress] == [
        (0, 3, 1, 6), (0, 6, 2, 6), (1, 3, 1, 6), (1, 6, 2, 6),
    ]  # fmt: skip
    finished = [event for event in events if isinstance(event, ImageFinished)]
    expected = tiny_processor.decode_multimodal(ids, shared_tiny_model).images
    assert [one.image.tobytes() for one in finished] == [one.tobytes() for one in expected]
    assert progress[1].preview().tobytes() == expected[0].tobytes()
    assert events[-1] == End("eos")


def test_any_ids_say_the_same_streamed_and_whole(ids_of, stream_ids, tiny_processor, tiny_layout):
    words = [
        *tiny_layout.special_token_ids.values(),
        *tiny_layout.digit_token_ids,
        tiny_layout.size_separator_token_id,
    ]
    visual = [tiny_layout.visual_token_offset + code for code in (0, 5)]
    image = tiny_layout.image_token_ids([visual, visual])
    draw = random.Random(0)
    pieces = [[word] for word in words] + [visual, image, image[:5], image[:-1], ids_of(" a red fox"), ids_of("é ")]
    num_compared = 0
    for _ in range(400):
        ids = [token_id for piece in draw.choices(pieces, k=12) for token_id in piece]
        segments, events = tiny_processor.decode_multimodal(ids), stream_ids(ids)
        images = [event for event in events if isinstance(event, ImageFinished)]
        assert [image.index for image in images] == list(range(len(images)))
        started = {event.index for event in events if isinstance(event, ImageStarted)}
        assert {image.index for image in images if image.complete} <= started
        # Streamed, a global thought without end goes on; in the segments an image ends it.
        if all(segment.complete for segment in segments if segment.kind == "global_thought"):
            assert outline(events) == outline(segments), ids
            num_compared += 1
    assert num_compared > 200


@pytest.mark.parametrize("text", ["é€😀 fox 狐\n", "\N{REPLACEMENT CHARACTER}fox\N{REPLACEMENT CHARACTER}", " \n fox"])
def test_pieces_are_whole_characters_and_join_to_the_text(text, ids_of, stream_ids, tiny_processor):
    ids = ids_of(text)
    pieces = [event.text for event in stream_ids(ids) if isinstance(event, TextPiece)]
    assert "".join(pieces) == tiny_processor.decode(ids) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert len(pieces) == (7 if text[0] == "é" else 1)


def test_bytes_that_are_no_text_join_to_what_decoding_makes_of_them(ids_of, stream_ids, tiny_processor):
    single_bytes = [ids_of("é")[0], ids_of("€")[0], ids_of("😀")[1]]
    draw = random.Random(1)
    for _ in range(50):
        ids = draw.choices([*single_bytes, *ids_of("a€")], k=12)
        pieces = [event.text for event in stream_ids(ids) if isinstance(event, TextPiece)]
        assert "".join(pieces) == tiny_processor.decode(ids)


def test_white_space_is_no_text_but_may_be_a_thought(ids_of, stream_ids):
    events = stream_ids(ids_of(" \n", [[1]], "boc", "  ", "eoc", " ", "ess"))
    assert [event for event in events if isinstance(event, TextPiece)] == []
    assert outline(events)[1] == ["image", "  "]


@pytest.mark.parametrize(
    ("cut", "reason"), [(1, "no size"), (5, "not closed"), (8, "1 whole rows of 3 codes"), (12, "not closed")]
)
def test_a_cut_image_is_told_with_its_reason(cut, reason, ids_of, stream_ids, shared_tiny_model):
    events = stream_ids(ids_of("a fox", [[1, 2, 3], [4, 5, 6]])[: len(ids_of("a fox")) + cut], shared_tiny_model)
    finished = events[-2]
    assert isinstance(finished, ImageFinished) and not finished.complete and reason in finished.reason
    assert (finished.image is not None) == (cut >= 8)
    assert events[-1] == End("length")


def test_codes_outside_the_codebook(ids_of, stream_ids, tiny_processor, tiny_layout, shared_tiny_model):
    class Small:
        config = type("Config", (), {"codebook_size": 4})
        decode = shared_tiny_model.vision_tokenizer.decode

    ids = ids_of([[1, 9]])
    finished = next(event for event in stream_ids(ids, Small()) if isinstance(event, ImageFinished))
    assert (finished.complete, finished.image) == (False, None) and "outside the codebook of 4" in finished.reason
    progress = next(event for event in stream_ids(ids, Small()) if isinstance(event, ImageProgress))
    with pytest.raises(ValueError, match="no preview: code 9"):
        progress.preview()


def test_progress_after_so_many_codes_and_previews(ids_of, stream_ids):
    seen = []

    def decode(codes):
        seen.append(codes[0].tolist())
        return torch.zeros(1, 3, 4, 4)

    events = stream_ids(ids_of([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), decode, progress_every=2)
    progress = [event for event in events if isinstance(event, ImageProgress)]
    assert [one.num_codes for one in progress] == [2, 4, 6, 8, 9]
    seen.clear()
    for one in progress[:2]:
        assert one.preview().size == (4, 4)
    assert seen == [[[1, 2, 2]] * 3, [[1, 2, 3], [4, 2, 3], [4, 2, 3]]]


def test_a_preview_needs_a_vision_tokenizer(ids_of, stream_ids):
    progress = next(event for event in stream_ids(ids_of([[1]])) if isinstance(event, ImageProgress))
    with pytest.raises(ValueError, match="vision_tokenizer=model"):
        progress.preview()


# ------------------------------------------------------------------------------------------------- the model's answers


def check_streamed(model, processor, inputs, **settings):
    """Streams an answer, and compares it with the same one made at once."""
    generator = torch.Generator().manual_seed(3)
    streamer = Emu35Streamer(processor, timeout=TIMEOUT)
    with streamer.run(model, **inputs, **settings, generator=generator) as events:
        events = list(events)
    whole = model.generate(**inputs, **settings, generator=torch.Generator().manual_seed(3))
    assert streamer.output.sequences.tolist() == whole.sequences.tolist()
    answer = whole.sequences[0, whole.answer_start[0] :]
    segments = processor.decode_multimodal(answer, model)
    assert outline(events) == outline(streamer.segments) == outline(segments)
    pictures = [image.image.tobytes() for image in emu35.segments_emu35.iter_images(segments) if image.image]
    assert pictures == [event.image.tobytes() for event in events if isinstance(event, ImageFinished) and event.image]
    own = emu35.segments_emu35.iter_images(streamer.segments)
    assert pictures == [image.image.tobytes() for image in own if image.image]
    return events


@pytest.fixture(scope="module")
def trained():
    return (
        Emu35ForConditionalGeneration.from_pretrained(emu35.TINY).eval(),
        Emu35Processor.from_pretrained(emu35.TINY),
    )


def test_the_shipped_model_streams_what_it_generates(trained):
    model, processor = trained
    inputs = processor(text="a small red circle above a large blue square", task="t2i")
    events = check_streamed(model, processor, inputs, task="t2i", generation_mode="image")
    assert [one.num_rows for one in events if isinstance(one, ImageProgress)] == [1, 2, 3, 4, 5, 6]
    assert events[-1] == End("eos")
    picture = next(event.image for event in events if isinstance(event, ImageFinished))
    inputs = processor(text="what color is the square?", images=[picture], task="vqa")
    events = check_streamed(model, processor, inputs, task="vqa", generation_mode="text")
    assert any(isinstance(event, TextPiece) for event in events) and events[-1] == End("eos")


@pytest.mark.parametrize("max_new_tokens", [7, 120])
def test_an_interleaved_answer_of_a_model_streams_what_it_generates(make_tiny_model, tiny_processor, max_new_tokens):
    model = make_tiny_model(token_layout={"size_digits": [1, 1]})
    model.lm_head.weight.data[model.config.token_layout.boi_token_id] *= 4
    inputs = tiny_processor(text="a red fox", task="story")
    settings = {"do_sample": True, "max_new_tokens": max_new_tokens, "generation_mode": "interleaved"}
    events = check_streamed(model, tiny_processor, inputs, **settings)
    assert any(isinstance(event, ImageFinished) for event in events) or max_new_tokens == 7


@pytest.mark.parametrize("num_left", [0, 1, 4, 7])
def test_an_image_that_the_prompt_begins_belongs_to_the_answer(
    shared_tiny_model, tiny_processor, ids_of, tiny_layout, num_left
):
    image = ids_of([[1, 2, 3], [4, 5, 6]])
    prompt = torch.tensor([[*ids_of("bos", "fox", "bss", [[7]]), *image[: len(image) - 1 - num_left]]])
    events = check_streamed(
        shared_tiny_model, tiny_processor, {"input_ids": prompt}, generation_mode="image", max_new_tokens=20
    )
    assert isinstance(events[-2], ImageFinished) and events[-2].complete and events[-2].index == 0
    assert [type(event) for event in events if not isinstance(event, ImageProgress)] == [
        ImageStarted,
        ImageFinished,
        End,
    ]


def test_the_model_stops_in_the_middle_of_an_image(shared_tiny_model, tiny_processor):
    inputs = tiny_processor(text="a red fox", task="t2i")
    settings = {"generation_mode": "image", "height": 64, "width": 64, "max_new_tokens": 400}
    streamer = Emu35Streamer(tiny_processor, max_queue=1, timeout=TIMEOUT)
    events = []
    for event in streamer.run(shared_tiny_model, **inputs, **settings):
        events.append(event)
        if isinstance(event, ImageProgress):
            streamer.stop()
    finished, end = events[-2:]
    assert end == End("stopped") and not finished.complete and 1 <= len(finished.codes) < 16
    assert streamer.output.sequences.shape[1] < inputs["input_ids"].shape[1] + 272
    assert outline(streamer.segments) == [["picture", (finished.codes.tolist(), False, finished.reason)]]


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + TIMEOUT
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def test_events_come_while_the_model_still_writes(tiny_processor, ids_of):
    model = Scripted(ids_of("a red fox" * 20), pause=0.01)
    streamer = Emu35Streamer(tiny_processor, timeout=TIMEOUT)
    seen = []
    for event in streamer.run(model):
        seen.append(event)
        if len(seen) == 1:
            assert model.num_put < len(model.ids) and streamer.output is None
            assert streamer.segments.text == "" or "".join(tiny_processor.decode(model.ids)).startswith(
                streamer.segments.text
            )
        if isinstance(event, End):
            assert streamer.output == "the output"
    assert outline(seen) == [["text", "a red fox" * 20]]
    assert list(streamer) == []


def test_a_slow_reader_makes_the_model_wait_and_misses_progress_only(tiny_processor, ids_of):
    picture = [[1, 2], [3, 4], [5, 6], [7, 8]]
    ids = ids_of(*["a fox ", picture] * 5)
    model = Scripted(ids)
    streamer = Emu35Streamer(tiny_processor, max_queue=3, timeout=TIMEOUT)
    with streamer.run(model) as events:
        time.sleep(0.1)
        assert model.num_put < len(ids) / 2  # it waits
        seen = []
        for event in events:
            assert len(streamer._events) <= 3
            seen.append(event)
            time.sleep(0.002)
    assert outline(seen) == outline(tiny_processor.decode_multimodal(ids))
    assert len([event for event in seen if isinstance(event, ImageStarted)]) == 5
    # What is left of the progress is in order.
    progress = [(event.index, event.num_codes) for event in seen if isinstance(event, ImageProgress)]
    assert len(progress) < 20 and progress == sorted(progress)


def test_progress_never_makes_the_model_wait(tiny_processor, ids_of):
    streamer = Emu35Streamer(tiny_processor, max_queue=2, timeout=0.01)
    for token_id in ids_of([[1, 2, 3]] * 9)[:-1]:
        streamer.put(torch.tensor([token_id]))
    started, progress = streamer._events
    assert isinstance(started, ImageStarted) and progress.num_rows == 9  # the newest
    streamer.close()


@pytest.mark.parametrize("how", ["break", "with", "error", "close", "no reader"])
def test_a_reader_that_leaves_stops_the_model(how, tiny_processor, ids_of):
    model = Scripted(ids_of("a red fox " * 1000))
    streamer = Emu35Streamer(tiny_processor, max_queue=2, timeout=TIMEOUT)
    if how == "error":
        with pytest.raises(ZeroDivisionError), streamer.run(model) as events:
            for _ in events:
                1 / 0  # noqa: B018
    elif how == "with":
        with streamer.run(model) as events:
            next(iter(events))
    elif how == "break":
        for _ in streamer.run(model):
            break
    else:
        streamer.run(model)
        time.sleep(0.05 if how == "no reader" else 0)
        streamer.close()
    assert streamer.stop_requested and not streamer._thread.is_alive()
    assert model.num_put < len(model.ids)
    assert streamer.output == "the output"  # what there was until then
    assert list(streamer) == []
    streamer.close()  # again


def test_after_stop_the_rest_can_be_read(tiny_processor, ids_of):
    streamer = Emu35Streamer(tiny_processor, max_queue=2, timeout=TIMEOUT)
    model = Scripted(ids_of("a red fox " * 1000))
    seen = []
    for event in streamer.run(model):
        seen.append(event)
        if len(seen) == 5:
            streamer.stop()
    assert seen[-1] == End("stopped")
    assert outline(seen) == outline(streamer.segments) != []
    assert model.num_put < len(model.ids)


def test_stop_from_another_thread_frees_a_model_that_waits(tiny_processor, ids_of):
    streamer = Emu35Streamer(tiny_processor, max_queue=1).run(Scripted(ids_of("a red fox " * 1000)))
    time.sleep(0.05)
    streamer.stop()
    streamer._thread.join(TIMEOUT)
    assert not streamer._thread.is_alive()
    assert list(streamer)[-1] == End("stopped")


def test_errors_of_generate_reach_the_reader(tiny_processor, ids_of):
    error = RuntimeError("CUDA out of memory")
    streamer = Emu35Streamer(tiny_processor, timeout=TIMEOUT).run(Scripted(ids_of("a fox"), error=error))
    seen = []
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        for event in streamer:
            seen.append(event)
    assert seen[-1] == End("error", error)
    assert outline(seen) == [["text", "a fox"]] and streamer.segments.text == "a fox"
    assert streamer.output is None


def test_an_error_after_the_reader_has_left_is_the_threads(tiny_processor, ids_of, monkeypatch):
    errors = []
    monkeypatch.setattr(threading, "excepthook", lambda args: errors.append(args.exc_value))
    error = RuntimeError("late")
    streamer = Emu35Streamer(tiny_processor, timeout=TIMEOUT)
    with streamer.run(Scripted(ids_of("a red fox" * 9), pause=0.02, error=error)):
        pass
    assert errors == [error]


def test_wrong_arguments_of_generate_reach_the_reader(shared_tiny_model, tiny_processor):
    inputs = tiny_processor(text="a red fox", task="t2i")
    with pytest.raises(ValueError, match="`guidance_scale`"):
        list(Emu35Streamer(tiny_processor, timeout=TIMEOUT).run(shared_tiny_model, **inputs, guidance_scal=3))


def test_time_limits(tiny_processor, ids_of):
    streamer = Emu35Streamer(tiny_processor, timeout=0.05)
    with pytest.raises(TimeoutError, match=r"nothing to read for `timeout`=0\.05"):
        next(iter(streamer))
    streamer = Emu35Streamer(tiny_processor, max_queue=1, timeout=0.05).run(Scripted(ids_of("a red fox")))
    streamer._thread.join(TIMEOUT)  # nobody reads
    with pytest.raises(TimeoutError, match="nobody has read the streamer's 1 waiting events"):
        list(streamer)


def test_a_model_that_cannot_stop_in_time_is_told(tiny_processor, ids_of, caplog):
    streamer = Emu35Streamer(tiny_processor, timeout=0.02).run(Scripted(ids_of("a"), pause=0.2))
    next(iter(streamer))  # giving up this iterator closes the streamer
    assert "still running after `timeout`=0.02" in caplog.text


def test_one_streamer_serves_one_answer(tiny_processor, ids_of):
    streamer = Emu35Streamer(tiny_processor, timeout=TIMEOUT)
    list(streamer.run(Scripted(ids_of("a"))))
    with pytest.raises(ValueError, match="has been used"):
        streamer.run(Scripted(ids_of("a")))
    with pytest.raises(ValueError, match="got another prompt"):
        streamer.put(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="got a batch of 2"):
        Emu35Streamer(tiny_processor).put(torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"progress_every": "column"},
            '`progress_every` must be "row" or a whole number of at least 1, got',
        ),
        ({"progress_every": 0}, "`progress_every`"),
        ({"max_queue": 0}, "`max_queue` must be a whole number"),
        ({"max_queue": True}, "`max_queue`"),
        ({"max_queue": "row"}, "`max_queue`"),
        ({"timeout": 0}, "`timeout` must be a positive number"),
    ],
)
def test_wrong_arguments(arguments, expected, tiny_processor):
    with pytest.raises(ValueError, match=expected):
        Emu35Streamer(tiny_processor, **arguments)
