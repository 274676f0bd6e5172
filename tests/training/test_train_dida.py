"""Adaptation training: noisy copies, who sees whom, two passes against one, losses."""

import numpy as np
import pytest
import torch
from emu35.pipelines.scheduling_dida import DiDAScheduler
from emu35.training.batches import Batch
from emu35.training.dida import add_adapter, code_losses, noisy_hidden_states
from emu35.training.dida_attention import PrefixCache, clean_mask, dida_mask
from emu35.training.dida_batches import add_noisy_copies
from emu35.training.dida_recipe import LoRARecipe
from emu35.training.sequences import IGNORED

NUM_CODES = 48
LENGTH, COPIES, NOISY_LENGTH = 60, 2, 24


def clean_batch(layout):
    """Two rows: three sequences with images of two sizes (one of them given, not learnt); one sequence and padding."""
    rng = np.random.default_rng(0)

    def image(height, width):
        codes = rng.integers(NUM_CODES, size=(height, width)) + layout.visual_token_offset
        return layout.image_token_ids(codes.tolist())

    def text(number):
        return rng.integers(20, 200, size=number).tolist()

    given, learnt = [(IGNORED, image(2, 2))], [(1, image(2, 3))]
    rows = [
        [[(IGNORED, text(3)), *learnt, (1, text(2))], [(IGNORED, text(1)), *given, (1, image(3, 2))], [(1, text(5))]],
        [[(IGNORED, text(2)), (1, image(1, 4)), (1, text(1)), (1, image(2, 2))]],
    ]
    shape = (len(rows), LENGTH)
    ids, labels = torch.full(shape, layout.pad_token_id), torch.full(shape, IGNORED)
    positions = torch.zeros(shape, dtype=torch.long)
    for index, row in enumerate(rows):
        begin = 0
        for sequence in row:
            tokens = [token for _, part in sequence for token in part]
            span = slice(begin, begin + len(tokens))
            ids[index, span] = torch.tensor(tokens)
            marks = [mark for mark, part in sequence for _ in part]
            labels[index, span] = torch.where(torch.tensor(marks) == 1, ids[index, span], IGNORED)
            positions[index, span] = torch.arange(len(tokens))
            begin = span.stop
    return Batch(ids, labels, positions, torch.empty(0), 4, int((ids != layout.pad_token_id).sum()))


@pytest.fixture(scope="module")
def batch(tiny_layout):
    return add_noisy_copies(clean_batch(tiny_layout), tiny_layout, scheduler(), COPIES, NOISY_LENGTH, seed=3)


def scheduler(path="mixture"):
    return DiDAScheduler(num_codes=NUM_CODES, path=path)


def seen_one_by_one(batch):
    """(rows, all, all): the rule in words, token by token.  A noisy token knows its image by the ids around it."""
    rows = batch.input_ids.shape[0]
    total = LENGTH + COPIES * NOISY_LENGTH
    seen = torch.zeros(rows, total, total, dtype=torch.bool)
    for row in range(rows):
        sequence, number = [], -1
        for position in batch.position_ids[row].tolist():
            number += position == 0
            sequence.append(number)
        for query in range(LENGTH):
            for key in range(query + 1):
                seen[row, query, key] = sequence[query] == sequence[key]
        for copy in range(COPIES):
            blocks = batch.block_ids[row, copy].tolist()
            for query in range(NOISY_LENGTH):
                at = LENGTH + copy * NOISY_LENGTH + query
                if blocks[query] < 0:
                    continue
                members = [index for index, block in enumerate(blocks) if block == blocks[query]]
                for member in members:
                    seen[row, at, LENGTH + copy * NOISY_LENGTH + member] = True
                end = int(batch.noisy_end[row, copy, query])  # checked by itself, in the test of the blocks
                for key in range(end):
                    seen[row, at, key] = sequence[key] == sequence[end]
    return seen


