"""The scheduler of DiDA (discrete diffusion adaptation): noise for training, and the steps from noise to an image."""

import copy
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from emu35.sampling_emu35 import Generators, draw, is_damaged, uniform
from torch.nn import functional as F

PATHS = ("metric", "mixture", "absorbing")
JUMPS = ("kinetic", "maximal", "renoise", "confidence")
#: Bytes of one `(positions, num_codes)` tensor in float64. A step holds about four of them at a time.
BLOCK_BYTES = 2**27


@dataclass
class DiDASchedulerOutput(BaseOutput):
    """
    Result of [`DiDAScheduler.step`].

    Args:
        prev_sample (`torch.LongTensor` of shape `(batch, ...)`): codes at the next time, the model's next input.
        pred_original_sample (`torch.LongTensor` of shape `(batch, ...)`): the codes x1 that this step aimed at.
        kept (`torch.BoolTensor` of shape `(batch, ...)`, *optional*):
            positions that are data for good; the next `step` wants it back. Only with `jump="confidence"` and
            `revise=False`.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor
    kept: torch.Tensor | None = None


class DiDAScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Discrete flow matching over the codes of an image.

    Time runs from 0 (noise) to 1 (data). A *path* says how a code $x_1$ looks at time t:

        metric     $p_t(x | x_1) = softmax_x(-\beta(t) d(x, x_1))$, $\beta(t) = c (t / (1 - t))^\alpha$,
                   $d(x, y) = \|E_x - E_y\|^2$ over the codebook's rows, scaled to length 1; uniform at t = 0
        mixture    $x_1$ with probability t, else uniform
        absorbing  $x_1$ with probability t, else the state [`mask_code`]

    A model is trained to predict $x_1$ from codes at time t. In every step $x_1$ is drawn from the prediction, each
    position on its own, and the codes go from $p_t(. | x_1)$ to $p_{t'}(. | x_1)$; the last step returns $x_1$. How
    they go is the *jump*:

        kinetic     A Markov process of the kinetic-optimal velocity, which is, on the metric path,
                    $u(x) = p_t(x | x_1) \beta'(t) relu(d(x_t, x_1) - d(x, x_1))$: codes only come nearer to $x_1$. A
                    position moves with probability $1 - \exp(-\int \sum_x u(x) dt)$, to a draw from $u / \sum u$.
        maximal     Stays with probability $\min(1, p_{t'}(x_t | x_1) / p_t(x_t | x_1))$, else a draw from the positive
                    part of $p_{t'} - p_t$: the fewest moves that end in $p_{t'}$ after a step of any length.
        renoise     A draw from $p_{t'}(. | x_1)$ that forgets $x_t$. On the absorbing path: remasking.
        confidence  The most probable predictions become data, as many as the path has at t'. All others get the
                    path's noise at t'.

    With true posteriors as predictions, kinetic and maximal make the true joint distribution in the limit of short
    steps. renoise keeps that of every single position; for two strongly coupled ones it needed four times the steps.
    confidence prefers probable codes.

    On the paths without a metric, kinetic and maximal are the same: a position becomes $x_1$ with probability
    $(t' - t) / (1 - t)$. On the metric path the kinetic integral is taken by the midpoint rule over $\beta$, since
    $\beta'(t)$ diverges at t = 1. With the tiny checkpoint's codebook that ends .04 to .06 away from $p_{t'}$ with 4
    steps and .01 with 16 (total variation, mean over steps); $dt \beta'(t)$ would end .38 to .40 and .06 to .07 away.

    Steps are equally long in u, and $t = u / (u + s (1 - u))$ with the *time shift* s. With $\sigma = 1 - u$ this is
    $t = 1 - s \sigma / (1 + (s - 1) \sigma)$. s < 1 spends more steps near the data.

    Sources: Emu3.5 (arXiv 2510.26583, section 4.3), URSA (arXiv 2510.24717), kinetic-optimal paths (arXiv
    2412.03487), discrete flow matching (arXiv 2407.15595), confidence order (arXiv 2202.04200), remasking (arXiv
    2503.00307).

    Guidance and filters (top-k, top-p) are the caller's, before `step`.

    Args:
        num_codes (`int`): size of the codebook.
        path (`str`): "metric" (needs [`set_codebook`]), "mixture" or "absorbing".
        alpha, c (`float`): of the metric path. Unpublished for Emu3.5.
        time_shift (`float`): s of the inference steps.
        training_time_shift (`float`, *optional*):
            s of [`sample_times`]. Default: `time_shift`. Apart from it because a trained model can be sampled with
            any shift.
        jump (`str`): "kinetic", "maximal", "renoise" or "confidence".
        temperature (`float`): divides the logits before $x_1$ is drawn. 0: the most probable code.
        confidence_noise (`float`):
            for `jump="confidence"`: Gumbel noise times `confidence_noise * (1 - t')` is added to what orders the
            positions, the log-probabilities of the drawn codes at temperature 1.
        revise (`bool`):
            for `jump="confidence"`: whether what was kept may become noise again or change. `False`: every step needs
            the `kept` of the step before.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_codes: int = 131072,
        path: str = "metric",
        alpha: float = 0.9,
        c: float = 3.0,
        time_shift: float = 1.0,
        training_time_shift: float | None = None,
        jump: str = "kinetic",
        temperature: float = 1.0,
        confidence_noise: float = 0.0,
        revise: bool = True,
    ):
        # diffusers takes positional arguments for defaults, which `from_config` would then forget.
        self.register_to_config(_use_default_values=[])
        _check_choice("path", path, PATHS)
        _check_choice("jump", jump, JUMPS)
        if not isinstance(num_codes, int) or num_codes < 2:
            raise ValueError(f"`num_codes` must be a whole number of at least 2, got {num_codes!r}.")
        shifts = {"time_shift": time_shift}
        if training_time_shift is not None:
            shifts["training_time_shift"] = training_time_shift
        for name, value in {"alpha": alpha, "c": c, **shifts}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be positive, got {value}.")
        for name, value in {"temperature": temperature, "confidence_noise": confidence_noise}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be at least 0 (0: none), got {value}.")
        self.num_inference_steps: int | None = None
        self.timesteps: torch.Tensor | None = None
        self._codebook: torch.Tensor | None = None

    @classmethod
    def _get_compatibles(cls):
        return [DiDAScheduler]  # the inherited one only knows the classes of diffusers

    def greedy(self) -> "DiDAScheduler":
        """This one, or a copy of it that always takes the most probable code."""
        if self.config.temperature == 0:
            return self
        scheduler = copy.copy(self)
        scheduler._internal_dict = FrozenDict({**self.config, "temperature": 0.0})
        return scheduler

    @property
    def mask_code(self) -> int | None:
        """State of the absorbing path that is no code: `num_codes`. `None` on the other paths."""
        return self.config.num_codes if self.config.path == "absorbing" else None

    def set_codebook(self, embeddings: torch.Tensor):
        """Gives the metric path its codebook, which is not part of the configuration.

        Args:
            embeddings (`torch.Tensor` of shape `(num_codes, dim)`): rows of any length; they are normalised in a copy.
        Raises:
            ValueError: for another number of rows, and for rows without a direction (zero, NaN).
        """
        num_codes = self.config.num_codes
        if embeddings.ndim != 2 or embeddings.shape[0] != num_codes:
            raise ValueError(
                f"`embeddings` must have shape (num_codes, dim) with num_codes={num_codes}, got "
                f"{tuple(embeddings.shape)}. Make the scheduler with `num_codes` of the model's codebook."
            )
        rows = F.normalize(embeddings.detach().float(), dim=-1)
        odd = ((rows.norm(dim=-1) - 1).abs() < 1e-3).logical_not().nonzero()[:, 0].tolist()
        if odd:
            raise ValueError(f"`embeddings` has {len(odd)} rows that are zero or not finite, the first is {odd[0]}.")
        self._codebook = rows

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None):
        """Sets `timesteps` (`(num_inference_steps,)`, float32): when each step begins. The last one ends at 1.

        Raises:
            ValueError: if `num_inference_steps` is not a whole number of at least 1.
        """
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be a whole number of at least 1, got {num_inference_steps}.")
        u = torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps
        self.num_inference_steps = num_inference_steps
        self.timesteps = _shift(u, self.config.time_shift).float().to(device)

    def initial_codes(
        self, shape: Sequence[int], generator: Generators = None, device: str | torch.device | None = None
    ) -> torch.LongTensor:
        """Codes at t = 0: uniform, or [`mask_code`] everywhere.

        Args:
            shape: `(batch, ...)`.
            generator: one for the batch, or one a row.
        """
        batch, *positions = shape
        device = torch.device("cpu" if device is None else device)
        _check_generators(generator, batch)
        return self._uninformed(uniform(batch, generator, device, positions))

    def sample_times(
        self, batch: int, generator: Generators = None, device: str | torch.device | None = None
    ) -> torch.Tensor:
        """Training times `(batch,)` in [0, 1]: uniform, then shifted by `training_time_shift`."""
        _check_generators(generator, batch)
        shift = self.config.training_time_shift
        shift = self.config.time_shift if shift is None else shift
        return _shift(uniform(batch, generator, torch.device("cpu" if device is None else device)), shift)

    def add_noise(
        self, codes: torch.LongTensor, t: float | torch.Tensor, generator: Generators = None
    ) -> torch.LongTensor:
        r"""Draws $x_t \sim p_t(. | x_1)$, every position on its own.

        Args:
            codes (`torch.LongTensor` of shape `(batch, ...)`): $x_1$.
            t (`float`, or `torch.Tensor` of shape `()` or `(batch,)`): in [0, 1].
            generator: one for the batch, or one a row.
        Raises:
            ValueError: for times outside [0, 1], codes outside the codebook, and a metric path without a codebook.
        """
        self._check_codes(codes, allow_mask=False)
        _check_generators(generator, len(codes))
        x1 = codes.flatten(1).long()
        times = _times(t, len(codes), codes.device)[:, None]
        numbers = uniform(len(codes), generator, codes.device, (2, x1.shape[1]))
        x_t = torch.empty_like(x1)
        metric = self.config.path == "metric"
        for block in _blocks(x1.shape, self.config.num_codes) if metric else [(slice(None), slice(None))]:
            x_t[block] = self._renoise(x1[block], times[block[0]], *numbers[block[0], :, block[1]].unbind(1))
        return x_t.view(codes.shape).to(codes.dtype)

    @torch.no_grad()
    def step(
        self,
        logits: torch.Tensor,
        t: float | torch.Tensor,
        codes: torch.LongTensor,
        generator: Generators = None,
        fixed: torch.BoolTensor | None = None,
        kept: torch.BoolTensor | None = None,
        return_dict: bool = True,
    ) -> DiDASchedulerOutput | tuple:
        """One step, from time t to the next.

        Args:
            logits (`torch.Tensor` of shape `(batch, ..., num_codes)`):
                prediction of x1, already guided and filtered; -inf where a code must not be.
            t (`float`, or `torch.Tensor` of shape `()` or `(batch,)`): of `timesteps`.
            codes (`torch.LongTensor` of shape `(batch, ...)`): at time t.
            generator: one for the batch, or one a row (`None` there: the row's result does not matter). A row then
                does not depend on the batch it is in. Every step takes three numbers a position from it.
            fixed (`torch.BoolTensor` of shape `(batch, ...)`, *optional*): positions that are given: their codes stay.
            kept (`torch.BoolTensor` of shape `(batch, ...)`, *optional*): that of the last output (`revise=False`).
        Raises:
            ValueError: for a time that is no timestep, shapes or codes that do not fit, logits that hold NaN or +inf
                or allow no code, a metric path without a codebook, a missing `kept`.
        """
        num_codes, batch = self.config.num_codes, len(codes)
        begin, end = self._interval(t, batch, codes.device)
        self._check_codes(codes, allow_mask=True)
        _check_generators(generator, batch)
        if logits.shape != (*codes.shape, num_codes):
            raise ValueError(
                f"`logits` must have shape (*codes.shape, num_codes) = {(*codes.shape, num_codes)}, got "
                f"{tuple(logits.shape)}. The scheduler's `num_codes` must be the size of the model's codebook."
            )
        fixed, kept = _check_mask("fixed", fixed, codes), self._check_kept(kept, codes, begin)
        if self.mask_code is not None and bool((fixed & (codes == self.mask_code)).any()):
            raise ValueError("`fixed` has positions where `codes` hold the mask. Only given codes can be fixed.")
        logits, x_t, fixed = logits.flatten(1, -2), codes.flatten(1).long(), fixed.flatten(1)
        settled = fixed | kept.flatten(1)
        to_draw, to_jump, to_land = uniform(batch, generator, codes.device, (3, x_t.shape[1])).unbind(1)
        ordered, is_last = self.config.jump == "confidence", bool((end >= 1).all())
        x1, x_next, damaged = x_t.clone(), x_t.clone(), torch.zeros_like(fixed)
        log_probs, shares = torch.zeros(2, *x_t.shape, device=x_t.device)
        for block in _blocks(x_t.shape, num_codes):
            scores, rows = logits[block].float(), block[0]
            damaged[block] = is_damaged(scores.flatten(0, 1)).view(damaged[block].shape)
            x1[block] = torch.where(settled[block], x_t[block], self._predict(scores, to_draw[block]))
            if is_last:
                continue
            if ordered:
                log_probs[block] = scores.log_softmax(-1).gather(-1, x1[block][..., None])[..., 0]
                x_next[block], shares[block] = self._noise_apart(x1[block], end[rows], to_land[block])
            elif self.config.jump == "renoise":
                x_next[block] = self._renoise(x1[block], end[rows], to_jump[block], to_land[block])
            else:
                times = begin[rows], end[rows]
                x_next[block] = self._jump(x_t[block], x1[block], *times, to_jump[block], to_land[block])
        damaged &= ~settled
        if bool(damaged.any()):
            rows = damaged.any(-1).nonzero()[:, 0].tolist()
            raise ValueError(f"`logits` hold NaN or +inf, or allow no code at all, in rows {rows} of the batch.")
        final = fixed | (end >= 1)
        if ordered:
            log_probs += self.config.confidence_noise * (1 - end) * _gumbel(to_jump)
            final = final | settled | _most_confident(log_probs, shares, fixed, settled)
        x_next = torch.where(final, x1, x_next)
        output = DiDASchedulerOutput(*(x.view(codes.shape).to(codes.dtype) for x in (x_next, x1)))
        if ordered and not self.config.revise:
            output["kept"] = final.view(codes.shape)
        return output if return_dict else output.to_tuple()

    def _predict(self, scores: torch.Tensor, numbers: torch.Tensor) -> torch.LongTensor:
        if self.config.temperature == 0:
            return scores.argmax(-1)
        return draw((scores / self.config.temperature).softmax(-1), numbers)

    def _jump(self, x_t, x1, begin, end, to_jump, to_land) -> torch.LongTensor:
        if self.config.path != "metric":
            return torch.where(to_jump < (end - begin) / (1 - begin), x1, x_t)
        distances, old = self._distances(x1), x_t[..., None]
        # What comes of end = 1, where beta is infinite, is not used.
        beta, next_beta = self._beta(begin)[..., None], self._beta(end)[..., None]
        if self.config.jump == "kinetic":
            nearer = (distances.gather(-1, old) - distances).relu()
            weights = (-(beta + next_beta) / 2 * distances).softmax(-1) * nearer
            log_stay = (beta - next_beta)[..., 0] * weights.sum(-1)
        else:
            now, then = ((-b * distances).log_softmax(-1) for b in (beta, next_beta))
            weights = (then.exp() - now.exp()).relu()
            log_stay = (then - now).gather(-1, old)[..., 0].clamp(max=0)
        return torch.where(to_jump < -torch.expm1(log_stay), draw(weights, to_land), x_t)

    def _renoise(self, x1, t, to_keep, to_land) -> torch.LongTensor:
        """A draw from $p_t(. | x_1)$."""
        if self.config.path != "metric":
            return torch.where(to_keep < t, x1, self._uninformed(to_land))
        weights = (-self._beta(t)[..., None] * self._distances(x1)).softmax(-1)
        return torch.where(t < 1, draw(weights, to_land), x1)

    def _noise_apart(self, x1, t, numbers) -> tuple[torch.LongTensor, torch.Tensor]:
        """$p_t(. | x_1)$ in two parts: a draw of what is not data, and the share of data.

        Metric path: $x \\ne x_1$, and $p_t(x_1 | x_1)$. Else: the noise of the path, and t.
        """
        if self.config.path != "metric":
            return self._uninformed(numbers), t.expand(x1.shape)
        energies = -self._beta(t)[..., None] * self._distances(x1)
        shares = energies.softmax(-1).gather(-1, x1[..., None])[..., 0]
        others = energies.scatter(-1, x1[..., None], float("-inf"))
        return draw(others.softmax(-1), numbers), shares

    def _beta(self, t: torch.Tensor) -> torch.Tensor:
        """beta(t); 0 for t = 1, where it is infinite and no caller uses it."""
        odds = torch.where(t < 1, t / (1 - t), 0.0)
        return self.config.c * odds**self.config.alpha

    def _distances(self, codes: torch.LongTensor) -> torch.Tensor:
        """Distances of `codes` (any shape) to all codes: `(..., num_codes)`."""
        if self._codebook is None:
            raise ValueError(
                "the metric path needs the codebook: call `scheduler.set_codebook(embeddings)` with the rows of the "
                "model's vision tokenizer, `model.vision_tokenizer.quantize.embedding.weight`."
            )
        self._codebook = self._codebook.to(codes.device)
        with torch.autocast(codes.device.type, enabled=False):  # bfloat16 has no digits for this difference
            return (2 - 2 * self._codebook[codes] @ self._codebook.T).clamp_(min=0)

    def _uninformed(self, numbers: torch.Tensor) -> torch.LongTensor:
        """Noise that does not depend on the data: the mask, or uniform codes from `numbers` in [0, 1)."""
        if self.mask_code is not None:
            return torch.full(numbers.shape, self.mask_code, device=numbers.device)
        return (numbers * self.config.num_codes).long().clamp(max=self.config.num_codes - 1)

    def _interval(self, t, batch: int, device) -> tuple[torch.Tensor, torch.Tensor]:
        """The step that begins at t: its begin and end, each `(batch, 1)`."""
        if self.timesteps is None:
            raise ValueError("the scheduler has no timesteps: call `set_timesteps` before `step`.")
        begin = _times(t, batch, device)
        steps = self.timesteps.to(begin)
        index = (begin[:, None] - steps).abs().argmin(-1)
        if not torch.allclose(steps[index], begin, rtol=0, atol=1e-6):
            raise ValueError(
                f"`t` must be one of the {len(steps)} `timesteps` from 0 to {float(steps[-1]):.4f}, got {t}."
            )
        ends = F.pad(steps[1:], (0, 1), value=1.0)
        return steps[index, None], ends[index, None]

    def _check_kept(self, kept, codes, begin: torch.Tensor) -> torch.BoolTensor:
        """Positions `codes.shape` that are data for good."""
        if self.config.jump == "confidence" and self.config.revise:
            return torch.zeros_like(codes, dtype=torch.bool)
        if self.mask_code is not None:
            return codes != self.mask_code
        if self.config.jump == "confidence" and kept is None and bool((begin > 0).any()):
            raise ValueError("`kept` is missing: with `revise=False` pass on the `kept` of the last step's output.")
        return _check_mask("kept", kept, codes)

    def _check_codes(self, codes: torch.Tensor, allow_mask: bool):
        if codes.ndim < 2 or codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"`codes` must be integers (batch, ...), got {codes.dtype} {tuple(codes.shape)}.")
        states = self.config.num_codes + (allow_mask and self.mask_code is not None)
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < states:
            raise ValueError(
                f"`codes` must lie in 0..{states - 1}, got {int(codes.min())}..{int(codes.max())}. They are codes of "
                "the codebook, not token ids."
            )


def _shift(u: torch.Tensor, shift: float) -> torch.Tensor:
    return u / (u + shift * (1 - u))


def _blocks(shape: Sequence[int], num_codes: int) -> Iterator[tuple[slice, slice]]:
    """Cuts `(batch, positions)` so that `(rows, columns, num_codes)` doubles take `BLOCK_BYTES`."""
    batch, positions = shape
    size = max(1, BLOCK_BYTES // (8 * num_codes))
    columns = max(1, min(size, positions))
    rows = size // columns
    for row in range(0, batch, rows):
        for column in range(0, positions, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def _most_confident(
    log_probs: torch.Tensor, shares: torch.Tensor, fixed: torch.BoolTensor, settled: torch.BoolTensor
) -> torch.BoolTensor:
    """Of the positions `(batch, positions)` that are not fixed, as many as `shares` add up to, settled ones first."""
    log_probs = log_probs.masked_fill(settled, float("inf")).masked_fill(fixed, float("-inf"))
    ranks = log_probs.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # of equals the first
    return ranks < shares.masked_fill(fixed, 0).sum(-1, keepdim=True).round().clamp(min=1)


def _gumbel(numbers: torch.Tensor) -> torch.Tensor:
    return -(-numbers.clamp(min=1e-20).log()).log()


def _times(t: float | torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    """`(batch,)`, float32."""
    times = torch.as_tensor(t, dtype=torch.float32, device=device)
    if times.ndim > 1 or (times.ndim == 1 and len(times) != batch):
        raise ValueError(f"`t` must be one time or one a row ({batch}), got shape {tuple(times.shape)}.")
    if not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError(f"`t` must lie in [0, 1] (0: noise, 1: data), got {t}.")
    return times.expand(batch)


def _check_mask(name: str, mask: torch.Tensor | None, codes: torch.Tensor) -> torch.BoolTensor:
    if mask is None:
        return torch.zeros_like(codes, dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != codes.shape:
        raise ValueError(
            f"`{name}` must be a bool mask of shape {tuple(codes.shape)}, got {mask.dtype} {tuple(mask.shape)}."
        )
    return mask


def _check_generators(generator: Generators, batch: int):
    if isinstance(generator, Sequence) and len(generator) != batch:
        raise ValueError(f"`generator` has {len(generator)} generators for a batch of {batch}. Give one for each row.")
    for one in generator if isinstance(generator, Sequence) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise ValueError(f"`generator` must be a `torch.Generator` (`manual_seed` sets its seed), got {one!r}.")


def _check_choice(name: str, value: str, choices: Sequence[str]):
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Choices: {', '.join(choices)}."
        raise ValueError(f"unknown `{name}` {value!r}. {hint}")
