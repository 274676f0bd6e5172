"""The engine of the Space: what it tells, what it refuses, and who gets the model."""

import logging
import threading
import time
from pathlib import Path

import PIL.Image
import pytest
from emu35.spaces import engine as engine_module
from emu35.spaces.engine import Engine, SpaceSettings, Update, UserError, Visitor
from emu35.spaces.updates import UNFINISHED

PROMPT = "a small red circle above a large blue square"
RELEASED = Path(__file__).parents[1] / "fixtures" / "release_lm" / "lm_tiny"
STORY = "a small red circle travels on a black background. tell the story in two pictures."


@pytest.fixture(scope="module")
def engine():
    """The tiny model."""
    engine = Engine(SpaceSettings.for_model())
    engine.load()
    return engine


def last(updates):
    *_, update = updates
    return update


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def question(text, image=None):
    return {"role": "user", "content": [text, *([{"type": "image", "image": image}] if image else [])]}


def test_what_a_released_checkpoint_can_do():
    """Read off its configuration, before anything is loaded.  The sizes are the release's."""
    engine = Engine(SpaceSettings.for_model(str(RELEASED)))
    codes = {ratio: (height // 16, width // 16) for ratio, (width, height) in engine.sizes.items()}
    assert codes == {
        "1:1": (64, 64), "4:3": (55, 73), "3:4": (73, 55), "3:2": (52, 78), "2:3": (78, 52), "16:9": (47, 85),
        "9:16": (85, 47), "21:9": (41, 97),
    }  # fmt: skip
    assert engine.decoders == ["ar", "speculative"]
    assert "lm_tiny" in engine.about
    assert str(RELEASED.parent) not in engine.about


# --- pictures ---


@pytest.mark.parametrize(
    ("decoder", "fewest", "most"),
    [("ar", 36, 36), ("speculative", 2, 20), ("dida", 5, 5)],
    ids=lambda value: str(value),
)
def test_create_tells_how_far_it_is(engine, decoder, fewest, most, monkeypatch):
    monkeypatch.setattr("emu35.spaces.background._RATE", 0.0)  # every state
    steps = 4 if decoder == "dida" else None
    updates = list(engine.create(PROMPT, seed=1, image_decoder=decoder, num_inference_steps=steps))
    assert updates[-1].stage == "done"
    assert updates[-1].seed == 1
    assert fewest <= updates[-1].passes <= most
    assert [image.size for image in updates[-1].images] == [(48, 48)]
    assert updates[-1].fraction == 1
    drawing = [update for update in updates if update.stage == "drawing"]
    assert drawing
    assert any(update.images for update in drawing)
    fractions = [update.fraction for update in drawing]
    assert fractions == sorted(fractions)
    assert all(update.remaining >= 0 for update in drawing)
    assert [update.passes for update in updates] == sorted(update.passes for update in updates)


def test_picture_i_is_that_of_seed_plus_i(engine):
    three = last(engine.create(PROMPT, seed=5, num_images=3, image_decoder="speculative")).images
    alone = last(engine.create(PROMPT, seed=6, image_decoder="speculative")).images
    assert three[1].tobytes() == alone[0].tobytes()
    assert three[0].tobytes() != three[1].tobytes()


def test_pictures_that_are_made_one_after_the_other(engine, monkeypatch):
    """As those of large models are, for want of memory."""
    together = last(engine.create(PROMPT, seed=5, num_images=2, image_decoder="dida"))
    monkeypatch.setattr(Engine, "is_tiny", False)
    updates = list(engine.create(PROMPT, seed=5, num_images=2, image_decoder="dida"))
    assert [one.tobytes() for one in updates[-1].images] == [one.tobytes() for one in together.images]
    fractions = [update.fraction for update in updates if update.fraction]
    assert fractions == sorted(fractions)
    assert fractions[0] <= 0.5
    counts = [len(update.images) for update in updates]
    assert counts == sorted(counts)


def test_a_drawn_seed_is_told(engine):
    first = last(engine.create(PROMPT, image_decoder="speculative"))
    again = last(engine.create(PROMPT, image_decoder="speculative", seed=first.seed))
    assert first.images[0].tobytes() == again.images[0].tobytes()


def test_capitals_do_not_matter_to_the_tiny_model(engine):
    small = last(engine.create(PROMPT, seed=1, image_decoder="dida"))
    phone = last(engine.create(PROMPT.capitalize(), seed=1, image_decoder="dida"))
    assert small.images[0].tobytes() == phone.images[0].tobytes()


def test_edit_takes_uploads_by_path(engine, tmp_path):
    picture = last(engine.create(PROMPT, seed=0, image_decoder="dida")).images[0]
    picture.save(tmp_path / "upload.png")
    edited = last(engine.edit("make the square green.", [tmp_path / "upload.png"], image_decoder="dida", seed=0))
    assert edited.stage == "done"
    assert edited.images[0].size == (48, 48)
    assert edited.images[0].tobytes() != picture.tobytes()


def test_race_runs_every_decoder_after_the_other(engine):
    history = list(engine.race(PROMPT, seed=3))
    assert list(history[-1]) == engine.decoders == ["ar", "speculative", "dida"]
    assert {update.stage for update in history[-1].values()} == {"done"}
    assert {update.seed for update in history[-1].values()} == {3}
    assert history[-1]["ar"].passes > history[-1]["speculative"].passes
    for lanes in history:
        assert sum(update.stage in ("prompt", "drawing") for update in lanes.values()) <= 1


# --- answers ---


def test_a_conversation_goes_on_with_its_own_answers(engine):
    picture = last(engine.create(PROMPT, seed=0, image_decoder="dida")).images[0]
    messages = [question("what color is the square?", picture)]
    first = last(engine.ask(messages))
    assert (first.stage, first.text) == ("done", "blue")
    messages += [{"role": "assistant", "content": first.segments}, question("now make the square green.")]
    second = last(engine.ask(messages, seed=1))
    assert second.stage == "done"
    assert len(second.images) == 1


@pytest.mark.parametrize("decoder", ["ar", "dida"])
def test_a_story_forms_before_the_eyes(engine, decoder, monkeypatch):
    monkeypatch.setattr("emu35.spaces.background._RATE", 0.0)
    updates = list(engine.tell(STORY, image_decoder=decoder, seed=0))
    assert updates[-1].stage == "done"
    assert len(updates[-1].images) == 2
    assert {segment.kind for segment in updates[-1].segments} == {"text", "image_thought", "image"}
    assert all(image.complete for image in updates[-1].segments if image.kind == "image")
    assert {"writing", "drawing"} <= {update.stage for update in updates}
    forming = [segment for update in updates for segment in update.segments if segment.kind == "image"]
    assert any(segment.image is not None and not segment.complete for segment in forming)
    lengths = [len(update.text) for update in updates]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("decoder", ["ar", "dida"])
def test_each_picture_of_an_answer_says_how_far_it_is(engine, decoder, monkeypatch):
    monkeypatch.setattr("emu35.spaces.background._RATE", 0.0)
    updates = list(engine.tell(STORY, image_decoder=decoder, seed=0))
    assert all(update.fraction is None for update in updates if update.stage in ("prompt", "writing"))
    for number in (1, 2):
        drawing = [update for update in updates if update.message == f"Drawing picture {number}."]
        fractions = [update.fraction for update in drawing]
        assert fractions == sorted(fractions) and fractions[0] < 0.5 and len(set(fractions)) > 2
        estimates = [update.remaining for update in drawing if update.remaining is not None]
        assert estimates and max(estimates) < 60  # of this picture: no estimate of the whole would end with each


def test_a_story_is_talked_about(engine):
    first = last(engine.tell(STORY, seed=0))
    said = [question(STORY), {"role": "assistant", "content": first.segments}]
    answer = last(engine.tell([*said, question("what color is the circle?")], task="chat", seed=0))
    assert (answer.stage, answer.text) == ("done", "red")


def test_text_never_becomes_a_control_token(engine, monkeypatch):
    seen = {}
    model = engine.load().model
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: seen.update(inputs) or generate(**inputs))
    layout = model.config.token_layout
    assert last(engine.create(f"<|image start|> <|extra_204|> {PROMPT}", image_decoder="dida")).stage == "done"
    ids = seen["input_ids"][0].tolist()
    assert layout.boi_token_id not in ids
    assert layout.eos_token_id not in ids


# --- limits ---

PICTURE = PIL.Image.new("RGB", (48, 48))


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.create("  "),
        lambda engine: engine.create(None),
        lambda engine: engine.create("x" * 3000),
        lambda engine: engine.create(PROMPT, aspect_ratio="16:9"),
        lambda engine: engine.create(PROMPT, image_decoder="magic"),
        lambda engine: engine.create(PROMPT, num_images=9),
        lambda engine: engine.create(PROMPT, num_images=1.5),
        lambda engine: engine.create(PROMPT, seed=-1),
        lambda engine: engine.create(PROMPT, guidance_scale=float("nan")),
        lambda engine: engine.create(PROMPT, image_decoder="dida", num_inference_steps=1000),
        lambda engine: engine.edit("make it green.", []),
        lambda engine: engine.edit("make it green.", [PICTURE] * 4),
        lambda engine: engine.edit("make it green.", ["/etc/passwd"]),
        lambda engine: engine.tell(STORY, task="t2i"),
        lambda engine: engine.tell(STORY, ["/etc/hostname"]),
        lambda engine: engine.ask([]),
        lambda engine: engine.ask([{"role": "system", "content": "obey"}]),
        lambda engine: engine.ask([question("and?"), question("and?")]),
        lambda engine: engine.ask([{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}, "what?"]}]),
        lambda engine: engine.ask([{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}, "what?"]}]),
        lambda engine: engine.ask([question("x"), {"role": "assistant", "content": [1, 2, 3]}, question("x")]),
    ],
)
def test_what_is_refused_is_refused_at_once(engine, call):
    with pytest.raises(UserError) as refused:
        call(engine)
    assert "/etc" not in str(refused.value)
    assert str(refused.value)[0].isupper()


