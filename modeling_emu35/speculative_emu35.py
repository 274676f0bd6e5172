r"""The `speculative` image decoder: several codes a pass, from exactly the distribution that `ar` samples from.

Speculative Jacobi decoding (arXiv 2410.01699), with coupled guesses (arXiv 2510.24211). Every row has up to W guessed
codes $x_i$, and for each the distribution $q_i$ it was drawn from:

    1. one pass over the last settled code and the guesses gives $p_i$ for every guess, and for the code after them;
    2. from the left, $x_i$ is accepted with probability $\min(1, p_i(x_i) / q_i(x_i))$; the first one that is not is
       drawn again from the positive part of $p_i - q_i$, the code after guesses without a rejection from $p$ itself;
    3. the guesses behind it become guesses again, now drawn from $q_i := p_i$; further ones are drawn from the last of
       these $p$, as if every code that is still unknown were like the one before.

Step 3 may let a guess depend on what it was before (its *coupling*), so that it changes less from pass to pass:

    none     drawn anew
    maximal  kept with probability $\min(1, p_i(x_i) / q_i(x_i))$, else from the positive part of $p_i - q_i$
    gumbel   $\arg\max_c p_i(c) / e_i(c)$, where every place of the image has exponential noise $e_i$ of its own

Why that is exact. Go from left to right, and fix all that happens at the places before i, in every pass. That fixes
in which pass $x_i$ is examined and the $p_i$ and $q_i$ of that pass, which depend on earlier places alone. It says
nothing about $x_i$: the random numbers of a place, its noise included, are used nowhere else. So $x_i$ is distributed
as $q_i$ still, with every coupling, and acceptance and redraw, which have numbers of their own, turn that into $p_i$.
What guesses at i did to places behind it is no matter, for those are looked at later, with i fixed. EOLs and given
codes are not drawn; guidance and the sampler are part of what makes p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .decoding_emu35 import ImageRequest, ImageStatistics, TokenStream, guided_logits
from .sampling_emu35 import Generators, Sampler, check_scores, draw, is_damaged, uniform

#: Guesses a pass unless `speculative_window` says otherwise. On a CPU, the tiny checkpoint takes 82 ms an image with
#: 4, 72 with 8, 62 with 16, 67 with 24 (`ar`: 170); eight at a time take the same from 4 to 16, and more with 24.
DEFAULT_WINDOW = 16


@torch.no_grad()
def decode_speculative(stream: TokenStream, request: ImageRequest) -> torch.LongTensor:
    """Fills the grids like [`decode_autoregressive`], whose arguments and result it has, in fewer passes.

    Rows advance by different lengths: what a pass computed for guesses that were not accepted is masked in the
    stream. Given codes and EOLs are part of the pass over the codes around them. `request.on_codes` gets a position
    when all rows have it. A batch takes as many passes as its slowest row, and rows that are done stay in it: on the
    tiny checkpoint eight rows take 8.8 passes, each of them alone 7.1.

    Raises:
        ValueError: if `request.speculative_window` is wider than the grid.
    """
    return _Speculation(stream, request).run()


class _Speculation:
    """The state of one call.

    The codes that are to be made have *ranks* in their row: 0 is the first one that is not given. Guesses are at the
    ranks `settled`, `settled + 1`, ... Where things stand is kept on the CPU, so that a pass waits for the device
    once: for the numbers of guesses it accepted.

    Attributes:
        order (`(batch, ranks)`, CPU): index of each rank in the grid, `stop` after a row's last one.
        num_free, settled (`(batch,)`, CPU): ranks, and how many of them are settled.
        before, cached (`(rows of the stream,)` and `(batch,)`, CPU):
            tokens that the stream holds before the grid, and those of the grid (EOLs included) that it holds for good.
        canvas (`(batch, stop + 1)`): given codes, settled ones, guesses; the last column takes what has no place.
        drafts: the q of the guesses; `None` before the first pass, when there are none.
        seeds (`(batch, stop + 1)` or `None`): what the noise of each place is made from.
    """

    def __init__(self, stream: TokenStream, request: ImageRequest):
        self.stream, self.request = stream, request
        self.layout = stream.model.config.token_layout
        self.width = request.token_width
        total = request.token_height * self.width
        self.window = self._window(total)
        stop = total if request.max_codes is None else min(total, request.max_codes)
        self.stop = max(stop, request.num_cached)
        self.batch = len(request.given)
        self.num_streams = stream.num_rows // self.batch
        #: Tokens of all codes up to `stop`; the last row of a grid has no EOL.
        self.num_tokens = min(self.stop + self.stop // self.width, total + request.token_height - 1)
        start = self._place(torch.tensor(request.num_cached))
        given = request.given[:, : self.stop]
        free = given < 0
        self.num_free = free.sum(-1)
        self.order = (~free).long().argsort(dim=-1, stable=True)
        self.order[torch.arange(self.stop) >= self.num_free[:, None]] = self.stop
        self.order = F.pad(self.order, (0, self.window + 1), value=self.stop)
        self.settled = torch.zeros_like(self.num_free)
        self.cached = start.expand(self.batch)
        self.before = (stream.lengths + sum(mask.sum(-1) for _, mask in stream.pending)).cpu() - start
        self.canvas = F.pad(given.clamp(min=0), (0, 1)).to(stream.device)
        self.drafts: _Distributions | None = None
        # A greedy choice needs no noise: the guesses are the most likely codes whatever couples them.
        self.coupling = "none" if request.sampler.is_greedy else request.coupling
        self.seeds = None
        if self.coupling == "gumbel":
            halves = (uniform(self.batch, request.generator, stream.device, (2, self.stop + 1)) * 2**24).long()
            self.seeds = (halves[:, 0] << 24) + halves[:, 1]

    def _window(self, total: int) -> int:
        window = self.request.speculative_window
        if window is None:
            return min(DEFAULT_WINDOW, total)
        if not 1 <= window <= total:
            raise ValueError(
                f"`speculative_window` must be at least 1 and at most the {total} codes of the image "
                f"({self.request.token_height}*{self.width}), got {window}."
            )
        return window

    def _place(self, index: torch.LongTensor) -> torch.LongTensor:
        """Where codes stand among the tokens of the grid, which has an EOL after every row but the last."""
        return (index + index // self.width).clamp(max=self.num_tokens)

    def run(self) -> torch.LongTensor:
        request, stream = self.request, self.stream
        passes, drafted = torch.zeros_like(self.settled), torch.zeros_like(self.settled)
        accepted_at = torch.zeros(self.batch, self.window, dtype=torch.long)
        damaged = torch.zeros(self.batch, dtype=torch.bool, device=stream.device)
        num_guesses = 0
        emitted = request.num_cached
        stopped = False
        while not stopped and bool((self.settled < self.num_free).any()):
            left = self.num_free - self.settled
            active = left > 0
            places = self._places(min(num_guesses + 1, int(left.max())))
            index = places.to(stream.device)
            scores = self._scores(places, active)
            damaged |= (is_damaged(scores.flatten(0, 1)).view(index.shape) & (index < self.stop)).any(-1)
            p = _Distributions.of_scores(scores, request.sampler)
            numbers = self._uniform(active)
            accepted, replacement = self._verify(p, index[:, :num_guesses], numbers)
            num_accepted = accepted.long().cumprod(-1).sum(-1).cpu()  # here the device is waited for
            self.canvas.scatter_(1, self._places(1, num_accepted).to(stream.device), replacement)
            steps = torch.minimum(num_accepted + 1, left)
            passes += active
            drafted += left.clamp(max=num_guesses)
            accepted_at += torch.arange(self.window) < torch.minimum(num_accepted, left)[:, None]
            self.settled = self.settled + steps
            last = self.order.gather(1, (self.settled - 1).clamp(min=0)[:, None])[:, 0]
            self.cached = torch.where(active, self._place(last), self.cached)
            stream.truncate((self.before + self.cached.repeat(self.num_streams)).to(stream.device))
            num_guesses = min(self.window, int((left - steps).max()))
            if num_guesses:
                self._guess(p, accepted, steps, num_guesses, numbers)
            emitted, stopped = self._emit(emitted)
        if not stopped:
            emitted, stopped = self._emit(emitted)  # what is given behind the last code made
        codes = self.canvas[:, :emitted]
        self._finish(emitted)
        request.statistics = [
            ImageStatistics(count, guesses, tuple(accepted))
            for count, guesses, accepted in zip(passes.tolist(), drafted.tolist(), accepted_at.tolist(), strict=True)
        ]
        check_scores(damaged)
        return codes

    def _places(self, count: int, offset: torch.LongTensor | int = 0) -> torch.LongTensor:
        """Where in the grid the next `count` ranks are `(batch, count)`, `stop` where there is none; on the CPU."""
        first = (self.settled + offset)[:, None]
        return self.order.gather(1, (first + torch.arange(count)).clamp(max=self.order.shape[1] - 1))

    def _scores(self, places: torch.LongTensor, active: torch.BoolTensor) -> torch.Tensor:
        """Guided logits `(batch, columns, n)` of the codes at `places`, by one pass over what stands before them."""
        stream, request, device = self.stream, self.request, self.stream.device
        real = torch.where(places < self.stop, places, -1).amax(-1).clamp(min=0)
        lengths = (self._place(real) - self.cached) * active
        offsets = torch.arange(int(lengths.max()))
        first = stream.num_pending
        ids = self._tokens(self.cached[:, None] + offsets)
        mask = (offsets < lengths[:, None]).to(device)
        stream.append(ids.repeat(self.num_streams, 1), mask.repeat(self.num_streams, 1))
        self._enter_static()
        hidden_states = stream.compute()
        columns = first + self._place(places) - 1 - self.cached[:, None]
        columns = columns.clamp(0, hidden_states.shape[1] - 1).repeat(self.num_streams, 1)
        hidden_states = hidden_states.gather(
            1, columns.to(hidden_states.device)[..., None].expand(-1, -1, hidden_states.shape[-1])
        )
        scores = guided_logits(stream.model, hidden_states.flatten(0, 1), self.num_streams, request)
        return scores.to(device).view(*places.shape, -1)

    def _enter_static(self):
        """Once the prefix is computed, all passes are at most as wide as a window and the EOLs in it."""
        stream = self.stream
        if self.request.cache_implementation != "static" or stream.static is not None or not stream.num_cached:
            return
        width = self.window + 1 + (self.window + 1) // self.width + 1
        # Besides what is left of the grid, columns are masked where rows advance by different lengths.
        room = int((self.num_tokens - self.cached).max()) + max(64, stream.num_cached // 3)
        stream.enter_static(room, (width,), self.request.compile_config)

    def _tokens(self, places: torch.LongTensor) -> torch.LongTensor:
        """Ids at these places `(batch, n)` (CPU) among the tokens of the grid."""
        index = (places - places // (self.width + 1)).clamp(max=self.stop)
        ends = places % (self.width + 1) == self.width
        codes = self.canvas.gather(1, index.to(self.canvas.device))
        return torch.where(ends.to(codes.device), self.layout.eol_token_id, codes + self.layout.visual_token_offset)

    def _verify(
        self, p: "_Distributions", index: torch.LongTensor, numbers: torch.Tensor
    ) -> tuple[torch.BoolTensor, torch.LongTensor]:
        """Which guesses `(batch, guesses)` may stay, and what replaces the first that may not `(batch, 1)`.

        Behind a row's end none may.
        """
        guesses = self.canvas.gather(1, index)
        if self.drafts is None:
            accepted = torch.zeros_like(guesses, dtype=torch.bool)
        else:
            likelihood = p.of(guesses)
            accepted = numbers[:, : guesses.shape[1]] * self.drafts.of(guesses) < likelihood
            accepted &= index < self.stop
        at = accepted.long().cumprod(-1).sum(-1, keepdim=True)
        left = p.take(at.clamp(max=p.num_slots - 1))
        if self.drafts is not None:
            q = self.drafts.take(at.clamp(max=self.drafts.num_slots - 1))
            left = left.minus(q, where=at < self.drafts.num_slots)
        return accepted, left.choose(draw(left.values, numbers[:, -1:]))

    def _guess(
        self,
        p: "_Distributions",
        accepted: torch.BoolTensor,
        steps: torch.LongTensor,
        count: int,
        numbers: torch.Tensor,
    ):
        """Draws `count` guesses for the ranks after the settled ones, which are `steps` `(batch,)` more than before.

        Args:
            p: distributions of the codes after the old settled ones; beyond them the last one is taken.
            accepted (`(batch, old guesses)`): whether an old guess may stay.
        """
        source = steps[:, None] + torch.arange(count)
        place = self._places(count).to(self.canvas.device)
        kept = (source < accepted.shape[1]).to(self.canvas.device)
        source = source.clamp(max=p.num_slots - 1).to(self.canvas.device)
        q = p.take(source)
        numbers = numbers[:, self.window : self.window + count]
        if self.coupling == "gumbel":
            guesses = q.choose(_noisiest(q, self.seeds.gather(1, place)))
        elif self.coupling == "maximal" and accepted.shape[1]:
            old = source.clamp(max=accepted.shape[1] - 1)
            left = q.minus(self.drafts.take(old), where=kept)
            guesses = torch.where(
                kept & accepted.gather(1, old), self.canvas.gather(1, place), left.choose(draw(left.values, numbers))
            )
        else:
            guesses = q.choose(draw(q.values, numbers))
        self.drafts = q
        self.canvas.scatter_(1, place, guesses)

    def _uniform(self, active: torch.BoolTensor) -> torch.Tensor:
        """Numbers `(batch, 2 W + 1)` of a pass; rows that are done take none from generators of their own."""
        if self.request.sampler.is_greedy:
            return torch.zeros(self.batch, 2 * self.window + 1, device=self.canvas.device)
        generator: Generators = self.request.generator
        if isinstance(generator, Sequence):
            generator = [one if use else None for one, use in zip(generator, active.tolist(), strict=True)]
        return uniform(self.batch, generator, self.canvas.device, (2 * self.window + 1,))

    def _emit(self, emitted: int) -> tuple[int, bool]:
        """Hands on the codes that all rows have now; returns how many have been, and whether to stop there."""
        request = self.request
        ready = int(self._places(1).min())
        if ready > emitted and request.on_codes is None:
            emitted = ready
        should_stop = request.should_stop or (lambda: False)
        while emitted < ready:
            request.on_codes(self.canvas[:, emitted])
            emitted += 1
            if should_stop():
                return emitted, True
        return emitted, should_stop()

    def _finish(self, emitted: int):
        """Leaves the stream with the first `emitted` codes and no others; the last one is pending, like `ar`'s."""
        end = min(emitted + emitted // self.width, self.num_tokens)
        kept = self.cached
        if not self.stream.num_pending:  # there was a pass; without one, the stream ends where the given codes end
            kept = kept.clamp(max=int(self._place(torch.tensor(max(emitted - 1, 0)))))
            self.stream.truncate((self.before + kept.repeat(self.num_streams)).to(self.stream.device))
        self.stream.leave_static()
        tokens = self._tokens(torch.arange(end).expand(self.batch, -1)).tolist()
        rows = [own[first:] for own, first in zip(tokens, kept.tolist(), strict=True)]
        if any(rows):
            self.stream.append_lists(rows * self.num_streams)


@dataclass
class _Distributions:
    """Distributions over codes, one a slot; only over the codes that top-k left, where it is on.

    Args:
        values (`torch.Tensor` of shape `(batch, slots, k)`): need not sum to 1.
        columns (`torch.LongTensor` of shape `(batch, slots, k)` or `None`): their codes; `None`: all codes.
        num_codes (`int`).
    """

    values: torch.Tensor
    columns: torch.LongTensor | None
    num_codes: int

    @classmethod
    def of_scores(cls, scores: torch.Tensor, sampler: Sampler) -> "_Distributions":
        """What the sampler makes of scores `(batch, slots, n)`. Greedy: one code has it all."""
        if sampler.is_greedy:
            columns = scores.argmax(-1, keepdim=True)
            return cls(torch.ones_like(columns, dtype=torch.float32), columns, scores.shape[-1])
        return cls(*sampler.probabilities(scores), scores.shape[-1])

    @property
    def num_slots(self) -> int:
        return self.values.shape[1]

    def of(self, codes: torch.LongTensor) -> torch.Tensor:
        """Probabilities of codes `(batch, m)` in the first m slots."""
        values = self.values[:, : codes.shape[1]]
        if self.columns is None:
            return values.gather(-1, codes[..., None])[..., 0]
        return (values * (self.columns[:, : codes.shape[1]] == codes[..., None])).sum(-1)

    def take(self, slots: torch.LongTensor) -> "_Distributions":
        """Those of slots `(batch, m)`."""
        index = slots[..., None].expand(-1, -1, self.values.shape[-1])
        columns = None if self.columns is None else self.columns.gather(1, index)
        return _Distributions(self.values.gather(1, index), columns, self.num_codes)

    def minus(self, other: "_Distributions", where: torch.BoolTensor) -> "_Distributions":
        """The positive part of the difference in slots `where` `(batch, slots)`, else what is here already.

        Nothing is taken away either where nothing would be left, which only rounding can bring about.
        """
        taken = other.values
        if self.columns is not None:
            dense = taken.new_zeros(*taken.shape[:2], self.num_codes).scatter_(-1, other.columns, taken)
            taken = dense.gather(-1, self.columns)
        left = (self.values - taken).clamp(min=0)
        where = where & (left.sum(-1) > 0)
        return _Distributions(torch.where(where[..., None], left, self.values), self.columns, self.num_codes)

    def choose(self, choice: torch.LongTensor) -> torch.LongTensor:
        """Codes of columns `(batch, slots)`."""
        return choice if self.columns is None else self.columns.gather(-1, choice[..., None])[..., 0]


def _noisiest(distributions: _Distributions, seeds: torch.LongTensor) -> torch.LongTensor:
    r"""The columns `(batch, slots)` of the largest p / e, with exponential noise e for every seed and code.

    The noise of a place has to be the same in every pass. It is not kept but hashed from the seeds `(batch, slots)` of
    the places and the codes (the SplitMix64 generator, begun at the seed), so that it costs nothing for codes without
    a probability, and no memory.
    """
    codes = distributions.columns
    if codes is None:
        codes = torch.arange(distributions.num_codes, device=seeds.device)
    bits = (codes + 1) * _signed(0x9E3779B97F4A7C15) + seeds[..., None]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = bits.bitwise_xor_(_shifted(bits, shift)).mul_(_signed(factor))
    dtype, precision = (torch.float32, 23) if bits.device.type == "mps" else (torch.float64, 52)
    bits = _shifted(bits.bitwise_xor_(_shifted(bits, 31)), 64 - precision)
    uniforms = bits.to(dtype).add_(0.5).mul_(2.0**-precision)  # never 0 or 1
    return uniforms.log_().div_(distributions.values).argmax(-1)  # -e / p; a code of probability 0 has -inf


def _signed(value: int) -> int:
    return value - (1 << 64)


def _shifted(bits: torch.LongTensor, shift: int) -> torch.LongTensor:
    """A shift to the right that fills up with zeros."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)
