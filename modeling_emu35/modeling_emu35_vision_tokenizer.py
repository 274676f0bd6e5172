"""IBQ vision tokenizer of Emu3.5: pixels -> integer codes -> pixels.

    pixels (B, 3, H, W) ─ encoder ─ quant_conv ─► latents (B, D, H/f, W/f) ─ nearest code ─► codes (B, H/f, W/f)
    codes ─ codebook rows ─ post_quant_conv ─ decoder ─► pixels

The convolutional pair is VQGAN's (arXiv 2012.09841), quantisation and losses are IBQ's (arXiv 2412.02692). Parameter
names are the release's, so its state dict loads one to one.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .checkpoint_emu35 import StrictCheckpointMixin
from .configuration_emu35 import Emu35VisionTokenizerConfig
from .released_vision_tokenizer_emu35 import is_released_vision_tokenizer, load_released_vision_tokenizer

# A block of logits of 1024 codes x 1024 positions (4 MiB in float32) stays in the processor's cache between the matrix
# product and the maximum; larger ones are no faster.
QUANTIZE_CODES_PER_CHUNK = 1024
QUANTIZE_POSITIONS_PER_CHUNK = 1024


@dataclass
class Emu35VisionTokenizerOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`): weighted sum of the losses below; only with `return_loss=True`.
        reconstruction (`torch.FloatTensor` of shape `(batch, 3, height, width)`): decoded pixels, not clamped.
        codes (`torch.LongTensor` of shape `(batch, height / f, width / f)`): the chosen codes.
        latents (`torch.FloatTensor` of shape `(batch, embed_dim, height / f, width / f)`): before quantisation.
        reconstruction_loss, quantization_loss, commitment_loss, entropy_loss (`torch.FloatTensor`): unweighted parts.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    latents: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    quantization_loss: torch.FloatTensor | None = None
    commitment_loss: torch.FloatTensor | None = None
    entropy_loss: torch.FloatTensor | None = None


def _norm(config: Emu35VisionTokenizerConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)


class Emu35VisionTokenizerResnetBlock(GradientCheckpointingLayer):
    """Two 3x3 convolutions beside a shortcut: (B, in_channels, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, config: Emu35VisionTokenizerConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _norm(config, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(config, out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states if self.nin_shortcut is None else self.nin_shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden_states = self.conv2(self.dropout(F.silu(self.norm2(hidden_states))))
        return residual + hidden_states


class Emu35VisionTokenizerAttention(GradientCheckpointingLayer):
    """Single-head attention over all positions, beside a shortcut: (B, channels, H, W) -> same."""

    def __init__(self, config: Emu35VisionTokenizerConfig, channels: int):
        super().__init__()
        self.norm = _norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden_states)
        query, key, value = (
            projection(normed).flatten(2).transpose(1, 2).unsqueeze(1) for projection in (self.q, self.k, self.v)
        )  # (B, 1, H*W, channels)
        attended = F.scaled_dot_product_attention(query, key, value)
        return hidden_states + self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(hidden_states.shape))


class Emu35VisionTokenizerDownsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # VQGAN pads on the right and at the bottom only; `padding=1` would shift every feature by a pixel.
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class Emu35VisionTokenizerUpsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class Emu35VisionTokenizerMid(nn.Module):
    def __init__(self, config: Emu35VisionTokenizerConfig, channels: int):
        super().__init__()
        self.block_1 = Emu35VisionTokenizerResnetBlock(config, channels, channels)
        self.attn_1 = Emu35VisionTokenizerAttention(config, channels) if config.mid_attention else None
        self.block_2 = Emu35VisionTokenizerResnetBlock(config, channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.block_1(hidden_states)
        if self.attn_1 is not None:
            hidden_states = self.attn_1(hidden_states)
        return self.block_2(hidden_states)


class Emu35VisionTokenizerLevel(nn.Module):
    """The blocks of one resolution; each is followed by an attention block where the configuration asks for it."""

    def __init__(
        self, config: Emu35VisionTokenizerConfig, level: int, in_channels: int, out_channels: int, num_blocks: int
    ):
        super().__init__()
        self.block = nn.ModuleList(
            Emu35VisionTokenizerResnetBlock(config, in_channels if index == 0 else out_channels, out_channels)
            for index in range(num_blocks)
        )
        has_attention = config.resolution // 2**level in config.attn_resolutions
        self.attn = nn.ModuleList(
            Emu35VisionTokenizerAttention(config, out_channels) for _ in range(num_blocks if has_attention else 0)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.block):
            hidden_states = block(hidden_states)
            if self.attn:
                hidden_states = self.attn[index](hidden_states)
        return hidden_states


class Emu35VisionTokenizerEncoder(nn.Module):
    """(B, in_channels, H, W) -> (B, latent_channels, H/f, W/f)."""

    def __init__(self, config: Emu35VisionTokenizerConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multiplier]
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.base_channels
        for index, width in enumerate(widths):
            level = Emu35VisionTokenizerLevel(config, index, channels, width, config.num_res_blocks)
            if index < len(widths) - 1:
                level.downsample = Emu35VisionTokenizerDownsample(width)
            self.down.append(level)
            channels = width
        self.mid = Emu35VisionTokenizerMid(config, channels)
        self.norm_out = _norm(config, channels)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv_in(pixel_values)
        for index, level in enumerate(self.down):
            hidden_states = level(hidden_states)
            if index < len(self.down) - 1:
                hidden_states = level.downsample(hidden_states)
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden_states))))


