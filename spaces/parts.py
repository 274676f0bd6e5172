"""Parts that every tab is made of: the status line, uploads, run and stop, settings, links that carry settings."""

import functools
import html
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image

from .downloads import UNFINISHED_NAME
from .engine import Engine, Visitor
from .errors import UserError
from .shown import shown_file
from .updates import UNFINISHED, Update

#: Names of the image decoders as visitors read them.
DECODER_NAMES = {
    "ar": "One code at a time (ar)",
    "speculative": "Several guessed at once, from the same distribution (speculative)",
    "dida": "All at once, refined in steps (dida)",
}
_STAGES = {
    "queued": "Waiting for your turn",
    "prompt": "Reading",
    "drawing": "Drawing",
    "writing": "Writing",
    "done": "Done",
    "stopped": "Stopped",
    "error": "Not possible",
}
_STATUS = """
{{#if value.stage}}
<div class="status is-{{value.stage}}">
  {{#if value.running}}
    {{#if value.known}}<progress aria-label="Progress" max="100" value="{{value.percent}}"></progress>
    {{else}}<progress aria-label="Progress"></progress>{{/if}}
  {{/if}}
  <p><b>{{value.message}}</b> <span>{{value.figures}}</span></p>
</div>
{{/if}}
"""
# Figures change several times a second. A screen reader is told the sentence only, and only when it changes.
_ANNOUNCE = """
const live = document.createElement("div");
live.setAttribute("role", "status");
live.className = "only-for-screen-readers";
element.parentElement.appendChild(live);
watch("value", () => {
  const said = (props.value || {}).message || "";
  if (live.textContent !== said) live.textContent = said;
});
"""


def status_line() -> gr.HTML:
    """How far a request is; its value is that of [`status`]."""
    line = gr.HTML(
        {},
        html_template=_STATUS,
        js_on_load=_ANNOUNCE,
        label="Status",
        elem_classes="status-line",
        apply_default_css=False,
    )
    line.api_info = lambda: {"type": "object"}
    return line


def status(update: Update) -> dict[str, Any]:
    """An [`Update`] as the status line draws it, and clients of the API get it."""
    return {
        "stage": update.stage,
        "running": not update.is_last,
        "known": update.fraction is not None,
        "percent": round(100 * (update.fraction or 0)),
        "seconds": round(update.seconds, 2),
        "remaining": update.remaining,
        "passes": update.passes,
        "seed": update.seed,
        "message": update.message or _STAGES[update.stage],
        "figures": figures(update),
    }


def figures(update: Update) -> str:
    """ "12 passes · 0.8 s · about 2 s left": what is known of them."""
    parts = []
    if update.passes:
        parts.append(f"{update.passes} pass{'es' if update.passes != 1 else ''}")
    if update.seconds:
        parts.append(f"{update.seconds:.1f} s")
    if update.remaining and not update.is_last:
        parts.append(f"about {max(1, round(update.remaining))} s left")
    if update.stage in ("done", "stopped"):
        parts.append(f"seed {update.seed}")
    return " · ".join(parts)


def upload(label: str, **settings: Any) -> gr.Image:
    """An image of the visitor, which listeners get as the path of its file."""
    image = gr.Image(
        type="filepath",
        label=label,
        sources=["upload"],
        buttons=[],
        elem_classes="upload pixels",
        **settings,
    )
    # Gradio's own would open the file, and nothing may do that before `uploads` has checked it. (Of a subclass, gradio
    # would write a .pyi file next to this one.)
    image.preprocess = _path_of
    return image


def _path_of(payload: Any) -> str | None:
    if payload is None:
        return None
    if payload.path is None:
        raise gr.Error("Send the image as a file, not as text.", print_exception=False)
    return payload.path


@dataclass(frozen=True)
class Link:
    """What a tab writes into the address of the page, and reads from it: `controls` by their name there."""

    tab: str
    controls: dict[str, Any] = field(default_factory=dict)

    def js(self, inputs: Sequence[Any]) -> str:
        """Runs before a request with these `inputs`: writes those of them that are `controls` into the address.

        Raises:
            ValueError: if a control is none of the `inputs`.
        """
        ids = [one._id for one in inputs]
        places = json.dumps([ids.index(control._id) for control in self.controls.values()])
        tab, names = json.dumps(self.tab), json.dumps(list(self.controls))
        return (
            f"(...values) => {{ emu35Share({tab}, {names}, {places}.map((place) => values[place])); return values; }}"
        )

    def read(self, query: dict[str, str]) -> list[Any]:
        """Values for the `controls`; `gr.skip()` where the address says nothing, or nothing that fits."""
        mine = query.get("tab", "create") == self.tab
        return [read_value(control, query.get(name) if mine else None) for name, control in self.controls.items()]


