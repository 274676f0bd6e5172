"""What holds for the project as a whole: packaging, dependencies, house rules, README."""

import ast
import configparser
import re
import sys
import tokenize
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
ROOMS = {"modeling_emu35": "emu35", "pipelines": "pipelines", "training": "training", "spaces": "spaces"}
SOURCES = [
    path
    for room in [*ROOMS, "model_cards"]
    for path in sorted((ROOT / room).rglob("*.py"))
    if "__pycache__" not in path.parts
] + [ROOT / "emu35_launcher.py"]
USERS_OF_THE_SCHEDULER = tuple(ROOT / "modeling_emu35" / name for name in ("dida_emu35.py", "bench_dida_emu35.py"))
COMMAND_LINE = ROOT / "modeling_emu35" / "cli.py"

#: Functions that may catch any error without raising it again, and why.
CATCH_ALL = {
    # A reward's failure stays with its sample, and is counted: cv2, onnxruntime and users raise what they like.
    (ROOT / "training" / "rewards" / "base.py", "attempt"),
    # A thread has nobody to raise to: the error is logged, and who waits for the thread is told.
    (ROOT / "spaces" / "background.py", "updates_of"),
    # A measurement: whatever went wrong, the request is lost, and why is reported.
    (ROOT / "spaces" / "load_test.py", "_send"),
}
#: What a room needs beyond what the package requires; it is imported when it is wanted.
EXTRAS = {"spaces": "demo"}

#: Where the name of a distribution is not that of its module.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path, nested: bool) -> set[str]:
    """Absolute names of all modules imported at the top of a file, or anywhere in it."""
    room = path.relative_to(ROOT).parts[0]
    package = "emu35" if room == "modeling_emu35" else f"emu35.{'.'.join(path.relative_to(ROOT).parts[:-1])}"
    found = set()
    tree = parse(path)
    nodes = ast.walk(tree) if nested else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")
            parent = parent[: len(parent) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(value: str) -> list[str]:
    return [line.strip() for line in value.splitlines() if line.strip()]


# --------------------------------------------------------------------------------------------------------- house rules


def test_token_ids_have_one_home():
    ids = re.compile(r"\b(1518(4[0-9]|5[0-9])|151643|151696|151697|15170[67]|15174[67])\b")
    for path in SOURCES:
        if path.name != "configuration_emu35.py":
            assert not ids.search(path.read_text(encoding="utf-8")), path


def test_only_the_command_line_prints():
    for path in SOURCES:
        calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
        prints = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
        assert not prints or path == COMMAND_LINE, (path, prints)


@pytest.mark.parametrize("keyword", ["trust_remote_code=True", "weights_only=False"])
def test_nothing_unsafe_is_asked_for(keyword):
    name, value = keyword.split("=")
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.keyword) and node.arg == name and isinstance(node.value, ast.Constant):
                assert str(node.value.value) != value, (path, node.value.lineno)


def test_every_torch_load_reads_weights_only():
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", (path, node.lineno)


def test_no_error_is_swallowed():
    for path in SOURCES:
        tree = parse(path)
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        allowed = {part for node in functions if (path, node.name) in CATCH_ALL for part in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and node not in allowed:
                assert node.type is not None, (path, node.lineno)
                broad = ast.unparse(node.type) in ("Exception", "BaseException")
                assert not broad or any(isinstance(part, ast.Raise) for part in ast.walk(node)), (path, node.lineno)


def test_no_assertion_guards_what_users_give():
    for path in SOURCES:
        found = [node.lineno for node in ast.walk(parse(path)) if isinstance(node, ast.Assert)]
        assert not found, (path, found)


def test_nothing_is_left_open():
    for path in SOURCES:
        with path.open("rb") as file:
            comments = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
        left = [token.start[0] for token in comments if re.search(r"\b(TODO|FIXME|XXX)\b", token.string)]
        assert not left, (path, left)


# -------------------------------------------------------------------------------------------------------- dependencies


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("modeling_emu35", ("emu35.pipelines", "emu35.training", "emu35.spaces")),
        ("pipelines", ("emu35.training", "emu35.spaces")),
        ("training", ("emu35.spaces",)),
    ],
)
def test_dependencies_point_one_way(room, forbidden):
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == room:
            # The command line reaches the other rooms, but only when one of its commands runs; and the scheduler of
            # `dida`, which diffusers wants among the pipelines, is looked up when a model decodes with it.
            for name in imports(path, nested=path not in (COMMAND_LINE, *USERS_OF_THE_SCHEDULER)):
                assert not name.startswith(forbidden), (path, name)


