"""Create: a sentence becomes pictures."""

import gradio as gr

from ..downloads import save_png
from ..engine import Engine
from ..examples import Examples
from ..parts import (
    Link,
    connect,
    connect_stop,
    example_box,
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
            example_box(examples.note, [[text] for text in examples.create], prompt)
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
            download = gr.DownloadButton("Download PNG", visible=False, size="md")

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
        for update in updates:
            pictures, download = [shown_file(image) for image in update.images], gr.DownloadButton(visible=False)
            if update.is_last and update.images:
                made_with = {"guidance_scale": guidance_scale, "image_decoder": image_decoder}
                pictures = [
                    str(save_png(image, user, prompt=prompt, seed=update.seed + number, **made_with))
                    for number, image in enumerate(update.images)
                ]
                download = gr.DownloadButton(value=pictures[0], visible=True)
            captioned = [(picture, f"seed {update.seed + number}") for number, picture in enumerate(pictures)]
            yield captioned, download, pictures if update.is_last else [], update

    def choose(chosen: gr.SelectData, files: list[str]):
        """The picture that the button gives: by its place, as a browser's word about files is not to be trusted."""
        return gr.DownloadButton(value=files[chosen.index]) if chosen.index < len(files) else gr.skip()

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
    gallery.select(choose, files, download, queue=False, show_progress="hidden", api_visibility="private")
    connect_stop(engine, stop, public=True)
    return link
