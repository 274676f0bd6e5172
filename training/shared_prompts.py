"""Answers to the same prompts in one pass, which computes each prompt once, and equal answers to it.

    rows of a batch           one sequence, without padding

    prompt 1  answer 1
    prompt 1  answer 2   ──►  prompt 1  answer 1  answer 2  prompt 2  answer 3 ...
    prompt 2  answer 3

An answer sees its prompt and itself. Of 8 short answers to a question about an image, that is a
sixth of the tokens; nor is anything computed for padding, but in attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass
class _Part:
    """Tokens whose attention is computed together: rows `(rows, longest)`, padded on the right.

    Attributes:
        places (`torch.LongTensor` of shape `(rows, longest)`): in the sequence; 0 where a row has no token.
        kept (`torch.LongTensor` of shape `(tokens,)`): which of the flattened places are tokens.
        prompts (`torch.LongTensor` of shape `(rows,)`, *optional*): of answers: the rows of the prompts before them.
        mask (`torch.BoolTensor` of shape `(rows, 1, longest, longest_prompt + longest)`, *optional*):
            of answers; prompts are causal.
    """

    places: torch.Tensor
    kept: torch.Tensor
    prompts: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class SharedPrompts:
    """A batch of prompts and answers as one sequence.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`), attention_mask:
            prompts padded on the left, then answers padded on the right.
        answer_length (`int`): columns of the answers.

    Attributes:
        input_ids, position_ids (`torch.LongTensor` of shape `(1, tokens)`):
            each prompt once, and different answers but for their last tokens, which nothing follows.
        before (`torch.LongTensor` of shape `(batch, answer_length)`):
            the place of the token before each token of the answers: what predicts it.
    """

    def __init__(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, answer_length: int):
        device, mask = input_ids.device, attention_mask.bool().cpu()
        own = [row[kept].tolist() for row, kept in zip(input_ids.cpu(), mask, strict=True)]
        lengths = mask[:, mask.shape[1] - answer_length :].sum(-1).tolist()
        prompts: dict[tuple[int, ...], list[int]] = {}  # -> rows of its answers
        for row, (ids, length) in enumerate(zip(own, lengths, strict=True)):
            prompts.setdefault(tuple(ids[: len(ids) - length]), []).append(row)
        texts = list(prompts)
        ids, positions, self._parts = [], [], []
        before = torch.zeros(len(own), answer_length, dtype=torch.long)
        for together in like_lengths([len(text) for text in texts]):
            starts, sizes = [], [len(texts[index]) for index in together]
            for index in together:
                starts.append(len(ids))
                ids += texts[index]
                positions += range(len(texts[index]))
            self._parts.append(_Part(*_places(starts, sizes, device)))
            answers: dict[tuple[int, tuple[int, ...]], int] = {}  # prompt, all but the last token -> its start
            prompt_of, answer_sizes = [], []
            for number, index in enumerate(together):
                for row in prompts[texts[index]]:
                    text = tuple(own[row][:-1])
                    if (number, text) not in answers:
                        answers[number, text] = len(ids)
                        prompt_of.append(number)
                        answer_sizes.append(len(text) - sizes[number])
                        ids += text[sizes[number] :]
                        positions += range(sizes[number], len(text))
                    before[row, : lengths[row]] = torch.arange(lengths[row]) + answers[number, text] - 1
                    before[row, 0] = starts[number] + sizes[number] - 1
            if any(answer_sizes):
                places, kept = _places(list(answers.values()), answer_sizes, device)
                longest = places.shape[1]
                known = torch.arange(max(sizes)) < torch.tensor(sizes)[prompt_of][:, None]  # (answers, longest_prompt)
                causal = torch.ones(longest, longest, dtype=torch.bool).tril().expand(len(prompt_of), -1, -1)
                visible = torch.cat([known[:, None].expand(-1, longest, -1), causal], dim=-1)[:, None]
                self._parts.append(_Part(places, kept, torch.tensor(prompt_of, device=device), visible.to(device)))
        self.input_ids = torch.tensor([ids], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.before = before.to(device)

    def attend(
        self,
        module: nn.Module,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attention_mask: None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """An `attention_function` of [`Emu35Attention`], with the signature of transformers' own.

        Args:
            queries, keys, values (`torch.Tensor` of shape `(1, heads, tokens, head_dim)`).
        Returns:
            `torch.Tensor` of shape `(1, tokens, heads, head_dim)`, and no weights.
        """
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        attended, device = [], queries.device  # of the layer: a model may be spread over several
        prompt_keys = prompt_values = None
        for part in self._parts:
            places = part.places.to(device)
            own = [states[0][:, places].transpose(0, 1) for states in (queries, keys, values)]
            if part.prompts is None:
                _, prompt_keys, prompt_values = own
                mask = None
            else:
                prompts, mask = part.prompts.to(device), part.mask.to(device)
                own[1] = torch.cat([prompt_keys[prompts], own[1]], dim=2)
                own[2] = torch.cat([prompt_values[prompts], own[2]], dim=2)
            attended.append(sdpa(module, *own, mask, **kwargs)[0].flatten(0, 1)[part.kept.to(device)])
        return torch.cat(attended)[None], None


def _places(starts: Sequence[int], sizes: Sequence[int], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and what is kept of them, see [`_Part`], of stretches of a sequence."""
    rows = [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    places = pad_sequence(rows, batch_first=True, padding_value=0)
    kept = torch.arange(places.shape[1]) < torch.tensor(sizes)[:, None]
    return places.to(device), kept.flatten().nonzero()[:, 0].to(device)


def like_lengths(lengths: Sequence[int], longest: float = 1.25) -> list[list[int]]:
    """Numbers of rows in groups, in each of which no row is more than `longest` times as long as the shortest.

    The tasks of a batch differ in length: padded to the longest, half of what is computed would be padding.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if not groups or lengths[row] > longest * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups
