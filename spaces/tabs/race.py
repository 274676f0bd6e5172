"""Race: the same picture by every image decoder, one after the other."""

from pathlib import Path
from typing import Any

import gradio as gr

from ..downloads import save_png
from ..engine import Engine, Visitor
from ..examples import Examples
from ..parts import (
    DECODER_NAMES,
    Link,
    connect,
    connect_stop,
    example_box,
    offer,
    png_button,
    prompt_box,
    run_buttons,
    seed_box,
    status_line,
    user_of,
)
from ..shown import shown_file
from ..updates import Update

_BARS = """
<table class="race">
  <caption>Seconds on the model and passes through it</caption>
  <thead><tr><th scope="col">Decoder</th><th scope="col">Time</th><th scope="col">Passes</th></tr></thead>
  <tbody>
  {{#each value}}
    <tr class="{{#if first}}first{{/if}}">
      <th scope="row">{{decoder}} <small>{{about}}</small></th>
      <td>
        <span class="bar" style="width:{{percent}}%"></span>
        {{#if seconds}}{{seconds}} s{{/if}}
      </td>
      <td>{{#if passes}}{{passes}}{{/if}}</td>
    </tr>
  {{/each}}
  </tbody>
</table>
"""


def build(engine: Engine, examples: Examples) -> Link:
    """Lays the tab out and connects it."""
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            prompt = prompt_box(engine, "Prompt", "What every decoder draws")
            run, stop = run_buttons("Race")
            example_box(examples.note, [[text] for text in examples.race], [prompt], examples.race)
            with gr.Accordion("Settings", open=False):
                seed = seed_box()
        with gr.Column(scale=7, min_width=300):
            views, downloads = [], []
            with gr.Row(elem_classes="lanes"):
                for name in engine.decoders:
                    with gr.Column(min_width=60):
                        view = gr.Image(
                            label=name,
                            type="filepath",
                            format="png",
                            interactive=False,
                            buttons=[],
                            elem_classes="pixels",
                        )
                        views.append(view)
                        downloads.append(png_button("sm"))
            status = status_line()
            waiting = compare(dict.fromkeys(engine.decoders, Update()))
            results = gr.HTML(
                waiting, html_template=_BARS, label="Results", apply_default_css=False, elem_classes="results"
            )
            results.api_info = lambda: {"type": "array", "items": {"type": "object"}}

    def race(request: gr.Request, prompt: str, seed: float | None = None):
        """The same picture by every decoder, each with the model to itself."""
        user = user_of(request)
        for lanes in engine.race(prompt, seed=seed, user=user):
            pictures = [shown_file(lane.images[0]) if lane.images else None for lane in lanes.values()]
            files = [None] * len(lanes)
            if all(lane.is_last for lane in lanes.values()):
                files = [save(name, lane, prompt, user) for name, lane in lanes.items()]
            made = [offer(file, name) for file, name in zip(files, lanes, strict=True)]
            yield *pictures, *made, compare(lanes), overall(lanes)

    def save(name: str, lane: Update, prompt: str, user: Visitor) -> Path | None:
        if not lane.images:
            return None
        made_with = engine.made_with("t2i", image_decoder=name)
        return save_png(lane.images[0], user, prompt=prompt, seed=lane.seed, kind=name, **made_with)

    link = Link("race", {"prompt": prompt, "seed": seed})
    connect(
        [run.click, prompt.submit],
        race,
        [prompt, seed],
        [*views, *downloads, results, status],
        stop,
        api_name="race",
        link=link,
    )
    connect_stop(engine, stop)
    return link


def compare(lanes: dict[str, Update]) -> list[dict[str, Any]]:
    """Figures of each decoder; `percent` of the longest time, `first` for the shortest once all are done."""
    longest = max(lane.seconds for lane in lanes.values()) or 1.0
    done = all(lane.stage == "done" for lane in lanes.values())
    shortest = min(lane.seconds for lane in lanes.values())
    return [
        {
            "decoder": name,
            "about": DECODER_NAMES[name].removesuffix(f" ({name})"),
            "seconds": round(lane.seconds, 2),
            "passes": lane.passes,
            "percent": round(100 * lane.seconds / longest),
            "first": done and lane.seconds == shortest,
        }
        for name, lane in lanes.items()
    ]


def overall(lanes: dict[str, Update]) -> Update:
    """The update of the decoder that runs, or of the last."""
    running = [lane for lane in lanes.values() if not lane.is_last]
    ended = [lane for lane in lanes.values() if lane.stage in ("stopped", "error")]
    return (ended or running or list(lanes.values()))[0 if ended or running else -1]
