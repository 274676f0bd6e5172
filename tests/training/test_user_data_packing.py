"""Mixing and packing: shares, order, processes, and that sequences in a row do not see each other."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from emu35.training.data import Collator, Example, PackedRows, Source, best_fit, mix, pack
from emu35.training.data.examples import IGNORED


def example(length, layout=None, seed=0):
    rng = np.random.default_rng((seed, length))
    ids = rng.integers(20, 300, size=length).astype(np.int32)
    return Example(ids, np.arange(length) >= length // 2, "t2i")


def source(name, lengths, weight=1.0, bad=()):
    def write(row):
        if row in bad:
            raise ValueError(f"row {row} is bad")
        return example(row)

    return Source(name, list(lengths), write, weight)


def test_shares_are_exact_at_any_time():
    sources = [source("short", [10] * 50, 3.0), source("long", [40] * 50, 1.0)]
    drawn = list(itertools.islice(mix(sources, 0, "tokens"), 400))
    tokens = {length: sum(len(one) for one in drawn if len(one) == length) for length in (10, 40)}
    assert tokens[10] == pytest.approx(3 * tokens[40], abs=120)
    drawn = list(itertools.islice(mix(sources, 0, "examples"), 400))
    assert sum(len(one) == 10 for one in drawn) == 300


def test_each_epoch_has_all_examples_in_an_order_of_its_own():
    lengths = range(10, 30)
    drawn = [len(one) for one in itertools.islice(source("a", lengths).examples(seed=1), 40)]
    assert sorted(drawn[:20]) == sorted(drawn[20:]) == list(lengths) and drawn[:20] != drawn[20:]
    assert drawn == [len(one) for one in itertools.islice(source("a", lengths).examples(seed=1), 40)]
    assert drawn != [len(one) for one in itertools.islice(source("a", lengths).examples(seed=2), 40)]


def test_a_stream_is_shuffled_in_a_buffer_and_read_again():
    class Stream:
        def __iter__(self):
            return iter(range(10, 1510))

    drawn = [len(one) for one in itertools.islice(Source("s", Stream(), example).examples(0), 3000)]
    assert sorted(drawn[:1500]) == sorted(drawn[1500:]) == list(range(10, 1510)) and drawn[:1500] != sorted(
        drawn[:1500]
    )


def test_bad_rows_are_skipped_and_counted_but_not_if_there_is_no_other():
    some = source("a", [10, 11, 12], bad=[11])
    assert {len(one) for one in itertools.islice(some.examples(0), 10)} == {10, 12}
    assert some.num_skipped >= 4
    assert [len(one) for one in some.first(5)] == [10, 12]
    with pytest.raises(ValueError, match="source 'b' has no good row"):
        next(source("b", [11], bad=[11]).examples(0))


def test_best_fit_fills_the_fullest_row_that_has_room():
    rows, left = best_fit([example(n) for n in (60, 90, 50, 10, 40)], row_length=100, num_rows=2)
    assert [[len(one) for one in row] for row in rows] == [[60, 40], [90, 10]]
    assert [len(one) for one in left] == [50]


def test_rows_are_full_and_nothing_waits_for_ever():
    lengths = np.random.default_rng(0).integers(10, 60, size=200).tolist()
    rows = list(itertools.islice(pack(source("a", lengths).examples(0), 100), 64))
    packed = [len(one) for row in rows for one in row]
    assert sum(packed) > 0.96 * 64 * 100 and all(sum(map(len, row)) <= 100 for row in rows)
    drawn = [len(one) for one in itertools.islice(source("a", lengths).examples(0), len(packed))]
    missing = Counter(drawn) - Counter(packed)  # what came later may have overtaken a few
    assert missing.total() < 15
    with pytest.raises(ValueError, match="has 120 tokens, more than `row_length`=100"):
        next(pack(source("a", [120]).examples(0), 100))


def stream(processor, **options):
    lengths = np.random.default_rng(0).integers(10, 60, size=50).tolist()
    options = {"row_length": 100, "rows": 2, "unconditional_share": 0.3, **options}
    return PackedRows([source("a", lengths), source("b", lengths[:7])], processor, **options)


def test_many_processes_see_what_one_sees_and_a_resumed_run_goes_on(tiny_processor):
    def rows(number, **options):
        return [row["input_ids"].tolist() for row in itertools.islice(stream(tiny_processor, **options), number)]

    one = rows(24)
    two = [rows(12, rank=rank, num_processes=2) for rank in (0, 1)]
    assert one == [row for pair in zip(*[iter(two[0])] * 2, *[iter(two[1])] * 2, strict=True) for row in pair]
    assert rows(8, start=16) == one[16:]
    assert rows(4, seed=1) != one[:4]


@pytest.mark.parametrize("attention", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_sequences_of_a_row_do_not_see_each_other(tiny_processor, tiny_model, attention):
    """Packed and padded, or one by one: the same losses."""
    row = next(iter(stream(tiny_processor)))
    short = next(iter(stream(tiny_processor, packing=False)))
    batch = Collator(tiny_processor.token_layout.pad_token_id)([row, short])
    assert batch["labels"][1, len(short["labels"]) :].eq(IGNORED).all()
    starts = [*np.flatnonzero(row["position_ids"] == 0), len(row["input_ids"])]
    assert len(starts) > 2
    pieces = [(0, begin, end) for begin, end in itertools.pairwise(starts)] + [(1, 0, len(short["input_ids"]))]
    tiny_model.set_attn_implementation(attention)
    with torch.no_grad():
        packed = tiny_model.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        tiny_model.set_attn_implementation("eager")
        for index, begin, end in pieces:
            alone = tiny_model.model(input_ids=batch["input_ids"][index : index + 1, begin:end])
            torch.testing.assert_close(
                packed[index : index + 1, begin:end], alone.last_hidden_state, atol=1e-5, rtol=1e-4
            )


def test_flash_attention_gets_rows_without_padding(tiny_processor):
    row, short = (next(iter(stream(tiny_processor, packing=packing))) for packing in (True, False))
    flat = Collator(0, flat=True)([row, short])
    assert flat["input_ids"].shape == (1, len(row["input_ids"]) + len(short["input_ids"]))


def test_what_begins_a_sequence_is_never_learnt(tiny_processor):
    row = next(iter(stream(tiny_processor, everything=True)))
    assert (row["labels"][row["position_ids"] == 0] == IGNORED).all()
    assert (row["labels"] != IGNORED).sum() == len(row["labels"]) - (row["position_ids"] == 0).sum()
