"""The chunked next-token loss against the plain one, and what it costs."""

import pytest
import torch
from emu35 import modeling_emu35 as package
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture
def batch(shared_tiny_model):
    """Ids `(3, 20)` with text and visual tokens, and labels with ignored positions."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shared_tiny_model.config.text_config.vocab_size, (3, 20), generator=generator)
    labels = ids.clone()
    labels[0, :7] = -100
    labels[1, 5:9] = -100
    return ids, labels


def plain_loss(model, ids, labels, divisor=None):
    """The formula, over the full logits."""
    layout = model.config.token_layout
    logits = model(ids).logits[:, :-1].float().flatten(0, 1)
    targets = labels[:, 1:].flatten()
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=-100)
    visual = (targets >= layout.visual_token_offset) & (targets < layout.visual_token_end)
    weights = torch.where(visual, model.config.visual_loss_weight, 1.0) * (targets != -100)
    return (losses * weights).sum() / (weights.sum() if divisor is None else divisor)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("visual_loss_weight", [0.5, 1.0, 0.0, 3])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_loss_and_gradients_equal_the_plain_ones(tiny_model, batch, monkeypatch, visual_loss_weight, chunk):
    tiny_model.config.visual_loss_weight = visual_loss_weight
    monkeypatch.setattr(package, "LOSS_CHUNK_BYTES", 4 * chunk * tiny_model.config.text_config.vocab_size)
    expected = plain_loss(tiny_model, *batch)
    output = tiny_model(batch[0], labels=batch[1])
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
    wanted = gradients(tiny_model, expected)
    got = gradients(tiny_model, output.loss)
    assert wanted.keys() == got.keys() and len(got) > 20
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def test_default_weight_halves_visual_tokens(tiny_model, tiny_layout):
    assert tiny_model.config.visual_loss_weight == 0.5
    text, visual = 60, tiny_layout.visual_token_offset
    ids = torch.tensor([[text, text, visual, tiny_layout.eol_token_id]])
    losses = F.cross_entropy(tiny_model(ids).logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    # Structure tokens count as text.
    expected = (losses[0] + 0.5 * losses[1] + losses[2]) / 2.5
    assert tiny_model(ids, labels=ids).loss.item() == pytest.approx(expected, abs=1e-5)


def test_divisor_under_gradient_accumulation(tiny_model, batch):
    for divisor in (7, torch.tensor(7)):
        loss = tiny_model(batch[0], labels=batch[1], num_items_in_batch=divisor).loss
        torch.testing.assert_close(loss, plain_loss(tiny_model, *batch, divisor=7), atol=1e-5, rtol=1e-5)


def test_nothing_to_learn(tiny_model, batch):
    loss = tiny_model(batch[0], labels=torch.full_like(batch[1], -100)).loss
    assert loss.item() == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients(tiny_model, loss).values())
    assert tiny_model(batch[0][:, :1], labels=batch[1][:, :1]).loss.item() == 0  # no next token


def test_logits_beside_the_loss(tiny_model, batch):
    output = tiny_model(batch[0], labels=batch[1], logits_to_keep=2)
    torch.testing.assert_close(output.logits, tiny_model(batch[0]).logits[:, -2:])
    assert tiny_model(batch[0], labels=batch[1], logits_to_keep=0).logits.shape[:2] == batch[0].shape


def test_labels_of_a_wrong_shape(tiny_model, batch):
    with pytest.raises(ValueError, match=r"`labels` must have the shape of the ids \(3, 20\), got \(3, 19\)"):
        tiny_model(batch[0], labels=batch[1][:, 1:])


def test_without_gradients_nothing_is_computed_twice(tiny_model, batch, monkeypatch):
    monkeypatch.setattr(package, "LOSS_CHUNK_BYTES", 4 * 7 * tiny_model.config.text_config.vocab_size)
    calls = []
    tiny_model.lm_head.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        tiny_model(batch[0], labels=batch[1])
    num_chunks = -(-int((batch[1][:, 1:] != -100).sum()) // 7)
    assert len(calls) == num_chunks


@pytest.mark.parametrize("answers", [0, 12])
def test_under_zero3_all_processes_make_as_many_passes_through_the_head(tiny_model, batch, monkeypatch, answers):
    """Each pass gathers its weights from all of them; one with fewer answers would leave the others waiting."""
    monkeypatch.setattr(package, "LOSS_CHUNK_BYTES", 4 * 7 * tiny_model.config.text_config.vocab_size)
    ids, labels = batch[0], torch.full_like(batch[0], -100)
    labels[0, 1 : 1 + answers] = ids[0, 1 : 1 + answers]
    expected = tiny_model(ids, labels=labels).loss
    monkeypatch.setattr(package, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(package.dist, "is_initialized", lambda: True)
    found = []

    def all_reduce(tensor, operation):
        assert operation == torch.distributed.ReduceOp.MAX
        found.append(int(tensor))
        tensor.fill_(5)

    monkeypatch.setattr(package.dist, "all_reduce", all_reduce)
    calls = []
    tiny_model.lm_head.register_forward_hook(lambda *_: calls.append(None))
    loss = tiny_model(ids, labels=labels).loss
    assert (found, len(calls)) == ([1 if not answers else 2], 5)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    assert len(calls) == 10  # each is computed again


def test_half_precision(tiny_model, batch):
    expected = plain_loss(tiny_model, *batch).item()
    loss = tiny_model.to(torch.bfloat16)(batch[0], labels=batch[1]).loss
    assert loss.dtype == torch.float32  # summed there
    assert loss.item() == pytest.approx(expected, rel=0.05)
    loss.backward()


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made while it is on: the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def test_memory(make_tiny_model, monkeypatch):
    """The released proportions, scaled down 64 times: as many positions as hidden sizes, a vocabulary much larger."""
    model = make_tiny_model(vocab_size=16_384, vision_tokenizer_config=None, num_hidden_layers=1)
    monkeypatch.setattr(package, "LOSS_CHUNK_BYTES", package.LOSS_CHUNK_BYTES // (64 * 16))
    ids = torch.randint(300, (1, 256), generator=torch.Generator().manual_seed(0))
    hidden_states = model.model(ids).last_hidden_state.detach().requires_grad_()

    def peak(loss):
        model.zero_grad()
        with PeakMemory() as memory:
            loss().backward()
        return memory.peak

    def plain():
        return F.cross_entropy(model.lm_head(hidden_states[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())

    full_logits = 256 * 16_384 * 4
    plain_peak, chunked_peak = peak(plain), peak(lambda: model.compute_loss(hidden_states, ids))
    assert plain_peak > 3 * full_logits  # the measure sees what it shall see
    # The gradient of the output matrix exists either way, and here weighs more than in the released model.
    matrix = model.lm_head.weight.numel() * 4
    assert chunked_peak - 2 * matrix < plain_peak / 10


def test_largest_tensor_is_a_chunk(tiny_model, batch, monkeypatch):
    vocab_size = tiny_model.config.text_config.vocab_size
    monkeypatch.setattr(package, "LOSS_CHUNK_BYTES", 4 * 5 * vocab_size)
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                # Not the matrix itself, or its gradient.
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and vocab_size in tensor.shape:
                    largest.append(tensor.numel() // vocab_size)
            return result

    with Largest():
        tiny_model(batch[0], labels=batch[1]).loss.backward()
    assert set(largest) <= {5, 4, 32} and 5 in largest  # rows of logits, shared out evenly; 32 is the hidden size
