"""Answers in words against right ones."""

import re
from collections import Counter
from collections.abc import Sequence

from .base import Sample, SampleReward

_WORDS = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
"""A Chinese character is a word of its own."""


class AnswerF1(SampleReward):
    r"""Words that an answer has in common with a right one.  Source: F1 of SQuAD (arXiv 1606.05250).

    $$ r = \frac{2 n}{|a| + |b|} $$

    for n words in common (each as often as in both) of the answer a and the right one b, without punctuation and in
    small letters; unlike SQuAD's, articles count. Of several right answers, the one that is nearest. Other than right
    or wrong, it tells a long answer with a slip from nonsense, and one that does not end from one that does.

    Range: [0, 1].

    Example:
        >>> AnswerF1()(["what is it?"], [""], texts=["a red fox"], answer=["the red fox"])  # 2 * 2 / (3 + 3)
        [0.6666666666666666]

    Args:
        column (`str`): the right answer, or a list of them.
    """

    name = "answer_f1"

    def __init__(self, column: str = "answer"):
        self.column = column
        self.needs = ("texts", column)

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        right = sample.columns[self.column]
        found = _words(sample.columns["texts"])
        return max(_f1(found, _words(one)) for one in ([right] if isinstance(right, str) else right))


def _words(text: str) -> Counter[str]:
    return Counter(_WORDS.findall(text.casefold()))


def _f1(found: Counter[str], right: Counter[str]) -> float:
    total = found.total() + right.total()
    return 2 * (found & right).total() / total if total else 1.0
