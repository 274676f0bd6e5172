"""Face identity: exact numbers with faces that are given, and OpenCV's interface with models that are stood in for."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from emu35.training.rewards import Face, FaceIdentity, OpenCVFaces, RewardMix
from PIL import Image


def picture(name):
    image = Image.new("RGB", (4, 4))
    image.info["name"] = name
    return image


class Faces:
    """`{name of a picture: [(area, angle), ...]}`; faces differ by the angle of their embeddings."""

    def __init__(self, **pictures):
        self.pictures, self.seen = pictures, []

    def __call__(self, image):
        self.seen.append(image.info["name"])
        found = self.pictures[image.info["name"]]
        return [
            Face(area, 3 * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])) for area, angle in found
        ]


ANALYZER = {
    "ann": [(1, 200), (9, 0)],  # the small one in the background does not count
    "bob": [(5, 90)],
    "empty": [],
    "ann_again": [(2, 60)],
    "both": [(1, 90), (1, 60), (1, 180)],
}


def ask(images, references, **settings):
    reward = FaceIdentity(Faces(**ANALYZER), **settings)
    images = [[picture(name) for name in names] for names in images]
    references = [names if names is None else [picture(name) for name in names] for names in references]
    return reward(["p"] * len(images), [""] * len(images), images=images, reference_images=references)


def test_identity_is_the_best_cosine_of_each_reference():
    values = ask(
        [["ann_again"], ["both"], ["both"], ["ann_again", "empty"], ["empty"], []],
        [["ann"], ["ann"], ["ann", "bob"], ["ann"], ["ann"], ["ann"]],
        same=1.0,
    )
    # cosines: 60 degrees 0.5, 0 degrees 1, 90 degrees 0
    assert values == pytest.approx([0.5, 0.5, 0.75, 0.25, 0.0, 0.0])


def test_a_usual_likeness_is_full_likeness():
    assert ask([["ann_again"], ["ann"]], [["ann"]] * 2) == pytest.approx([0.5 / 0.8, 1.0])
    assert ask([["bob"]], [["ann_again"]], same=0.5) == [1.0]  # 30 degrees


def test_references_without_a_face_give_none():
    assert ask([["ann"]] * 3, [["empty"], ["empty", "ann"], None]) == [None, 1.0, None]


def test_the_faces_of_a_shared_reference_are_found_once():
    analyzer = Faces(**ANALYZER)
    reference, reward = [picture("ann")], FaceIdentity(analyzer)
    reward(["p"] * 4, [""] * 4, images=[[picture("both")]] * 4, reference_images=[reference] * 4)
    assert analyzer.seen.count("ann") == 1 and analyzer.seen.count("both") == 4


def test_references_out_of_the_prompt():
    said = [{"type": "image", "image": picture("ann")}, {"type": "text", "text": "put her on a horse"}]
    messages = [[{"role": "user", "content": said}], [{"role": "user", "content": "a horse"}]]
    reward = FaceIdentity(Faces(**ANALYZER), column=None, same=1.0)
    values = reward(["p"] * 2, [""] * 2, images=[[picture("both")]] * 2, messages=messages)
    assert values == [pytest.approx(0.5), None]  # a prompt without a face asks for none


def test_a_broken_picture_is_none_and_counted():
    reward = FaceIdentity(Faces(**ANALYZER))
    images = [[picture("ann")], [picture("unknown")]]
    assert RewardMix([reward])(["p"] * 2, [""] * 2, images=images, reference_images=[[picture("ann")]] * 2) == [
        10,
        None,
    ]
    assert reward.num_failures == 1


def test_a_bad_threshold_is_refused():
    for value in (0, 1.5):
        with pytest.raises(ValueError, match=r"`same` must be a cosine in \(0, 1\]"):
            FaceIdentity(same=value)


def test_opencv_is_asked_in_its_own_terms(monkeypatch):
    """The order of channels, the size of the detector's input, and the rows it returns."""
    made = {}

    class Detector:
        @staticmethod
        def create(path, config, size, threshold):
            made["detector"] = path, threshold
            return Detector()

        def setInputSize(self, size):
            self.size = size

        def detect(self, pixels):
            assert pixels.shape[:2][::-1] == self.size and pixels.flags["C_CONTIGUOUS"]
            if pixels[0, 0, 2] == 0:
                return 1, None
            return 1, np.array([[1, 1, 2, 3, *[0] * 10, 0.9], [0, 0, 4, 2, *[0] * 10, 0.95]], dtype=np.float32)

    class Recognizer:
        @staticmethod
        def create(path, config):
            made["recognizer"] = path
            return Recognizer()

        def alignCrop(self, pixels, face):
            return face

        def feature(self, crop):
            return np.full((1, 3), crop[2], dtype=np.float32)

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(FaceDetectorYN=Detector, FaceRecognizerSF=Recognizer))
    analyzer = OpenCVFaces("yunet.onnx", "sface.onnx", threshold=0.7)
    assert made == {}  # nothing is loaded yet
    faces = analyzer(Image.new("RGB", (6, 4), (255, 0, 0)))
    assert [face.area for face in faces] == [6.0, 8.0]
    assert [face.embedding.tolist() for face in faces] == [[2.0] * 3, [4.0] * 3]
    assert analyzer(Image.new("RGB", (6, 4), (0, 0, 255))) == []
    assert made == {"detector": ("yunet.onnx", 0.7), "recognizer": "sface.onnx"}


def test_without_opencv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    reward = FaceIdentity(OpenCVFaces("yunet.onnx", "sface.onnx"))
    with pytest.raises(ImportError, match=r"Face identity needs `cv2`: `pip install 'emu35\[rewards\]'`"):
        reward(["p"], [""], images=[[picture("x")]], reference_images=[[picture("y")]])
