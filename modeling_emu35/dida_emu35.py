"""The `dida` image decoder: all codes of an image at once, refined in a few denoising steps.

Discrete diffusion adaptation (arXiv 2510.26583, section 4.3). What stands before an image's IMG is computed once, like
all text, by the model as it is. A denoising step then computes only the *block*

    IMG x_0 x_1 ... EOL x_w ... x_{n-1}

of noisy codes x against that cache, with the adapter on: its tokens have the positions of the clean tokens they stand
for, and see the prefix and each other in both directions. The output at the token before x_i predicts code i. The
cache never keeps a block. When the image is done, its clean tokens are left pending, so that the next pass computes
them causally, as if `ar` had made them.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

from .adapters_emu35 import DIDA_ADAPTER, adapter_layers
from .decoding_emu35 import ImageRequest, ImageStatistics, TokenStream, execution_device
from .sampling_emu35 import Generators, check_scores, guide, is_damaged

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "scheduler_config.json")

#: Most bytes of weights that are kept with the adapter added to them.
MERGED_BYTES = 2**30

#: Times of steps are float32, so that 7 of 10 steps end below 0.7.
TIME_TOLERANCE = 1e-6

#: Bytes of float32 logits that are filtered together.
LOGIT_CHUNK_BYTES = 512 * 2**20


class DidaMixin:
    """The adapter and the scheduler of a model that decodes images with `dida`."""

    #: What `image_decoder="dida"` takes its steps with; [`load_dida_adapter`] sets it.
    dida_scheduler = None

    def load_dida_adapter(self, folder: str | Path):
        """Loads a DiDA adapter, and the scheduler that was saved with it, into `dida_scheduler`.

        The adapter is active in denoising passes only: text and images of other decoders stay the same to the bit.
        One that was loaded before is replaced. The model is in evaluation mode afterwards.

        Args:
            folder: holds `adapter_config.json`, `adapter_model.safetensors` (PEFT) and `scheduler_config.json`.
        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if adapter or scheduler belong to another model.
            ImportError: if `peft` is not installed.
        """
        folder = Path(folder)
        missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} is no DiDA adapter: it lacks {', '.join(missing)}. Train one with `emu35 train "
                "training/recipes/tiny-dida.yaml`; the tiny model's is `emu35.TINY_DIDA`."
            )
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
            names = list(tensors.keys())
        outside = [name for name in names if "lm_head" in name or "vision_tokenizer" in name]
        if outside:
            raise ValueError(
                f"the adapter in {folder} changes {outside[0]}. A DiDA adapter may change the decoder only "
                "(`model.layers`)."
            )
        scheduler = self._checked_scheduler(_scheduler_class().from_pretrained(folder))
        if DIDA_ADAPTER in getattr(self, "peft_config", {}):
            self.delete_adapter(DIDA_ADAPTER)
        active = {layer: layer.active_adapters for layer in adapter_layers(self)}
        conversions = getattr(self, "_weight_conversions", None)
        try:
            problems = self.load_adapter(str(folder), adapter_name=DIDA_ADAPTER)
            # It leaves those of the adapter, by which the model's own tensors would be saved under wrong names.
            self._weight_conversions = conversions
        except RuntimeError as error:  # tensors of other shapes
            self._drop_adapter(active)
            raise ValueError(f"the adapter in {folder} does not fit this model: {error}") from error
        self._drop_adapter(active, keep=True)
        # Tensors of other adapters count as missing there.
        wrong = sorted(name for name in problems.missing_keys if f".{DIDA_ADAPTER}." in name)
        wrong += sorted(problems.unexpected_keys)
        if wrong:
            self._drop_adapter(active)
            raise ValueError(
                f"the adapter in {folder} does not fit this model: {len(wrong)} tensors, like {wrong[0]}."
            )
        self.dida_scheduler = scheduler

    def _drop_adapter(self, active: dict[nn.Module, list[str]], keep: bool = False):
        """Makes the adapters active that were so before; `keep=False`: also removes what has been loaded."""
        for layer in adapter_layers(self):
            layer._active_adapter = active.get(layer, [])
        if not keep:
            self.delete_adapter(DIDA_ADAPTER)

    def find_dida_scheduler(self, scheduler, allow_unadapted: bool):
        """The scheduler that a call of `generate` uses, checked."""
        adapted = self.config.dida_adapted or DIDA_ADAPTER in getattr(self, "peft_config", {})
        if not adapted and not allow_unadapted:
            raise ValueError(
                '`image_decoder`="dida" needs a model that was adapted to it, and this one has no adapter. Load one: '
                "`model.load_dida_adapter(FOLDER)`, or `emu35 ... --adapter FOLDER`; the tiny model's is "
                "`emu35.TINY_DIDA`; `emu35 train "
                "training/recipes/tiny-dida.yaml` trains it. `allow_unadapted=True` runs without, for what it is "
                "worth."
            )
        if scheduler is not None:
            return self._checked_scheduler(scheduler)
        if self.dida_scheduler is None and self.config.dida_adapted:
            folder = Path(self.name_or_path)
            if not (folder / ADAPTER_FILES[-1]).is_file():
                raise ValueError(
                    f"the checkpoint has no {ADAPTER_FILES[-1]}, which says how it was adapted. Give the scheduler: "
                    "`generate(scheduler=...)`."
                )
            self.dida_scheduler = self._checked_scheduler(_scheduler_class().from_pretrained(folder))
        if self.dida_scheduler is None:
            return self._checked_scheduler(_scheduler_class()(num_codes=self.config.token_layout.num_visual_tokens))
        return self.dida_scheduler

    def _checked_scheduler(self, scheduler):
        """The scheduler, with this model's codebook. Raises a ValueError if it is of another model, or is none."""
        layout = self.config.token_layout
        if not isinstance(scheduler, _scheduler_class()):
            raise ValueError(f"`scheduler` must be a `DiDAScheduler`, got {type(scheduler).__name__}.")
        if scheduler.config.num_codes != layout.num_visual_tokens:
            raise ValueError(
                f"the scheduler has `num_codes`={scheduler.config.num_codes}, but the model "
                f"{layout.num_visual_tokens} visual tokens. They don't belong together."
            )
        if scheduler.mask_code is not None and layout.image_placeholder_token_id is None:
            raise ValueError(
                "the scheduler's `path`='absorbing' writes masked codes as the image placeholder, which this model's "
                "token layout does not name."
            )
        if scheduler.config.path == "metric" and self.vision_tokenizer is not None:
            # Not its weight: offloading brings that in around `forward` only.
            codebook = self.vision_tokenizer.quantize.embedding
            with torch.no_grad():
                scheduler.set_codebook(
                    codebook(torch.arange(codebook.num_embeddings, device=execution_device(codebook)))
                )
        return scheduler


def _scheduler_class() -> type:
    try:
        from emu35.pipelines.scheduling_dida import DiDAScheduler
    except ImportError as error:
        raise ImportError('`image_decoder`="dida" needs the whole package: `pip install emu35`.') from error
    return DiDAScheduler


class dida_adapter(contextlib.AbstractContextManager):
    """Inside, the DiDA adapter is active, beside those that already were. Without one, nothing changes.

    Where memory allows, layers get weights that the adapter was added to before, and give them back: two more
    products a layer are what makes a pass with a large rank slow. May be entered again and again, since finding the
    layers takes longer than a small model's pass.

    Raises:
        ValueError: if another adapter is merged into the weights, beside which PEFT computes no second one.
    """

    def __init__(self, model: nn.Module):
        layers = [layer for layer in adapter_layers(model.model) if _has_adapter(layer)]
        for layer in layers:
            if layer.merged:
                raise ValueError(
                    f"the adapters {layer.merged_adapters} are merged into the weights. Unmerge them before decoding "
                    "with `dida`."
                )
        merged = _merged_weights(model, layers)
        # Their dictionaries, since a module looks three times at what is set through it.
        self.layers = [(vars(layer), layer.get_base_layer()._parameters, merged.get(layer)) for layer in layers]
        self.entered: list[list[tuple]] = []

    def __enter__(self):
        before: list[tuple] = []
        self.entered.append(before)
        for layer, parameters, merged in self.layers:
            active, disabled = layer.get("_active_adapter", "default"), layer.get("_disable_adapters", False)
            before.append((active, disabled, parameters.get("weight")))
            others = [] if disabled else [active] if isinstance(active, str) else active
            # Not `set_adapter`, which also decides what is trained.
            layer["_active_adapter"], layer["_disable_adapters"] = [*others, DIDA_ADAPTER], False
            if merged is not None and not others:
                parameters["weight"], layer["_disable_adapters"] = merged, True

    def __exit__(self, *_):
        for (layer, parameters, _), (active, disabled, weight) in zip(self.layers, self.entered.pop(), strict=True):
            layer["_active_adapter"], layer["_disable_adapters"] = active, disabled
            if weight is not None:
                parameters["weight"] = weight


