r"""The `speculative` image decoder: several codes a pass, from exactly the distribution that `ar` samples from.

Speculative Jacobi decoding (arXiv 2410.01699), with coupled drafts (arXiv 2510.24211). Every row has a window of W
guessed codes $x_i$, and for each the whole distribution $q_i$ it was drawn from:

    1. one pass over the last settled code and the window gives $p_i$ for every guess, and for the code after them;
    2. from the left, $x_i$ is accepted with probability $\min(1, p_i(x_i) / q_i(x_i))$; the first one that is not is
       drawn again from the positive part of $p_i - q_i$, the code after a window without one from $p$ itself;
    3. the guesses behind it become guesses again, now drawn from $q_i := p_i$; the window is filled up by copying the
       code above.

Why that is exact: given all that happens at the places before it, a guess is distributed as its $q_i$ in every pass,
whatever it was before; so acceptance and redraw make it one of $p_i$. In step 3 it may thus depend on what it was:

    none     drawn anew
    maximal  kept with probability $\min(1, p_i(x_i) / q_i(x_i))$, else from the positive part of $p_i - q_i$
    gumbel   $\arg\max_c p_i(c) / e_c$, where every place of the image has its own exponential noise $e$
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .decoding_emu35 import ImageRequest, ImageStatistics, TokenStream
from .sampling_emu35 import Generators, check_scores, draw, guide, is_damaged, uniform

#: Guesses a pass unless `speculative_window` says otherwise.
DEFAULT_WINDOW = 16


@torch.no_grad()
def decode_speculative(stream: TokenStream, request: ImageRequest) -> torch.LongTensor:
    """Fills the grids like [`decode_autoregressive`], whose arguments and result it has, in fewer passes.

    Rows advance by different lengths: what a pass computed for guesses that were not accepted is masked in the
    stream. Given codes and EOLs are part of the pass over the codes around them. `request.on_codes` gets a position
    when all rows have it.

    Raises:
        ValueError: if `request.speculative_window` is wider than the grid.
    """
    return _Speculation(stream, request).run()


class _Speculation:
    """The state of one call.

    The codes that are to be made have *ranks* in their row: 0 is the first one that is not given. The window holds
    the ranks `settled` .. `settled + W`, the last of which has no guess yet.

    Attributes:
        canvas (`(batch, stop + 1)`): given codes, settled ones, guesses; the last column takes what has no place.
        order (`(batch, ranks)`): index of each rank in the grid, `stop` after a row's last one.
        num_free, settled (`(batch,)`): ranks, and how many of them are settled.
        cached (`(batch,)`): tokens of the grid (EOLs included) that the stream holds for good.
        drafts (`(batch, W + 1, n)`): the q of the guesses, 0 where there is none.
        noise (`(batch, W + 1, n)` or `None`): that of the window's ranks.
    """

    def __init__(self, stream: TokenStream, request: ImageRequest):
        self.stream, self.request = stream, request
        self.layout = stream.model.config.token_layout
        self.width = request.token_width
        total = request.token_height * self.width
        self.window = self._window(total)
        stop = total if request.max_codes is None else min(total, request.max_codes)
        self.stop = max(stop, request.num_cached)
        self.batch, device = len(request.given), stream.device
        self.num_streams = stream.num_rows // self.batch
        #: Tokens of all codes up to `stop`; the last row of a grid has no EOL.
        self.num_tokens = min(self.stop + self.stop // self.width, total + request.token_height - 1)
        start = self._place(torch.tensor(request.num_cached))
        given = request.given[:, : self.stop]
        free = given < 0
        order = (~free).long().argsort(dim=-1, stable=True)
        order[torch.arange(self.stop) >= free.sum(-1, keepdim=True)] = self.stop
        self.order = F.pad(order, (0, self.window + 1), value=self.stop).to(device)
        self.canvas = F.pad(given.clamp(min=0), (0, 1)).to(device)
        self.num_free = free.sum(-1).to(device)
        self.settled = torch.zeros_like(self.num_free)
        self.cached = start.to(device).expand(self.batch)
        #: Tokens of each row of the stream that stand before the grid.
        self.before = stream.lengths + sum(mask.sum(-1) for _, mask in stream.pending) - int(start)
        size = (self.batch, self.window + 1, self.layout.num_visual_tokens)
        self.drafts = torch.zeros(size, device=device)
        # A greedy choice needs no noise: the guesses are the most likely codes whatever couples them.
        self.greedy = request.sampler.is_greedy
        self.coupling = "maximal" if self.greedy else request.coupling
        self.noise = torch.ones(size, device=device) if self.coupling == "gumbel" else None

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
        request, stream, device = self.request, self.stream, self.canvas.device
        ranks = torch.arange(self.window + 1, device=device)
        # At first there are no guesses: all are copies.
        index = self._index()
        self._fill(index, (ranks < self.window).expand_as(index))
        if self.noise is not None:
            self._renew_noise(index < self.stop)
        passes, drafted = torch.zeros_like(self.settled), torch.zeros_like(self.settled)
        accepted_at = torch.zeros(self.batch, self.window + 1, dtype=torch.long, device=device)
        damaged = torch.zeros(self.batch, dtype=torch.bool, device=device)
        emitted = request.num_cached
        stopped = False
        while not stopped and bool((active := self.settled < self.num_free).any()):
            index = self._index()
            scores = self._scores(index, active)
            real = index < self.stop
            damaged |= (is_damaged(scores.flatten(0, 1)).view(real.shape) & real).any(-1)
            p = request.sampler.distribution(scores)
            new, num_accepted = self._verify(p, index, active)
            self.canvas.scatter_(1, index, new)
            passes += active
            drafted += real[:, :-1].sum(-1)
            accepted_at += (ranks < num_accepted[:, None]) & real
            self.settled = torch.minimum(self.settled + num_accepted + 1, self.num_free)
            last = self.order.gather(1, (self.settled - 1).clamp(min=0)[:, None])[:, 0]
            self.cached = torch.where(active, self._place(last), self.cached)
            stream.truncate(self.before + self.cached.repeat(self.num_streams))
            self._move_window(p, num_accepted + 1)
            emitted, stopped = self._emit(emitted)
        if not stopped:
            emitted, stopped = self._emit(emitted)  # what is given behind the last code made
        codes = self.canvas[:, :emitted]
        self._finish(emitted)
        request.statistics = [
            ImageStatistics(count, guesses, tuple(accepted[: self.window]))
            for count, guesses, accepted in zip(passes.tolist(), drafted.tolist(), accepted_at.tolist(), strict=True)
        ]
        check_scores(damaged)
        return codes

    def _index(self) -> torch.LongTensor:
        """Where in the grid the window's codes are `(batch, W + 1)`, `stop` where there is none."""
        offsets = torch.arange(self.window + 1, device=self.order.device)
        return self.order.gather(1, self.settled[:, None] + offsets)

    def _scores(self, index: torch.LongTensor, active: torch.BoolTensor) -> torch.Tensor:
        """Guided logits `(batch, W + 1, n)` of the window's codes, by one pass over what stands before them."""
        stream, request = self.stream, self.request
        reached = torch.minimum(self.settled + self.window, self.num_free - 1).clamp(min=0)
        end = self._place(self.order.gather(1, reached[:, None])[:, 0])
        lengths = (end - self.cached) * active
        offsets = torch.arange(int(lengths.max()), device=index.device)
        first = stream.num_pending
        mask = offsets < lengths[:, None]
        stream.append(
            self._tokens(self.cached[:, None] + offsets).repeat(self.num_streams, 1), mask.repeat(self.num_streams, 1)
        )
        hidden_states = stream.compute()
        columns = first + self._place(index) - 1 - self.cached[:, None]
        columns = columns.clamp(0, hidden_states.shape[1] - 1).repeat(self.num_streams, 1)
        hidden_states = hidden_states.gather(
            1, columns.to(hidden_states.device)[..., None].expand(-1, -1, hidden_states.shape[-1])
        )
        logits = stream.model.compute_logits(hidden_states.flatten(0, 1), vocabulary="visual")
        guided = guide(logits.chunk(self.num_streams), request.guidance_scale, request.image_guidance_scale)
        return guided.to(index.device).view(*index.shape, -1)

    def _tokens(self, places: torch.LongTensor) -> torch.LongTensor:
        """Ids at these places among the tokens of the grid."""
        codes = self.canvas.gather(1, (places - places // (self.width + 1)).clamp(max=self.stop))
        ends = places % (self.width + 1) == self.width
        return torch.where(ends, self.layout.eol_token_id, codes + self.layout.visual_token_offset)

    def _verify(
        self, p: torch.Tensor, index: torch.LongTensor, active: torch.BoolTensor
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """New codes of the window `(batch, W + 1)`, and how many guesses were accepted `(batch,)`.

        With the code after those, which is settled too, the rest are new guesses.
        """
        guesses, q = self.canvas.gather(1, index), self.drafts
        u, v = self._uniform(active, (2, self.window + 1)).unbind(1)
        accepted = u * _of(q, guesses) < _of(p, guesses)
        accepted[:, -1] = False  # no guess, and q = 0, so that what is left of p - q is p
        num_accepted = accepted.long().cumprod(-1).sum(-1)
        if self.coupling == "maximal":
            return torch.where(accepted, guesses, draw(_residual(p, q), v)), num_accepted
        ranks = torch.arange(self.window + 1, device=p.device)
        at = num_accepted[:, None]
        if self.coupling == "none":
            redrawn = draw(torch.where((ranks <= at)[..., None], _residual(p, q), p), v)
        else:
            redrawn = (p / self.noise).argmax(-1)
            rows = at[..., None].expand(-1, -1, p.shape[-1])
            replacement = draw(_residual(p.gather(1, rows), q.gather(1, rows)), v.gather(1, at))
            redrawn = redrawn.scatter(1, at, replacement)
        return torch.where(ranks < at, guesses, redrawn), num_accepted

    def _move_window(self, p: torch.Tensor, steps: torch.LongTensor):
        """The window's guesses were drawn from `p`; its first `steps` `(batch,)` are settled and leave it."""
        source = torch.arange(self.window + 1, device=p.device) + steps[:, None]
        fresh = source > self.window
        source = source.clamp(max=self.window)[..., None].expand(-1, -1, p.shape[-1])
        self.drafts = p.gather(1, source)
        self.drafts[:, -1] = 0.0
        index = self._index()
        self._fill(index[:, :-1], fresh[:, :-1])
        if self.noise is not None:
            self.noise = self.noise.gather(1, source)
            self._renew_noise(fresh & (index < self.stop))

    def _fill(self, index: torch.LongTensor, fresh: torch.BoolTensor):
        """First guesses at the `fresh` places: the code above, in the first row the one before; q is all there."""
        above = torch.where(index >= self.width, index - self.width, (index - 1).clamp(min=0))
        guesses = self.canvas.gather(1, above)
        self.canvas.scatter_(1, torch.where(fresh, index, self.stop), guesses)
        drafts = self.drafts[:, : index.shape[1]].masked_fill_(fresh[..., None], 0.0)
        drafts.scatter_add_(-1, guesses[..., None], fresh[..., None].to(drafts))

    def _renew_noise(self, fresh: torch.BoolTensor):
        for rows, generator in self._groups():
            count = int(fresh[rows].sum())
            if count:
                where = self.noise.device if generator is None else generator.device
                noise = torch.empty(count, self.noise.shape[-1], device=where).exponential_(generator=generator)
                self.noise[rows] = self.noise[rows].masked_scatter(fresh[rows][..., None], noise.to(self.noise.device))

    def _groups(self) -> list[tuple[slice, torch.Generator | None]]:
        """Rows that share a generator."""
        generator = self.request.generator
        if isinstance(generator, Sequence):
            return [(slice(row, row + 1), one) for row, one in enumerate(generator)]
        return [(slice(None), generator)]

    def _uniform(self, active: torch.BoolTensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Numbers `(batch, *shape)`; rows that are done take none from generators of their own."""
        if self.greedy:
            return torch.zeros(self.batch, *shape, device=active.device)
        generator: Generators = self.request.generator
        if isinstance(generator, Sequence):
            generator = [one if use else None for one, use in zip(generator, active.tolist(), strict=True)]
        return uniform(self.batch, generator, active.device, shape)

    def _emit(self, emitted: int) -> tuple[int, bool]:
        """Hands on the codes that all rows have now; returns how many have been, and whether to stop there."""
        request = self.request
        ready = int(self._index()[:, 0].min())
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
            self.stream.truncate(self.before + kept.repeat(self.num_streams))
        tokens = self._tokens(torch.arange(end, device=kept.device).expand(self.batch, -1)).tolist()
        rows = [own[first:] for own, first in zip(tokens, kept.tolist(), strict=True)]
        if any(rows):
            self.stream.append_lists(rows * self.num_streams)


def _of(distributions: torch.Tensor, codes: torch.LongTensor) -> torch.Tensor:
    """Probabilities of `codes` `(batch, W)` in `(batch, W, n)`."""
    return distributions.gather(-1, codes[..., None])[..., 0]


def _residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The positive part of p - q, which a rejected guess is replaced from; p itself where rounding leaves nothing."""
    left = (p - q).clamp(min=0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, p)