def read_value(control: Any, text: str | None) -> Any:
    """What a control becomes by a text of the address; `gr.skip()` if it does not fit."""
    if text is None:
        return gr.skip()
    if isinstance(control, (gr.Radio, gr.Dropdown)):
        return text if text in [value for _, value in control.choices] else gr.skip()
    if isinstance(control, (gr.Slider, gr.Number)):
        try:
            number = float(text)
        except ValueError:
            return gr.skip()
        low = float("-inf") if control.minimum is None else control.minimum
        high = float("inf") if control.maximum is None else control.maximum
        return number if low <= number <= high else gr.skip()
    return text[: control.max_length]


@dataclass(frozen=True)
class Settings:
    """The folded controls of a tab."""

    seed: gr.Number
    guidance_scale: gr.Slider | None
    image_decoder: gr.Radio
    num_inference_steps: gr.Slider

    def __iter__(self) -> Iterator[Any]:
        return iter(control for control in vars(self).values() if control is not None)

    def names(self) -> dict[str, Any]:
        short = {
            "seed": self.seed,
            "guidance": self.guidance_scale,
            "decoder": self.image_decoder,
            "steps": self.num_inference_steps,
        }
        return {name: control for name, control in short.items() if control is not None}


def prompt_box(engine: Engine, label: str, placeholder: str) -> gr.Textbox:
    """A sentence of the visitor."""
    return gr.Textbox(
        label=label,
        placeholder=placeholder,
        max_lines=5,
        max_length=engine.settings.max_prompt_length,
        autofocus=False,
    )


def seed_box() -> gr.Number:
    return gr.Number(None, label="Seed", info="Empty: a new one every time", precision=0, minimum=0)


def settings_box(engine: Engine, guidance: float | None = None) -> Settings:
    """Seed, guidance (with its start value; `None`: no such control) and image decoder."""
    image_decoder = gr.Radio(
        [(DECODER_NAMES[name], name) for name in engine.decoders],
        value=engine.decoders[0],
        label="Decoder",
        info="How the codes of a picture are found",
    )
    steps = gr.Slider(
        1,
        engine.settings.max_steps,
        value=engine.settings.num_inference_steps,
        step=1,
        label="Steps",
        info="More steps, more passes",
        visible=False,
    )
    image_decoder.change(
        lambda name: gr.Slider(visible=name == "dida"),
        image_decoder,
        steps,
        api_visibility="private",
        queue=False,
        show_progress="hidden",
    )
    scale = None
    if guidance is not None:
        scale = gr.Slider(
            1, 10, value=guidance, step=0.1, label="Guidance", info="How closely to follow the prompt; 1: off"
        )
    return Settings(seed_box(), scale, image_decoder, steps)


def more_pictures() -> tuple[gr.Image, gr.Image]:
    """A second and a third reference, folded away."""
    with gr.Accordion("More pictures", open=False), gr.Row():
        return upload("Second picture", height=160, min_width=120), upload("Third picture", height=160, min_width=120)


def chat_box(hint: str) -> gr.Chatbot:
    """A conversation, with what to do in its place while it is empty."""
    return gr.Chatbot(
        label="Conversation",
        show_label=False,
        placeholder=hint,
        height=460,
        buttons=[],
        allow_file_downloads=False,
        elem_classes="pixels chat",
    )


def run_buttons(label: str) -> tuple[gr.Button, gr.Button]:
    """The one primary action of a tab, and its end."""
    with gr.Row(elem_classes="run"):
        run = gr.Button(label, variant="primary", scale=3, min_width=120)
        stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_classes="stop")
    return run, stop


def example_box(note: str, rows: Sequence[Sequence[Any]], inputs: Sequence[Any], labels: Sequence[str]) -> gr.Dataset:
    """Examples that fill the inputs.

    Not `gr.Examples`: a click there rebuilds the inputs for the session, and an [`upload`] so rebuilt is gradio's own
    again. Plain values leave them as they are.

    Args:
        note: what these examples are.
        rows: values of the `inputs`, for an upload the path of a picture; `labels` are what the page shows of them.
    """
    box = gr.Dataset(
        components=[gr.Radio(list(labels), render=False)],  # which is shown whole; a text would be cut
        samples=[[label] for label in labels],
        type="index",
        label=note,
    )

    def fill(index: int) -> Any:
        values = [
            shown_file(PIL.Image.open(value)) if value is not None and isinstance(one, gr.Image) else value
            for one, value in zip(inputs, rows[index], strict=True)
        ]
        return values if len(values) > 1 else values[0]

    box.click(fill, box, list(inputs), queue=False, show_progress="hidden", api_visibility="private")
    return box


