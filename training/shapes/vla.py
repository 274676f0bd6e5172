"""Manipulation: a gripper picks and places blocks, one sentence and one key frame a sub-task.

A picture is a side view. Row 0 is the gripper's rail: a pink large ring is the open gripper, a pink large circle the
closed one. Blocks are large squares of other colours, all different. They stand on the floor (row 2) or on one another
(row 1), and a held block hangs in row 1 below the closed gripper. So two blocks in a column are a full one.

    subtask = "pick up the" block "." | "place it" target "."
    goal    = "put the" block target { "and the" block target } "."
    target  = "on the" block | "on the floor on the left" | "on the floor in the center" | "on the floor on the right"
    block   = COLOUR "block"

- A pick needs an open gripper and the top block of a column; the block is lifted to row 1.
- A placement needs a held block and a free target: an empty column, or a block with nothing on it. The held block
  travels along row 1, so that no other block may stand in row 1 on its way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .checker import ReadScene
from .episode import Episode, GlobalThought, Said, Turn, read_told, up_to
from .scene import BACKGROUNDS, COLORS, GRID_SIZE, HELD_OUT, Frame, SceneObject, _draw
from .words import PLACES, choose

GRIPPER_COLOR = "pink"
"""No block has it."""
BLOCK_COLORS: tuple[str, ...] = tuple(color for color in COLORS if color != GRIPPER_COLOR)
"""Colours of blocks. Training shows no purple one: a purple square is a held-out pair."""
MAX_BLOCKS = 3
"""Most blocks of a picture; the least is 1."""
MAX_SUBTASKS = 6
"""Most sub-tasks of a sampled episode."""
SPARE_SUBTASKS = 2
"""How many more sub-tasks than necessary a plan may have."""

_OPEN, _CLOSED = "ring", "circle"
_RAIL, _UP, _FLOOR = range(GRID_SIZE)
_COLUMNS = tuple(range(GRID_SIZE))
_FULL = 2  # blocks of a column
_HELD_RATE = 1 / 3  # of episodes that start with a block in the gripper
_COLUMN_NAMES = ("left", "center", "right")
_FLOOR_PHRASES = tuple(f"on the floor {PLACES[name][0]}" for name in _COLUMN_NAMES)


@dataclass(frozen=True)
class BlocksState:
    """Where the blocks and the gripper are.

    Attributes:
        columns (`tuple[tuple[str, ...], ...]`): colours of the blocks of each column, the lowest first, without the
            held one.
        gripper (`int`): its column.
        held (`str`, *optional*): colour of the held block.
    """

    columns: tuple[tuple[str, ...], ...]
    gripper: int
    held: str | None = None


@dataclass(frozen=True)
class Pick:
    """ "pick up the `block` block." """

    block: str


@dataclass(frozen=True)
class Place:
    """Place the held block on a block (its colour) or on the floor (a column)."""

    target: str | int


Subtask = Pick | Place


@dataclass(frozen=True)
class Stands:
    """One statement of a goal: a block stands on a block (its colour) or on the floor (a column)."""

    block: str
    target: str | int


@dataclass(frozen=True)
class VlaMeaning:
    """What a prompt says and shows: the `goal`, the state of the first picture and its `background`."""

    goal: tuple[Stands, ...]
    state: BlocksState
    background: str


def sample_vla(
    rng: np.random.Generator, held_out: bool | None = False, difficulty: float = 1.0, kind: str | None = None
) -> Episode:
    """Draw a task: task "vla", kind "2_subtasks", "4_subtasks", "6_subtasks", or "start_held" (1, 3 or 5 sub-tasks).

    The number of sub-tasks is odd if a block is in the gripper at the start, since a goal wants the gripper empty. The
    answer is the plan of [`shortest_plan`], after a thought that says what stands where and where each block goes.

    Args:
        rng (`np.random.Generator`): the only source of randomness.
        held_out (`bool`, *optional*): `True` shows a purple block, the only held-out pair among blocks; `False` shows
            none; `None` draws from all colours. Goals and plans are no other with it.
        difficulty (`float`, defaults to 1.0): in `(0, 1]`; bounds the number of sub-tasks and of blocks.
        kind (`str`, *optional*): one of those above, at any difficulty; `None` draws it.
    Raises:
        ValueError: if the difficulty or the kind is another.
    """
    rounds = up_to(difficulty, 1, MAX_SUBTASKS // 2)
    kinds = {f"{2 * n}_subtasks": 2 * n for n in range(1, MAX_SUBTASKS // 2 + 1)}
    if kind is not None and kind not in (*kinds, "start_held"):
        raise ValueError(f"`kind` must be one of {', '.join((*kinds, 'start_held'))}, got {kind!r}.")
    if kind is None:
        kind = "start_held" if rng.random() < _HELD_RATE else choose(rng, tuple(kinds)[:rounds])
    number = kinds.get(kind) or 2 * int(rng.integers(1, rounds + 1)) - 1
    colors = tuple(color for color in BLOCK_COLORS if held_out is not False or (color, "square") not in HELD_OUT)
    background = choose(rng, tuple(BACKGROUNDS))
    fewest = 1 if number <= 2 else 2
    most = max(fewest, up_to(difficulty, 1, MAX_BLOCKS))
    number_of_blocks = int(rng.integers(fewest, most + 1))
    goal = None
    while goal is None:
        blocks = _draw(rng, colors, number_of_blocks)
        if not held_out or any((color, "square") in HELD_OUT for color in blocks):
            state = _sample_state(rng, blocks, held=kind == "start_held")
            goal = _sample_goal(rng, state, number)
    meaning = VlaMeaning(goal, state, background)
    plan, shown = shortest_plan(state, goal), state
    answer: list = [GlobalThought(_think(state, plan))]
    for subtask in plan:
        shown = apply_subtask(subtask, shown)
        answer += [instruct_subtask(subtask), state_frame(shown, background)]
    prompt = goal_text(goal), state_frame(state, background)
    return Episode("vla", kind, (Turn("user", prompt), Turn("assistant", tuple(answer))), meaning)


def _think(state: BlocksState, plan: Sequence[Subtask]) -> str:
    """What stands where, lowest first, and where each block goes: "orange red center. red right, orange left."."""
    there = [f"{' '.join(blocks)} {name}" for blocks, name in zip(state.columns, _COLUMN_NAMES, strict=True) if blocks]
    block, goes = state.held, []
    for subtask in plan:
        if isinstance(subtask, Pick):
            block = subtask.block
        else:
            target = subtask.target
            goes.append(f"{block} {_COLUMN_NAMES[target] if isinstance(target, int) else f'on {target}'}")
    held = [f"{state.held} in gripper"] if state.held else []
    return f"{', '.join([*there, *held])}. {', '.join(goes)}."


def instruct_subtask(subtask: Subtask) -> str:
    """The sentence of a sub-task: `parse_subtask(instruct_subtask(subtask)) == subtask`."""
    if isinstance(subtask, Pick):
        return f"pick up the {subtask.block} block."
    return f"place it {_target_phrase(subtask.target)}."


def parse_subtask(text: str) -> Subtask:
    """Reads one sentence of the grammar above, nothing else.

    Raises:
        ValueError: if the text is another.
    """
    if text not in _SUBTASKS:
        raise ValueError(f'Cannot read {text!r}. Write like "pick up the red block." or "place it on the blue block."')
    return _SUBTASKS[text]


def goal_text(goal: Sequence[Stands]) -> str:
    """ "put the red block on the blue block and the blue block on the floor on the left." """
    return f"put {' and '.join(f'the {s.block} block {_target_phrase(s.target)}' for s in goal)}."


def _target_phrase(target: str | int) -> str:
    return _FLOOR_PHRASES[target] if isinstance(target, int) else f"on the {target} block"


_SUBTASKS: dict[str, Subtask] = {
    instruct_subtask(subtask): subtask
    for subtask in (*map(Pick, BLOCK_COLORS), *map(Place, BLOCK_COLORS), *map(Place, _COLUMNS))
}


def apply_subtask(subtask: Subtask, state: BlocksState) -> BlocksState | None:
    """The state after a sub-task; `None` if it is not legal."""
    if isinstance(subtask, Pick):
        column = next((c for c in _COLUMNS if state.columns[c][-1:] == (subtask.block,)), None)
        if state.held is not None or column is None:
            return None
        return BlocksState(_replace(state.columns, column, state.columns[column][:-1]), column, subtask.block)
    below = () if isinstance(subtask.target, int) else (subtask.target,)
    options = [subtask.target] if isinstance(subtask.target, int) else _COLUMNS
    column = next((c for c in options if state.columns[c] == below), None)
    if state.held is None or column is None:
        return None
    way = range(min(state.gripper, column), max(state.gripper, column) + 1)
    if any(len(state.columns[c]) == _FULL for c in way):
        return None
    return BlocksState(_replace(state.columns, column, (*below, state.held)), column)


def goal_holds(goal: Sequence[Stands], state: BlocksState) -> bool:
    """Whether every statement of a goal is true of a state and the gripper is empty."""
    return state.held is None and all(s in _statements(state) for s in goal)


def shortest_plan(state: BlocksState, goal: Sequence[Stands]) -> list[Subtask]:
    """The shortest plan; of several, the first in the order of columns from left to right.

    The order is of the columns that a pick takes from or a placement goes to, the first sub-task first.

    Raises:
        ValueError: if no plan reaches the goal.
    """
    names = _names(state)
    start, wanted = _rename_state(state, names), [_rename_stands(s, names) for s in goal]
    nodes = _reachable(start)
    index = next((i for i, node in enumerate(nodes) if goal_holds(wanted, node.state)), None)
    if index is None:
        raise ValueError(f"No plan reaches `goal` {goal_text(goal)!r} from {state}.")
    colors = {name: color for color, name in names.items()}
    plan = []
    while nodes[index].parent is not None:
        plan.append(_rename_subtask(nodes[index].subtask, colors))
        index = nodes[index].parent
    return plan[::-1]


def state_frame(state: BlocksState, background: str) -> Frame:
    """The picture of a state."""
    held = [] if state.held is None else [("square", state.held, _UP, state.gripper)]
    gripper = (_OPEN if state.held is None else _CLOSED), GRIPPER_COLOR, _RAIL, state.gripper
    blocks = [
        ("square", color, _FLOOR - height, column)
        for column, colors in enumerate(state.columns)
        for height, color in enumerate(colors)
    ]
    objects = sorted((gripper, *held, *blocks), key=lambda o: o[2:])
    return Frame(tuple(SceneObject(shape, color, "large", *cell) for shape, color, *cell in objects), background)


def read_state(seen: ReadScene) -> BlocksState | None:
    """The state that a picture shows; `None` if it is not physical or not readable.

    Physical: one gripper, on its rail; else only blocks, of different colours, none on the rail; no block floats but
    the one below the closed gripper, which holds one.
    """
    if seen.background is None or seen.unreadable or any(o.size != "large" for o in seen.objects):
        return None
    grippers = [o for o in seen.objects if o.color == GRIPPER_COLOR and o.shape in (_OPEN, _CLOSED)]
    blocks = {(o.row, o.column): o.color for o in seen.objects if o.color in BLOCK_COLORS and o.shape == "square"}
    if [o.row for o in grippers] != [_RAIL] or len(grippers) + len(blocks) < len(seen.objects):
        return None
    if len(set(blocks.values())) < len(blocks) or any(row == _RAIL for row, _ in blocks):
        return None
    (gripper,) = grippers
    held = blocks.pop((_UP, gripper.column), None) if gripper.shape == _CLOSED else None
    if (gripper.shape == _CLOSED) != (held is not None):
        return None
    if any(row == _UP and (_FLOOR, column) not in blocks for row, column in blocks):
        return None
    columns = tuple(tuple(blocks[row, c] for row in (_FLOOR, _UP) if (row, c) in blocks) for c in _COLUMNS)
    return BlocksState(columns, gripper.column, held)


def check_vla(meaning: VlaMeaning, answers: Sequence[Sequence[Said]]) -> dict[str, float | bool]:
    """Mark a plan from its sentences and pixels; any legal plan will do.

    A sub-task is a sentence and the picture after it; text after the last picture is a sub-task without a picture.

    Args:
        meaning ([`VlaMeaning`]): of the prompt.
        answers: pieces of each turn of the assistant.
    Returns:
        `dict`: `legal`, the sub-tasks that can be read, are legal in the state which the picture before shows and
            whose own picture shows their result exactly, as a share of the sub-tasks found or of the least necessary
            ones if those are more; `goal` (the last picture shows it reached, the gripper empty); `success` (all
            sub-tasks legal, goal reached, at most [`SPARE_SUBTASKS`] more than necessary).
    """
    told, rest = read_told(answers)
    subtasks = [(text, read_state(seen) if seen.background == meaning.background else None) for text, seen in told]
    goal = bool(subtasks) and subtasks[-1][1] is not None and goal_holds(meaning.goal, subtasks[-1][1])
    if rest:
        subtasks.append((rest, None))
    legal, before = 0, meaning.state
    for text, shown in subtasks:
        subtask = _SUBTASKS.get(text)
        legal += None not in (subtask, before, shown) and apply_subtask(subtask, before) == shown
        before = shown
    least = len(shortest_plan(meaning.state, meaning.goal))
    success = goal and legal == len(subtasks) <= least + SPARE_SUBTASKS
    return {"legal": legal / max(len(subtasks), least), "goal": goal, "success": success}


# ----------------------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class _Node:
    """A state, the sub-task that led to it from the node `parent` (an index), and the number of sub-tasks so far."""

    state: BlocksState
    subtask: Subtask | None
    parent: int | None
    depth: int


@cache
def _reachable(start: BlocksState) -> tuple[_Node, ...]:
    """All states that can be reached, the nearest first: the nodes of a breadth-first search."""
    nodes, met = [_Node(start, None, None, 0)], {start}
    for index, node in enumerate(nodes):  # grows while it is walked
        for subtask in _options(node.state):
            state = apply_subtask(subtask, node.state)
            if state is not None and state not in met:
                met.add(state)
                nodes.append(_Node(state, subtask, index, node.depth + 1))
    return tuple(nodes)


def _options(state: BlocksState) -> list[Subtask]:
    """At most one sub-task a column, from left to right; perhaps some that are not legal."""
    if state.held is None:
        return [Pick(blocks[-1]) for blocks in state.columns if blocks]
    return [Place(blocks[-1] if blocks else column) for column, blocks in enumerate(state.columns)]


def _sample_state(rng: np.random.Generator, blocks: Sequence[str], held: bool) -> BlocksState:
    """Any physical state, blocks in random columns; the last block may be held."""
    columns = [()] * GRID_SIZE
    for color in blocks[:-1] if held else blocks:
        column = choose(rng, [c for c in _COLUMNS if len(columns[c]) < _FULL])
        columns[column] = (*columns[column], color)
    free = [c for c in _COLUMNS if not held or len(columns[c]) < _FULL]
    return BlocksState(tuple(columns), choose(rng, free), blocks[-1] if held else None)


def _sample_goal(rng: np.random.Generator, state: BlocksState, number: int) -> tuple[Stands, ...] | None:
    """One or two statements that take a number of sub-tasks at least; `None` if this draw finds none."""
    names = _names(state)
    ends = [node.state for node in _reachable(_rename_state(state, names)) if node.depth == number]
    if not ends:
        return None
    statements = _statements(choose(rng, ends))
    wanted = _draw(rng, statements, int(rng.integers(1, min(2, len(statements)) + 1)))
    colors = {name: color for color, name in names.items()}
    goal = tuple(_rename_stands(s, colors) for s in wanted)
    return goal if len(shortest_plan(state, goal)) == number else None


@cache
def _statements(state: BlocksState) -> tuple[Stands, ...]:
    """All that is true of the blocks, from left to right."""
    return tuple(
        Stands(color, blocks[height - 1] if height else column)
        for column, blocks in enumerate(state.columns)
        for height, color in enumerate(blocks)
    )


def _replace(columns: tuple[tuple[str, ...], ...], column: int, blocks: tuple[str, ...]):
    return (*columns[:column], blocks, *columns[column + 1 :])


# Plans do not depend on colours. With blocks named by where they stand, few states are searched and all of them once.


def _names(state: BlocksState) -> dict[str, str]:
    """Colour to the name of the block in the search."""
    colors = [color for blocks in state.columns for color in blocks] + [state.held] * (state.held is not None)
    return {color: str(index) for index, color in enumerate(colors)}


def _rename_state(state: BlocksState, names: dict[str, str]) -> BlocksState:
    columns = tuple(tuple(names[color] for color in blocks) for blocks in state.columns)
    return BlocksState(columns, state.gripper, names.get(state.held))


def _rename_stands(stands: Stands, names: dict[str, str]) -> Stands:
    return Stands(names[stands.block], names.get(stands.target, stands.target))


def _rename_subtask(subtask: Subtask, names: dict[str, str]) -> Subtask:
    return (
        Pick(names[subtask.block]) if isinstance(subtask, Pick) else Place(names.get(subtask.target, subtask.target))
    )
