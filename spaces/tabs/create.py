"""Create: a sentence becomes pictures."""

import gradio as gr

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
    settings_box,
    status_line,
    user_of,
)
from ..shown import shown_file


def build(engine: Engine, examples: Examples) -> Link:
    """Lays the tab out and connects it."""
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            prompt = prompt_box(engine, "Prompt", "What the picture shows")
            run, stop = run_buttons("Create")
            example_box(examples.note, [[text] for text in examples.create], [prompt], examples.create)
            with gr.Accordion("Settings", open=False):
                ratios = engine.aspect_ratios
                aspect_ratio = gr.Radio(ratios, value=ratios[0], label="Aspect ratio", interactive=len(ratios) > 1)
                num_images = gr.Slider(1, engine.settings.max_images, value=1, step=1, label="Pictures")
                settings = settings_box(engine, guidance=engine.guidance_scale("t2i"))
        with gr.Column(scale=7, min_width=300):
            gallery = gr.Gallery(
                label="Pictures",
                format="png",
                columns=2,
                height="auto",
                object_fit="contain",
                interactive=False,
                buttons=["fullscreen"],
                elem_classes="pixels stage",
            )
            status = status_line()
            download = png_button()

    files = gr.State([])

    def create(
        request: gr.Request,
        prompt: str,
        aspect_ratio: str,
        num_images: float,
        seed: float | None = None,
        guidance_scale: float | None = None,
        image_decoder: str = "ar",
        num_inference_steps: float | None = None,
    ):
        """Pictures of a sentence, shown while they form; as PNG files that hold prompt and seed."""
        user = user_of(request)
        updates = engine.create(
            prompt,
            aspect_ratio=aspect_ratio,
            num_images=num_images,
            seed=seed,
            guidance_scale=guidance_scale,
            image_decoder=image_decoder,
            num_inference_steps=num_inference_steps,
            user=user,
        )
        made_with = engine.made_with("t2i", guidance_scale, image_decoder, num_inference_steps)
        for update in updates:
            pictures, files = [shown_file(image) for image in update.images], []
            if update.is_last:
                files = pictures = [
                    str(save_png(image, user, prompt=prompt, seed=update.seed + number, **made_with))
                    for number, image in enumerate(update.images)
                ]
            captions = [caption(f"seed {update.seed + number}", image) for number, image in enumerate(update.images)]
            yield list(zip(pictures, captions, strict=True)), offer(files[0] if files else None), files, update

    controls = {"prompt": prompt, "ratio": aspect_ratio, "n": num_images, **settings.names()}
    link = Link("create", controls)
    connect(
        [run.click, prompt.submit],
        create,
        list(controls.values()),
        [gallery, download, files, status],
        stop,
        api_name="create",
        link=link,
    )
    choose_by(gallery, files, download)
    connect_stop(engine, stop, public=True)
    return link
