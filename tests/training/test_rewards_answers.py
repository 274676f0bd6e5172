"""Words of an answer: exact numbers, several right answers, two languages."""

import pytest
from emu35.training.rewards import AnswerF1


def score(texts, answers, **options):
    return AnswerF1(**options)([""] * len(texts), [""] * len(texts), texts=texts, answer=answers)


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("A red fox.", "a red fox", 1.0),
        ("a red fox", "the red fox", 4 / 6),
        ("red red red", "red", 2 / 4),  # a word counts as often as in both
        ("", "red", 0.0),
        ("!", "?", 1.0),
        ("红色的狐狸", "红狐狸", 6 / 8),
        ("two", ["2", "two", "two of them"], 1.0),
        (None, "red", None),
        ("red", None, None),
    ],
)
def test_words_in_common(text, answer, value):
    assert score([text], [answer]) == [pytest.approx(value) if value is not None else None]


def test_the_right_answer_may_stand_in_another_column():
    reward = AnswerF1("wanted")
    assert reward([""], [""], texts=["a fox"], wanted=["fox"]) == [pytest.approx(2 / 3)]
    with pytest.raises(ValueError, match="needs the column `wanted`"):
        score(["a"], ["a"], column="wanted")