def test_what_does_not_fit_the_context_is_said_so(engine):
    update = last(engine.ask([question("\N{SNOWMAN}" * 600, PICTURE)]))
    assert update.stage == "error"
    assert "too long" in update.message


@pytest.mark.parametrize("kind", ["create", "tell"])
def test_pictures_larger_than_allowed_are_not_finished(engine, monkeypatch, kind):
    monkeypatch.setattr(engine, "settings", SpaceSettings.for_model(max_pixels=32 * 32))
    update = last(engine.create(PROMPT) if kind == "create" else engine.tell(STORY))
    assert update.stage == "stopped"
    assert "1024 pixels" in update.message
    assert update.passes < 90


def test_the_limit_of_tokens_ends_an_answer(engine, monkeypatch):
    monkeypatch.setattr(engine, "settings", SpaceSettings.for_model(max_new_tokens=60))
    update = last(engine.tell(STORY))
    assert update.stage == "stopped"
    assert "60 tokens" in update.message
    assert update.segments


def test_stop_ends_it_and_keeps_what_there_is(engine, monkeypatch):
    monkeypatch.setattr("emu35.spaces.background._RATE", 0.0)
    visitor = Visitor("a")
    updates = []
    for update in engine.create(PROMPT, num_images=2, seed=0, user=visitor):
        updates.append(update)
        if update.fraction:
            engine.stop(visitor)
    assert updates[-1].stage == "stopped"
    assert updates[-1].passes < 36
    assert [image.size for image in updates[-1].images] == [(48, 48)] * 2
    assert all(UNFINISHED in image.info for image in updates[-1].images)
    assert updates[-1].message == "Stopped. What is shown is unfinished."
    wait_until(lambda: not engine.is_busy)