class Emu35VisionTokenizerDecoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, out_channels, h*f, w*f).  `up` is numbered like the encoder's `down`."""

    def __init__(self, config: Emu35VisionTokenizerConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multiplier]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Emu35VisionTokenizerMid(config, widths[-1])
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            channels = widths[min(index + 1, len(widths) - 1)]  # what comes from the coarser level
            level = Emu35VisionTokenizerLevel(config, index, channels, width, config.num_res_blocks + 1)
            if index > 0:
                level.upsample = Emu35VisionTokenizerUpsample(width)
            self.up.append(level)
        self.norm_out = _norm(config, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden_states = self.mid(self.conv_in(latents))
        for index, level in reversed(list(enumerate(self.up))):
            hidden_states = level(hidden_states)
            if index > 0:
                hidden_states = level.upsample(hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states)))


class Emu35VisionTokenizerCodebook(nn.Embedding):
    """Codebook rows by code, or codes by latent: whichever is given.

    Both go through `forward`, because accelerate's offload hooks bring the weights in around `forward` only.
    """

    def forward(
        self, codes: torch.Tensor | None = None, latents: torch.Tensor | None = None, normalize: bool = False
    ) -> torch.Tensor:
        if latents is not None:
            return nearest_codes(latents, self.weight, normalize_codebook=normalize)
        rows = super().forward(codes)
        return F.normalize(rows, dim=-1) if normalize else rows


