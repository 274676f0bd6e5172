"""The model behind a Space: requests in, updates out, one generation at a time.

    create, edit, race ─► checks ─► queue (`turns`) ─► a thread (`background`) ─► Emu35Pipeline ─► updates
    ask, tell          ─► checks ─►        "       ─►          "              ─► streaming generate ─► updates

What can be refused is refused when a method is called, with a [`UserError`]. The iterators it returns raise no more
than that; what goes wrong later is an [`Update`] with the stage "error". Closing an iterator, or [`Engine.stop`], ends
the generation at its next pass through the model.
"""

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from math import ceil, gcd
from pathlib import Path
from typing import Any, TypeVar

import PIL.Image
import torch
from emu35 import Emu35Config, Emu35GenerationConfig
from emu35.cli_tools_emu35 import find_device, load
from emu35.generation_configuration_emu35 import grid_for_aspect_ratio
from emu35.pipelines import Emu35Pipeline
from emu35.prompts_emu35 import TASK_TEMPLATES

from .answering import answer
from .background import Run, updates_of
from .checks import check_images, check_messages, check_number, check_prompt
from .drawing import draw
from .errors import UserError
from .settings import SpaceSettings
from .turns import NAP, Turn, TurnQueue, Visitor
from .updates import Update
from .zero_gpu import IS_ZERO_GPU, on_gpu

T = TypeVar("T")
#: Something to do with the model: `work(pipe, run, settings, **arguments)`.
Work = Callable[..., None]

#: Width to height, of pictures to make; the release's list.
ASPECT_RATIOS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9")
#: Tasks of [`Engine.tell`].
TELLING = ("story", "howto", "explore", "vla", "chat")
_ANYBODY = Visitor()
_MAX_SEED = 2**31 - 1
_MAX_GUIDANCE = 20.0
#: Of its time on ZeroGPU, after which a request ends with what there is. At the end it would be killed.
_SHARE = 0.9