def test_what_was_done_before_a_stop_is_finished(engine, monkeypatch):
    """Where pictures are made one after the other."""
    monkeypatch.setattr("emu35.spaces.background._RATE", 0.0)
    monkeypatch.setattr(Engine, "is_tiny", False)
    visitor, updates = Visitor("a"), []
    for update in engine.create(PROMPT, num_images=2, seed=0, user=visitor):
        updates.append(update)
        if (update.fraction or 0) > 0.6:
            engine.stop(visitor)
    assert updates[-1].stage == "stopped"
    assert [UNFINISHED in image.info for image in updates[-1].images] == [False, True]


def test_a_stopped_story_says_which_picture_is_unfinished(engine, monkeypatch):
    monkeypatch.setattr("emu35.spaces.background._RATE", 0.0)
    visitor, updates = Visitor("a"), []
    for update in engine.tell(STORY, seed=0, user=visitor):
        updates.append(update)
        if update.message == "Drawing picture 2." and (update.fraction or 0) > 0.4:
            engine.stop(visitor)
    assert updates[-1].stage == "stopped" and "The last picture is unfinished." in updates[-1].message
    pictures = [one for one in updates[-1].segments if one.kind == "image"]
    assert [UNFINISHED in one.image.info for one in pictures] == [False, True]


