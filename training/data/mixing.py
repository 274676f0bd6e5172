"""Many sources, one stream of packed rows.

    source ─► examples, shuffled anew each epoch ─┐
    source ─► ...                                 ├─► drawn in proportion ─► packed (best fit) ─► rows ─► batches
    source ─► ...                                 ┘

The stream is a function of its seed alone: a resumed run skips what it has seen, and each of several processes packs
the same rows and keeps its share, so one process and many see the same batches.
"""

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from emu35.processing_emu35 import Emu35Processor
from torch.utils.data import IterableDataset

from .examples import ROW_ERRORS, Example, encode_images, labels_of, without_text

logger = logging.getLogger(__name__)

ROWS_AT_A_TIME = 16
"""Rows that are packed together."""
SURPLUS = 1.1
"""Tokens drawn for them, as a multiple of their size; what does not fit waits for the next ones."""
SHUFFLE_BUFFER = 1000
"""Examples of a stream, which has no order of its own to shuffle, among which the next one is drawn."""


@dataclass
class Source:
    """Examples of one kind.

    Args:
        name (`str`): for logs and losses.
        rows (`Sequence` or `Iterable`): of whatever `write` takes; without a length they are streamed.
        write (`Callable`): row -> [`Example`]; raises one of `ROW_ERRORS` if the row is bad.
        weight (`float`): its share is `weight` over the sum of all.
    Attributes:
        num_skipped (`int`): bad rows so far.
    """

    name: str
    rows: Sequence | Iterable
    write: Callable[[dict], Example]
    weight: float = 1.0
    num_skipped: int = 0

    def examples(self, seed: int) -> Iterator[Example]:
        """Without end.  Bad rows are skipped, and told once each 100.

        Raises:
            ValueError: if all rows are bad.
        """
        epoch = 0
        while True:
            found = 0
            rng = np.random.default_rng((seed, zlib.crc32(self.name.encode()), epoch))
            for row in self._shuffled(rng):
                try:
                    example = self.write(row)
                except ROW_ERRORS as error:
                    if self.num_skipped % 100 == 0:
                        logger.warning(
                            "source %s: a bad row is skipped (%d so far): %s", self.name, self.num_skipped, error
                        )
                    self.num_skipped, last = self.num_skipped + 1, error
                    continue
                found += 1
                yield example
            if not found:
                raise ValueError(f"source {self.name!r} has no good row. The last one: {last}")
            epoch += 1

    def _shuffled(self, rng: np.random.Generator) -> Iterator:
        if hasattr(self.rows, "__len__"):
            yield from (self.rows[int(index)] for index in rng.permutation(len(self.rows)))
            return
        buffer: list = []
        for row in self.rows:
            if len(buffer) < SHUFFLE_BUFFER:
                buffer.append(row)
                continue
            index = int(rng.integers(SHUFFLE_BUFFER))
            yield buffer[index]
            buffer[index] = row
        yield from (buffer[int(index)] for index in rng.permutation(len(buffer)))

    def first(self, number: int) -> list[Example]:
        """The first good examples, at most `number`, in the order of the data."""
        found: list[Example] = []
        for row in self.rows:
            if len(found) == number:
                break
            try:
                found.append(self.write(row))
            except ROW_ERRORS as error:
                logger.warning("source %s: a bad row is left out: %s", self.name, error)
        return found


def mix(sources: Sequence[Source], seed: int, balance: str = "tokens") -> Iterator[Example]:
    """Draws from the source that is furthest behind its share, so that shares are exact at any time.

    Args:
        balance (`str`): what `weight` shares out: "tokens" or "examples".
    """
    streams = [source.examples(seed) for source in sources]
    drawn = np.zeros(len(sources))
    weights = np.array([source.weight for source in sources])
    while True:
        index = int(np.argmin(drawn / weights))
        example = next(streams[index])
        drawn[index] += len(example) if balance == "tokens" else 1
        yield example


def best_fit(examples: Sequence[Example], row_length: int, num_rows: int) -> tuple[list[list[Example]], list[Example]]:
    """Each in turn goes into the fullest row that has room; best with the longest first.

    Returns:
        rows of examples, and the examples for which there was no room.
    """
    rows: list[list[Example]] = [[] for _ in range(num_rows)]
    room, left = [row_length] * num_rows, []
    for example in examples:
        fitting = [index for index, free in enumerate(room) if free >= len(example)]
        if not fitting:
            left.append(example)
            continue
        index = min(fitting, key=room.__getitem__)
        rows[index].append(example)
        room[index] -= len(example)
    return rows, left


