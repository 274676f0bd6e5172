"""Text tokenizers of Emu3.5, and the token layout that belongs to one.

All of them are byte-level BPE with Qwen's pre-tokenizer pattern and NFC normalisation, held by a plain
`PreTrainedTokenizerFast`, so that `tokenizer.json` is all there is to save. Three ways to get one:

- [`tokenizer_from_tiktoken`]: the release's `emu3.tiktoken`;
- [`tokenizer_from_qwen`]: any Qwen2 or Qwen3 tokenizer directory (same ranks, hence the same ids);
- [`train_small_tokenizer`]: a word-like vocabulary of its own for a small model.

The visual tokens are not in the tokenizer: 131,072 added tokens make it slow to load, and ids are enough. They begin
right after its last token; [`token_layout_from_tokenizer`] says where.
"""

import base64
import binascii
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .configuration_emu35 import SPECIAL_TOKENS, Emu35TextConfig, Emu35TokenLayout

#: Name of the rank file in the release.
TIKTOKEN_FILE = "emu3.tiktoken"

#: Qwen's pre-tokenizer: contractions, words with one leading character, *single* digits, punctuation, white space.
PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: The control tokens of the released vocabulary in the order of their ids, right after the text tokens.
RELEASED_CONTROL_TOKENS: tuple[str, ...] = (
    SPECIAL_TOKENS["pad"],
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
    SPECIAL_TOKENS["img"],
    SPECIAL_TOKENS["boi"],
    SPECIAL_TOKENS["eoi"],
)