def user_of(request: gr.Request) -> Visitor:
    """Who asks: one open page, or one client of the API."""
    return Visitor(str(request.session_hash), request.client.host if request.client else "")


def connect(
    triggers: Sequence[Callable],
    function: Callable[..., Iterator[tuple]],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    stop: gr.Button,
    *,
    api_name: str | None,
    link: Link | None = None,
    js: str | None = None,
):
    """Starts `function` when a trigger fires, shows what it yields, and enables `stop` meanwhile.

    Args:
        function: a generator of values for the `outputs`, the last of which is a [`status_line`] and gets an
            [`Update`]; a [`UserError`] reaches the visitor as a message, and clients of the API as an error.
        api_name: its stable name for clients; `None`: not for them.
    """

    @functools.wraps(function)
    def run(*values):
        try:
            for shown in function(*values):
                update = shown[-1]
                yield (*shown[:-1], status(update), gr.Button(interactive=not update.is_last))
        except UserError as error:
            update = Update(stage="error", message=str(error))
            yield (*[gr.skip()] * (len(outputs) - 1), status(update), gr.Button(interactive=False))
        if update.stage == "error":
            # Messages are drawn as HTML, and may repeat what the visitor wrote.
            raise gr.Error(html.escape(update.message, quote=False), print_exception=False)

    event = gr.on(
        triggers,
        run,
        inputs,
        [*outputs, stop],
        api_name=api_name,
        api_visibility="public" if api_name else "private",
        js=js or (link.js(inputs) if link else None),
        concurrency_limit=None,  # the engine has a queue of its own, which is fair
        show_progress="hidden",
        trigger_mode="once",
    )
    event.failure(lambda: gr.Button(interactive=False), None, stop, queue=False, api_visibility="private")
    return event


def clear_when_done(event: Any, status: gr.HTML, inputs: Sequence[Any]):
    """Empties inputs after an answer; what was stopped can be sent again."""
    event.success(
        None,
        [status, *inputs],
        list(inputs),
        js="""(status, ...values) => {
            const done = status && status.stage === "done";
            return values.map((value) => (done ? (typeof value === "string" ? "" : null) : value));
        }""",
        show_progress="hidden",
        api_visibility="private",
    )


def png_button(size: str = "md") -> gr.DownloadButton:
    """For a picture of those that are shown; see [`offer`]."""
    return gr.DownloadButton("Download PNG", visible=False, size=size, min_width=60)


def offer(file: str | Path | None, what: str = "PNG") -> gr.DownloadButton:
    """What a [`png_button`] becomes: hidden without a file; it says so where the picture is unfinished."""
    if file is None:
        return gr.DownloadButton(visible=False)
    unfinished = "unfinished " if Path(file).stem.endswith(UNFINISHED_NAME) else ""
    return gr.DownloadButton(f"Download {unfinished}{what}", value=file, visible=True)


def choose_by(gallery: gr.Gallery, files: gr.State, download: gr.DownloadButton):
    """Lets a [`png_button`] give the picture of a gallery that was clicked last.

    Args:
        files: of the pictures, in their order, `None` for those that are no work of the model. The picture is found by
            its place: a browser's word about files is not to be trusted.
    """

    def choose(chosen: gr.SelectData, files: list[str | None]) -> Any:
        file = files[chosen.index] if chosen.index < len(files) else None
        return offer(file) if file and Path(file).is_file() else gr.skip()

    gallery.select(choose, files, download, queue=False, show_progress="hidden", api_visibility="private")


def caption(text: str, image: PIL.Image.Image) -> str:
    """The line under a picture."""
    return f"{text}, unfinished" if UNFINISHED in image.info else text


def connect_stop(engine: Engine, button: gr.Button, *, public: bool = False):
    """Lets a button end what its page has running."""

    def stop(request: gr.Request) -> None:
        """Ends what this session has waiting or running."""
        engine.stop(user_of(request))

    button.click(
        stop,
        None,
        None,
        queue=False,
        show_progress="hidden",
        api_name="stop" if public else None,
        api_visibility="public" if public else "private",
    )


__all__ = [
    "Link",
    "Settings",
    "caption",
    "chat_box",
    "choose_by",
    "clear_when_done",
    "connect",
    "connect_stop",
    "example_box",
    "figures",
    "more_pictures",
    "offer",
    "png_button",
    "prompt_box",
    "read_value",
    "run_buttons",
    "seed_box",
    "settings_box",
    "status",
    "status_line",
    "upload",
    "user_of",
]
