"""Tell and show: stories and guides, text and pictures by turns."""

import gradio as gr

from ..dialogue import shown_messages, user_message
from ..downloads import save_story
from ..engine import Engine
from ..examples import Examples
from ..parts import (
    Link,
    chat_box,
    connect,
    connect_stop,
    example_box,
    prompt_box,
    run_buttons,
    settings_box,
    status_line,
    upload,
    user_of,
)

KINDS = [("Story", "story"), ("Step-by-step guide", "howto")]


def build(engine: Engine, examples: Examples) -> Link:
    """Lays the tab out and connects it."""
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            task = gr.Radio(KINDS, value="story", label="Kind")
            prompt = prompt_box(engine, "Prompt", "What to tell, or what to explain")
            run, stop = run_buttons("Tell and show")
            example_box(examples.note, examples.tell, [task, prompt], [row[1] for row in examples.tell])
            with gr.Accordion("Picture to begin from", open=False):
                image = upload("First picture", height=200)
            with gr.Accordion("Settings", open=False):
                settings = settings_box(engine)
        with gr.Column(scale=7, min_width=300):
            chat = chat_box("The answer comes as text and pictures by turns. Thoughts are folded away.")
            status = status_line()
            with gr.Row():
                page = gr.DownloadButton("Download page", visible=False, size="md")
                video = gr.DownloadButton("Download video", visible=False, size="md")

    def tell(
        request: gr.Request,
        prompt: str,
        task: str = "story",
        seed: float | None = None,
        image_decoder: str = "ar",
        num_inference_steps: float | None = None,
        image: str | None = None,
    ):
        """A story or a guide, as text and pictures by turns."""
        said = user_message(prompt, [image], engine.settings)
        user = user_of(request)
        updates = engine.tell(
            [said],
            task=task,
            seed=seed,
            image_decoder=image_decoder,
            num_inference_steps=num_inference_steps,
            user=user,
        )
        hidden = gr.DownloadButton(visible=False)
        for update in updates:
            answer = {"role": "assistant", "content": update.segments}
            shown = shown_messages([said, answer], running=not update.is_last)
            files = []
            if update.is_last and update.segments.images:
                files = save_story(update.segments, user, prompt=prompt)
            buttons = [gr.DownloadButton(value=file, visible=True) for file in files]
            yield shown, *(*buttons, hidden, hidden)[:2], update

    controls = {"prompt": prompt, "task": task, **settings.names()}
    link = Link("tell", controls)
    connect(
        [run.click, prompt.submit],
        tell,
        [*controls.values(), image],
        [chat, page, video, status],
        stop,
        api_name="tell",
        link=link,
    )
    connect_stop(engine, stop)
    return link