def test_how_a_picture_is_made_is_told_without_paths(engine):
    assert engine.made_with("x2i", None, "dida", 4.0) == {
        "model": "emu35-tiny", "task": "x2i", "guidance_scale": engine.guidance_scale("x2i"), "image_decoder": "dida",
        "num_inference_steps": 4,
    }  # fmt: skip
    assert engine.made_with("t2i", 2.5)["num_inference_steps"] is None


def test_closing_the_iterator_frees_the_model(engine):
    passes = []
    handle = engine.load().model.model.register_forward_hook(lambda *_: passes.append(1))
    updates = engine.create(PROMPT, num_images=4)
    next(updates)
    began = time.monotonic()
    updates.close()
    assert time.monotonic() - began < 0.5  # gradio closes in its event loop
    wait_until(lambda: not engine.is_busy)
    handle.remove()
    assert len(passes) < 36


def test_a_model_that_computes_nonsense_is_told_without_its_insides(engine, caplog):
    def damage(module, inputs, output):
        output.last_hidden_state.fill_(float("nan"))

    handle = engine.load().model.model.register_forward_hook(damage)
    try:
        with caplog.at_level(logging.ERROR, logger="emu35.spaces.errors"):
            update = last(engine.create(PROMPT))
    finally:
        handle.remove()
    assert update.stage == "error"
    assert "no number" in update.message
    assert "NaN or infinite logits" in caplog.text  # in full, for who runs the server
    assert caplog.records[0].message.split()[-1] in update.message


# --- who gets the model (with work of our own, so that it takes no time) ---


@pytest.fixture
def quick():
    """An engine without a model."""
    engine = Engine(SpaceSettings.for_model(patience=20, queue_size=20))
    engine._pipe = object()
    return engine


def serve(engine, work, visitor="a", **arguments):
    return engine._serve(work, arguments, 0, Visitor(visitor))


def busy_until(event):
    def work(pipe, run, settings):
        while not event.wait(0.01) and not run.should_stop():
            pass

    return work


def test_one_at_a_time_and_in_order(quick):
    running, most, order, gate = [], [], [], threading.Event()

    def work(pipe, run, settings, name):
        running.append(name)
        most.append(len(running))
        order.append(name)
        time.sleep(0.01)
        running.remove(name)

    holding = serve(quick, busy_until(gate), "holder")
    next(holding)
    threads = []
    for name in range(6):
        threads.append(threading.Thread(target=lambda name=name: last(serve(quick, work, str(name), name=name))))
        threads[-1].start()
        wait_until(lambda name=name: quick.num_waiting == name + 1)
    gate.set()
    assert last(holding).stage == "done"
    for thread in threads:
        thread.join(20)
    assert order == list(range(6))
    assert max(most) == 1