class Emu35VisionTokenizerQuantizer(nn.Module):
    """latents (B, embed_dim, h, w) <-> codes (B, h, w)."""

    def __init__(self, config: Emu35VisionTokenizerConfig):
        super().__init__()
        self.normalize_latents = config.normalize_latents
        self.logit_scale = float(config.logit_scale)
        self.embedding = Emu35VisionTokenizerCodebook(config.codebook_size, config.embed_dim)

    def _normalize(self, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(rows, dim=-1) if self.normalize_latents else rows

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = latents.shape
        # The length of a latent does not change its nearest code, that of a code does.
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
        return self.embedding(latents=rows, normalize=self.normalize_latents).view(batch, height, width)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.embedding(codes, normalize=self.normalize_latents).permute(0, 3, 1, 2).contiguous()

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """IBQ's straight-through quantisation.  Source: arXiv 2412.02692, section 3.

        The gradient reaches *every* codebook row, through the softmax: that is what keeps large codebooks in use. It
        costs a (positions, codebook_size) tensor, which is meant in training and never needed in inference (`encode`).

        Returns:
            quantised latents of the shape of `latents`; codes `(batch, h, w)`; the unweighted losses.
        """
        batch, dim, height, width = latents.shape
        rows = self._normalize(latents.permute(0, 2, 3, 1).reshape(-1, dim).float())  # (N, D)
        codebook = self._normalize(self.embedding.weight.float())  # (K, D)
        logits = self.logit_scale * rows @ codebook.T  # (N, K)
        soft = logits.softmax(dim=-1)
        codes = logits.argmax(dim=-1)
        hard = torch.zeros_like(soft).scatter_(1, codes[:, None], 1.0)
        quantized = (hard - soft.detach() + soft) @ codebook

        usage = soft.mean(dim=0)
        entropy_of_codes = -(soft * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
        entropy_of_usage = -(usage * usage.clamp_min(1e-12).log()).sum()
        losses = {
            "quantization_loss": F.mse_loss(codebook[codes], rows.detach()),
            "commitment_loss": F.mse_loss(rows, codebook[codes].detach()),
            "entropy_loss": entropy_of_codes - entropy_of_usage,
        }
        quantized = quantized.view(batch, height, width, dim).permute(0, 3, 1, 2).to(latents.dtype)
        return quantized, codes.view(batch, height, width), losses


def nearest_codes(
    rows: torch.Tensor,
    codebook: torch.Tensor,
    normalize_codebook: bool = False,
) -> torch.Tensor:
    """Code of the largest dot product, without the (positions, codebook_size) tensor of all of them.

    Products are in float32 whatever the dtype: bfloat16 would move codes. Ties go to the lower code, as in `argmax`.

    Args:
        rows (`torch.Tensor` of shape `(num_positions, embed_dim)`): latents.
        codebook (`torch.Tensor` of shape `(codebook_size, embed_dim)`): one row a code.
        normalize_codebook (`bool`): compare with unit-length rows (cosine).
    Returns:
        `torch.LongTensor` of shape `(num_positions,)`: codes in `[0, codebook_size)`.
    """
    codes = torch.zeros(rows.shape[0], dtype=torch.long, device=rows.device)
    best = torch.full((rows.shape[0],), float("-inf"), device=rows.device)
    rows = rows.float()
    for start in range(0, codebook.shape[0], QUANTIZE_CODES_PER_CHUNK):
        chunk = codebook[start : start + QUANTIZE_CODES_PER_CHUNK].float()
        if normalize_codebook:
            chunk = F.normalize(chunk, dim=-1)
        for first in range(0, rows.shape[0], QUANTIZE_POSITIONS_PER_CHUNK):
            part = slice(first, first + QUANTIZE_POSITIONS_PER_CHUNK)
            value, index = (rows[part] @ chunk.T).max(dim=-1)
            better = value > best[part]
            best[part] = torch.where(better, value, best[part])
            codes[part] = torch.where(better, index + start, codes[part])
    return codes


def to_uint8_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
    """Model range to bytes, as the release does it: `(y + 1) * 127.5`, clamped to 0..255, *truncated*.

    Args:
        pixel_values (`torch.FloatTensor` of any shape): what `decode` returns, nominally in [-1, 1].
    Returns:
        `torch.ByteTensor` of the same shape.
    """
    return ((pixel_values.float() + 1.0) * 127.5).clamp(0.0, 255.0).to(torch.uint8)


def _by_shape(items: Sequence[torch.Tensor], function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """`function` on batches of equal shape (nothing is padded), results in the order of `items`."""
    groups: dict[tuple, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((*item.shape, item.device, item.dtype), []).append(index)
    results: list[torch.Tensor | None] = [None] * len(items)
    for indices in groups.values():
        for index, result in zip(indices, function(torch.stack([items[i] for i in indices])), strict=True):
            results[index] = result
    return results


class Emu35VisionTokenizer(StrictCheckpointMixin, PreTrainedModel):
    r"""
    Images to codes and back.  `from_pretrained` reads our own checkpoints and the released folder (`config.yaml` +
    `model.ckpt`, without ever unpickling code).

    Weights stay in float32 even if the rest of a model is loaded in half precision, which would change codes.
    `model.to(torch.bfloat16)` converts them all the same.

    Example:
        >>> codes = tokenizer.encode(pixel_values)  # (B, 3, H, W) in [-1, 1] -> (B, H/f, W/f)
        >>> pixels = to_uint8_pixels(tokenizer.decode(codes))
    """

    config_class = Emu35VisionTokenizerConfig
    base_model_prefix = "vision_tokenizer"
    # So that it also loads from the checkpoint of a whole model.
    _keys_to_ignore_on_load_unexpected = [r"^model\.", r"^lm_head\."]
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # Its few attention blocks compute the same whatever is asked for; what is asked for is meant for the decoder
    # beside it.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _no_split_modules = [
        "Emu35VisionTokenizerResnetBlock",
        "Emu35VisionTokenizerAttention",
        "Emu35VisionTokenizerQuantizer",
    ]
    _keep_in_fp32_modules_strict = ["encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"]

    def __init__(self, config: Emu35VisionTokenizerConfig):
        super().__init__(config)
        self.encoder = Emu35VisionTokenizerEncoder(config)
        self.decoder = Emu35VisionTokenizerDecoder(config)
        self.quantize = Emu35VisionTokenizerQuantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # Torch's own initialisation shrinks the signal layer by layer until the biases drown it, and GroupNorm of few
        # groups does not take those away: a small model then starts several times slower.
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="linear")
            init.zeros_(module.bias)
            if module is self.post_quant_conv and self.config.normalize_latents:
                init.normal_(module.weight)  # its input has unit length, so each entry is small
        elif isinstance(module, Emu35VisionTokenizerResnetBlock):
            init.zeros_(module.conv2.weight)  # blocks start as their shortcut
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)

    @property
    def downsampling_factor(self) -> int:
        """Pixels a side of one code."""
        return self.config.downsampling_factor

    @apply_forward_hook
    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Images to codes.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`, or a list of `(3, height, width)`):
                pixels `x / 127.5 - 1`. Images in a list may differ in size; equal sizes are encoded together.
        Returns:
            `torch.LongTensor` of shape `(batch, height / f, width / f)`, or a list of `(height / f, width / f)`.
        Raises:
            TypeError: if `pixel_values` is not made of floating-point tensors.
            ValueError: on a wrong rank or number of channels, a size that is not a multiple of f, or NaN.
        """
        if not isinstance(pixel_values, torch.Tensor):
            images = _as_list("pixel_values", pixel_values)
            for index, image in enumerate(images):
                self._check_pixels(image, 3, f"pixel_values[{index}]")
            return _by_shape(images, self._encode)
        self._check_pixels(pixel_values, 4)
        return self._encode(pixel_values)

    @apply_forward_hook
    @torch.no_grad()
    def decode(self, codes: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Codes to pixels.

        Args:
            codes (`torch.LongTensor` of shape `(batch, token_height, token_width)`, or a list of
                `(token_height, token_width)`): in `[0, codebook_size)`. Grids in a list may differ in size.
        Returns:
            `torch.FloatTensor` of shape `(batch, 3, f * token_height, f * token_width)`, or a list of
            `(3, f * token_height, f * token_width)`: nominally in [-1, 1], not clamped (see `to_uint8_pixels`).
        Raises:
            TypeError: if `codes` is not made of integer tensors.
            ValueError: on a wrong rank, an empty grid, or a code outside the codebook.
        """
        if not isinstance(codes, torch.Tensor):
            grids = _as_list("codes", codes)
            for index, grid in enumerate(grids):
                self._check_codes(grid, 2, f"codes[{index}]")
            return _by_shape(grids, self._decode)
        self._check_codes(codes, 3)
        return self._decode(codes)

    def forward(self, pixel_values: torch.FloatTensor, return_loss: bool | None = None) -> Emu35VisionTokenizerOutput:
        """Encode, quantise and decode.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`): pixels `x / 127.5 - 1`.
            return_loss (`bool`, *optional*, defaults to `self.training`):
                quantise with IBQ's straight-through and return its losses. Otherwise by argmax, without gradients to
                the encoder.
        """
        self._check_pixels(pixel_values, 4)
        return_loss = self.training if return_loss is None else return_loss
        latents = self.latents(pixel_values)
        if not return_loss:
            codes = self.quantize.encode(latents)
            return Emu35VisionTokenizerOutput(reconstruction=self._decode(codes), codes=codes, latents=latents)
        quantized, codes, losses = self.quantize(latents)
        reconstruction = self.decode_latents(quantized)
        difference = F.l1_loss if self.config.reconstruction_loss == "l1" else F.mse_loss
        losses["reconstruction_loss"] = difference(reconstruction.float(), pixel_values.float())
        loss = losses["reconstruction_loss"] + sum(
            getattr(self.config, f"{name}_weight") * losses[name]
            for name in ("quantization_loss", "commitment_loss", "entropy_loss")
        )
        return Emu35VisionTokenizerOutput(
            loss=loss, reconstruction=reconstruction, codes=codes, latents=latents, **losses
        )

    def latents(self, pixel_values: torch.FloatTensor) -> torch.FloatTensor:
        """`(batch, 3, H, W)` -> latents before quantisation, `(batch, embed_dim, H/f, W/f)`."""
        return self.quant_conv(self.encoder(pixel_values.to(self.dtype)))

    def decode_latents(self, latents: torch.FloatTensor) -> torch.FloatTensor:
        """Quantised latents `(batch, embed_dim, h, w)` -> pixels `(batch, 3, h*f, w*f)`."""
        return self.decoder(self.post_quant_conv(latents.to(self.dtype)))

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.quantize.encode(self.latents(pixel_values))

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.decode_latents(self.quantize.decode(codes.long()))

    def _check_pixels(self, pixel_values: torch.Tensor, rank: int, name: str = "pixel_values"):
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            kind = pixel_values.dtype if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
            raise TypeError(f"`{name}` must be a floating-point tensor (bytes: `x / 127.5 - 1`), got {kind}.")
        shape = tuple(pixel_values.shape)
        if pixel_values.ndim != rank:
            wanted = "(batch, channels, height, width)" if rank == 4 else "(channels, height, width)"
            raise ValueError(
                f"`{name}` must have the shape {wanted}, got {shape}. Use `x[None]` for one image, a list for images "
                "of different sizes."
            )
        if shape[-3] != self.config.in_channels or 0 in shape:
            raise ValueError(
                f"`{name}` must have {self.config.in_channels} channels and no empty dimension, got {shape}."
            )
        for side, size in (("height", shape[-2]), ("width", shape[-1])):
            factor = self.downsampling_factor
            if size % factor:
                lower, higher = size // factor * factor, (size // factor + 1) * factor
                nearest = f"{lower} or {higher}" if lower else f"{higher}"
                raise ValueError(
                    f"`{name}`: the {side} must be a multiple of {factor}, got {size}. Nearest: {nearest}."
                )
        if not torch.isfinite(pixel_values).all():
            raise ValueError(f"`{name}` holds NaN or infinite values. Pixels lie in [-1, 1].")

    def _check_codes(self, codes: torch.Tensor, rank: int, name: str = "codes"):
        kind = codes.dtype if isinstance(codes, torch.Tensor) else type(codes).__name__
        if not isinstance(codes, torch.Tensor) or codes.is_floating_point() or codes.is_complex():
            raise TypeError(f"`{name}` must be an integer tensor, got {kind}.")
        if codes.dtype == torch.bool:
            raise TypeError(f"`{name}` must be an integer tensor, got {kind}.")
        shape = tuple(codes.shape)
        if codes.ndim != rank:
            wanted = "(batch, token_height, token_width)" if rank == 3 else "(token_height, token_width)"
            raise ValueError(
                f"`{name}` must have the shape {wanted}, got {shape}. Use `codes.view(1, token_height, token_width)` "
                "for one image, a list for images of different sizes."
            )
        if 0 in shape:
            raise ValueError(f"`{name}` must hold at least one code, got the shape {shape}.")
        lowest, highest = (int(value) for value in codes.aminmax())
        if lowest < 0 or highest >= self.config.codebook_size:
            bad = lowest if lowest < 0 else highest
            raise ValueError(
                f"`{name}` must lie in [0, {self.config.codebook_size}), got {bad}. Vocabulary ids become codes by "
                "subtracting `visual_token_offset`."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, **kwargs):
        """[`PreTrainedModel.from_pretrained`], which also reads the released folder (`config.yaml` + `model.ckpt`)."""
        if pretrained_model_name_or_path is not None:
            directory = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if is_released_vision_tokenizer(directory):
                kwargs.pop("subfolder", None)
                config, state_dict = load_released_vision_tokenizer(directory)
                kwargs.setdefault("config", config)
                # What is stored is float16; the release copies it into float32 parameters.
                kwargs["state_dict"] = {name: tensor.float() for name, tensor in state_dict.items()}
                model = super().from_pretrained(None, *model_args, **kwargs)
                loaded = model[0] if isinstance(model, tuple) else model
                loaded.name_or_path = str(pretrained_model_name_or_path)
                return model
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)


def _as_list(name: str, value: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"`{name}` must be a tensor or a list of tensors, got {type(value).__name__}.")
    return list(value)


__all__ = [
    "Emu35VisionTokenizer",
    "Emu35VisionTokenizerOutput",
    "is_released_vision_tokenizer",
    "load_released_vision_tokenizer",
    "nearest_codes",
    "to_uint8_pixels",
]
