"""Answers to the same prompts in one sequence: fewer tokens, the same numbers."""

import pytest
import torch
from emu35.training.rollout import RolloutSettings, TokenKind, score_answers
from emu35.training.shared_prompts import SharedPrompts, like_lengths

#: Prompt and answer, by row. Ids below 256 are text.
ROWS = [
    ([1, 2, 3, 4, 5], [11, 12, 13]),
    ([1, 2, 3, 4, 5], [14]),
    ([7, 8], [15, 16, 17, 18]),
    ([1, 2, 3, 4, 5], [19, 20]),
    ([7, 8], [21]),
    ([9, 9, 9, 9, 9, 9], [22, 23]),
    ([7, 8], [15, 16, 17, 24]),  # differs in the last token, which is not there
    ([1, 2, 3, 4, 5], [11, 12, 13]),  # said before
    ([9, 9, 9, 9, 9, 9, 9], [22, 23]),  # to another prompt
    ([1, 2, 3, 4, 5, 11], [12, 25]),  # a prompt that is another one and the beginning of its answer
]


def batch(rows=ROWS):
    """Prompts padded on the left, answers on the right."""
    left, right = (max(len(row[part]) for row in rows) for part in (0, 1))
    ids, mask, kinds = [], [], []
    for prompt, answer in rows:
        before, after = [0] * (left - len(prompt)), [0] * (right - len(answer))
        ids.append([*before, *prompt, *answer, *after])
        mask.append([*before, *[1] * len(prompt + answer), *after])
        kinds.append([int(TokenKind.TEXT)] * len(answer) + after)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(kinds)


def test_each_prompt_and_answer_is_there_once_and_last_tokens_are_not():
    ids, mask, kinds = batch()
    shared = SharedPrompts(ids, mask, kinds.shape[1])
    found, positions = shared.input_ids[0].tolist(), shared.position_ids[0].tolist()
    assert sorted(found) == sorted(
        [1, 2, 3, 4, 5, 7, 8, *[9] * 13, 11, 12, 15, 16, 17, 19, 22, 22, 1, 2, 3, 4, 5, 11, 12]
    )
    assert positions[found.index(8)] == 1 and positions[found.index(12)] == 6 and positions[found.index(17)] == 4
    for row, (prompt, answer) in enumerate(ROWS):
        assert shared.input_ids[0, shared.before[row, : len(answer)]].tolist() == [prompt[-1], *answer[:-1]]


def alone(model, prompt, answer, settings):
    """Log-probabilities of one answer, from the plain forward pass over its own row."""
    ids = torch.tensor([prompt + answer])
    hidden_states = model.model(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    logits = model.compute_logits(hidden_states, vocabulary="text").float() / settings.temperature
    blocked = model.config.token_layout.image_placeholder_token_id
    if blocked is not None:
        logits = logits.index_fill(-1, torch.tensor([blocked]), float("-inf"))
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_values_and_gradients_are_those_of_each_row_alone(make_tiny_model, checkpointing):
    settings, weights = RolloutSettings(temperature=0.9), torch.linspace(-1, 1, len(ROWS))
    none = dict.fromkeys(("attention_dropout", "embedding_dropout", "residual_dropout"), 0.0)
    model = make_tiny_model(num_key_value_heads=1, **none).train()  # several query heads to one of the keys
    expected = [alone(model, *row, settings) for row in ROWS]
    sum(weight * one.sum() for weight, one in zip(weights, expected, strict=True)).backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    log_probs = score_answers(model, *batch(), settings)["log_probs"]
    for row, one in enumerate(expected):
        # Sums in another order, no more.
        torch.testing.assert_close(log_probs[row, : len(one)], one, atol=1e-5, rtol=0)
        assert not log_probs[row, len(one) :].any()
    (weights[:, None] * log_probs).sum().backward()
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"} <= gradients.keys()
    for name, one in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(one.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_an_answer_does_not_see_the_others(tiny_model):
    settings = RolloutSettings()
    before = score_answers(tiny_model, *batch(), settings)["log_probs"]
    (prompt, answer), *others = ROWS
    changed = [(prompt, [30] * len(answer)), *others]
    after = score_answers(tiny_model, *batch(changed), settings)["log_probs"]
    assert not torch.allclose(after[0], before[0])
    torch.testing.assert_close(after[1:], before[1:], atol=1e-6, rtol=0)


def test_answers_of_one_token_need_the_prompts_alone(tiny_model):
    rows = [([1, 2, 3], [5]), ([1, 2, 3], [6]), ([4], [7])]
    ids, mask, kinds = batch(rows)
    assert SharedPrompts(ids, mask, 1).input_ids.tolist() == [[4, 1, 2, 3]]
    found = score_answers(tiny_model, ids, mask, kinds, RolloutSettings())["log_probs"]
    expected = torch.stack([alone(tiny_model, *row, RolloutSettings())[0] for row in rows])
    torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=0)


def test_prompts_of_like_lengths_go_together():
    assert like_lengths([100, 40, 126, 50, 120, 51]) == [[1, 3], [5], [0, 4], [2]]
    assert like_lengths([7]) == [[0]]