def _has_adapter(layer: nn.Module) -> bool:
    # The second looks through all kinds of adapters, which takes longer.
    return DIDA_ADAPTER in getattr(layer, "lora_A", ()) or DIDA_ADAPTER in layer._all_available_adapter_names()


def _merged_weights(model: nn.Module, layers: list[nn.Module]) -> dict[nn.Module, nn.Parameter]:
    """Weights with the adapter in them, by layer; kept with the model until an adapter or a weight changes.

    Plain matrices only, and only `MERGED_BYTES` of them: in a model of 34 B parameters a second copy of all adapted
    matrices would take as much as the first.
    """
    layers = [layer for layer in layers if DIDA_ADAPTER in getattr(layer, "lora_A", ())]
    plain = [layer for layer in layers if type(layer.get_base_layer()) is nn.Linear]
    plain = [layer for layer in plain if layer.get_base_layer().weight.device.type != "meta"]
    weights = [layer.get_base_layer().weight for layer in plain]
    known, merged = getattr(model, "_dida_weights", (None, {}))
    if merged and all(weight is merged.get(layer) for layer, weight in zip(plain, weights, strict=True)):
        return merged  # they are in use
    if sum(weight.numel() * weight.element_size() for weight in weights) > MERGED_BYTES:
        return {}
    parts = [
        (weight, layer.lora_A[DIDA_ADAPTER].weight, layer.lora_B[DIDA_ADAPTER].weight)
        for weight, layer in zip(weights, plain, strict=True)
    ]
    # The parameters themselves are kept: another adapter's may come to lie where those of a deleted one were.
    sources = [part for own in parts for part in own]
    state = [(id(part), part.data_ptr(), part._version) for part in sources]
    if known is None or state != known[0]:
        with torch.no_grad():
            merged = {
                layer: nn.Parameter(
                    (weight.float() + layer.get_delta_weight(DIDA_ADAPTER).float()).to(weight.dtype), False
                )
                for weight, layer in zip(weights, plain, strict=True)
            }
        model._dida_weights = ((state, sources), merged)
    return merged


@torch.no_grad()
def decode_dida(stream: TokenStream, request: ImageRequest) -> torch.LongTensor:
    """The `dida` decoder: one pass a denoising step.

    Given codes stay in their places in every step, and all others see them, those below and to the right too.
    `request.on_codes` gets the codes after the last step, except for those that every row is given at the beginning.
    Stopped before that, an image has only those.

    Args:
        stream (`TokenStream`):
            rows of the conditional stream, then those of the unconditional ones. Holds (or has pending) everything up
            to IMG, and `request.num_cached` is 0. Afterwards IMG and the codes are pending, but no EOI.
        request (`ImageRequest`):
            its `scheduler` (a `DiDAScheduler` that has its codebook) makes `num_inference_steps` steps. The guidance
            scale at time t is `guidance_scale + t * (guidance_scale_end - guidance_scale)`; from `guidance_cutoff` on
            there is none, and the unconditional rows are left out. The sampler's filters come before the scheduler.
            With `verify_codes` the model looks at the codes as `ar` would, without the adapter, in one causal pass
            that the cache needs anyway: none remains that the sampler would never draw after those before it. So a
            greedy sampler gets the image of `ar`, in as few passes as the adapter's predictions are good.
    Returns:
        `torch.LongTensor` of shape `(batch, codes)`: all codes of the grid, given ones included.
    Raises:
        ValueError: for NaN or infinite logits.
    """
    return _Denoising(stream, request).run()


