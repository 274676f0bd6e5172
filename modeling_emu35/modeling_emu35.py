"""The Emu3.5 decoder and its composite with the vision tokenizer."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3MLP,
    Qwen3Model,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple

from .checkpoint_emu35 import ReleasedCheckpointMixin, StrictCheckpointMixin
from .configuration_emu35 import Emu35Config, Emu35TextConfig
from .decoding_emu35 import execution_device
from .generation_configuration_emu35 import Emu35GenerationConfig
from .generation_emu35 import Emu35GenerationMixin
from .image_tokens_emu35 import last_image
from .modeling_emu35_vision_tokenizer import Emu35VisionTokenizer

#: Bytes of float32 logits that one chunk of the loss may hold.
LOSS_CHUNK_BYTES = 128 * 2**20

#: Pixels that go through the vision tokenizer together. The released one needs about 5 GiB for a million of them.
PIXELS_PER_PASS = 1024 * 1024


@dataclass
class Emu35CausalLMOutput(CausalLMOutputWithPast):
    """transformers' `CausalLMOutputWithPast`; `logits` is `None` when only the loss was asked for."""


class Emu35RMSNorm(Qwen3RMSNorm):
    """Qwen3's, as one operation: a step of decoding is made of little else than the overhead of small ones."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # Under autocast, weights may be float32 and states not: like Qwen3's, the result is then float32.
        return F.rms_norm(hidden_states.to(self.weight.dtype), self.weight.shape, self.weight, self.variance_epsilon)


class Emu35RotaryEmbedding(Qwen3RotaryEmbedding):
    """Qwen3's; the sine has the signs of [`rotate`] already, and both have a dimension for the heads."""

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = super().forward(hidden_states, position_ids)
        first, second = sin.chunk(2, dim=-1)
        return cos[:, None], torch.cat([-first, second], dim=-1)[:, None]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: the halves of each head `(batch, heads, length, head_dim)` are the two parts of its pairs."""
    return states * cos + states.roll(states.shape[-1] // 2, dims=-1) * sin


class Emu35Attention(Qwen3Attention):
    """Qwen3's attention with fewer operations: see [`Emu35RMSNorm`] and [`rotate`]."""

    def __init__(self, config: Emu35TextConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_norm = Emu35RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Emu35RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        attention_function: Callable | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            attention_function (`Callable`, *optional*): instead of the configured one, with the same signature.
        """
        shape = hidden_states.shape[:-1]
        heads = (*shape, -1, self.head_dim)
        queries = rotate(self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2), *position_embeddings)
        keys = rotate(self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2), *position_embeddings)
        values = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        if attention_function is None:
            configured = self.config._attn_implementation
            attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(configured, eager_attention_forward)
        attended, weights = attention_function(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(attended.reshape(*shape, -1)), weights


class Emu35DecoderLayer(Qwen3DecoderLayer):
    """Qwen3's layer with the release's dropout on both residual branches."""

    def __init__(self, config: Emu35TextConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = Emu35Attention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Emu35RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Emu35RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.residual_dropout = config.residual_dropout

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + self._drop(attended)
        return hidden_states + self._drop(self.mlp(self.post_attention_layernorm(hidden_states)))

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        return F.dropout(branch, self.residual_dropout) if self.training and self.residual_dropout else branch


class Emu35PreTrainedModel(StrictCheckpointMixin, PreTrainedModel):
    config: Emu35Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Emu35DecoderLayer", "Emu35VisionTokenizer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Emu35DecoderLayer, "attentions": Emu35Attention}


class Emu35Model(Emu35PreTrainedModel, Qwen3Model):
    """
    The decoder without output head: token ids in, hidden states out.  Image tokens are ordinary tokens here.

    Takes an [`Emu35TextConfig`], or the text part of an [`Emu35Config`].
    """

    config_class = Emu35Config
    _keys_to_ignore_on_load_unexpected = [r"^vision_tokenizer\.", r"^lm_head\."]

    def __init__(self, config: Emu35TextConfig | Emu35Config):
        config = config.get_text_config()
        # Not Qwen3Model's own __init__: it would build (and initialise) layers without dropout first.
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(Emu35DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Emu35RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Emu35RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in config.layer_types
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                or `inputs_embeds` of shape `(batch, length, hidden_size)`.
            attention_mask (`torch.Tensor`): `(batch, cached + length)`, 1 = attend; or a prepared 4D mask.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=F.dropout(inputs_embeds, self.config.embedding_dropout, self.training),
            use_cache=use_cache,
            **kwargs,
        )


class Emu35ForConditionalGeneration(ReleasedCheckpointMixin, Emu35PreTrainedModel, Emu35GenerationMixin):
    """
    Emu3.5: decoder, output head, and (where the configuration has one) the vision tokenizer.

    `from_pretrained` also reads the release's own checkpoints; `vision_tokenizer=DIRECTORY` adds the vision tokenizer,
    which those do not contain.
    """

    generation_config_class = Emu35GenerationConfig
    input_modalities = ("text", "image")
    output_modalities = ("text", "image")
    # Codes are an argmax over up to 131,072 near neighbours: half precision would flip some of them.
    _keep_in_fp32_modules_strict = ["vision_tokenizer"]
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: Emu35Config):
        super().__init__(config)
        self.model = Emu35Model(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.vision_tokenizer = None
        if config.vision_tokenizer_config is not None:
            # float32 from the start, not only when weights are loaded: disk offloading goes by the type it finds here.
            self.vision_tokenizer = Emu35VisionTokenizer(config.vision_tokenizer_config).float()
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def get_decoder(self):
        return self.model

    def set_decoder(self, decoder):
        self.model = decoder

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | Sequence[torch.Tensor] | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        vocabulary: Literal["all", "text", "visual"] = "all",
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> Emu35CausalLMOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                image placeholders are resolved if `pixel_values` come.
            labels (`torch.LongTensor` of shape `(batch, length)`):
                usually a copy of `input_ids`; -100 is ignored. The shift happens here. With `labels`, logits are
                computed in chunks for the loss and not returned, unless `logits_to_keep` asks for them.
            logits_to_keep (`int` or `torch.Tensor`, *optional*):
                the last n positions (0: all), or their indices. Default: all, or none when there are `labels`.
            vocabulary (`str`): which rows of the output matrix `logits` covers, see [`compute_logits`].
            num_items_in_batch (`int`, *optional*): divisor of the summed loss under gradient accumulation.
        """
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError(
                    "`pixel_values` needs `input_ids` with image placeholders; got `inputs_embeds` alone."
                )
            resolved = self.resolve_image_tokens(input_ids=input_ids, pixel_values=pixel_values)["input_ids"]
            if labels is not None:
                placeholder = self.config.token_layout.image_placeholder_token_id
                labels = torch.where(labels == placeholder, resolved, labels)
            input_ids = resolved
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss = None if labels is None else self.compute_loss(hidden_states, labels, num_items_in_batch)
        logits = None
        if labels is None or logits_to_keep is not None:
            kept = slice_logits_to_keep(hidden_states, 0 if logits_to_keep is None else logits_to_keep)
            logits = self.compute_logits(kept, vocabulary)
        return Emu35CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def compute_logits(
        self, hidden_states: torch.Tensor, vocabulary: Literal["all", "text", "visual"] = "all"
    ) -> torch.Tensor:
        """Logits over all ids, over the text ids only, or over the visual ids only.

        Only the rows asked for are read: in the released vocabulary, 54 % (text) or 46 % (visual) of the output
        matrix.

        Returns:
            `torch.Tensor` of shape `(..., n)`: column c means id c ("all"), visual code c ("visual"), or id c while
            c < `visual_token_offset` ("text"; ids after the visual range, where there are any, follow).
        """
        layout = self.config.token_layout
        begin, end = layout.visual_token_offset, layout.visual_token_end
        if vocabulary == "all":
            return self.lm_head(hidden_states)
        if vocabulary not in ("text", "visual"):
            raise ValueError(f'`vocabulary` must be "all", "text" or "visual", got {vocabulary!r}.')
        vocab_size = self.config.text_config.vocab_size
        spans = [(begin, end)] if vocabulary == "visual" else [(0, begin), (end, vocab_size)]
        spans = [(first, last) for first, last in spans if last > first]
        if _is_plain_matrix(self.lm_head, rows=vocab_size):
            weight = self.lm_head.weight
            hidden_states = hidden_states.to(weight.device)
            parts = [_project(hidden_states, weight[first:last]) for first, last in spans]
        else:
            logits = self.lm_head(hidden_states)
            parts = [logits[..., first:last] for first, last in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def compute_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.LongTensor,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Next-token loss: the weighted mean of the cross-entropies, `visual_loss_weight` for visual targets, else 1.

        The full logits never exist: positions go through the head in chunks of `LOSS_CHUNK_BYTES`, and a chunk's
        logits are computed again in the backward pass.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`).
            labels (`torch.LongTensor` of shape `(batch, length)`): not shifted; -100 is ignored.
        """
        if labels.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"`labels` must have the shape of the ids {tuple(hidden_states.shape[:2])}, got {tuple(labels.shape)}."
            )
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten().to(hidden_states.device)
        positions = (targets != -100).nonzero()[:, 0]
        targets = targets[positions]
        hidden_states = hidden_states.flatten(0, 1)[positions]
        layout = self.config.token_layout
        visual = (targets >= layout.visual_token_offset) & (targets < layout.visual_token_end)
        weights = torch.where(visual, float(self.config.visual_loss_weight), 1.0)

        def chunk_loss(hidden_states, targets, weights):
            logits = self.lm_head(hidden_states).float()
            losses = F.cross_entropy(logits, targets.to(logits.device), reduction="none").to(weights.device)
            return (losses * weights).sum()

        size = max(1, LOSS_CHUNK_BYTES // (4 * self.config.text_config.vocab_size))
        num_chunks = max(1, math.ceil(len(targets) / size))
        if is_deepspeed_zero3_enabled() and dist.is_initialized():
            # Each pass through the head gathers its weights from all processes, so all must make as many.
            most = torch.tensor(num_chunks, device=hidden_states.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            num_chunks = int(most)
        total = hidden_states.new_zeros((), dtype=torch.float32)
        for chunk in zip(*(one.tensor_split(num_chunks) for one in (hidden_states, targets, weights)), strict=True):
            # Recomputing pays only where several chunks would have to be kept.
            recompute = num_chunks > 1 and torch.is_grad_enabled()
            total = total + (checkpoint(chunk_loss, *chunk, use_reentrant=False) if recompute else chunk_loss(*chunk))
        if num_items_in_batch is None:
            return total / weights.sum().clamp(min=1e-8)
        return total / torch.as_tensor(num_items_in_batch, device=total.device)

    def _require_vision_tokenizer(self) -> Emu35VisionTokenizer:
        if self.vision_tokenizer is None:
            raise ValueError(
                "this checkpoint has no vision tokenizer, so images can be neither encoded nor decoded (text and "
                "codes work). Load it with `from_pretrained(..., vision_tokenizer=DIRECTORY)`, or merge both with "
                "`python -m emu35.convert_emu35_to_hf`."
            )
        return self.vision_tokenizer

    @torch.no_grad()
    def encode_image(self, pixel_values: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.LongTensor]:
        """Visual codes of images of any sizes.

        Args:
            pixel_values: `(n, 3, H, W)`, or a sequence of `(3, H, W)`; values in [-1, 1].
        Returns:
            `list[torch.LongTensor]`, each `(h, w)`.
        """
        vision_tokenizer = self._require_vision_tokenizer()
        device, dtype = execution_device(vision_tokenizer), next(vision_tokenizer.parameters()).dtype
        images = [
            image[0] if image.ndim == 4 and len(image) == 1 else image
            for image in (pixel_values.unbind(0) if isinstance(pixel_values, torch.Tensor) else pixel_values)
        ]
        codes = []
        for batch in _batches(images, [image.shape[-2] * image.shape[-1] for image in images]):
            codes += vision_tokenizer.encode([image.to(device, dtype) for image in batch])
        return codes

    @torch.no_grad()
    def decode_image(self, codes: Sequence[torch.LongTensor]) -> list[torch.Tensor]:
        """Pixels `(3, H, W)` (range about [-1, 1], not clamped) of grids of codes `(h, w)` of any sizes."""
        vision_tokenizer = self._require_vision_tokenizer()
        device, factor = execution_device(vision_tokenizer), vision_tokenizer.config.downsampling_factor
        images = []
        for batch in _batches(codes, [grid.numel() * factor**2 for grid in codes]):
            images += vision_tokenizer.decode([grid.to(device) for grid in batch])
        return images

    def resolve_image_tokens(self, pixel_values=None, **inputs) -> dict:
        """Replaces every image placeholder by the image's visual token, in `input_ids` and in all negative prompts.

        Args:
            pixel_values: images in the order of their placeholders, row after row (what the processor returns).
            inputs: `input_ids` and what else the processor returned; everything that is not token ids is passed
            through.
        Returns:
            `dict`: `inputs` without `pixel_values` and `image_sizes`.
        """
        placeholder = self.config.token_layout.image_placeholder_token_id
        id_keys = [
            key for key in inputs if key == "input_ids" or (key.startswith("negative") and key.endswith("_ids"))
        ]
        resolved = {key: value for key, value in inputs.items() if key != "image_sizes"}
        visual_ids = None
        if pixel_values is not None:
            codes = self.encode_image(pixel_values)
            visual_ids = torch.cat([grid.flatten() for grid in codes]) + self.config.token_layout.visual_token_offset
        for key in id_keys:
            ids = inputs[key]
            if ids is None:
                continue
            if not isinstance(ids, torch.Tensor):
                raise TypeError(f"`{key}` must be a tensor, got {type(ids).__name__}. Ask the processor for tensors.")
            holes = ids == placeholder if placeholder is not None else torch.zeros_like(ids, dtype=torch.bool)
            num_holes = int(holes.sum())
            if num_holes == 0 and (visual_ids is None or key != "input_ids"):
                continue
            if visual_ids is None:
                raise ValueError(
                    f"`{key}` has {num_holes} image placeholders but there are no `pixel_values`. Pass the images the "
                    "processor returned beside the ids."
                )
            if num_holes != len(visual_ids):
                raise ValueError(
                    f"`{key}` has {num_holes} image placeholders but `pixel_values` give {len(visual_ids)} visual "
                    "tokens. Pass ids and images of the same processor call."
                )
            resolved[key] = ids.masked_scatter(holes, visual_ids.to(ids.device, ids.dtype))
        return resolved

    def decode_image_tokens(self, sequences) -> list[torch.Tensor]:
        """Pixels of the last image of each sequence (height and width are read from the sequence).

        Args:
            sequences: `(batch, length)` token ids, or what [`generate`] returned.
        Returns:
            `list[torch.Tensor]`, each `(3, H, W)`, range about [-1, 1].
        """
        sequences = getattr(sequences, "sequences", sequences)
        grids = []
        for row, ids in enumerate(sequences.tolist()):
            image = last_image(ids, self.config.token_layout)
            if image is None or not image.complete:
                raise ValueError(
                    f"row {row} of `sequences` has no image, or the last one is not complete. Did `max_new_tokens` "
                    "cut it?"
                )
            grids.append(torch.tensor(image.codes).view(image.token_height, image.token_width))
        return self.decode_image(grids)


def _batches(items: Sequence[torch.Tensor], pixels: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Consecutive items, as many at a time as have `PIXELS_PER_PASS` pixels together (or one that has more)."""
    batch, room = [], PIXELS_PER_PASS
    for item, size in zip(items, pixels, strict=True):
        if batch and size > room:
            yield batch
            batch, room = [], PIXELS_PER_PASS
        batch.append(item)
        room -= size
    if batch:
        yield batch


def _project(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`hidden_states @ weight.T`, in the order that is fast."""
    on_cpu = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32
    if on_cpu and hidden_states.ndim == 2 and 0 < len(hidden_states) <= 32:
        # Few rows against a tall matrix in float32: 1.5 to 7 times faster on a CPU with the matrix on the left. A
        # single row would be a product with a vector, which has one thread: 10 ms instead of 2.5 over 131,072 x 256.
        rows = hidden_states if len(hidden_states) > 1 else hidden_states.repeat(2, 1)
        return (weight @ rows.t()).t()[: len(hidden_states)].contiguous()
    return F.linear(hidden_states, weight)


def _is_plain_matrix(head: nn.Module, rows: int) -> bool:
    """Can rows of an output head be sliced?  Not where it is quantised, sharded, offloaded, adapted or hooked into."""
    if type(head) is not nn.Linear or type(head.weight) not in (nn.Parameter, torch.Tensor):
        return False
    hooked = head._forward_hooks or head._forward_pre_hooks
    return len(head.weight) == rows and head.weight.device.type != "meta" and not hooked


__all__ = ["Emu35CausalLMOutput", "Emu35ForConditionalGeneration", "Emu35Model", "Emu35PreTrainedModel"]
