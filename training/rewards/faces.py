"""Whether a face in a picture is the face of a reference picture."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download
from PIL import Image

from .base import Sample, SampleReward, clamp, import_extra, mean, open_image, reference_images


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a picture.

    Attributes:
        area (`float`): of its box, in pixels.
        embedding (`np.ndarray` of shape `(dim,)`): faces of one person have a large cosine.
    """

    area: float
    embedding: np.ndarray


FaceAnalyzer = Callable[[Image.Image], list[Face]]
"""Finds the faces of a picture and embeds them."""


class OpenCVFaces:
    """YuNet finds faces, SFace embeds them, both by OpenCV (Apache 2.0).

    Licences: YuNet MIT, SFace Apache 2.0, so both allow commercial use. No model is bundled: without paths they come
    from `opencv/face_detection_yunet` and `opencv/face_recognition_sface` on the Hub. By OpenCV's own measurement on
    LFW two faces with a cosine of 0.363 and more are of one person.

    Args:
        detector (`str` or `os.PathLike`, *optional*): an ONNX file of YuNet.
        recognizer (`str` or `os.PathLike`, *optional*): an ONNX file of SFace.
        threshold (`float`): least confidence of a face.
    """

    def __init__(
        self,
        detector: str | os.PathLike | None = None,
        recognizer: str | os.PathLike | None = None,
        threshold: float = 0.8,
    ):
        self.paths, self.threshold = (detector, recognizer), threshold
        self._detector: Any = None
        self._recognizer: Any = None

    def load(self) -> None:
        """Raises an ImportError if OpenCV is not installed."""
        if self._detector is None:
            cv2 = import_extra("cv2", "Face identity")
            detector, recognizer = self.paths
            detector = detector or hf_hub_download("opencv/face_detection_yunet", "face_detection_yunet_2023mar.onnx")
            recognizer = recognizer or hf_hub_download(
                "opencv/face_recognition_sface", "face_recognition_sface_2021dec.onnx"
            )
            self._recognizer = cv2.FaceRecognizerSF.create(os.fspath(recognizer), "")
            self._detector = cv2.FaceDetectorYN.create(os.fspath(detector), "", (320, 320), self.threshold)

    def __call__(self, image: Image.Image) -> list[Face]:
        self.load()
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])  # OpenCV's BGR
        self._detector.setInputSize(image.size)
        _, found = self._detector.detect(pixels)
        faces = []
        for face in () if found is None else found:  # left, top, width, height, 5 landmarks, confidence
            embedding = self._recognizer.feature(self._recognizer.alignCrop(pixels, face))
            faces.append(Face(float(face[2] * face[3]), np.array(embedding, dtype=np.float64).ravel()))
        return faces


class FaceIdentity(SampleReward):
    r"""Whether the people of the reference images are in the images.

    $$ r = \frac{1}{n} \sum_{i=1}^n \mathrm{clamp}\!\left(\max_j \frac{\cos(a_i, b_j)}{s}, 0, 1\right) $$

    for the largest face a_i of each reference image and the faces b_j of an image; the mean over the images of a
    completion, 0 without one, or without a face. Samples whose references show no face get `None`.

    Range: [0, 1].

    Example:
        >>> FaceIdentity()(["put her on a horse"], [""], images=[[rider]], reference_images=[[portrait]])  # cosine 0.6
        [0.75]

    Args:
        analyzer (`FaceAnalyzer`, *optional*): default: [`OpenCVFaces`]. InsightFace's models are for non-commercial
            research only; wrap `FaceAnalysis.get` if that is your case.
        column (`str`, *optional*): the reference images (or their paths), a list for each sample; `None`: the images
            of the prompt, which a GRPO run has in `messages`.
        same (`float`): s, the cosine that counts as full likeness.
    """

    name = "face_identity"

    def __init__(
        self, analyzer: FaceAnalyzer | None = None, column: str | None = "reference_images", same: float = 0.8
    ):
        if not 0 < same <= 1:
            raise ValueError(f"`same` must be a cosine in (0, 1], got {same!r}.")
        self.analyzer, self.column, self.same = analyzer or OpenCVFaces(), column, same
        self.needs = ("images", column or "messages")

    def load(self) -> None:
        if hasattr(self.analyzer, "load"):
            self.analyzer.load()

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        # The rollouts of a group share their references: the same objects, whose faces are found once. They live as
        # long as the samples, so that an id stands for one of them.
        known: dict[int, list[Face]] = {}
        return [self._score(sample, known) for sample in samples]

    def _score(self, sample: Sample, known: dict[int, list[Face]]) -> float | None:
        wanted = []
        for image in reference_images(sample, self.column):
            if id(image) not in known:
                known[id(image)] = self.analyzer(open_image(image))
            if known[id(image)]:
                wanted.append(max(known[id(image)], key=lambda face: face.area))
        if not wanted:
            return None
        if not sample.images:
            return 0.0
        return mean([self._likeness(wanted, self.analyzer(image)) for image in sample.images])

    def _likeness(self, wanted: list[Face], found: list[Face]) -> float:
        best = [max((_cosine(one.embedding, other.embedding) for other in found), default=0.0) for one in wanted]
        return mean([clamp(cosine / self.same, 0, 1) for cosine in best])


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
