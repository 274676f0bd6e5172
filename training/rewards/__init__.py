"""Rewards for reinforcement learning: callables with TRL's signature, a name and a range, and their mix.

| reward | range | measures | needs |
|---|---|---|---|
| [`ClipSimilarity`] | 0..1 | image against text | a CLIP model |
| [`AestheticScore`] | 1..10 | looks | a CLIP model, a head of the user's |
| [`VLMAlignment`] | 0..1 | a model's yes to "does it show ...?" | Emu3.5 or another image-text-to-text model |
| [`TextFidelity`], [`TextLayout`] | 0..1 | text in the image, and where it stands | `emu35[rewards]` |
| [`FaceIdentity`] | 0..1 | faces of the reference images | `emu35[rewards]`, two models |
| [`Preservation`] | 0..1 | what an edit may not change | a mask; for features a CLIP model |
| [`NarrativeConsistency`] | 0..1 | one world in all images of a story | a CLIP model |
| [`VLMConsistency`] | 0..1 | a model's yes to "one story?" for neighbouring images | as `VLMAlignment` |
| [`AnswerF1`] | 0..1 | words of an answer against a right one | right answers |
| [`WorldReward`] | 0..1 | the exact checkers of `shapes` | nothing |

```python
mix = RewardMix([Component(WorldReward(), 1.0), Component(WorldReward(["preservation"]), 0.5, tasks=["x2i"])])
mix.load()  # what is missing is found now
mix(prompts, completions, task=tasks, meaning=meanings, images=images, texts=texts)  # numbers in [1, 10], or None
```

Write your own as a function with `name` and `range`, or as a [`SampleReward`]: docs/rewards.md.
"""

from .alignment import VLMAlignment, VLMConsistency, YesNoJudge
from .answers import AnswerF1
from .base import Reward, Sample, SampleReward
from .clip import AestheticScore, ClipEncoder, ClipSimilarity, NarrativeConsistency
from .faces import Face, FaceIdentity, OpenCVFaces
from .mix import Component, ComponentReport, RewardMix
from .preservation import Preservation
from .text_rendering import RapidOCRReader, TextFidelity, TextLayout, TextLine
from .world import PARTIAL_CREDIT, WorldReward, check_answer

__all__ = [
    "PARTIAL_CREDIT",
    "AestheticScore",
    "AnswerF1",
    "ClipEncoder",
    "ClipSimilarity",
    "Component",
    "ComponentReport",
    "Face",
    "FaceIdentity",
    "NarrativeConsistency",
    "OpenCVFaces",
    "Preservation",
    "RapidOCRReader",
    "Reward",
    "RewardMix",
    "Sample",
    "SampleReward",
    "TextFidelity",
    "TextLayout",
    "TextLine",
    "VLMAlignment",
    "VLMConsistency",
    "WorldReward",
    "YesNoJudge",
    "check_answer",
]
