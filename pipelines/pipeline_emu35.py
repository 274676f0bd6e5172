"""Emu3.5 as a diffusers pipeline: images from text, from other images, and completed ones."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.accelerate_utils import apply_forward_hook
from emu35 import Emu35ForConditionalGeneration, Emu35GenerateOutput, Emu35GenerationConfig, Emu35Processor
from emu35.adapters_emu35 import DIDA_ADAPTER, adapter_layers, delete_adapters, load_lora, without_adapters
from emu35.image_processing_emu35 import is_single_image, to_rgb
from emu35.sampling_emu35 import Generators
from emu35.segments_emu35 import pixels_to_pil, read_image
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers.utils.hub import cached_file

from .pipeline_output import Emu35PipelineOutput
from .pipeline_progress import ImageWatcher, StepCallback
from .scheduling_dida import DiDAScheduler

OUTPUT_TYPES = ("pil", "pt", "np", "codes")
#: Folder of a saved pipeline in which each adapter has one of its own.
ADAPTERS = "adapters"
#: Settings of `generate` that the pipeline makes itself.
_OWN_SETTINGS = ("generation_mode", "max_images", "max_new_tokens", "num_return_sequences", "return_dict_in_generate")


class Emu35Pipeline(DiffusionPipeline):
    r"""
    Images with [`Emu35ForConditionalGeneration.generate`], in the form of a diffusers pipeline.

    Args:
        model ([`Emu35ForConditionalGeneration`]): with its vision tokenizer, which stays in float32.
        processor ([`Emu35Processor`]).
        scheduler ([`DiDAScheduler`], *optional*):
            of `image_decoder="dida"`. Default: the one that came with the model or its adapter, else a new one.

    Example:
        >>> pipe = Emu35Pipeline.from_pretrained(emu35.TINY)
        >>> pipe("a red circle", generator=torch.Generator().manual_seed(0)).images[0].save("circle.png")
        >>> pipe("make the circle blue", image="circle.png").images[0]
    """

    model_cpu_offload_seq = "model"
    _optional_components = ["scheduler"]
    _callback_tensor_inputs = ["codes"]

    def __init__(
        self,
        model: Emu35ForConditionalGeneration,
        processor: Emu35Processor,
        scheduler: DiDAScheduler | None = None,
    ):
        super().__init__()
        if scheduler is None and (model.dida_scheduler is not None or model.config.dida_adapted):
            scheduler = model.find_dida_scheduler(None, allow_unadapted=False)
        elif scheduler is None:  # by itself, as the model would also compute its codebook
            scheduler = DiDAScheduler(num_codes=model.config.token_layout.num_visual_tokens)
        self.register_modules(model=model, processor=processor, scheduler=scheduler)
        self._interrupt = False

    # --- loading, saving, moving ---

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "Emu35Pipeline":
        """Loads a saved pipeline, or the checkpoint of a model alone.

        Args:
            pretrained_model_name_or_path:
                a folder, or a repository of the Hub. Without a `model_index.json` it is the checkpoint of a model,
                with its processor; a `scheduler_config.json` in it makes the scheduler.
            kwargs:
                of [`DiffusionPipeline.from_pretrained`], as `dtype=torch.bfloat16`; for a model's checkpoint, of
                [`Emu35ForConditionalGeneration.from_pretrained`]. Components (`model=`, `processor=`, `scheduler=`)
                take the place of those that would be loaded.
        """
        path = pretrained_model_name_or_path
        names = ("cache_dir", "local_files_only", "revision", "token")
        location = {name: kwargs[name] for name in names if name in kwargs}
        if cached_file(path, cls.config_name, _raise_exceptions_for_missing_entries=False, **location) is not None:
            pipe = super().from_pretrained(path, **kwargs)
            if not os.path.isdir(path):  # diffusers downloads the folders of components only
                path = snapshot_download(path, allow_patterns=f"{ADAPTERS}/*", **location)
            pipe._load_adapters(Path(path, ADAPTERS))
            return pipe
        components = {name: kwargs.pop(name, None) for name in ("model", "processor", "scheduler")}
        if "torch_dtype" in kwargs:
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        if components["model"] is None:
            components["model"] = Emu35ForConditionalGeneration.from_pretrained(path, **kwargs).eval()
        if components["processor"] is None:
            components["processor"] = Emu35Processor.from_pretrained(path, **location)
        name = DiDAScheduler.config_name
        if components["scheduler"] is None and cached_file(
            path, name, _raise_exceptions_for_missing_entries=False, **location
        ):
            components["scheduler"] = DiDAScheduler.from_pretrained(path, **location)
        pipe = cls(**components)
        pipe.register_to_config(_name_or_path=str(path))
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "Emu35Pipeline":
        """[`DiffusionPipeline.from_pipe`], which by default leaves the shared components in their dtype."""
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.dtype)
        return super().from_pipe(pipeline, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """[`DiffusionPipeline.save_pretrained`].  Adapters are saved beside the model, not into it.

        These are DiDA's, and those that are active.
        """
        folder = Path(save_directory, ADAPTERS)
        for stale in folder.glob("*/adapter_config.json"):
            shutil.rmtree(stale.parent)
        active = {name for layer in adapter_layers(self.model) for name in layer.active_adapters}
        for name, config in getattr(self.model, "peft_config", {}).items():
            if name in (*active, DIDA_ADAPTER):
                config.save_pretrained(folder / name)
                state = self.model.get_adapter_state_dict(name)
                state = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in state.items()}
                save_file(state, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
            if name == DIDA_ADAPTER:
                self.scheduler.save_pretrained(folder / name)
        with without_adapters(self.model):
            super().save_pretrained(save_directory, **kwargs)  # last, because it may upload the folder

    def to(self, *args, **kwargs) -> "Emu35Pipeline":
        """[`DiffusionPipeline.to`].  What is in float32 for its precision moves, but stays in float32.

        That is the vision tokenizer (rounding would change codes) and the frequencies of the rotary embedding.
        """
        vision_tokenizer, self.model.vision_tokenizer = self.model.vision_tokenizer, None
        buffers = [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        try:
            super().to(*args, **kwargs)
        finally:
            self.model.vision_tokenizer = vision_tokenizer
            for module, name, buffer in buffers:
                setattr(module, name, buffer.to(getattr(module, name).device))
        device = kwargs.get("device", next((one for one in args if not isinstance(one, torch.dtype)), None))
        if vision_tokenizer is not None and device is not None:
            vision_tokenizer.to(device)
        return self

    # --- adapters ---

    def load_dida_adapter(self, folder: str | os.PathLike):
        """Loads a DiDA adapter ([`Emu35ForConditionalGeneration.load_dida_adapter`]) and takes over its scheduler."""
        self.model.load_dida_adapter(folder)
        self.scheduler = self.model.dida_scheduler

    def load_lora_weights(self, folder: str | os.PathLike, adapter_name: str = "default"):
        """Loads a PEFT adapter, see [`load_lora`]."""
        load_lora(self.model, folder, adapter_name)

    def unload_lora_weights(self):
        """Removes all adapters but that of DiDA."""
        names = [name for name in getattr(self.model, "peft_config", {}) if name != DIDA_ADAPTER]
        if names:
            delete_adapters(self.model, names)

    def _load_adapters(self, folder: Path):
        """Those that [`save_pretrained`] has saved."""
        names = sorted(one.name for one in folder.glob("*/"))
        if DIDA_ADAPTER in names:
            self.load_dida_adapter(folder / DIDA_ADAPTER)
            names.remove(DIDA_ADAPTER)
        for name in names:
            self.load_lora_weights(folder / name, name)
        if names:
            self.model.set_adapter(names)

    # --- the call ---

    @property
    def interrupt(self) -> bool:
        """Whether the call that runs shall end; set `pipe._interrupt = True` in a callback or another thread."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float | None:
        """Of the last call; `None`: no guidance."""
        return self._config.guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Denoising steps an image of the last call."""
        return self._config.num_inference_steps

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Any = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        image_temperature: float | None = None,
        image_top_k: int | None = None,
        image_top_p: float | None = None,
        image_decoder: Literal["ar", "speculative", "dida"] | None = None,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        generator: Generators = None,
        output_type: Literal["pil", "pt", "np", "codes"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
        allow_unadapted: bool = False,
        **settings: Any,
    ) -> Emu35PipelineOutput | tuple:
        """Makes images.

        Settings that are `None` are the checkpoint's own, for the task "t2i" or, with `image`, "x2i".

        Args:
            prompt (`str` or `list[str]`): what to make.
            image (*optional*):
                what to make it from: an image or, for one prompt, a list of several; for a list of prompts, a list
                with an image or a list of images for each.
            mask_image (*optional*):
                for completion: a mask of `image`, which is then no reference but the picture itself, one for all
                prompts or a list with one for each. What is white (or above 0.5, or `True`) is made anew, all other
                codes are kept. A PIL image, array or tensor `(H, W)` of the image's size, which must be a multiple of
                the pixels a code has.
            height, width (`int`), aspect_ratio (`str`): see [`Emu35GenerationConfig`].
            num_inference_steps (`int`): denoising steps of `image_decoder="dida"`.
            guidance_scale, image_guidance_scale, image_temperature, image_top_k, image_top_p:
                see [`Emu35GenerationConfig`].
            image_decoder (`str`):
                "ar", "speculative" or "dida". Default: "dida" where the model is adapted to it, else the checkpoint's.
            num_images_per_prompt (`int`).
            batch_size (`int`, *optional*): images made at a time. Default: all.
            generator (`torch.Generator`, or a list with one an image):
                with one an image, an image does not depend on the others of its batch.
            output_type (`str`): see [`Emu35PipelineOutput`].
            return_dict (`bool`): `False`: a tuple, of which the images are the first.
            callback_on_step_end (`Callable`, *optional*):
                `callback(pipe, step, t, {"codes": codes})`, after every denoising step; with the other decoders, after
                every row of codes. `t` is the time at which the step began, 0 to 1. `codes` `(images, h, w)` are those
                of the images being made (images of different sizes are made one after the other), -1 where there is
                none yet; a copy, which cannot be replaced. With `pipe._interrupt = True` it ends the call.
            callback_on_step_end_tensor_inputs (`list[str]`): which tensors it gets; there is only "codes".
            allow_unadapted (`bool`): whether "dida" may run without an adapter.
            settings: other fields of [`Emu35GenerationConfig`].
        Raises:
            TypeError, ValueError: for arguments that don't exist, don't fit together or don't fit the model; before
                any pass.
        """
        started = time.perf_counter()
        prompts = [prompt] if isinstance(prompt, str) else prompt
        task = "t2i" if image is None or mask_image is not None else "x2i"
        explicit = {
            "height": height,
            "width": width,
            "aspect_ratio": aspect_ratio,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "image_guidance_scale": image_guidance_scale,
            "image_temperature": image_temperature,
            "image_top_k": image_top_k,
            "image_top_p": image_top_p,
            "image_decoder": image_decoder,
        }
        settings |= {name: value for name, value in explicit.items() if value is not None}
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        counts = {"num_images_per_prompt": num_images_per_prompt, "batch_size": batch_size}
        self._check_inputs(prompts, counts, generator, output_type, callback_on_step_end_tensor_inputs)
        foreign = [name for name in _OWN_SETTINGS if name in settings]
        if foreign:
            raise ValueError(f"`{foreign[0]}` is not for the pipeline. Use `model.generate`, or leave it out.")
        self._check_images(prompt, image, mask_image, settings)
        settings["generation_mode"] = "image"
        if image_decoder is None and (
            self.model.config.dida_adapted or DIDA_ADAPTER in getattr(self.model, "peft_config", {})
        ):
            settings["image_decoder"] = "dida"
        self._config = self._checked_config(task, settings)

        # An item for each prompt; for one prompt, `image` may be a list of images.
        references = None if task == "t2i" else [image] if isinstance(prompt, str) else image
        inputs = self.processor(text=list(prompts), images=references, task=task)
        # Once, not for every copy and batch. As in `generate`, offloading must bring the model in first.
        inputs = apply_forward_hook(lambda model: model.resolve_image_tokens(**inputs))(self.model)
        given = self._given(image, mask_image, len(prompts))
        is_dida = self._config.image_decoder == "dida"
        if is_dida:
            settings |= {"scheduler": self.scheduler, "allow_unadapted": allow_unadapted}

        rows = [row for row in range(len(prompts)) for _ in range(num_images_per_prompt)]
        batch_size = len(rows) if batch_size is None else batch_size
        self._interrupt = False
        codes, images, num_passes = [], [], 0
        with self.progress_bar(total=0) as bar:
            watcher = ImageWatcher(self, bar, len(rows), callback_on_step_end, callback_on_step_end_tensor_inputs)
            for start in range(0, len(rows), batch_size):
                part = slice(start, start + batch_size)
                watcher.begin(len(rows[part]))
                output = self.model.generate(
                    **{name: tensor[rows[part]] for name, tensor in inputs.items()},
                    **{name: [one[row] for row in rows[part]] for name, one in given.items()},
                    task=task,
                    generator=generator[part] if isinstance(generator, Sequence) else generator,
                    return_dict_in_generate=True,
                    **watcher.arguments(is_dida),
                    **settings,
                )
                num_passes += output.num_forward_passes
                for grid, picture in self._images_of(output, watcher):
                    codes.append(grid)
                    images.append(picture)
                if self.interrupt:
                    break
            watcher.end()
        for _ in rows[len(codes) :]:
            codes.append(torch.zeros(0, 0, dtype=torch.long))
            images.append(None)
        self.maybe_free_model_hooks()
        seconds = time.perf_counter() - started
        result = Emu35PipelineOutput(_convert(images, codes, output_type), codes, num_passes, seconds)
        return result if return_dict else result.to_tuple()

    def _checked_config(self, task: str, settings: dict[str, Any]) -> Emu35GenerationConfig:
        """What `generate` will make of the settings.  Raises what it would raise."""
        config = Emu35GenerationConfig().overridden_by(self.model.generation_config).with_settings(task, **settings)
        self.model._check_config(config)
        if config.aspect_ratio != "reference":
            self.model._grid([], config)
        if "num_inference_steps" in settings and config.image_decoder != "dida":
            raise ValueError(
                "`num_inference_steps` is the number of denoising steps of `image_decoder`='dida', but this call uses "
                f"{config.image_decoder!r}. Leave it out, or load an adapter first (`load_dida_adapter`)."
            )
        return config

    def _check_inputs(
        self,
        prompts: Any,
        counts: dict[str, int | None],
        generator: Generators,
        output_type: str,
        tensor_inputs: Sequence[str],
    ):
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(one, str) for one in prompts):
            raise ValueError(f"`prompt` must be a string or a list of strings that is not empty, got {prompts!r}.")
        for name, value in counts.items():
            optional = name == "batch_size" and value is None
            if not optional and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        wanted = len(prompts) * counts["num_images_per_prompt"]
        if isinstance(generator, Sequence) and len(generator) != wanted:
            raise ValueError(
                f"`generator` has {len(generator)} generators for {wanted} images ({len(prompts)} prompts, "
                f"`num_images_per_prompt`={counts['num_images_per_prompt']}). Give one for all, or one each."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        if output_type != "codes" and self.model.vision_tokenizer is None:
            raise ValueError(
                f"`output_type`={output_type!r} needs a vision tokenizer, and the model has none. Use 'codes', or "
                "load it with one: `from_pretrained(..., vision_tokenizer=DIRECTORY)`."
            )
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may have {self._callback_tensor_inputs}, got {unknown}."
            )

    def _check_images(self, prompt: str | Sequence[str], image: Any, mask_image: Any, settings: dict[str, Any]):
        several = not isinstance(prompt, str)
        if mask_image is not None:
            if image is None:
                raise ValueError("`mask_image` needs the `image` that it is a mask of.")
            sizes = [name for name in ("height", "width", "aspect_ratio") if name in settings]
            if sizes:
                raise ValueError(f"`mask_image` completes an image in its own size. Leave out {', '.join(sizes)}.")
            num_prompts = len(prompt) if several else 1
            for name, value in (("image", image), ("mask_image", mask_image)):
                if isinstance(value, (list, tuple)) and len(value) != num_prompts:
                    raise ValueError(
                        f"`{name}` has {len(value)} items for {num_prompts} prompts. Give one for all, or one each."
                    )
        elif image is not None and several:
            many = hasattr(image, "__len__") and not is_single_image(image)
            if many and len(image) == len(prompt):
                return
            got = f"{len(image)} items" if many else "one image" if is_single_image(image) else type(image).__name__
            raise ValueError(
                f"`prompt` is a list of {len(prompt)}, so `image` must be a list with an image or a list of images "
                f"for each, got {got}."
            )

    def _given(self, image: Any, mask_image: Any, num_prompts: int) -> dict[str, list[torch.Tensor]]:
        """`image` and `mask` of `generate`, in codes, one a prompt; nothing where no image is completed."""
        if mask_image is None:
            return {}
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        masks = list(mask_image) if isinstance(mask_image, (list, tuple)) else [mask_image]
        pixels = [_to_pixels(one, f"image[{index}]", self.model.image_factor) for index, one in enumerate(images)]
        masks = [_to_mask(one, f"mask_image[{index}]", self.model.image_factor) for index, one in enumerate(masks)]
        codes = apply_forward_hook(lambda model: model.encode_image(pixels))(self.model)
        return {
            name: items * num_prompts if len(items) == 1 else items
            for name, items in (("image", [grid.cpu() for grid in codes]), ("mask", masks))
        }

    def _images_of(
        self, output: Emu35GenerateOutput, watcher: "ImageWatcher"
    ) -> Iterator[tuple[torch.LongTensor, PIL.Image.Image | None]]:
        """Codes and pixels of each image, as far as it goes."""
        made = output.images or [[] for _ in output.sequences]
        for ids, start, pictures in zip(output.sequences.tolist(), output.answer_start.tolist(), made, strict=True):
            image, _ = read_image(ids, start, self.processor.token_layout)
            codes, picture = image.codes, next(iter(pictures), None)
            if not image.complete:
                codes = watcher.codes_of(image.size, codes)
                if codes.numel() and self.model.vision_tokenizer is not None:
                    picture = pixels_to_pil(self.model.decode_image([codes])[0])
            yield codes, picture


def _to_pixels(image: Any, name: str, factor: int) -> torch.Tensor:
    """Pixels `(3, H, W)` in [-1, 1] of an image to complete, which keeps its size."""
    image = to_rgb(image, name)
    if image.width % factor or image.height % factor:
        raise ValueError(
            f"`{name}` has {image.height}*{image.width} pixels; to be completed, both must be multiples of {factor}, "
            "the pixels a side of one code. Resize or crop it."
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def _to_mask(mask: Any, name: str, factor: int) -> torch.BoolTensor:
    """Codes `(h, w)` that have a pixel to make anew."""
    if isinstance(mask, PIL.Image.Image):
        mask = np.array(mask.convert("L")) / 255
    mask = torch.as_tensor(mask)
    if mask.ndim != 2 or 0 in mask.shape or any(side % factor for side in mask.shape):
        raise ValueError(
            f"`{name}` must be a PIL image, array or tensor (height, width) of the image's size, a multiple of "
            f"{factor}, got the shape {tuple(mask.shape)}."
        )
    return F.max_pool2d((mask > 0.5).float()[None], factor)[0] > 0


def _convert(images: list[PIL.Image.Image | None], codes: list[torch.LongTensor], output_type: str) -> Any:
    """The `images` of an [`Emu35PipelineOutput`]."""
    if output_type == "pil":
        return images
    if output_type == "codes":
        items = codes
    else:
        items = [None if image is None else np.array(image).astype(np.float32) / 255 for image in images]
        if output_type == "pt":
            items = [None if item is None else torch.from_numpy(item).permute(2, 0, 1) for item in items]
    shapes = {None if item is None else tuple(item.shape) for item in items}
    if len(shapes) > 1 or None in shapes:
        return items
    return np.stack(items) if output_type == "np" else torch.stack(items)


# `DiffusionPipeline.from_pretrained` looks the class that a saved pipeline names up there, and has no register.
diffusers.Emu35Pipeline = Emu35Pipeline

__all__ = ["Emu35Pipeline"]
