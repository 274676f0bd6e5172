"""Stories: right ones are marked right, and each kind of damage shows in the marks it should and in no other."""

from dataclasses import replace

import numpy as np
import pytest
from emu35.training.shapes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    POSITIONS,
    SHAPES,
    Described,
    Frame,
    GlobalThought,
    ImageThought,
    SceneObject,
    parse_caption,
    position_cell,
    render,
)
from emu35.training.shapes.story import (
    DIRECTIONS,
    Narration,
    StoryMeaning,
    check_story,
    narrate,
    parse_narration,
    sample_story,
)

RIGHT = {
    "narration": 1.0,
    "character": 1.0,
    "world": 1.0,
    "character_consistent": True,
    "frames": True,
    "whole": True,
}


def stories(number, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return [sample_story(rng, **kwargs) for _ in range(number)]


def said(pieces):
    return [[render(piece) if isinstance(piece, Frame) else piece for piece in pieces]]


def thing(words, position):
    size, color, shape = words.split()
    return SceneObject(shape, color, size, *position_cell(position))


HERO, SQUARE, RING = Described("circle", "red", "small"), "large blue square", "small green ring"


def picture(hero="center", square="top left", background="navy", extra=()):
    """The character and a square, each at a position or (`None`) nowhere."""
    named = {"small red circle": hero, SQUARE: square, **dict(extra)}
    return Frame(tuple(thing(words, at) for words, at in named.items() if at is not None), background)


def told(first=None):
    """A prompt and a right answer: center, right, top right, bottom left."""
    meaning = StoryMeaning(HERO, picture(hero=None), 4, first)
    positions = ("center", "right", "top right", "bottom left")
    sentences = ["the circle starts in the center.", "it moves right.", "it moves up.", "it jumps to the bottom left."]
    if first is not None:
        sentences[0] = "the circle moves down."
    return meaning, sentences, [picture(at) for at in positions]


def marks(meaning, sentences, frames):
    answer = [piece for pair in zip(sentences, frames, strict=True) for piece in pair]
    return check_story(meaning, said(answer))


def changed(result):
    return {name: value for name, value in result.items() if value != RIGHT[name]}


@pytest.mark.parametrize("held_out", [False, True, None])
def test_sampled_stories_are_right(held_out):
    for episode in stories(120, held_out=held_out):
        assert check_story(episode.meaning, said(episode.answers[0].content)) == RIGHT


def test_what_a_story_is_made_of():
    seen = set()
    for episode in stories(200):
        (user, answer), meaning = episode.turns, episode.meaning
        seen.add((episode.kind, bool(user.frames), len(meaning.still.objects)))
        assert episode.task == "story" and episode.kind == f"{meaning.num_frames}_frames"
        kinds = [str, ImageThought, Frame] * meaning.num_frames
        assert [type(piece) for piece in answer.content] == kinds
        for thought, frame in zip(answer.content[1::3], answer.frames, strict=True):
            *things, background = thought.text.split(", ")
            assert background == frame.background
            assert {(o.size, o.color, o.shape, o.position) for o in frame.objects} == {
                (*words.split(" ", 3),) for words in things
            }
    assert {kind for kind, _, _ in seen} == {f"{k}_frames" for k in (2, 3, 4, 5)}
    assert {(goes_on, still) for _, goes_on, still in seen} == {(g, n) for g in (False, True) for n in (0, 1, 2)}


def test_the_prompt_says_what_the_checker_is_told():
    for episode in stories(150):
        meaning, (text, *pictures) = episode.meaning, episode.turns[0].content
        opening, *things, request = text.removesuffix(".").split(". ")
        number = ("zero", "one", "two", "three", "four", "five").index(request.split()[-2])
        assert request.startswith("tell the story in ") and number == meaning.num_frames
        assert parse_caption(opening.split(" travels")[0]).objects[0] == meaning.character
        if pictures:
            assert tuple(pictures) == (meaning.first,) and not things and opening.endswith(" travels")
            still = [o for o in meaning.first.objects if Described(o.shape, o.color, o.size) != meaning.character]
            assert meaning.still == Frame(tuple(still), meaning.first.background)
            assert len(still) == len(meaning.first.objects) - 1
        else:
            assert meaning.first is None and opening.endswith(f" on a {meaning.still.background} background")
            said_still = [parse_caption(words.replace(" is ", " ")).objects[0] for words in things]
            assert said_still == [Described(o.shape, o.color, o.size, o.position) for o in meaning.still.objects]


def test_held_out_pairs():
    def pairs(episode):
        return [{(o.color, o.shape) for o in frame.objects} for turn in episode.turns for frame in turn.frames]

    assert all(frame.isdisjoint(HELD_OUT) for episode in stories(300) for frame in pairs(episode))
    for episode in stories(100, held_out=True):
        assert (episode.meaning.character.color, episode.meaning.character.shape) in HELD_OUT


def test_the_generator_alone_decides():
    assert stories(20, seed=5) == stories(20, seed=5) != stories(20, seed=6)


def test_difficulty_bounds_pictures_and_things():
    easy, half = stories(100, difficulty=0.1), stories(100, difficulty=0.5)
    assert {episode.kind for episode in easy} == {"2_frames"}
    assert all(not episode.meaning.still.objects for episode in easy)
    assert max(episode.meaning.num_frames for episode in half) == 4
    assert max(len(episode.meaning.still.objects) for episode in half) == 1
    for difficulty in (0, -1, 1.1):
        with pytest.raises(ValueError, match="difficulty"):
            sample_story(np.random.default_rng(0), difficulty=difficulty)


# ---------------------------------------------------------------------------------------------------- the checker


def test_a_story_told_by_hand():
    assert marks(*told()) == RIGHT
    assert marks(*told(first=picture("top"))) == RIGHT
    meaning, sentences, frames = told()
    plain = [piece for pair in zip(sentences, frames, strict=True) for piece in pair]
    thoughts = [GlobalThought("it moves."), *plain[:1], ImageThought("a small red circle"), *plain[1:]]
    assert check_story(meaning, said(thoughts)) == RIGHT


def test_another_story_is_as_good():
    meaning, _, _ = told()
    sentences = [
        "it starts in the center.",
        "it meets the square.",
        "the circle stays.",
        "the red circle moves right.",
    ]
    assert marks(meaning, sentences, [picture(at) for at in ("center", "top", "top", "top right")]) == RIGHT


def test_a_wrong_color_in_one_frame():
    meaning, sentences, frames = told()
    frames[1] = replace(frames[1], objects=(thing("small pink circle", "right"), thing(SQUARE, "top left")))
    # a step needs both its pictures, so the sentence after the damage fails as well
    assert changed(marks(meaning, sentences, frames)) == {
        "narration": 0.5,
        "character": 0.75,
        "character_consistent": False,
        "whole": False,
    }


def test_a_second_character():
    meaning, sentences, frames = told()
    frames[3] = Frame((*frames[3].objects, thing("small red circle", "bottom")), "navy")
    assert changed(marks(meaning, sentences, frames)) == {
        "narration": 0.75,
        "character": 0.75,
        "character_consistent": False,
        "whole": False,
    }


def test_a_character_that_teleports():
    meaning, sentences, frames = told()
    frames[3] = picture("bottom right")
    assert changed(marks(meaning, sentences, frames)) == {"narration": 0.75, "whole": False}
    frames[1] = picture("bottom")  # "right": wrong, and the step up does not start there either
    assert changed(marks(meaning, sentences, frames)) == {"narration": 0.25, "whole": False}


@pytest.mark.parametrize(
    "square, background, extra",
    [
        (None, "navy", ()),
        ("left", "navy", ()),
        ("top left", "black", ()),
        ("top left", "navy", ((RING, "bottom"),)),
    ],
    ids=["missing", "moved", "background", "stranger"],
)
def test_a_world_that_changes(square, background, extra):
    meaning, sentences, frames = told()
    frames[2] = picture("top right", square, background, extra)
    assert changed(marks(meaning, sentences, frames)) == {"world": 0.75, "whole": False}


def test_an_unreadable_cell_is_a_stranger_unless_it_may_be_the_character():
    meaning, sentences, frames = told()
    answer = said([piece for pair in zip(sentences, frames, strict=True) for piece in pair])
    answer[0][7][:8, 32:40] = 255  # one patch of the empty top right
    assert changed(check_story(meaning, answer)) == {"world": 0.75, "whole": False}
    answer[0][7] = render(frames[3])
    answer[0][7][32:40, :8] = 255  # one patch of the character's
    assert changed(check_story(meaning, answer)) == {
        "narration": 0.75,
        "character": 0.75,
        "character_consistent": False,
        "whole": False,
    }


@pytest.mark.parametrize("sentence", ["it moves left.", "it stays.", "it moves rihgt.", "it moves right", ""])
def test_a_sentence_that_is_not_true(sentence):
    meaning, sentences, frames = told()
    sentences[1] = sentence
    assert changed(marks(meaning, sentences, frames)) == {"narration": 0.75, "whole": False}


def test_one_sentence_a_frame():
    meaning, sentences, frames = told()
    answer = [piece for pair in zip(sentences, frames, strict=True) for piece in pair]
    answer.insert(3, "it stays.")
    assert changed(check_story(meaning, said(answer))) == {"narration": 0.75, "whole": False}


def test_a_missing_last_frame():
    meaning, sentences, frames = told()
    expected = {
        "narration": 0.75,
        "character": 0.75,
        "world": 0.75,
        "character_consistent": False,
        "frames": False,
        "whole": False,
    }
    assert changed(marks(meaning, sentences[:3], frames[:3])) == expected
    damaged = said([piece for pair in zip(sentences, frames, strict=True) for piece in pair])
    damaged[0][-1] = None
    result = changed(check_story(meaning, damaged))
    assert result == {name: value for name, value in expected.items() if name != "frames"}


def test_an_extra_frame():
    meaning, sentences, frames = told()
    result = marks(meaning, [*sentences, "it stays."], [*frames, frames[-1]])
    assert changed(result) == {"frames": False, "whole": False}


@pytest.mark.parametrize("answers", [[], [[]], [["it moves right."]]])
def test_no_picture_at_all(answers):
    meaning, _, _ = told()
    assert not any(check_story(meaning, answers).values())


@pytest.mark.parametrize(
    "before, after, sentence, true",
    [
        ("center", "top", "it moves up.", True),
        ("center", "bottom", "it moves down.", True),
        ("center", "left", "it moves left.", True),
        ("center", "right", "it moves right.", True),
        ("left", "right", "it moves right.", False),  # two steps
        ("right", "bottom left", "it moves right.", False),  # not over the edge
        ("center", "center", "it stays.", True),
        ("center", "top", "it stays.", False),
        ("center", "bottom right", "it jumps to the bottom right.", True),
        ("center", "right", "it jumps to the right.", False),  # one step reaches it
        ("center", "center", "it jumps to the center.", False),
        ("center", "bottom right", "it jumps to the bottom left.", False),
        ("center", "top", "it meets the square.", True),
        ("center", "left", "it meets the blue square.", True),
        ("center", "right", "it meets the square.", False),
        ("bottom right", "top", "it meets the square.", False),  # a jump
        ("top", "top", "it meets the square.", False),
        ("center", "top", "it meets the green square.", False),
        ("center", "top", "it meets the ring.", False),
        ("center", "top", "it meets the circle.", False),  # itself
        ("center", "top", "the square moves up.", False),
        ("center", "top", "the small circle moves up.", True),
        ("center", "top", "it starts at the top.", False),  # there was a picture before
    ],
)
def test_what_each_verb_says(before, after, sentence, true):
    meaning = StoryMeaning(HERO, picture(hero=None), 1, picture(before))
    assert marks(meaning, [sentence], [picture(after)]) == (
        RIGHT if true else RIGHT | {"narration": 0, "whole": False}
    )


def test_names_must_fit_one_object():
    other = (("large green circle", "bottom left"),)
    meaning = StoryMeaning(HERO, picture(hero=None, extra=other), 1, picture("center", extra=other))
    frame = picture("left", extra=other)
    for sentence, true in (
        ("the circle moves left.", False),
        ("the red circle moves left.", True),
        ("it meets the circle.", True),  # it can only meet the other one
        ("it meets the square.", True),
    ):
        assert marks(meaning, [sentence], [frame])["narration"] == true


def test_a_story_begins_with_its_start():
    meaning = StoryMeaning(HERO, picture(hero=None), 1)
    for sentence, true in (
        ("it starts in the center.", True),
        ("it starts in the middle.", True),
        ("it starts at the top.", False),
        ("it stays.", False),
        ("it moves up.", False),
    ):
        assert marks(meaning, [sentence], [picture("center")])["narration"] == true


# -------------------------------------------------------------------------------------------------- the sentences


def test_sentences_round_trip():
    things = [
        Described(shape, color, size) for shape in SHAPES for color in (*COLORS, None) for size in (None, "large")
    ]
    deeds = [Narration("stays"), *(Narration("meets", thing) for thing in things)]
    deeds += [Narration("moves", direction) for direction in DIRECTIONS]
    deeds += [Narration(verb, position) for verb in ("starts", "jumps") for position in POSITIONS]
    for deed in deeds:
        for subject in (None, *things[::7]):
            narration = replace(deed, subject=subject)
            assert parse_narration(narrate(narration)) == narration


@pytest.mark.parametrize(
    "text",
    [
        "",
        "it.",
        "it moves.",
        "it moves right",
        "It moves right.",
        " it moves right.",
        "it moves right. ",
        "it moves right.\n",
        "it moves right. it stays.",
        "it moves  right.",
        "it moves to the right.",
        "it moves north.",
        "it stays right.",
        "it stays in the center.",
        "it jumps right.",
        "it jumps to the middle.",
        "it jumps in the center.",
        "it starts in the top.",
        "it starts right.",
        "it meets it.",
        "it meets a square.",
        "it meets the squares.",
        "it meets the object.",
        "it meets the blue large square.",
        "it meets the tiny square.",
        "a circle stays.",
        "circle stays.",
        "the object stays.",
        "the red stays.",
        "the red circle.",
        "the red circle it stays.",
    ],
)
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="Cannot read"):
        parse_narration(text)


def test_every_background_is_used():
    assert {episode.meaning.still.background for episode in stories(100)} == set(BACKGROUNDS)