def test_the_modeling_folder_is_flat():
    assert not [path for path in (ROOT / "modeling_emu35").iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_the_command_line_imports_nothing_heavy_at_the_top():
    for path in (COMMAND_LINE, ROOT / "emu35_launcher.py"):
        roots = {name.partition(".")[0] for name in imports(path, nested=False)}
        assert roots <= sys.stdlib_module_names, path


def test_what_the_package_imports_is_what_it_requires():
    def names(value: str) -> set[str]:
        return {canonicalize_name(Requirement(line).name) for line in lines(value)}

    required = names(config()["options"]["install_requires"])
    extras = {room: names(config()["options.extras_require"][extra]) for room, extra in EXTRAS.items()}
    for path in SOURCES:
        available = required | extras.get(path.relative_to(ROOT).parts[0], set())
        for name in imports(path, nested=False):
            root = name.partition(".")[0]
            if root in sys.stdlib_module_names or root == "emu35":
                continue
            assert canonicalize_name(DISTRIBUTIONS.get(root, root)) in available, (path, root)
    assert "torchvision" not in required


# ----------------------------------------------------------------------------------------------------------- packaging


def test_all_packages_and_their_data_are_listed():
    options = config()["options"]
    folders = dict(line.split(" = ") for line in lines(options["package_dir"]))
    assert set(folders) == set(lines(options["packages"]))
    listed = {ROOT / folder for folder in folders.values()}
    for room in [*ROOMS, "model_cards"]:
        for path in (ROOT / room).rglob("*.py"):
            assert path.parent in listed, f"{path.parent} is missing in setup.cfg"
    data = config()["options.package_data"]
    for package, patterns in data.items():
        patterns = [pattern.strip() for pattern in patterns.split(",")]
        folder = ROOT / folders[package]
        assert patterns and folder.is_dir()
    for folder, package in ((ROOT / "training", "emu35.training"), (ROOT / "model_cards", "emu35.model_cards")):
        matched = {path for pattern in data[package].split(",") for path in folder.glob(pattern.strip())}
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert path in matched, f"{path} is missing in package_data"


def test_the_command_starts_with_the_launcher():
    assert lines(config()["options.entry_points"]["console_scripts"]) == ["emu35 = emu35_launcher:main"]
    assert lines(config()["options"]["py_modules"]) == ["emu35_launcher"]


def test_constraints_pin_everything_within_its_range():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, separator, version = line.partition("==")
            assert separator and Version(version).local is None, line
            pins[canonicalize_name(name)] = Version(version)
    required = lines(config()["options"]["install_requires"])
    for extra in config()["options.extras_require"].values():
        required += lines(extra)
    for line in required:
        requirement = Requirement(line)
        if requirement.name != "emu35":  # the extra `all`
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line
    assert (str(pins["torch"]), str(pins["transformers"]), str(pins["diffusers"])) == ("2.13.0", "5.23.0", "0.42.1")


# -------------------------------------------------------------------------------------------------------------- README


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_lines_are_in_the_readme_and_only_there():
    install, test = (line for line in readme().splitlines() if line.startswith("pip install -c constraints.txt "))
    generate = 'emu35 generate "a small red circle above a large blue square" -o out.png'
    assert install == f"pip install -c constraints.txt -e . && {generate}"
    assert test == 'pip install -c constraints.txt -e ".[test]" && pytest'
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script and "emu35 generate" not in script and "&& pytest" not in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
