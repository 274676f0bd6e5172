"""Pictures of a sentence, or of other pictures, by the pipeline."""

from collections.abc import Iterable, Sequence
from typing import Any

import PIL.Image
import torch
from emu35.pipelines import Emu35Pipeline
from emu35.segments_emu35 import pixels_to_pil

from .background import Run
from .checks import UNLIMITED, check_length
from .settings import SpaceSettings
from .updates import UNFINISHED


@torch.no_grad()
def draw(pipe: Emu35Pipeline, run: Run, settings: SpaceSettings, **arguments: Any):
    """Makes pictures, and shows them while they form.

    Args:
        arguments: of the pipeline. Picture i has the seed of the run + i, so that it can be made again alone.
    """
    prompt, image = arguments["prompt"], arguments.get("image")
    task = "t2i" if image is None else "x2i"
    inputs = pipe.processor(text=prompt, images=image, task=task, max_length=UNLIMITED)
    check_length(inputs["input_ids"], pipe.model, settings)
    number = arguments.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(run.seed + index) for index in range(number)]
    done: list[PIL.Image.Image] = []  # those of earlier batches
    grid = (0, 0)

    def follow(pipe: Emu35Pipeline, step: int, t: float, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal grid
        codes = tensors["codes"]
        grid = codes.shape[1:]
        if grid.numel() * pipe.model.image_factor**2 > settings.max_pixels:
            run.stop(f"Stopped: the model began a picture of more than {settings.max_pixels} pixels.")
        num_steps = pipe.num_timesteps if arguments["image_decoder"] == "dida" else grid[0]
        fraction = (len(done) + len(codes) * (step + 1) / num_steps) / number
        run.show(stage="drawing", fraction=fraction, message="Drawing.")

        def preview() -> dict[str, Any]:
            forming = _decode(pipe, codes, grid)
            if step + 1 == num_steps:
                done.extend(forming)
                return {"images": list(done)}
            return {"images": [*done, *forming]}

        run.show_sometimes(preview, force=step + 1 == num_steps)
        return tensors

    def after_pass(*_: Any):
        run.count_pass()
        # The pipeline's own switch, so that it ends within a row of codes, too.
        pipe._interrupt = pipe._interrupt or run.should_stop()

    handle = pipe.model.model.register_forward_hook(after_pass)
    try:
        output = pipe(**arguments, generator=generators, callback_on_step_end=follow)
    finally:
        handle.remove()
    images = output.images
    if run.reason:  # some have fewer rows, or none
        images = _decode(pipe, [codes for codes in output.codes if codes.numel()], grid)
        for image in images[len(done) :]:
            image.info[UNFINISHED] = True
        if len(images) > len(done):
            run.reason += " What is shown is unfinished."
    run.show(images=images, passes=output.num_forward_passes)


def _decode(pipe: Emu35Pipeline, grids: Iterable[torch.LongTensor], size: Sequence[int]) -> list[PIL.Image.Image]:
    """Pictures of grids of codes `(rows, width)` as if they had `size`.  Each missing row repeats the one above."""
    whole = []
    for codes in grids:
        rows = int((codes >= 0).all(1).sum())
        whole.append(torch.cat([codes[:rows], codes[rows - 1 : rows].expand(size[0] - rows, -1)]))
    return [pixels_to_pil(pixels) for pixels in pipe.model.decode_image(whole)] if whole else []


__all__ = ["draw"]