def tokenizer_from_tiktoken(
    path: str | os.PathLike, model_max_length: int = Emu35TextConfig.max_position_embeddings
) -> PreTrainedTokenizerFast:
    """The released tokenizer as a fast one.  Same ids and same decoded text, without the release's remote code.

    Args:
        path: the release's `emu3.tiktoken`, or the directory that holds it.
        model_max_length (`int`): longest prompt, in tokens.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line of it is not `base64-token rank`, or if the ranks are not 0, 1, 2, ...
    """
    path = Path(path)
    if path.is_dir():
        path = path / TIKTOKEN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"`path`: no file {path}. Give the release's {TIKTOKEN_FILE} or its directory.")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}, line {number}: expected `base64-token rank`, got {line[:80]!r}.") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{path}: ranks must be 0..n-1 and hold all 256 bytes; got {len(ranks)} tokens.")

    vocab = {_printable(token): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts = _last_parts(token, ranks)
            # A token no merge leads to is still found when it is a whole word, thanks to `ignore_merges`.
            if len(parts) == 2:
                merges.append((_printable(parts[0]), _printable(parts[1])))
    return _wrap(_byte_level_bpe(vocab, merges), RELEASED_CONTROL_TOKENS, model_max_length)


def tokenizer_from_qwen(
    directory: str | os.PathLike, model_max_length: int = Emu35TextConfig.max_position_embeddings
) -> PreTrainedTokenizerFast:
    """The released tokenizer, from a Qwen2 or Qwen3 tokenizer directory: their text vocabularies are the same.

    Only vocabulary and merges are taken; Qwen's own control tokens give way to those of Emu3.5.

    Args:
        directory: holds `tokenizer.json`, or `vocab.json` and `merges.txt`.
        model_max_length (`int`): longest prompt, in tokens.
    Raises:
        FileNotFoundError: if neither is there.
        ValueError: if it is not a byte-level BPE whose ids are 0..n-1.
    """
    directory = Path(directory)
    whole, vocab_file, merges_file = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.is_file():
        model = json.loads(whole.read_text(encoding="utf-8")).get("model", {})
        vocab, merges = model.get("vocab"), model.get("merges")
        if model.get("type", "BPE") != "BPE" or not isinstance(vocab, dict) or merges is None:
            raise ValueError(f"{whole} holds a {model.get('type')} model, not the byte-level BPE of Qwen2 and Qwen3.")
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    elif vocab_file.is_file() and merges_file.is_file():
        vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
        lines = merges_file.read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    else:
        raise FileNotFoundError(
            f"`directory`: found neither tokenizer.json nor vocab.json and merges.txt in {directory}. "
            "Give the directory of a Qwen2 or Qwen3 tokenizer."
        )
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{directory}: the ids of the text tokens must be 0..{len(vocab) - 1} without gaps.")
    return _wrap(_byte_level_bpe(vocab, merges), RELEASED_CONTROL_TOKENS, model_max_length)


def train_small_tokenizer(
    texts: Iterable[str], vocab_size: int, model_max_length: int = 4096
) -> PreTrainedTokenizerFast:
    """Trains a vocabulary for a small model: frequent words, with their leading space, are one token each.

    All 256 bytes are in it, so any text can be encoded; digits and `*`, of which sizes are made, are single tokens.

    Args:
        texts: what the vocabulary shall be good at.  Include the prompts' own words: "You are a helpful assistant".
        vocab_size (`int`): upper bound for text and control tokens together; the visual tokens come after them.
        model_max_length (`int`): longest prompt, in tokens.
    Raises:
        ValueError: if `vocab_size` has no room for the 256 bytes and the control tokens.
    """
    control_tokens = tuple(SPECIAL_TOKENS.values())
    smallest = 256 + len(control_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size` must be at least {smallest} (256 bytes and {len(control_tokens)} control tokens), "
            f"got {vocab_size}."
        )
    tokenizer = _byte_level_bpe()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(control_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _wrap(tokenizer, control_tokens, model_max_length)


def token_layout_from_tokenizer(
    tokenizer: PreTrainedTokenizerBase, num_visual_tokens: int, size_digits: Sequence[int] = (2, 2)
) -> Emu35TokenLayout:
    """Reads the ids of the control tokens, the digits and `*` off a tokenizer; visual ids begin where it ends.

    Args:
        tokenizer: one made by this module.
        num_visual_tokens (`int`): size of the visual vocabulary, at least the vision tokenizer's `codebook_size`.
        size_digits (`Sequence[int]`): smallest and largest number of digits when the model chooses an image's size.
    Raises:
        ValueError: if a token that every image needs is missing.
    """
    vocab = tokenizer.get_vocab()
    ids = {f"{role}_token_id": vocab.get(token) for role, token in SPECIAL_TOKENS.items()}
    needed = {f"{role}_token_id": SPECIAL_TOKENS[role] for role in ("pad", "bos", "eos", "boi", "img", "eol", "eoi")}
    missing = [token for name, token in needed.items() if ids[name] is None]
    missing += [token for token in (*"0123456789", "*") if token not in vocab]
    if missing:
        raise ValueError(
            f"`tokenizer` lacks {missing}. Make it with tokenizer_from_tiktoken, tokenizer_from_qwen or "
            "train_small_tokenizer."
        )
    return Emu35TokenLayout(
        **ids,
        visual_token_offset=max(vocab.values()) + 1,
        num_visual_tokens=num_visual_tokens,
        digit_token_ids=[vocab[digit] for digit in "0123456789"],
        size_separator_token_id=vocab["*"],
        size_digits=list(size_digits),
    )


def _byte_level_bpe(vocab: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None) -> Tokenizer:
    # `ignore_merges` is tiktoken's rule: a piece that is a token as a whole is that token.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=vocab is not None))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer, control_tokens: Sequence[str], model_max_length: int) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS["bos"],
        eos_token=SPECIAL_TOKENS["eos"],
        pad_token=SPECIAL_TOKENS["pad"],
        model_max_length=model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _byte_characters() -> dict[int, str]:
    """GPT-2's table: every byte as one printable character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


_BYTE_CHARACTERS = _byte_characters()


def _printable(token: bytes) -> str:
    return "".join(_BYTE_CHARACTERS[byte] for byte in token)


def _last_parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What `token` is made of just before the merge that completes it, when its bytes are merged by rank."""
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = ((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        rank, i = min(candidates)
        if rank >= limit:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


__all__ = [
    "token_layout_from_tokenizer",
    "tokenizer_from_qwen",
    "tokenizer_from_tiktoken",
    "train_small_tokenizer",
]
