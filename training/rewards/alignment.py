"""Whether images show what was asked for, and one story, by a model that is asked."""

import itertools
import os
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from emu35.processing_emu35 import Emu35Processor
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, PreTrainedModel

from .base import Sample, SampleReward, mean, text_column
from .clip import default_device

_YES = ("yes", " yes", "Yes", " Yes", "YES", " YES")
_NO = ("no", " no", "No", " No", "NO", " NO")


class YesNoJudge:
    """The probability of "yes" by a model that reads images and text: Emu3.5 or any image-text-to-text model.

    Args:
        model (`str`, `os.PathLike` or `PreTrainedModel`): where it is saved, or the model itself; Emu3.5 answers by
            its "vqa" prompt. A policy in training should not judge itself: give a path, or a frozen copy.
        processor (*optional*): of the model, with a chat template; needed when `model` is a model.
        device (`str`, *optional*): default: the current GPU if there is one.
        dtype: of the weights; default: as saved.
    Raises:
        ValueError: if a model comes without its processor.
    """

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel,
        processor: Any = None,
        device: str | None = None,
        dtype: torch.dtype | str = "auto",
    ):
        if not isinstance(model, str | os.PathLike) and processor is None:
            raise ValueError("`processor` is needed when `model` is a model. Or give the path of a checkpoint.")
        self.model, self.processor, self.device, self.dtype = model, processor, device, dtype
        self._answers: tuple[torch.Tensor, torch.Tensor] | None = None

    def load(self) -> None:
        """Raises a ValueError if the tokenizer has no tokens for yes and no."""
        if self._answers is not None:
            return
        if isinstance(self.model, str | os.PathLike):
            path = self.model
            self.processor = self.processor or AutoProcessor.from_pretrained(path)
            model = AutoModelForMultimodalLM.from_pretrained(path, dtype=self.dtype, use_safetensors=True)
            self.model = model.to(self.device or default_device()).eval()
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        yes, no = ({tokenizer.encode(word, add_special_tokens=False)[0] for word in words} for words in (_YES, _NO))
        neither = (yes & no) | {tokenizer.unk_token_id}  # `yes & no`: a space that is a token of its own
        if yes <= neither or no <= neither:
            raise ValueError(
                f"`processor` of a judge must have tokens for yes and no, {type(tokenizer).__name__} cannot tell them "
                "apart by the first token. Take another model."
            )
        self._answers = torch.tensor(sorted(yes - neither)), torch.tensor(sorted(no - neither))

    @torch.no_grad()
    def probability(self, images: Image.Image | Sequence[Image.Image], question: str) -> float:
        """`P(yes) / (P(yes) + P(no))` of the first token of the answer, however the two are spelled."""
        self.load()
        shown = [images] if isinstance(images, Image.Image) else images
        content = [*({"type": "image", "image": image} for image in shown), {"type": "text", "text": question}]
        options = {"task": "vqa"} if isinstance(self.processor, Emu35Processor) else {"add_generation_prompt": True}
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        kept = {"logits_to_keep": 1} if "logits_to_keep" in signature(self.model.forward).parameters else {}
        logits = self.model(**inputs.to(self.model.device, self.model.dtype), **kept).logits[0, -1].float().cpu()
        yes, no = (logits[ids].logsumexp(0) for ids in self._answers)
        return torch.sigmoid(yes - no).item()


class VLMAlignment(SampleReward):
    r"""Whether images show what the prompt says, by a model's answer.  Source: VQAScore (arXiv 2404.01291).

    $$ r = \frac{P(\mathrm{yes})}{P(\mathrm{yes}) + P(\mathrm{no})} $$

    after the question, for each image; the mean over the images of a completion, 0 without one.

    Range: [0, 1].

    Example:
        >>> VLMAlignment(emu35.TINY, question="is there {prompt}?")(["a red ring"], [""], images=[[image]])
        [0.99]

    Args:
        judge ([`YesNoJudge`], `str` or `os.PathLike`): who is asked, or where the model is saved.
        question (`str`): `{prompt}` stands for the text.
        column (`str`, *optional*): where the text stands; default: the prompt.
    Raises:
        ValueError: if `question` has no `{prompt}`.
    """

    name = "vlm_alignment"

    def __init__(
        self,
        judge: YesNoJudge | str | os.PathLike,
        question: str = 'Does this image show "{prompt}"? Answer yes or no.',
        column: str | None = None,
    ):
        if "{prompt}" not in question:
            raise ValueError(
                f"`question` must say where the text of the prompt goes, by {{prompt}}; got {question!r}."
            )
        self.judge, self.question, self.column = _as_judge(judge), question, column
        self.needs = ("images",) if column is None else ("images", column)

    def load(self) -> None:
        self.judge.load()

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        question = self.question.replace("{prompt}", text_column(sample, self.column).strip())
        return mean([self.judge.probability(image, question) for image in sample.images]) if sample.images else 0.0


class VLMConsistency(SampleReward):
    r"""Whether each image of a story goes on from the one before, by a model's answer.  Source: Emu3.5 report
    (arXiv 2510.26583), RL, which has a reward of this kind and does not publish its question.

    $$ r = \frac{1}{n - 1} \sum_{i=1}^{n-1} \frac{P(\mathrm{yes})}{P(\mathrm{yes}) + P(\mathrm{no})} $$

    after the question and the images i and i + 1 of n; 0 with fewer than two. Copies may please the model: mix it with
    [`NarrativeConsistency`], for which they count as nothing.

    Range: [0, 1].

    Example:
        >>> VLMConsistency("emu35")(["tell a story"], [""], images=[[first, second]])
        [0.97]

    Args:
        judge ([`YesNoJudge`], `str` or `os.PathLike`): who is asked, or where the model is saved; reads two images.
        question (`str`): `{prompt}`, if it is there, stands for the prompt.
    """

    name = "vlm_consistency"

    def __init__(
        self,
        judge: YesNoJudge | str | os.PathLike,
        question: str = "Do these two images tell one story, with the same characters in one style? Answer yes or no.",
    ):
        self.judge, self.question = _as_judge(judge), question

    def load(self) -> None:
        self.judge.load()

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        question = self.question.replace("{prompt}", sample.prompt.strip())
        values = [self.judge.probability(pair, question) for pair in itertools.pairwise(sample.images)]
        return mean(values) if values else 0.0


def _as_judge(judge: YesNoJudge | str | os.PathLike) -> YesNoJudge:
    return judge if hasattr(judge, "probability") else YesNoJudge(judge)
