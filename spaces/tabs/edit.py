"""Edit: one to three pictures and an instruction become a picture."""

import gradio as gr

from ..downloads import save_png
from ..engine import Engine
from ..examples import Examples
from ..parts import (
    Link,
    connect,
    connect_stop,
    example_box,
    more_pictures,
    offer,
    png_button,
    prompt_box,
    run_buttons,
    settings_box,
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
            image = upload("Picture to edit", height=220)
            image_2, image_3 = more_pictures()
            prompt = prompt_box(engine, "Instruction", "What to change; the pictures count from the first")
            run, stop = run_buttons("Edit")
            labels = [row[0] for row in examples.edit]
            example_box(examples.note, examples.edit, [prompt, image, image_2], labels)
            with gr.Accordion("Settings", open=False):
                settings = settings_box(engine, guidance=engine.guidance_scale("x2i"))
        with gr.Column(scale=7, min_width=300):
            slider = gr.ImageSlider(
                label="Before and after",
                type="filepath",
                format="png",
                interactive=False,
                buttons=["fullscreen"],
                elem_classes="pixels stage",
            )
            status = status_line()
            download = png_button()

    def edit(
        request: gr.Request,
        prompt: str,
        image: str | None = None,
        image_2: str | None = None,
        image_3: str | None = None,
        seed: float | None = None,
        guidance_scale: float | None = None,
        image_decoder: str = "ar",
        num_inference_steps: float | None = None,
    ):
        """A picture made of one to three others: that of before, resized to its size, and the new one."""
        images = [read_image(path, engine.settings) for path in (image, image_2, image_3) if path]
        user = user_of(request)
        updates = engine.edit(
            prompt,
            images,
            seed=seed,
            guidance_scale=guidance_scale,
            image_decoder=image_decoder,
            num_inference_steps=num_inference_steps,
            user=user,
        )
        made_with = engine.made_with("x2i", guidance_scale, image_decoder, num_inference_steps)
        before = None
        for update in updates:
            after = update.images[0] if update.images else None
            pair = None
            if after is not None:
                before = before or images[0].resize(after.size)
                pair = shown_file(before), shown_file(after)
            file = None
            if update.is_last and after is not None:
                file = save_png(after, user, prompt=prompt, seed=update.seed, **made_with)
            yield pair, offer(file), update

    link = Link("edit", {"prompt": prompt, **settings.names()})
    connect(
        [run.click, prompt.submit],
        edit,
        [prompt, image, image_2, image_3, *settings],
        [slider, download, status],
        stop,
        api_name="edit",
        link=link,
    )
    connect_stop(engine, stop)
    return link
