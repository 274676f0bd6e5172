"""From token ids back to text and images: the half of the processor that reads what the model wrote."""

from typing import Any

import numpy as np
import PIL.Image
import torch

from .configuration_emu35 import Emu35TokenLayout
from .segments_emu35 import Segments, decode_images, iter_images, parse_segments, pixels_to_pil, read_image

#: A visual token as a string, in the release's vocabulary and in `decode`.
VISUAL_TOKEN = "<|visual token {:06d}|>"


class Emu35OutputMixin:
    """Decoding, for a processor that has a `tokenizer` and a `token_layout`."""

    tokenizer: Any
    token_layout: Emu35TokenLayout

    def decode_multimodal(
        self, ids: Any, vision_tokenizer: Any = None, skip_special_tokens: bool = True, skip_prompt: bool = False
    ) -> Segments:
        """One sequence of ids as [`Segments`]: [`Text`], [`GlobalThought`], [`ImageThought`], [`Image`].

        An image that is unfinished or damaged is reported (`complete=False`, `reason`, the rows there are), and
        nothing around it is lost.

        Args:
            ids: one sequence: a list of ints or a tensor `(length,)`.
            vision_tokenizer (*optional*):
                fills in `Image.image`: the model, its vision tokenizer, or a function from codes `(1, h, w)` to pixels
                `(1, 3, H, W)` in [-1, 1]. Without it images are codes only.
            skip_special_tokens (`bool`):
                whether control tokens out of place are left out of texts. `False` writes them out, like the release.
            skip_prompt (`bool`): whether to leave out the prompt, if there is one: all up to the last BSS.
        Raises:
            ValueError: if `ids` is not one sequence, or has an id outside the vocabulary.
        """
        row = self._row(ids)
        if skip_prompt:
            row = self._without_prompt(row)
        segments = parse_segments(
            row, self.token_layout, lambda run: self.decode(run, skip_special_tokens=skip_special_tokens)
        )
        segments.ids = row
        if vision_tokenizer is not None:
            decode_images(segments, vision_tokenizer)
        return segments

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        vision_tokenizer: Any = None,
        skip_special_tokens: bool = True,
        skip_prompt: bool = True,
        generation_mode: str | None = "interleaved",
        **kwargs,
    ) -> list[Segments] | list[str] | list[PIL.Image.Image]:
        """What [`generate`] returned, row by row.

        Args:
            generated_outputs:
                a tensor `(batch, length)` of ids, or what `generate` returned: `sequences`, perhaps `answer_start` and
                perhaps `images` (for every row, or in one flat list, those of all complete images of the answers).
            vision_tokenizer, skip_special_tokens, skip_prompt: see [`decode_multimodal`].
            generation_mode (`str`, *optional*):
                "interleaved": segments.  "text" or `None` (so transformers' pipelines call it): strings, prompt
                included, images left out.  "image": pixels, as the model's `decode_image_tokens` returns them, to PIL.
        Returns:
            one [`Segments`], one string or one image per row.
        """
        if generation_mode not in ("interleaved", "text", "image", None):
            raise ValueError(f'`generation_mode` must be "interleaved", "text" or "image", got {generation_mode!r}.')
        if generation_mode == "image":
            return [pixels_to_pil(pixels) for pixels in generated_outputs]
        images = getattr(generated_outputs, "images", None)
        starts = getattr(generated_outputs, "answer_start", None)
        rows = to_list(getattr(generated_outputs, "sequences", generated_outputs))
        if rows and isinstance(rows[0], int):
            rows = [rows]
        if generation_mode != "interleaved":
            return [self._text_of(row, skip_special_tokens, **kwargs) for row in rows]
        if kwargs:
            raise TypeError(f"post_process_multimodal_output got unknown arguments: {sorted(kwargs)}.")
        # Pictures belong to the answers, so they can be handed out only where the prompts are left out.
        images = images if skip_prompt else None
        if skip_prompt and starts is not None:
            rows = [row[start:] for row, start in zip(rows, to_list(starts), strict=True)]
            skip_prompt = False
        results = [self.decode_multimodal(row, None, skip_special_tokens, skip_prompt) for row in rows]
        if images is not None:
            _attach(results, images)
        if vision_tokenizer is not None:
            for segments in results:
                decode_images(segments, vision_tokenizer)
        return results

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs) -> list[str]:
        """The text of every row, prompt included, images left out."""
        return self.post_process_multimodal_output(
            generated_outputs, skip_special_tokens=skip_special_tokens, generation_mode="text", **kwargs
        )

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:
        """Ids as a string, visual tokens as `<|visual token 000000|>` (left out with `skip_special_tokens`).

        For reading; [`decode_multimodal`] is what turns ids into text and images. A batch gives a list of strings.
        """
        ids = to_list(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and not isinstance(ids[0], int):
            return [self.decode(row, skip_special_tokens, **kwargs) for row in ids]
        parts: list[str] = []
        run: list[int] = []
        layout = self.token_layout
        for token_id in [*self._row(ids), None]:
            if token_id is not None and token_id < layout.visual_token_offset:
                run.append(token_id)
                continue
            if run:
                parts.append(self.tokenizer.decode(run, skip_special_tokens=skip_special_tokens, **kwargs))
                run = []
            if token_id is not None and not skip_special_tokens:
                parts.append(VISUAL_TOKEN.format(token_id - layout.visual_token_offset))
        return "".join(parts)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs) -> list[str]:
        """[`decode`] of every row."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in to_list(sequences)]

    def _text_of(self, ids: list[int], skip_special_tokens: bool, **kwargs) -> str:
        if not skip_special_tokens:
            return self.decode(ids, **kwargs)
        kept, position = [], 0
        while position < len(ids):
            if ids[position] == self.token_layout.boi_token_id:
                position = read_image(ids, position, self.token_layout)[1]
            else:
                kept.append(ids[position])
                position += 1
        return self.decode(kept, skip_special_tokens=True, **kwargs)

    def _without_prompt(self, ids: list[int]) -> list[int]:
        layout = self.token_layout
        if layout.bos_token_id not in ids or layout.bss_token_id not in ids:
            return ids  # generated tokens only
        return ids[len(ids) - ids[::-1].index(layout.bss_token_id) :]

    def _row(self, ids: Any) -> list[int]:
        row = to_list(ids)
        if not isinstance(row, list) or any(not isinstance(token_id, int) for token_id in row):
            raise ValueError("`ids` must be one sequence of ints. For a batch use `post_process_multimodal_output`.")
        end = max(self.token_layout.visual_token_end, len(self.tokenizer))
        bad = [token_id for token_id in row if not 0 <= token_id < end]
        if bad:
            raise ValueError(f"`ids` holds {bad[0]}, outside the vocabulary [0, {end}).")
        return row


def to_list(ids: Any) -> Any:
    if isinstance(ids, (torch.Tensor, np.ndarray, np.integer)):
        return ids.tolist()
    if isinstance(ids, (list, tuple)):
        return [to_list(item) for item in ids]
    return ids


def _attach(results: list[Segments], images: Any) -> None:
    """Gives the pictures that came with an output to the complete images, in order."""
    images = list(images)
    if len(images) == len(results) and all(isinstance(row, (list, tuple)) for row in images):
        groups = [(iter_images(segments), row) for segments, row in zip(results, images, strict=True)]
    else:
        groups = [([image for segments in results for image in iter_images(segments)], images)]
    for targets, pictures in groups:
        targets = [image for image in targets if image.complete]
        if len(targets) != len(pictures):
            raise ValueError(
                f"the output has {len(pictures)} images, but its sequences hold {len(targets)} complete ones."
            )
        for target, picture in zip(targets, pictures, strict=True):
            target.image = pixels_to_pil(picture)


__all__ = ["Emu35OutputMixin"]
