"""README.md, docs/ and the cards: every link leads somewhere, every command can be called."""

import re
import shlex
from pathlib import Path

import pytest
from emu35 import cli
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "model_cards").glob("*/README.md")),
]
LINES_OF_FIRST_PAGE = 160  # about three screens


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def tokens(path: Path):
    front_matter = r"\A---\n.*?\n---\n"
    text = re.sub(front_matter, "", read(path), flags=re.DOTALL)
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def targets(path: Path) -> list[str]:
    """Of links and images, HTML ones, too."""
    found = []
    for token in tokens(path):
        found += [value for name, value in (token.attrs or {}).items() if name in ("href", "src")]
        if token.type in ("html_block", "html_inline"):
            found += re.findall(r'(?:href|src)="([^"]+)"', token.content)
    return found


def anchors(path: Path) -> set[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", read(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = targets(path)
    assert links
    for link in links:
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists() and target.is_relative_to(ROOT), link
            assert not anchor or anchor in anchors(target), link


def commands(path: Path) -> list[str]:
    blocks = [token.content for token in tokens(path) if token.type == "fence" and token.info == "bash"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = [token.content for token in tokens(path) if token.type == "code_inline"]
    return [line for line in (*lines, *spans) if line.startswith("emu35 ") and "..." not in line]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(path):
    parser = cli._build_parser()
    known = parser._subparsers._group_actions[0].choices
    for command in commands(path):
        words = shlex.split(command, comments=True)[1:]
        if len(words) == 1:  # only its name
            assert words[0] in known, command
            continue
        args, rest = parser.parse_known_args(words)
        if args.command == "convert":
            from emu35.convert_emu35_to_hf import add_arguments

            converter = cli._Parser()
            add_arguments(converter)
            converter.parse_args(rest)
        else:
            assert not rest, command
        if args.command == "train" and args.recipe.startswith("training/"):
            assert (ROOT / args.recipe).is_file() or "*" in args.recipe, command


def test_there_are_commands():
    assert len(commands(ROOT / "README.md")) >= 6
    assert sum(len(commands(path)) for path in PAGES) >= 40


def test_the_first_page_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= LINES_OF_FIRST_PAGE
