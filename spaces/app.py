"""The Space: a thin Gradio interface over [`Engine`].

    python -m emu35.spaces.app          # or `emu35 demo`

EMU35_MODEL names the checkpoint (default: the tiny one that is shipped); `settings` says what else may be set.
"""

from pathlib import Path

import emu35.spaces
import gradio as gr
from emu35.spaces.downloads import remove_downloads
from emu35.spaces.engine import Engine
from emu35.spaces.examples import RELEASED, TINY
from emu35.spaces.guard import refuse_addresses
from emu35.spaces.parts import Link, user_of
from emu35.spaces.tabs import ask, create, edit, explore, race, robot, tell

# Of the package: as the main file of a Space, this one lies outside of it.
_FOLDER = Path(emu35.spaces.__file__).parent
#: What gradio wants where an app is launched or mounted, not where it is built.
LOOK = {
    "theme": gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        # Those of gradio are too pale to be read by everybody (WCAG AA: 4.5 to 1).
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        button_secondary_background_fill="*neutral_100",
        button_large_text_weight="600",
        button_large_text_size="*text_md",
    ),
    "css": (_FOLDER / "style.css").read_text(encoding="utf-8"),
    "head": f"<script>{(_FOLDER / 'page.js').read_text(encoding='utf-8')}</script>",
}
TABS = {
    "create": ("Create", create),
    "edit": ("Edit", edit),
    "ask": ("Ask", ask),
    "tell": ("Tell and show", tell),
    "explore": ("Explore", explore),
    "robot": ("Robot", robot),
    "race": ("Race", race),
}


def build_app(engine: Engine) -> gr.Blocks:
    """The whole page."""
    examples = TINY if engine.is_tiny else RELEASED
    links: list[Link] = []
    with gr.Blocks(
        title="Emu3.5",
        analytics_enabled=False,
        delete_cache=(engine.settings.delete_after, engine.settings.delete_after),
    ) as app:
        with gr.Row(elem_classes="head"):
            gr.HTML(f"<h1>Emu3.5</h1><p>{engine.about}</p>", elem_classes="about", padding=False)
            copy = gr.Button("Copy link", size="sm", min_width=90, scale=0, elem_id="copy-link")
            shade = gr.Button("Light or dark", size="sm", min_width=90, scale=0)
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs:
            for name, (title, tab) in TABS.items():
                with gr.Tab(
                    title, id=name, elem_id=f"tab-{name}", elem_classes="tiny" if engine.is_tiny else ""
                ) as item:
                    links.append(tab.build(engine, examples))
                item.select(None, None, None, js=f"() => emu35Tab('{name}')", show_progress="hidden")
        copied = copy.click(None, None, copy, js="emu35CopyLink", show_progress="hidden")
        copied.then(None, None, copy, js="() => emu35Later('Copy link')", show_progress="hidden")
        shade.click(None, None, None, js="emu35Shade")
        controls = [control for link in links for control in link.controls.values()]

        # Not at the top: of functions with arguments of ours, gradio finds no annotations.
        def open_link(request: gr.Request) -> list:
            """The tab and the settings that the address of the page names."""
            query = dict(request.query_params)
            tab = query.get("tab")
            chosen = gr.Tabs(selected=tab) if tab in TABS else gr.skip()
            return [chosen, *(value for link in links for value in link.read(query))]

        def leave(request: gr.Request) -> None:
            """Cleans up when a page is closed."""
            engine.stop(user_of(request))
            remove_downloads(user_of(request))

        app.load(open_link, None, [tabs, *controls], api_visibility="private", show_progress="hidden")
        app.unload(leave)
    refuse_addresses(app)
    return app


def main():
    """Serves the Space."""
    from emu35.spaces.server import serve

    serve()


if __name__ == "__main__":
    main()