class _Denoising:
    """The state of one call.

    Attributes:
        given, fixed (`(batch, total)`): codes of the grid that are settled, -1 elsewhere; and where.
        block (`(batch, columns)`): ids of the block, without the noisy codes.
        places (`(total,)`): columns of the block whose outputs predict the codes, which stand one further.
    """

    def __init__(self, stream: TokenStream, request: ImageRequest):
        self.stream, self.request = stream, request
        self.model, self.layout = stream.model, stream.model.config.token_layout
        self.adapter = dida_adapter(self.model)
        request.scheduler.set_timesteps(request.num_inference_steps, device=stream.device)
        self.scheduler = request.scheduler.greedy() if request.sampler.is_greedy else request.scheduler
        self.batch, self.device = len(request.given), stream.device
        self.num_streams = stream.num_rows // self.batch
        height, width = request.token_height, request.token_width
        self.total = height * width
        self.given = request.given.to(self.device)
        self.fixed = self.given >= 0
        places = torch.arange(self.total, device=self.device)
        self.places = places + places // width
        self.block = torch.full((self.batch, height * (width + 1)), self.layout.eol_token_id, device=self.device)
        self.block[:, 0] = self.layout.img_token_id

    def run(self) -> torch.LongTensor:
        request, stream = self.request, self.stream
        self._take_back_img()
        known = (request.given >= 0).all(0)
        stop = self.total if request.max_codes is None else min(self.total, request.max_codes)
        codes, holds_image = self.given, False
        emitted, stopped = self._emit(codes, 0, min(int(known.long().cumprod(0).sum()), stop))
        if not stopped and not known.all():
            if stream.num_pending:
                stream.compute()
            codes, stopped = self._denoise(self.given, self.scheduler, request.on_step)
            if request.verify_codes and not stopped:
                codes, holds_image = self._verify(codes)
                stopped = not holds_image
        before = stream.lengths - self.block.shape[1] * holds_image
        if not stopped:
            emitted, _ = self._emit(codes, emitted, stop)
        length = 1 + emitted + min(emitted // request.token_width, request.token_height - 1)
        ids = self._ids(codes)[:, :length]
        if holds_image:
            stream.truncate(before + length - 1)
            ids = ids[:, -1:]
        stream.append(ids.repeat(self.num_streams, 1))
        request.statistics = [ImageStatistics(stream.num_passes)] * self.batch
        return codes[:, :emitted]

    def _denoise(self, given: torch.LongTensor, scheduler, on_step=None) -> tuple[torch.LongTensor, bool]:
        """Codes `(batch, total)` after the last step of a scheduler, or after the one that was told to stop.

        Args:
            given (`torch.LongTensor` of shape `(batch, total)`): codes that stay; -1: to be made.
        """
        request, fixed = self.request, given >= 0
        prefix = _Prefix(self.stream, self.block.shape[1])
        generator = self._generators(given)
        codes = scheduler.initial_codes((self.batch, self.total), generator, self.device)
        codes = torch.where(fixed, given, codes)
        kept = None
        cutoff = 1.0 if request.guidance_cutoff is None else request.guidance_cutoff  # no step begins at 1
        for step, t in enumerate(scheduler.timesteps):
            if prefix.num_rows > self.batch and float(t) >= cutoff - TIME_TOLERANCE:
                prefix = _Prefix(self.stream.rows(range(self.batch)), self.block.shape[1])
            scores = self._scores(prefix, codes, float(t))
            output = scheduler.step(scores, t, codes, generator, fixed=fixed, kept=kept)
            codes, kept = output.prev_sample, output.kept
            if on_step is not None:
                shown = codes
                if scheduler.mask_code is not None:
                    shown = torch.where(codes == scheduler.mask_code, output.pred_original_sample, codes)
                on_step(step, shown.view(self.batch, request.token_height, request.token_width))
            if request.should_stop is not None and request.should_stop():
                return codes, True
        return codes, False

    def _verify(self, codes: torch.LongTensor) -> tuple[torch.LongTensor, bool]:
        """Codes that the model could have made one by one, and whether the stream holds their block now.

        The first code of a row that the sampler would never draw after those before it is drawn anew, and what comes
        after it is denoised again. So at least one more code is settled in every round. Told to stop, it returns what
        there is.
        """
        request, scheduler = self.request, copy.copy(self.scheduler)
        places = torch.arange(self.total, device=self.device)
        settled = torch.zeros(self.batch, 1, dtype=torch.long, device=self.device)
        steps = request.num_inference_steps
        while True:
            before = self.stream.lengths
            first, replacement = self._first_excluded(codes, settled)
            if bool((first == self.total).all()):
                return codes, True
            self.stream.truncate(before)
            given = torch.where(self.fixed | (places < first), codes, -1)
            codes = given = torch.where(places == first, replacement, given)
            settled = (first + 1).clamp(max=self.total)
            # Fewer in every round, since less is open; by rounds alone, so that a row does not depend on its batch.
            steps = max(1, steps // 2)
            scheduler.set_timesteps(steps, device=self.device)
            if bool((given < 0).any()):
                codes, stopped = self._denoise(given, scheduler, self._show_again)
                if stopped:
                    return codes, False

    def _show_again(self, step: int, shown: torch.LongTensor):
        """For `on_step`, what happens while codes are verified belongs to the last step."""
        if self.request.on_step is not None:
            self.request.on_step(self.request.num_inference_steps - 1, shown)

    def _first_excluded(
        self, codes: torch.LongTensor, settled: torch.LongTensor
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Where in each row the first code is that the sampler excludes, and what it draws there: both `(batch, 1)`.

        One causal pass without the adapter, whose keys and values stay in the stream. `total`: there is none.

        Args:
            settled (`torch.LongTensor` of shape `(batch, 1)`): as many codes are not asked about.
        """
        request, stream = self.request, self.stream
        stream.append(self._ids(codes).repeat(self.num_streams, 1))
        hidden_states = stream.compute()
        hidden_states = hidden_states[:, self.places.to(hidden_states.device)]
        guided = guide(hidden_states.chunk(self.num_streams), request.guidance_scale, request.image_guidance_scale)
        guided = guided.to(hidden_states.dtype)
        places = torch.arange(self.total, device=self.device)
        allowed = self.fixed | (places < settled)
        for columns, logits in self._logits_in_parts(guided):
            distribution = request.sampler.distribution(logits.float())
            allowed[:, columns] |= distribution.gather(-1, codes[:, columns, None])[..., 0] > 0
        first = torch.where(allowed, self.total, places).amin(-1, keepdim=True)
        at = first[:, 0].clamp(max=self.total - 1).to(guided.device)
        guided = guided[torch.arange(self.batch, device=at.device), at]
        logits = self.model.compute_logits(guided, vocabulary="visual")
        none_left = torch.where(first == self.total, 0, -1)
        drawn = request.sampler(logits.float().to(self.device), self._generators(none_left))
        return first, drawn[:, None]

    def _scores(self, prefix: "_Prefix", codes: torch.LongTensor, t: float) -> torch.Tensor:
        """Guided and filtered log-probabilities `(batch, total, num_visual_tokens)` of the codes, by one pass."""
        request = self.request
        num_streams = prefix.num_rows // self.batch
        with self.adapter:
            hidden_states = prefix.compute(self._ids(codes).repeat(num_streams, 1))
        self.stream.num_passes += 1
        guidance_scale = request.guidance_scale
        if request.guidance_scale_end is not None:
            guidance_scale += (request.guidance_scale_end - guidance_scale) * t
        hidden_states = hidden_states[:, self.places.to(hidden_states.device)]
        # The output matrix is linear, so guidance comes before it.
        guided = guide(hidden_states.chunk(num_streams), guidance_scale, request.image_guidance_scale)
        guided = guided.to(hidden_states.dtype)
        scores = torch.empty(self.batch, self.total, self.layout.num_visual_tokens, device=self.device)
        for columns, logits in self._logits_in_parts(guided):
            if self.scheduler.config.temperature == 0:  # filters leave the most probable code what it is
                scores[:, columns] = logits
            else:
                scores[:, columns] = request.sampler.distribution(logits.float()).log_()
        return scores

    def _logits_in_parts(self, hidden_states: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits `(batch, columns, num_visual_tokens)` of some columns at a time, as filters need much memory."""
        damaged = torch.zeros(self.batch, dtype=torch.bool, device=self.device)
        size = max(1, LOGIT_CHUNK_BYTES // (4 * self.batch * self.layout.num_visual_tokens))
        for begin in range(0, self.total, size):
            columns = slice(begin, min(begin + size, self.total))
            logits = self.model.compute_logits(hidden_states[:, columns], vocabulary="visual").to(self.device)
            damaged |= is_damaged(logits.flatten(0, 1)).view(self.batch, -1).any(-1)
            yield columns, logits
        check_scores(damaged)

    def _ids(self, codes: torch.LongTensor) -> torch.LongTensor:
        """The block `(batch, columns)` with these codes in it."""
        ids = codes + self.layout.visual_token_offset
        if self.scheduler.mask_code is not None:
            ids = torch.where(codes == self.scheduler.mask_code, self.layout.image_placeholder_token_id, ids)
        block = self.block.clone()
        block[:, self.places + 1] = ids
        return block

    def _emit(self, codes: torch.LongTensor, first: int, end: int) -> tuple[int, bool]:
        """Hands on codes `first` to `end`; returns how far it came, and whether to stop there."""
        request = self.request
        if request.on_codes is None:
            return end, False
        for index in range(first, end):
            request.on_codes(codes[:, index])
            if request.should_stop is not None and request.should_stop():
                return index + 1, True
        return end, False

    def _generators(self, given: torch.LongTensor) -> Generators:
        """None for rows that are given as a whole, in whatever batch."""
        if not isinstance(self.request.generator, Sequence):
            return self.request.generator
        complete = (given >= 0).all(1).tolist()
        return [None if skip else one for skip, one in zip(complete, self.request.generator, strict=True)]

    def _take_back_img(self):
        """Leaves the stream with what stands before IMG: the block has an IMG of its own."""
        ids, mask = self.stream._pending()
        if ids.shape[1]:
            self.stream.pending = [(ids[:, :-1], mask[:, :-1])]
        else:
            self.stream.truncate(self.stream.lengths - 1)


class _Prefix:
    """What blocks are computed against: the cache of a stream, which stays as it is."""

    def __init__(self, stream: TokenStream, columns: int):
        self.model, self.cache, self.num_rows = stream.model.model, stream.cache, stream.num_rows
        new = torch.ones(self.num_rows, columns, dtype=torch.bool, device=stream.device)
        self.position_ids = stream.lengths[:, None] + new.cumsum(-1) - 1
        # All tokens of a block see the same columns, so that this is no more than a mask of padding, which every
        # attention implementation has a form for. Without padding there is none.
        mask = create_bidirectional_mask(
            self.model.config,
            torch.empty(self.num_rows, columns, 1, dtype=self.model.dtype, device=stream.device),
            torch.cat([stream.cached_mask, new], dim=1),
            past_key_values=self.cache,
        )
        self.attention_mask = dict.fromkeys(self.model.config.layer_types, mask)

    def compute(self, ids: torch.LongTensor) -> torch.Tensor:
        """Final hidden states `(rows, columns, hidden_size)` of a block `(rows, columns)`."""
        hidden_states = self.model(
            input_ids=ids,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            past_key_values=self.cache,
            use_cache=True,
            is_causal=False,  # what no mask would mean otherwise
        ).last_hidden_state
        self.cache.crop(-ids.shape[1])
        return hidden_states