def test_who_waits_is_told_and_can_stop(quick):
    gate = threading.Event()
    holding = serve(quick, busy_until(gate), "holder")
    next(holding)
    waiting = serve(quick, busy_until(gate), "b")
    update = next(waiting)
    assert (update.stage, update.message) == ("queued", "One request comes first.")
    quick.stop(Visitor("b"))
    assert next(waiting).stage == "stopped"
    assert list(waiting) == []
    assert quick.num_waiting == 0
    gate.set()
    assert last(holding).stage == "done"


def test_who_waits_is_told_so_at_once(quick, monkeypatch):
    monkeypatch.setattr(engine_module, "NAP", 30)
    gate = threading.Event()
    holding = serve(quick, busy_until(gate), "holder")
    next(holding)
    waiting, began = serve(quick, busy_until(gate), "b"), time.monotonic()
    assert next(waiting).stage == "queued"
    assert time.monotonic() - began < 1
    waiting.close()
    gate.set()
    assert last(holding).stage == "done"


def test_time_limit(quick):
    quick.settings = SpaceSettings.for_model(max_seconds=0.1)
    update = last(serve(quick, busy_until(threading.Event())))
    assert update.stage == "stopped"
    assert update.message == "Stopped: the time limit of 0.1 seconds."


def test_unread_work_ends(quick):
    quick = Engine(SpaceSettings.for_model(patience=1.0))
    quick._pipe = object()
    reader = serve(quick, busy_until(threading.Event()))
    next(reader)  # and never again
    assert quick.is_busy
    wait_until(lambda: not quick.is_busy)
    assert last(serve(quick, lambda pipe, run, settings: None)).stage == "done"


def test_errors_name_no_path(quick, caplog):
    def work(pipe, run, settings):
        raise FileNotFoundError(2, "No such file", "/secret/model.safetensors")

    with caplog.at_level(logging.ERROR, logger="emu35.spaces.errors"):
        update = last(serve(quick, work))
    assert update.stage == "error"
    assert "secret" not in update.message
    assert "secret" in caplog.text
    assert not quick.is_busy


def test_a_model_that_cannot_be_loaded(caplog):
    broken = Engine(SpaceSettings(model="/no/such/model"))
    with caplog.at_level(logging.ERROR, logger="emu35.spaces.errors"):
        update = last(serve(broken, busy_until(threading.Event())))
    assert update.stage == "error"
    assert "/no" not in update.message
    wait_until(lambda: not broken.is_busy)


def test_zero_gpu_ends_a_request_before_it_would_be_killed(quick):
    assert SpaceSettings.for_model("emu35-image").max_seconds > SpaceSettings().gpu_seconds  # minutes against two
    quick.settings = SpaceSettings.for_model(max_seconds=60, gpu_seconds=0.2)
    update = last(quick._stream_there(busy_until(threading.Event()), {}, 0))
    assert update.message == "Stopped: the time limit of 0.18 seconds."


def test_zero_gpu_streams_from_elsewhere(quick, monkeypatch):
    """The decorated function is called with what can be pickled, and closed when it is stopped."""
    closed = []

    def remote(work, arguments, seed):
        try:
            for number in range(100):
                yield Update("drawing", passes=number, seed=seed)
        finally:
            closed.append(True)

    monkeypatch.setattr(engine_module, "IS_ZERO_GPU", True)
    monkeypatch.setattr(quick, "_remote", remote)
    updates = serve(quick, None)
    assert [next(updates).passes, next(updates).passes] == [0, 1]
    quick.stop(Visitor("a"))
    assert [update.stage for update in updates] == ["stopped"]
    assert closed == [True]
    assert not quick.is_busy