def test_blocks_are_copies_of_learnt_images(batch, tiny_layout):
    layout = tiny_layout
    images = set()
    for row in range(2):
        for copy in range(COPIES):
            for block in range(int(batch.block_ids[row, copy].max()) + 1):
                at = batch.block_ids[row, copy] == block
                end, first = batch.noisy_end[row, copy][at], batch.noisy_first[row, copy][at]
                assert len(end.unique()) == len(first.unique()) == len(batch.times[row, copy][at].unique()) == 1
                start, length = int(end[0]), int(at.sum())
                clean, noisy = batch.input_ids[row, start : start + length], batch.noisy_ids[row, copy][at]
                assert clean[0] == noisy[0] == layout.img_token_id
                assert batch.input_ids[row, start + length] == layout.eoi_token_id
                assert batch.labels[row, start + 1] != IGNORED
                visual = clean >= layout.visual_token_offset
                assert torch.equal(clean[~visual], noisy[~visual])  # IMG and EOL stay clean
                assert (noisy[visual] >= layout.visual_token_offset).all()
                positions = batch.position_ids[row, start : start + length]
                assert torch.equal(batch.noisy_position_ids[row, copy][at], positions)
                following = batch.input_ids[row, start + 1 : start + length + 1]
                wanted = torch.where(
                    following >= layout.visual_token_offset, following - layout.visual_token_offset, -100
                )
                assert torch.equal(batch.targets[row, copy][at], wanted)
                assert int(first[0]) == start - int(positions[0])
                images.add((row, start))
    assert len(images) == 4  # the given image has none
    assert batch.num_blocks >= 4
    assert (batch.targets[batch.block_ids < 0] == IGNORED).all()


def test_masks_against_the_rule(tiny_model, batch):
    seen = seen_one_by_one(batch)
    real = torch.cat([torch.ones_like(batch.first, dtype=torch.bool), (batch.block_ids >= 0).flatten(1)], dim=1)
    config, like = tiny_model.config.text_config, torch.zeros(2, seen.shape[1], 1)
    tiny_model.set_attn_implementation("sdpa")
    whole = dida_mask(config, batch, like)[:, 0]
    assert torch.equal(whole[real], seen[real])
    assert not whole[:, :LENGTH, LENGTH:].any()
    tiny_model.set_attn_implementation("eager")
    assert torch.equal(dida_mask(config, batch, like)[:, 0] == 0, whole)
    assert torch.equal(clean_mask(config, batch, like[:, :LENGTH])[:, 0] == 0, whole[:, :LENGTH, :LENGTH])
    cache = PrefixCache()
    cache.update(torch.zeros(2 * COPIES, 1, LENGTH, 1), torch.zeros(2 * COPIES, 1, LENGTH, 1), 0)
    apart = dida_mask(config, batch, torch.zeros(2 * COPIES, NOISY_LENGTH, 1), cache)[:, 0] == 0
    for copy in range(COPIES):
        span = slice(LENGTH + copy * NOISY_LENGTH, LENGTH + (copy + 1) * NOISY_LENGTH)
        keys = torch.cat([whole[:, span, :LENGTH], whole[:, span, span]], dim=-1)
        assert torch.equal(apart[copy::COPIES], keys)


@pytest.mark.parametrize("with_cache", [False, True])
def test_the_mask_of_flex_attention_is_that_of_sdpa(tiny_model, batch, with_cache):
    """Cell by cell, without compiling its kernel; with a cache as an adapter is trained."""
    rows, length, cache = 2, LENGTH + COPIES * NOISY_LENGTH, None
    if with_cache:
        rows, length, cache = 2 * COPIES, NOISY_LENGTH, PrefixCache()
        cache.update(torch.zeros(rows, 1, LENGTH, 1), torch.zeros(rows, 1, LENGTH, 1), 0)
    config, like = tiny_model.config.text_config, torch.zeros(rows, length, 1)
    tiny_model.set_attn_implementation("sdpa")
    expected = dida_mask(config, batch, like, cache)[:, 0]
    tiny_model.set_attn_implementation("flex_attention")
    sees = dida_mask(config, batch, like, cache).mask_mod
    row, query, key = torch.meshgrid(*(torch.arange(size) for size in expected.shape), indexing="ij")
    assert torch.equal(sees(row, torch.zeros_like(row), query, key), expected)


@pytest.mark.slow
def test_flex_attention_agrees(tiny_model, batch):
    """Its mask is compiled, which takes a while."""
    with torch.no_grad():
        tiny_model.set_attn_implementation("sdpa")
        expected = noisy_hidden_states(tiny_model.model, batch, tiny_model.config.text_config)[0]
        tiny_model.set_attn_implementation("flex_attention")
        got = noisy_hidden_states(tiny_model.model, batch, tiny_model.config.text_config)[0]
    real = batch.block_ids >= 0
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_two_passes_with_a_fresh_adapter_equal_one_pass(tiny_model, batch, attention):
    tiny_model.set_attn_implementation(attention)
    config = tiny_model.config.text_config
    with torch.no_grad():
        whole, clean = noisy_hidden_states(tiny_model.model, batch, config)
        adapted = add_adapter(tiny_model, LoRARecipe(rank=4))
        apart, none = noisy_hidden_states(tiny_model.model, batch, config, adapted)
    assert none is None and clean.shape == (2, LENGTH, config.hidden_size)
    real = batch.block_ids >= 0
    torch.testing.assert_close(apart[real], whole[real], atol=1e-5, rtol=1e-4)


