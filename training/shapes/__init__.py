"""A procedural world with exact answers: scenes, pictures, sentences, questions, and a checker of pictures.

```python
rng = np.random.default_rng(0)
scene = sample_scene(rng, held_out=False)  # training; `held_out=True` shows combinations that training never does
pixels = render(scene)  # (48, 48, 3), uint8
prompt = caption(scene, rng)
score(prompt.meaning, read_scene(pixels))["whole_scene"]  # True
score(parse_caption("a red circle above a blue square"), read_scene(pixels))  # a user's own prompt
sample_question(scene, rng)  # Question(text="what color is the small ring?", answer="green", kind="colour")
```
"""

from .checker import ReadObject, ReadScene, read_scene, read_scenes
from .dialogue import sample_questions_about_images
from .episode import Episode, GlobalThought, ImageThought, Piece, Said, Turn
from .episodes import EPISODES, EpisodeTask
from .language import Caption, caption, describe_text
from .meaning import RELATIONS, Described, Meaning, Relation, meaning_of, relation_holds
from .parsing import parse_caption
from .questions import QUESTION_KINDS, Question, describe, sample_question
from .render import render, template, to_image
from .scene import (
    BACKGROUNDS,
    CELL_SIZE,
    COLORS,
    GRID_SIZE,
    HELD_OUT,
    IMAGE_SIZE,
    MAX_OBJECTS,
    POSITIONS,
    SHAPES,
    SIZES,
    Frame,
    Scene,
    SceneObject,
    position_cell,
    position_name,
    sample_scene,
)
from .scoring import score, score_scene
from .words import VOCABULARY

__all__ = [
    "BACKGROUNDS",
    "CELL_SIZE",
    "COLORS",
    "EPISODES",
    "GRID_SIZE",
    "HELD_OUT",
    "IMAGE_SIZE",
    "MAX_OBJECTS",
    "POSITIONS",
    "QUESTION_KINDS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "VOCABULARY",
    "Caption",
    "Described",
    "Episode",
    "EpisodeTask",
    "Frame",
    "GlobalThought",
    "ImageThought",
    "Meaning",
    "Piece",
    "Question",
    "ReadObject",
    "ReadScene",
    "Relation",
    "Said",
    "Scene",
    "SceneObject",
    "Turn",
    "caption",
    "describe",
    "describe_text",
    "meaning_of",
    "parse_caption",
    "position_cell",
    "position_name",
    "read_scene",
    "read_scenes",
    "relation_holds",
    "render",
    "sample_question",
    "sample_questions_about_images",
    "sample_scene",
    "score",
    "score_scene",
    "template",
    "to_image",
]
