"""What a Space runs and allows."""

import pytest
from emu35 import TINY, TINY_DIDA
from emu35.spaces.settings import SpaceSettings


def test_nothing_said_means_the_tiny_model():
    settings = SpaceSettings.from_environment({})
    assert settings.is_tiny
    assert settings.model == TINY
    assert settings.dida_adapter == TINY_DIDA
    assert settings.max_pixels < 10_000


def test_another_model_has_other_limits():
    settings = SpaceSettings.from_environment({"EMU35_MODEL": "emu35-image", "EMU35_LOAD_IN": "4bit"})
    assert not settings.is_tiny
    assert settings.load_in == "4bit"
    assert settings.dida_adapter is None
    assert settings.max_pixels == 1024 * 1024


def test_every_limit_can_be_set():
    environment = {"EMU35_MAX_SECONDS": "12.5", "EMU35_MAX_IMAGES": "2", "EMU35_DIDA_ADAPTER": "runs/dida"}
    settings = SpaceSettings.from_environment(environment | {"EMU35_QUEUE_SIZE": " "})
    assert (settings.max_seconds, settings.max_images, settings.dida_adapter) == (12.5, 2, "runs/dida")
    assert settings.queue_size == SpaceSettings().queue_size


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("EMU35_MAX_IMAGES", "many", "EMU35_MAX_IMAGES must be a whole number, got 'many'"),
        ("EMU35_MAX_IMAGES", "1.5", "whole number"),
        ("EMU35_MAX_SECONDS", "long", "EMU35_MAX_SECONDS must be a number"),
        ("EMU35_MAX_SECONDS", "0", "`max_seconds` must be positive"),
        ("EMU35_MAX_SECONDS", "nan", "`max_seconds` must be positive"),
        ("EMU35_LOAD_IN", "2bit", "`load_in` must be '4bit', '8bit' or None"),
    ],
)
def test_what_is_no_setting(name, value, says):
    with pytest.raises(ValueError, match=says):
        SpaceSettings.from_environment({name: value})
