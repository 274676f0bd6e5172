"""The browser tests' pictures of the page as those of README: docs/images/space-TAB.png and space-phone.png.

    python tests/spaces/take_screenshots.py              # runs the two tests that take them, and writes all
    python tests/spaces/take_screenshots.py --from DIR   # of a run with EMU35_SCREENSHOTS=DIR

Each gets 256 colours at most, by which it is a third as large and looks the same. What README shows of them, and their
order, is `python -m emu35.model_cards.generate`'s.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
TABS = ("create", "edit", "ask", "tell", "explore", "robot", "race")
#: Picture of README to that of the tests.
SOURCES = {**{tab: f"{tab}-light" for tab in TABS}, "phone": "create-phone"}


def write_small(source: Path, target: Path):
    with Image.open(source) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(target, optimize=True)


def take(folder: Path) -> int:
    tests = [f"{ROOT}/tests/spaces/test_browser.py", "-n", "0", "-m", "slow"]
    tests += ["-k", "accessibility and light or phone", "-s"]
    return subprocess.call(
        [sys.executable, "-m", "pytest", *tests], env=os.environ | {"EMU35_SCREENSHOTS": str(folder)}
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="folder", type=Path, metavar="DIR", help="pictures that the tests have taken")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.folder is None and (code := take(folder)):
            return code
        for name, source in SOURCES.items():
            write_small(folder / f"{source}.png", IMAGES / f"space-{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
