"""Robot: a goal and a first picture become sub-tasks with key frames."""

from collections.abc import Sequence

import gradio as gr
import PIL.Image
from emu35.segments_emu35 import Segment

from ..downloads import save_png
from ..engine import Engine
from ..examples import Examples
from ..parts import (
    Link,
    caption,
    choose_by,
    connect,
    connect_stop,
    example_box,
    offer,
    png_button,
    prompt_box,
    run_buttons,
    status_line,
    upload,
    user_of,
)
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
            download = png_button()
            with gr.Accordion("The model's plan, as a thought", open=False):
                thought = gr.Textbox(label="Thought", lines=2, interactive=False)

    def robot(request: gr.Request, prompt: str, image: str | None = None):
        """Sub-tasks towards a goal, each with a picture of what it leads to."""
        images = [read_image(image, engine.settings)] if image else []
        user, made_with = user_of(request), engine.made_with("vla")
        for update in engine.tell(prompt, images, task="vla", user=user):
            frames, thought = read_plan(update.segments)
            shown = [(shown_file(frame), caption(said, frame)) for frame, said in frames]
            files = []
            if update.is_last and frames:
                # The sub-task stands in the file as its prompt; the seed is that of the whole plan.
                made = [
                    save_png(frame, user, prompt=said, seed=update.seed, goal=prompt, **made_with)
                    for frame, said in frames
                ]
                files = [*(None for _ in images), *map(str, made)]
            first = [(shown_file(image), "first picture") for image in images]
            yield [*first, *shown], thought, offer(files[-1] if files else None), files, update

    files = gr.State([], time_to_live=engine.settings.delete_after)
    link = Link("robot", {"prompt": prompt})
    connect(
        [run.click, prompt.submit],
        robot,
        [prompt, image],
        [strip, thought, download, files, status],
        stop,
        api_name="robot",
        link=link,
    )
    choose_by(strip, files, download)
    connect_stop(engine, stop)
    return link


def read_plan(segments: Sequence[Segment]) -> tuple[list[tuple[PIL.Image.Image, str]], str]:
    """Key frames with their sub-tasks, and the thought."""
    frames, words, thoughts = [], "", []
    for segment in segments:
        if segment.kind == "text":
            words += segment.text
        elif segment.kind != "image":
            thoughts.append(segment.text.strip())
        elif segment.image is not None:
            frames.append((segment.image, words.strip()))
            words = ""
    return frames, "\n".join(thoughts)