def pack(examples: Iterator[Example], row_length: int) -> Iterator[list[Example]]:
    """Rows of whole examples, `row_length` tokens at most, without end.

    Raises:
        ValueError: if an example is longer than a row.
    """
    waiting: list[Example] = []
    while True:
        missing, fresh = SURPLUS * ROWS_AT_A_TIME * row_length - sum(map(len, waiting)), []
        while missing > 0:
            example = next(examples)
            if len(example) > row_length:
                raise ValueError(
                    f"an example of the task {example.task!r} has {len(example)} tokens, more than "
                    f"`row_length`={row_length}. Raise it, or prepare the data with a smaller --max-length."
                )
            fresh.append(example)
            missing -= len(example)
        # Those that wait go first, or some of middling length would wait for ever.
        ordered = waiting + sorted(fresh, key=len, reverse=True)
        rows, waiting = best_fit(ordered, row_length, ROWS_AT_A_TIME)
        yield from rows


class PackedRows(IterableDataset):
    """The rows of one process, as `dict` of `input_ids`, `labels` and `position_ids`, int64 `(length,)` each.

    Args:
        sources (`Sequence[Source]`): what to mix.
        processor ([`Emu35Processor`], *optional*): for images that wait and unconditional prompts.
        row_length (`int`): tokens of a row, at most.
        rows (`int`): of a batch. Processes take batches in turn.
        seed (`int`): of everything.
        encode (`Callable`, *optional*): images to codes, see [`encode_images`]; prepared data has none to encode.
        everything (`bool`): learn prompts, too.
        unconditional_share (`float`): of examples with images in an answer that lose their text, for guidance.
        balance (`str`): see [`mix`].
        packing (`bool`): `False`: one example a row.
        rank (`int`), num_processes (`int`): of this process, and how many there are.
        start (`int`): rows, of all processes together, to skip.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        processor: Emu35Processor | None,
        row_length: int,
        rows: int = 1,
        seed: int = 0,
        encode: Callable | None = None,
        everything: bool = False,
        unconditional_share: float = 0.0,
        balance: str = "tokens",
        packing: bool = True,
        rank: int = 0,
        num_processes: int = 1,
        start: int = 0,
    ):
        self.sources, self.processor, self.row_length, self.rows = sources, processor, row_length, rows
        self.seed, self.encode, self.everything = seed, encode, everything
        self.unconditional_share, self.balance, self.packing = unconditional_share, balance, packing
        self.rank, self.num_processes, self.start = rank, num_processes, start

    def _examples(self) -> Iterator[Example]:
        rng = np.random.default_rng((self.seed, 1))
        for example in mix(self.sources, self.seed, self.balance):
            if rng.random() < self.unconditional_share:
                example = without_text(example, self.processor, rng)
            yield example

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        examples = self._examples()
        packed = pack(examples, self.row_length) if self.packing else ([example] for example in examples)
        for index, row in enumerate(packed):
            if index >= self.start and index // self.rows % self.num_processes == self.rank:
                yield self.join(row)

    def join(self, row: list[Example]) -> dict[str, np.ndarray]:
        """Examples one after the other, each with positions of its own."""
        if any(example.pixel_values for example in row):
            encode_images(row, self.encode, self.processor.token_layout)
        return {
            "input_ids": np.concatenate([example.input_ids for example in row]).astype(np.int64),
            "labels": np.concatenate([labels_of(example, self.everything) for example in row]),
            "position_ids": np.concatenate([np.arange(len(example)) for example in row]),
        }


class Collator:
    """Rows to tensors `(rows, length)`, padded on the right; positions of padding begin anew.

    There is no `attention_mask`: where positions begin anew, transformers' masks begin a new sequence (and only then;
    with a mask, or a cache, they do not).

    Args:
        pad_id (`int`): of padding; it is not learnt.
        flat (`bool`): one row of all, without padding: flash attention knows sequences only there.
    """

    def __init__(self, pad_id: int, flat: bool = False):
        self.pad_id, self.flat = pad_id, flat

    def __call__(self, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        if self.flat:
            joined = {name: np.concatenate([row[name] for row in rows])[None] for name in rows[0]}
            return {name: torch.from_numpy(values) for name, values in joined.items()}
        length = max(len(row["input_ids"]) for row in rows)
        batch = {name: [] for name in rows[0]}
        for row in rows:
            missing = length - len(row["input_ids"])
            padding = {"input_ids": np.full(missing, self.pad_id), "labels": np.full(missing, -100)}
            padding["position_ids"] = np.arange(missing)
            for name, values in row.items():
                batch[name].append(np.concatenate([values, padding[name]]))
        return {name: torch.from_numpy(np.stack(values)) for name, values in batch.items()}