def test_a_block_against_decoding_by_hand(tiny_model, batch):
    """Frozen prefix in transformers' own cache, then one block with the adapter, which sees all of both."""
    model, config = tiny_model, tiny_model.config.text_config
    adapted = add_adapter(model, LoRARecipe(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        ours = noisy_hidden_states(model.model, batch, config, adapted)[0]
        everywhere = noisy_hidden_states(model.model, batch, config)[0]
        compared = 0
        for row in range(2):
            for copy in range(COPIES):
                at = batch.block_ids[row, copy] == 0
                first, end = int(batch.noisy_first[row, copy][at][0]), int(batch.noisy_end[row, copy][at][0])
                with adapted.disable_adapter():
                    cache = model.model(batch.input_ids[row : row + 1, first:end], use_cache=True).past_key_values
                by_hand = model.model(
                    batch.noisy_ids[row, copy][at][None],
                    attention_mask=torch.zeros(1, 1, int(at.sum()), end - first + int(at.sum())),
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                torch.testing.assert_close(ours[row, copy][at], by_hand[0], atol=1e-5, rtol=1e-4)
                compared += (ours[row, copy][at] - everywhere[row, copy][at]).abs().max() > 1e-2
    assert compared > 0  # an adapted prefix would be something else


def test_gradients_reach_the_adapter_alone(tiny_model, batch):
    adapted = add_adapter(tiny_model, LoRARecipe(rank=4))
    hidden_states = noisy_hidden_states(tiny_model.model, batch, tiny_model.config.text_config, adapted)[0]
    learnt = batch.targets != IGNORED
    code_losses(tiny_model, hidden_states[learnt], batch.targets[learnt]).mean().backward()
    with_gradient = {
        name for name, p in tiny_model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert with_gradient and all("lora_B" in name for name in with_gradient)  # A's is 0 while B is
    assert len(with_gradient) == 2 * 7


def test_losses_in_chunks(tiny_model, monkeypatch):
    hidden_states = torch.randn(10, tiny_model.config.text_config.hidden_size, requires_grad=True)
    targets = torch.arange(10)
    whole = code_losses(tiny_model, hidden_states, targets)
    (whole_gradient,) = torch.autograd.grad(whole.sum(), hidden_states)
    monkeypatch.setattr("emu35.training.dida.LOSS_CHUNK_BYTES", 4 * NUM_CODES * 3)
    chunked = code_losses(tiny_model, hidden_states, targets)
    (gradient,) = torch.autograd.grad(chunked.sum(), hidden_states)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(gradient, whole_gradient)
    logits = tiny_model.lm_head(hidden_states)[:, tiny_model.config.token_layout.visual_token_offset :][:, :NUM_CODES]
    torch.testing.assert_close(whole, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


def test_the_mask_state_is_written_as_the_placeholder(tiny_layout):
    batch = add_noisy_copies(clean_batch(tiny_layout), tiny_layout, scheduler("absorbing"), 1, NOISY_LENGTH, 1.0)
    visual = batch.targets.roll(1, dims=-1) != IGNORED
    assert (batch.noisy_ids[visual] == tiny_layout.image_placeholder_token_id).all()
    assert (batch.times == 0).all()


def test_an_image_that_does_not_fit(tiny_layout):
    with pytest.raises(ValueError, match=r"an image takes 8 tokens, but a noisy part has 7\. Raise `noisy_share`."):
        add_noisy_copies(clean_batch(tiny_layout), tiny_layout, scheduler(), 1, 7)


def test_without_learnt_images_there_is_nothing_to_copy(tiny_layout):
    clean = clean_batch(tiny_layout)
    clean.labels.fill_(IGNORED)
    batch = add_noisy_copies(clean, tiny_layout, scheduler(), 1, NOISY_LENGTH)
    assert batch.num_blocks == 0 and (batch.block_ids == -1).all()
