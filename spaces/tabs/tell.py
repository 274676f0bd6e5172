"""Tell and show: stories and guides, text and pictures by turns, and what is said about them afterwards."""

import gradio as gr
from emu35 import Segments

from ..dialogue import shown_messages, user_message
from ..downloads import save_story
from ..engine import Engine
from ..examples import Examples
from ..parts import (
    Link,
    chat_box,
    clear_when_done,
    connect,
    connect_stop,
    example_box,
    prompt_box,
    run_buttons,
    settings_box,
    status_line,
    upload,
    user_of,
)

KINDS = [("Story", "story"), ("Step-by-step guide", "howto")]


def build(engine: Engine, examples: Examples) -> Link:
    """Lays the tab out and connects it."""
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            task = gr.Radio(KINDS, value="story", label="Kind", info="Of the first answer in a conversation")
            prompt = prompt_box(engine, "Prompt", "What to tell, or what to explain")
            run, stop = run_buttons("Tell and show")
            tried = example_box(examples.note, examples.tell, [task, prompt], [row[1] for row in examples.tell])
            with gr.Accordion("Picture to begin from", open=False):
                image = upload("First picture", height=200)
            with gr.Accordion("Settings", open=False):
                settings = settings_box(engine)
        with gr.Column(scale=7, min_width=300):
            chat = chat_box(
                "The answer comes as text and pictures by turns, with thoughts folded away. Then go on: ask about it, "
                "or have a picture changed."
            )
            status = status_line()
            with gr.Row():
                page = gr.DownloadButton("Download page", visible=False, size="md")
                video = gr.DownloadButton("Download video", visible=False, size="md")
                forget = gr.Button("New conversation", size="md")
    conversation = gr.State([], time_to_live=engine.settings.delete_after)

    def tell(
        request: gr.Request,
        prompt: str,
        task: str = "story",
        seed: float | None = None,
        image_decoder: str = "ar",
        num_inference_steps: float | None = None,
        image: str | None = None,
        conversation: list[dict] | None = None,
    ):
        """A story or a guide, as text and pictures by turns.  Later prompts of this session go on from it."""
        messages = [*conversation, user_message(prompt, [image], engine.settings)]
        user = user_of(request)
        updates = engine.tell(
            messages,
            task="chat" if conversation else task,
            seed=seed,
            image_decoder=image_decoder,
            num_inference_steps=num_inference_steps,
            user=user,
        )
        hidden = gr.DownloadButton(visible=False)
        for update in updates:
            whole = [*messages, {"role": "assistant", "content": update.segments}]
            shown = shown_messages(whole, running=not update.is_last)
            files = []
            if update.is_last:
                answers = [part for one in whole if one["role"] == "assistant" for part in one["content"]]
                if any(part.kind == "image" and part.image is not None for part in answers):
                    files = save_story(Segments(answers), user, prompt=whole[0]["content"][0])
            buttons = [gr.DownloadButton(value=file, visible=True) for file in files]
            kept = whole if update.stage == "done" else conversation
            yield shown, *(*buttons, hidden, hidden)[:2], kept, update

    def start_anew() -> tuple:
        """Forgets this session's story."""
        return [], [], gr.DownloadButton(visible=False), gr.DownloadButton(visible=False)

    controls = {"prompt": prompt, "task": task, **settings.names()}
    link = Link("tell", controls)
    event = connect(
        [run.click, prompt.submit],
        tell,
        [*controls.values(), image, conversation],
        [chat, page, video, conversation, status],
        stop,
        api_name="tell",
        link=link,
    )
    clear_when_done(event, status, [prompt, image])
    # An example begins a conversation: in the middle of another one it would not show what it is an example of.
    anew = {"fn": start_anew, "outputs": [chat, conversation, page, video], "queue": False, "show_progress": "hidden"}
    forget.click(**anew, api_name="forget_story")
    tried.click(**anew, api_visibility="private")
    chat.clear(**anew, api_visibility="private")
    connect_stop(engine, stop)
    return link
