"""Explore: a place, walked move by move."""

from dataclasses import dataclass
from typing import Any

import gradio as gr
import PIL.Image

from ..dialogue import user_message
from ..downloads import save_png
from ..engine import Engine, Visitor
from ..errors import UserError
from ..examples import Examples
from ..parts import (
    Link,
    caption,
    connect,
    connect_stop,
    example_box,
    offer,
    png_button,
    prompt_box,
    run_buttons,
    status_line,
    upload,
    user_of,
)
from ..shown import shown_file
from ..updates import Update

Walk = dict[str, Any]
"""Of one session: `messages`, those of the conversation; `opening`, the first of them while it has no move yet;
`views`, see [`View`]."""


@dataclass(frozen=True)
class View:
    """A picture on the way. Not its file, which does not last as long as a page may stay open.

    Attributes:
        move (`str`): that led to it.
        made_with (`dict`, *optional*): for [`save_png`]; `None`: it is the visitor's own.
    """

    image: PIL.Image.Image
    move: str
    made_with: dict[str, Any] | None = None

    @property
    def shown(self) -> tuple[str, str]:
        """Its file, written anew if it has gone, and its caption."""
        return shown_file(self.image), caption(self.move, self.image)

    def offer(self, user: Visitor) -> gr.DownloadButton:
        return offer(None if self.made_with is None else save_png(self.image, user, **self.made_with))


def build(engine: Engine, examples: Examples) -> Link:
    """Lays the tab out and connects it."""
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            prompt = prompt_box(engine, "Where to begin", "The place, in words")
            with gr.Accordion("First view", open=False) as first_view:
                image = upload("Picture of the first view", height=200)
            run, stop = run_buttons("Start")
            labels = [row[0] if row[1] is None else f"{row[0]} (with a picture)" for row in examples.explore]
            example_box(examples.note, examples.explore, [prompt, image], labels)
            with gr.Row(elem_classes="moves"):
                moves = {
                    move: gr.Button(move.capitalize(), interactive=False, min_width=60, elem_classes=f"place-{place}")
                    for move, place in zip(examples.moves, ("up", "left", "right", "down"), strict=True)
                }
        with gr.Column(scale=7, min_width=300):
            view = gr.Image(
                label="View",
                type="filepath",
                format="png",
                interactive=False,
                height=380,
                buttons=["fullscreen"],
                elem_classes="pixels stage view",
            )
            status = status_line()
            download = png_button()
            trail = gr.Gallery(
                label="Trail",
                format="png",
                columns=6,
                fit_columns=False,
                height="auto",
                object_fit="contain",
                interactive=False,
                buttons=[],
                elem_classes="pixels trail",
            )
    walk = gr.State(None, time_to_live=engine.settings.delete_after)
    direction = gr.Radio(list(examples.moves), value=next(iter(examples.moves)), label="Direction", visible=False)

    def explore(request: gr.Request, prompt: str, image: str | None = None):
        """Begins a walk.  From words the model draws the first view; a picture is the first view."""
        opening = user_message(prompt, [image], engine.settings)
        if image is None:
            yield from go_on({"messages": [], "views": []}, opening, "start", user_of(request))
            return
        view = View(opening["content"][1]["image"], "start")
        started = {"messages": [], "opening": opening, "views": [view]}
        update = Update(stage="done", message="Choose a move.")
        yield view.shown[0], [view.shown], started, *enabled(True), offer(None), update

    def move(request: gr.Request, direction: str, walk: Walk | None):
        """The next view of this session's walk."""
        if walk is None:
            raise UserError("Begin a walk first, with Start.")
        said = {"role": "user", "content": [examples.moves[direction]]}
        if "opening" in walk:
            words, *shown = walk["opening"]["content"]
            said["content"] = [f"{words} {examples.moves[direction]}", *shown]
        yield from go_on(walk, said, direction, user_of(request))

    def go_on(walk: Walk, said: dict, name: str, user: Visitor):
        messages = [*walk["messages"], said]
        for update in engine.tell(messages, task="explore", user=user):
            made_with = {"prompt": said["content"][0], "seed": update.seed, **engine.made_with("explore")}
            views = [*walk["views"], *(View(picture, name, made_with) for picture in update.segments.images)]
            kept, download = walk, offer(None)
            if update.stage == "done":
                kept = {"messages": [*messages, {"role": "assistant", "content": update.segments}], "views": views}
                download = views[-1].offer(user) if views else download
            shown = [view.shown for view in views]
            can_move = update.is_last and bool(kept["views"])
            yield shown[-1][0] if shown else None, shown, kept, *enabled(can_move), download, update

    def enabled(can_move: bool) -> list[gr.Button]:
        return [gr.Button(interactive=can_move)] * len(moves)

    def choose(request: gr.Request, chosen: gr.SelectData, walk: Walk | None) -> gr.DownloadButton:
        """The view that the button gives."""
        views = walk["views"] if walk else []
        return views[chosen.index].offer(user_of(request)) if chosen.index < len(views) else gr.skip()

    outputs = [view, trail, walk, *moves.values(), download, status]
    link = Link("explore", {"prompt": prompt})
    connect([run.click, prompt.submit], explore, [prompt, image], outputs, stop, api_name="explore", link=link)
    connect([direction.input], move, [direction, walk], outputs, stop, api_name="move")
    for name, button in moves.items():
        connect(
            [button.click],
            move,
            [direction, walk],
            outputs,
            stop,
            api_name=None,
            js=f"(direction, ...others) => ['{name}', ...others]",
        )
    image.change(lambda image: gr.Accordion(open=image is not None), image, first_view, api_visibility="private")
    trail.select(choose, walk, download, queue=False, show_progress="hidden", api_visibility="private")
    connect_stop(engine, stop)
    return link
