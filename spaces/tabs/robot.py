"""Robot: a goal and a first picture become sub-tasks with key frames."""

from collections.abc import Sequence

import gradio as gr
from emu35.segments_emu35 import Segment

from ..engine import Engine
from ..examples import Examples
from ..parts import Link, connect, connect_stop, example_box, prompt_box, run_buttons, status_line, upload, user_of
from ..shown import shown_file
from ..uploads import read_image


def build(engine: Engine, examples: Examples) -> Link:
    """Lays the tab out and connects it."""
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            image = upload("What the robot sees first", height=220)
            prompt = prompt_box(engine, "Goal", "What is to be done")
            run, stop = run_buttons("Plan")
            example_box(examples.note, examples.robot, [prompt, image], [row[0] for row in examples.robot])
        with gr.Column(scale=7, min_width=300):
            strip = gr.Gallery(
                label="Sub-tasks",
                format="png",
                columns=3,
                height="auto",
                object_fit="contain",
                interactive=False,
                buttons=["fullscreen"],
                elem_classes="pixels stage strip",
            )
            status = status_line()
            with gr.Accordion("The model's plan, as a thought", open=False):
                thought = gr.Textbox(label="Thought", lines=2, interactive=False)

    def robot(request: gr.Request, prompt: str, image: str | None = None):
        """Sub-tasks towards a goal, each with a picture of what it leads to."""
        images = [read_image(image, engine.settings)] if image else []
        for update in engine.tell(prompt, images, task="vla", user=user_of(request)):
            frames, thought = read_plan(update.segments)
            yield [*((shown_file(first), "first picture") for first in images), *frames], thought, update

    link = Link("robot", {"prompt": prompt})
    connect(
        [run.click, prompt.submit],
        robot,
        [prompt, image],
        [strip, thought, status],
        stop,
        api_name="robot",
        link=link,
    )
    connect_stop(engine, stop)
    return link


def read_plan(segments: Sequence[Segment]) -> tuple[list[tuple[str, str]], str]:
    """Files of key frames with their sub-tasks, and the thought."""
    frames, words, thoughts = [], "", []
    for segment in segments:
        if segment.kind == "text":
            words += segment.text
        elif segment.kind != "image":
            thoughts.append(segment.text.strip())
        elif segment.image is not None:
            frames.append((shown_file(segment.image), words.strip()))
            words = ""
    return frames, "\n".join(thoughts)
