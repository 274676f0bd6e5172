"""What visitors may try first: prompts and pictures that the model at hand was made for."""

from dataclasses import dataclass
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"


@dataclass(frozen=True)
class Examples:
    """Rows for `gr.Examples`, one field a tab; a row holds the values of its inputs.

    Attributes:
        note (`str`): what these examples are, for their heading.
        create, race (`list[str]`): prompts.
        edit (`list[list]`): instruction and one to three images.
        ask (`list[list]`): question and one to three images.
        tell (`list[list]`): task, "story" or "howto", and prompt.
        explore (`list[list]`): opening and the first view, or `None`.
        moves (`dict[str, str]`): move to what is said for it, in the order north, west, east, south (forward, left,
            right, back).
        robot (`list[list]`): goal and first image.
    """

    note: str
    create: list[str]
    race: list[str]
    edit: list[list]
    ask: list[list]
    tell: list[list]
    explore: list[list]
    moves: dict[str, str]
    robot: list[list]


def picture(name: str) -> str:
    """The path of a picture that is shipped for the examples."""
    return str(PICTURES / f"{name}.png")


#: For the tiny model: sentences of its own language, pictures of its own world (`emu35.training.shapes` drew them).
TINY = Examples(
    note="Examples for the tiny model",
    create=[
        "a small red circle above a large blue square",
        "a large green ring on the left and a small red cross at the top on a navy background",
        "a red cross on a black background",
    ],
    race=["a small red circle above a large blue square", "a large pink ring to the left of a small orange square"],
    edit=[
        ["make the square green.", picture("scene"), None],
        ["change the background to navy.", picture("scene"), None],
        ["add the ring of the second image at the top.", picture("scene"), picture("ring")],
    ],
    ask=[
        ["what color is the square?", picture("scene"), None],
        ["describe the image.", picture("place"), None],
        ["which image has a ring?", picture("scene"), picture("ring")],
    ],
    tell=[
        ["story", "a small red circle travels on a white background. tell the story in three pictures."],
        [
            "howto",
            "how do i build: a large blue circle on the left and a small red square at the top on a navy background?",
        ],
    ],
    explore=[
        ["a map on black: large red circle two three, small blue square four one. start at the top.", None],
        ["start in the center.", picture("place")],
    ],
    moves={"north": "go north.", "west": "go west.", "east": "go east.", "south": "go south."},
    robot=[
        ["put the red block on the blue block.", picture("blocks")],
        ["put the green block on the floor on the left and the red block on the blue block.", picture("blocks")],
    ],
)

#: For the released size. It was never run here, so what it answers is not known.
RELEASED = Examples(
    note="Examples",
    create=[
        "A fox asleep in fresh snow, soft morning light, shallow depth of field",
        'A hand-painted shop sign that reads "OPEN LATE" above a rainy street at night',
    ],
    race=["A lighthouse on a cliff at dusk, oil painting"],
    edit=[["Turn the square into a ceramic tile, keep everything else.", picture("scene"), None]],
    ask=[["Describe the image in one sentence.", picture("scene"), None]],
    tell=[
        ["story", "Tell the story of a paper boat on its way to the sea, with a picture for each scene."],
        ["howto", "How do I fold a paper crane? Show every step."],
    ],
    explore=[["Explore an old library with tall wooden shelves, from its entrance.", None]],
    moves={
        "forward": "Move forward.",
        "left": "Turn left.",
        "right": "Turn right.",
        "back": "Move back.",
    },
    robot=[["Put the red block on the blue block.", picture("blocks")]],
)

__all__ = ["RELEASED", "TINY", "Examples", "picture"]