class Engine:
    """A model that serves one request after the other.

    Args:
        settings ([`SpaceSettings`]).

    Example:
        >>> engine = Engine(SpaceSettings.from_environment())
        >>> for update in engine.create("a red cross on a black background"):
        ...     print(update)
        >>> update.images[0].save("cross.png")
    """

    def __init__(self, settings: SpaceSettings):
        self.settings = settings
        self._queue = TurnQueue(settings.queue_size, settings.requests_per_user, settings.patience)
        self._loading = threading.Lock()
        self._pipe: Emu35Pipeline | None = None
        self._remote = on_gpu(self._stream_there, min(ceil(settings.max_seconds / _SHARE), settings.gpu_seconds))

    # --- what there is ---

    @property
    def is_tiny(self) -> bool:
        """Whether the model is the tiny one that is shipped."""
        return self.settings.is_tiny

    @property
    def is_loaded(self) -> bool:
        return self._pipe is not None

    @property
    def is_busy(self) -> bool:
        """Whether the model is in use."""
        return self._queue.is_busy

    @property
    def num_waiting(self) -> int:
        """Requests that wait for the model."""
        return len(self._queue)

    @cached_property
    def decoders(self) -> list[str]:
        """Image decoders that can be chosen."""
        can_dida = self.settings.dida_adapter is not None or self._config.dida_adapted
        return ["ar", "speculative", *(["dida"] if can_dida else [])]

    @cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Width and height in pixels of each aspect ratio."""
        vision, defaults = self._config.vision_tokenizer_config, self._defaults
        if defaults.height is not None:  # a model of one size
            return {_ratio(defaults.width, defaults.height): (defaults.width, defaults.height)}
        factor = 16 if vision is None else vision.downsampling_factor
        area = min(defaults.image_area, self.settings.max_pixels)
        grids = {ratio: grid_for_aspect_ratio(ratio, area, factor) for ratio in ASPECT_RATIOS}
        return {ratio: (width * factor, height * factor) for ratio, (height, width) in grids.items()}

    @property
    def aspect_ratios(self) -> list[str]:
        return list(self.sizes)

    def guidance_scale(self, task: str) -> float:
        """The checkpoint's own for a task."""
        return self._defaults.with_settings(task).guidance_scale or 1.0

    def made_with(
        self, task: str, guidance_scale: float | None = None, image_decoder: str = "ar", steps: float | None = None
    ) -> dict[str, Any]:
        """How a picture is made, beside prompt and seed, for whoever wants to make it again."""
        return {
            "model": Path(self.settings.model).name,
            "task": task,
            "guidance_scale": self.guidance_scale(task) if guidance_scale is None else guidance_scale,
            "image_decoder": image_decoder,
            "num_inference_steps": int(steps or self.settings.num_inference_steps)
            if image_decoder == "dida"
            else None,
        }

    @cached_property
    def about(self) -> str:
        """What runs here, in a sentence."""
        where = torch.cuda.get_device_name() if find_device("auto") == "cuda" and not IS_ZERO_GPU else "a CPU"
        where = "ZeroGPU" if IS_ZERO_GPU else where
        if self.is_tiny:
            width, height = next(iter(self.sizes.values()))
            return (
                f"This is the tiny model, which knows coloured shapes in pictures of {width} x {height} pixels, on "
                f"{where}. The released model has the same architecture, 5000 times larger."
            )
        quantised = f", in {self.settings.load_in}" if self.settings.load_in else ""
        return f"This is {Path(self.settings.model).name}{quantised}, on {where}."

    @cached_property
    def _config(self) -> Emu35Config:
        return Emu35Config.from_pretrained(self.settings.model)

    @cached_property
    def _defaults(self) -> Emu35GenerationConfig:
        try:
            return Emu35GenerationConfig.from_pretrained(self.settings.model)
        except OSError:
            return Emu35GenerationConfig()

    def load(self) -> Emu35Pipeline:
        """Loads the model, once; the others wait for it."""
        with self._loading:
            if self._pipe is None:
                settings = self.settings
                device = "cuda" if IS_ZERO_GPU else "auto"
                model, processor = load(
                    settings.model, device, load_in=settings.load_in, vision_tokenizer=settings.vision_tokenizer
                )
                if settings.dida_adapter is not None:
                    model.load_dida_adapter(settings.dida_adapter)
                # References are made no larger than what may be made of them.
                own = processor.image_area
                processor.image_area = {
                    task: min(own if isinstance(own, int) else template.image_area, settings.max_pixels)
                    for task, template in TASK_TEMPLATES.items()
                }
                self._pipe = Emu35Pipeline(model, processor)
                self._pipe.set_progress_bar_config(disable=True)
            return self._pipe

    # --- requests ---

    def create(
        self,
        prompt: str,
        *,
        aspect_ratio: str | None = None,
        seed: int | None = None,
        guidance_scale: float | None = None,
        image_decoder: str = "ar",
        num_inference_steps: int | None = None,
        num_images: int = 1,
        user: Visitor = _ANYBODY,
    ) -> Iterator[Update]:
        """Pictures of a sentence.

        Args:
            aspect_ratio (`str`, *optional*): one of [`aspect_ratios`]; default: the first.
            seed (`int`, *optional*): picture i is made with `seed` + i; default: drawn.
            guidance_scale (`float`, *optional*): 1: none; default: the checkpoint's.
            image_decoder (`str`): one of [`decoders`].
            num_inference_steps (`int`, *optional*): denoising steps of "dida".
            num_images (`int`): at once.
            user ([`Visitor`]): whose request it is.
        Raises:
            UserError: if it is refused.
        """
        arguments = self._drawing(prompt, guidance_scale, image_decoder, num_inference_steps)
        if aspect_ratio is not None and aspect_ratio not in self.sizes:
            raise UserError(f"There is no aspect ratio {aspect_ratio!r}. Choose one of {', '.join(self.sizes)}.")
        width, height = self.sizes[aspect_ratio or self.aspect_ratios[0]]
        limits = self.settings
        arguments |= {"height": height, "width": width}
        arguments["num_images_per_prompt"] = check_number("images", num_images, 1, limits.max_images, whole=True)
        arguments["batch_size"] = None if self.is_tiny else 1  # memory
        return self._serve(draw, arguments, self._seed(seed), user)

    def edit(
        self,
        prompt: str,
        images: Sequence[PIL.Image.Image | str | Path],
        *,
        seed: int | None = None,
        guidance_scale: float | None = None,
        image_decoder: str = "ar",
        num_inference_steps: int | None = None,
        user: Visitor = _ANYBODY,
    ) -> Iterator[Update]:
        """A picture made of one to three others.

        Args:
            images: pictures, or the paths of uploads, which are checked.
            seed, guidance_scale, image_decoder, num_inference_steps, user: see [`create`].
        Raises:
            UserError: if it is refused.
        """
        arguments = self._drawing(prompt, guidance_scale, image_decoder, num_inference_steps)
        arguments["image"] = check_images(images, self.settings, at_least=1)
        return self._serve(draw, arguments, self._seed(seed), user)

    def ask(self, messages: Sequence[dict], *, seed: int | None = None, user: Visitor = _ANYBODY) -> Iterator[Update]:
        """The next answer of a conversation about images; it may draw one.

        Args:
            messages:
                `{"role": "user", "content": [text, {"type": "image", "image": PIL}, ...]}` and, by turns,
                `{"role": "assistant", "content": segments}` with the `segments` of the last [`Update`].
            seed, user: see [`create`].
        Raises:
            UserError: if it is refused.
        """
        messages = check_messages(messages, self.settings)
        has_image = any(isinstance(part, dict) for part in messages[0]["content"])
        # Single questions are what "vqa" was trained on; it can only answer.
        task = "vqa" if len(messages) == 1 and has_image else "chat"
        return self._serve(answer, {"messages": messages, "task": task}, self._seed(seed), user)

    def tell(
        self,
        messages: str | Sequence[dict],
        images: Sequence[PIL.Image.Image | str | Path] = (),
        *,
        task: str = "story",
        seed: int | None = None,
        guidance_scale: float | None = None,
        image_decoder: str = "ar",
        num_inference_steps: int | None = None,
        user: Visitor = _ANYBODY,
    ) -> Iterator[Update]:
        """An answer of text and images: a story, a plan, the next view of a walk, the sub-tasks of a robot.

        Args:
            messages: a prompt, or a conversation as for [`ask`].
            images: what the prompt shows; for a conversation they stand in its messages.
            task (`str`): "story", "howto", "explore" or "vla"; "chat": whatever the conversation leads to.
            seed, guidance_scale, image_decoder, num_inference_steps, user: see [`create`].
        Raises:
            UserError: if it is refused.
        """
        if task not in TELLING:
            raise UserError(f"There is no task {task!r}. Choose one of {', '.join(TELLING)}.")
        settings = self._decoding(guidance_scale, image_decoder, num_inference_steps)
        if isinstance(messages, str):
            shown = check_images(images, self.settings)
            content = [messages, *({"type": "image", "image": image} for image in shown)]
            messages = [{"role": "user", "content": content}]
        messages = check_messages(messages, self.settings)
        arguments = {"messages": messages, "task": task, **settings}
        return self._serve(answer, arguments, self._seed(seed), user)

    def race(self, prompt: str, *, seed: int | None = None, user: Visitor = _ANYBODY) -> Iterator[dict[str, Update]]:
        """The same picture by every decoder, one after the other, so that each has the model to itself.

        Yields:
            `dict[str, Update]`: of each decoder; those whose turn has not come are "queued".
        Raises:
            UserError: if it is refused.
        """
        seed = self._seed(seed)
        steps = self.settings.num_inference_steps
        runners = {
            name: self._drawing(prompt, None, name, steps if name == "dida" else None) for name in self.decoders
        }
        return self._in_turn(
            user,
            seed,
            lambda turn: self._race(turn, runners, seed),
            lambda update: dict.fromkeys(runners, update),
        )

    def stop(self, user: Visitor):
        """Ends what the user has waiting or running."""
        self._queue.stop(user)

    # --- checks ---

    def _seed(self, seed: int | None) -> int:
        if seed is None:
            return secrets.randbelow(_MAX_SEED)
        return check_number("seed", seed, 0, _MAX_SEED, whole=True)

    def _decoding(self, guidance_scale: float | None, image_decoder: str, steps: int | None) -> dict[str, Any]:
        """Settings of `generate` for making images."""
        if image_decoder not in self.decoders:
            raise UserError(f"There is no decoder {image_decoder!r} here. Choose one of {', '.join(self.decoders)}.")
        settings: dict[str, Any] = {"image_decoder": image_decoder}
        if image_decoder == "dida":
            steps = self.settings.num_inference_steps if steps is None else steps
            settings["num_inference_steps"] = check_number("steps", steps, 1, self.settings.max_steps, whole=True)
        if guidance_scale is not None:
            settings["guidance_scale"] = check_number("guidance", guidance_scale, 0, _MAX_GUIDANCE)
        return settings

    def _drawing(self, prompt: str, *decoding: Any) -> dict[str, Any]:
        return {"prompt": check_prompt(prompt, self.settings), **self._decoding(*decoding)}

    # --- work ---

    def _serve(self, work: Work, arguments: dict[str, Any], seed: int, user: Visitor) -> Iterator[Update]:
        return self._in_turn(user, seed, lambda turn: self._stream(turn, work, arguments, seed), lambda update: update)

    def _in_turn(
        self, user: Visitor, seed: int, serve: Callable[[Turn], Iterator[T]], told_as: Callable[[Update], T]
    ) -> Iterator[T]:
        """Waits for the model, and then serves."""
        turn = self._queue.join(user)
        try:
            nap = 0.0  # who has to wait is told so at once
            while not turn.wait(nap):
                nap = NAP
                if turn.stopped.is_set():
                    yield told_as(Update("stopped", message="Stopped.", seed=seed))
                    return
                number = turn.num_before
                message = "One request comes first." if number == 1 else f"{number} requests come first."
                yield told_as(Update("queued", message=message, seed=seed))
            with closing(serve(turn)) as told:
                for one in told:
                    turn.touch()
                    yield one
        finally:
            turn.release()

    def _race(self, turn: Turn, runners: dict[str, dict[str, Any]], seed: int) -> Iterator[dict[str, Update]]:
        updates = dict.fromkeys(runners, Update(message="Waits for the others.", seed=seed))
        for name, arguments in runners.items():
            for update in self._stream(turn, draw, arguments, seed):
                updates = updates | {name: update}
                yield updates
            if update.stage != "done":
                rest = Update("stopped", message="Was not begun.", seed=seed)
                yield {name: one if one.is_last else rest for name, one in updates.items()}
                return

    def _stream(self, turn: Turn, work: Work, arguments: dict[str, Any], seed: int) -> Iterator[Update]:
        if not IS_ZERO_GPU:
            yield from self._stream_here(work, arguments, seed, turn.stopped, turn)
            return
        self.load()  # before the other process is made
        with closing(self._remote(work, arguments, seed)) as updates:
            for update in updates:
                yield update
                if turn.stopped.is_set() and not update.is_last:
                    yield replace(update, stage="stopped", message="Stopped.", remaining=None)
                    return

    def _stream_there(self, work: Work, arguments: dict[str, Any], seed: int) -> Iterator[Update]:
        settings = self.settings
        seconds = min(settings.max_seconds, _SHARE * settings.gpu_seconds)
        yield from self._stream_here(work, arguments, seed, threading.Event(), seconds=seconds)

    def _stream_here(
        self,
        work: Work,
        arguments: dict[str, Any],
        seed: int,
        stopped: threading.Event,
        turn: Turn | None = None,
        seconds: float | None = None,
    ) -> Iterator[Update]:
        def target(run: Run):
            if not self.is_loaded:
                run.show(message="Loading the model.")
                self.load()
                run.restart()
            work(self.load(), run, self.settings, **arguments)

        run = Run(seed, stopped, seconds or self.settings.max_seconds, self.settings.patience)
        if turn is not None:
            turn.hold()  # until the thread has ended, which may be after its reader has gone
        return updates_of(target, run, on_end=turn.release if turn is not None else lambda: None)


def _ratio(width: int, height: int) -> str:
    return f"{width // gcd(width, height)}:{height // gcd(width, height)}"


__all__ = ["ASPECT_RATIOS", "TELLING", "Engine", "SpaceSettings", "Update", "UserError", "Visitor"]
