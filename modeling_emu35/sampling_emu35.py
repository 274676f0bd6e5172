"""From logits to tokens: guidance, temperature, top-k, top-p, and the draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: One for a batch, or one a row (`None` there: the row needs no draw).
Generators = torch.Generator | Sequence[torch.Generator | None] | None


@dataclass(frozen=True)
class Sampler:
    """How one token is drawn from logits.  Order: temperature, top-k, top-p (the release's).

    Args:
        do_sample (`bool`): `False`: the most likely token.
        temperature (`float`), top_k (`int`), top_p (`float`): `None` (or 0 for top-k, 1 for the others): off.
    """

    do_sample: bool = True
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def probabilities(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The distribution that is sampled from.

        Args:
            logits (`torch.Tensor` of shape `(..., n)`).
        Returns:
            probabilities `(..., k)`, and their columns `(..., k)` in `logits` (`None`: all, in order).
        """
        values, columns = logits.float(), None
        if self.temperature is not None:  # the largest becomes 0, so that the smallest temperatures overflow nothing
            values = (values - values.amax(-1, keepdim=True)) / max(self.temperature, torch.finfo(values.dtype).tiny)
        has_top_p = self.top_p is not None and self.top_p < 1
        if self.top_k and self.top_k < values.shape[-1]:
            values, columns = values.topk(self.top_k)  # sorted, so top-p needs no sort of its own
            probabilities = values.softmax(-1)
        elif has_top_p:
            probabilities, columns = _likeliest(values, self.top_p)
        else:
            probabilities = values.softmax(-1)
        if has_top_p:
            before = probabilities.cumsum(-1) - probabilities  # 0 for the first, so one always stays
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities, columns

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.top_k == 1

    def distribution(self, logits: torch.Tensor) -> torch.Tensor:
        """The same over all columns: `(..., n)`, like `logits`. Greedy: one column has it all."""
        if self.is_greedy:
            return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        probabilities, columns = self.probabilities(logits)
        if columns is None:
            return probabilities
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, columns, probabilities)

    def __call__(self, logits: torch.Tensor, generator: Generators = None) -> torch.LongTensor:
        """Draws one column a row.

        Args:
            logits (`torch.Tensor` of shape `(batch, n)`).
            generator: one for the batch, or one a row (then a row's draws don't depend on the batch it is in).
        Returns:
            `torch.LongTensor` of shape `(batch,)`.
        """
        if self.is_greedy:
            return logits.argmax(-1)
        probabilities, columns = self.probabilities(logits)
        choice = draw(probabilities, uniform(len(logits), generator, logits.device))
        return choice if columns is None else columns.gather(-1, choice[:, None])[:, 0]


def _likeliest(logits: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest probabilities `(..., k)`, in falling order, and their columns; k such that they hold `mass`.

    A CPU takes 9 ms to sort 131,072 columns and a tenth of that to find the largest thousand, which are enough more
    often than not. A GPU sorts fast, and asking it whether they are enough would keep it waiting.
    """
    probabilities, count = logits.softmax(-1), 1024
    while logits.device.type == "cpu" and 4 * count <= logits.shape[-1]:
        values, columns = probabilities.topk(count)
        held = float(values.sum(-1).min())
        if held >= mass:
            return values, columns
        if held < mass / 2:
            break  # flat: there is no way round
        count *= 8
    return probabilities.sort(descending=True)


def uniform(batch: int, generator: Generators, device: torch.device, shape: Sequence[int] = ()) -> torch.Tensor:
    """`(batch, *shape)` numbers in [0, 1), drawn where the generator lives."""
    if isinstance(generator, Sequence):
        numbers = [torch.zeros(1, *shape) if one is None else uniform(1, one, device, shape) for one in generator]
        return torch.cat([number.to(device) for number in numbers])
    where = device if generator is None else generator.device
    return torch.rand((batch, *shape), generator=generator, device=where, dtype=torch.float32).to(device)


def draw(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.LongTensor:
    """Inverse of the cumulative distribution.  A column of probability 0 is never chosen.

    Args:
        probabilities (`torch.Tensor` of shape `(..., n)`): need not sum to exactly 1.
        numbers (`torch.Tensor` of shape `(...)`): in [0, 1).
    """
    # float32 sums over 131,072 columns would be off by more than a rare token's probability.
    dtype = torch.float32 if probabilities.device.type == "mps" else torch.float64
    cumulative = probabilities.to(dtype).cumsum(-1)
    targets = numbers.to(dtype)[..., None] * cumulative[..., -1:]
    choice = torch.searchsorted(cumulative, targets, right=True)[..., 0]
    return choice.clamp(max=probabilities.shape[-1] - 1)


def guide(
    streams: Sequence[torch.Tensor], guidance_scale: float, image_guidance_scale: float | None = None
) -> torch.Tensor:
    r"""Classifier-free guidance.

    One unconditional stream: $s = u + g (c - u)$.  Two: $s = n + g_{img} (u - n) + g (c - u)$.  The release does this
    on log-probabilities; on logits, or on what they are linear in, the result differs by a constant a row, which no
    later step can see.

    Args:
        streams: values of the conditional stream c, then of the unconditional ones u and n; each `(batch, ...)`.
    """
    if len(streams) == 1:
        return streams[0].float()
    conditional, unconditional = streams[0].float(), streams[1].float()
    guided = guidance_scale * (conditional - unconditional)
    if len(streams) == 2:
        return unconditional + guided
    neither = streams[2].float()
    return neither + image_guidance_scale * (unconditional - neither) + guided


def is_damaged(scores: torch.Tensor) -> torch.BoolTensor:
    """Rows `(batch,)` of scores `(batch, n)` that hold NaN or infinity, or allow nothing at all."""
    return ~scores.amax(-1).isfinite()


def check_scores(damaged: torch.BoolTensor):
    """Raises a ValueError if any row [`is_damaged`]."""
    if bool(damaged.any()):
        rows = damaged.nonzero()[:, 0].tolist()
        raise ValueError(
            f"the model computed NaN or infinite logits in rows {rows} of the batch. float16 overflows easily: load "
            "the model with `dtype=torch.bfloat16` or `torch.float32`. If it is that already, its weights are damaged."
        )
