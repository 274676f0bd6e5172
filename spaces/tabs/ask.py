"""Ask: a conversation about pictures."""

import gradio as gr

from ..dialogue import shown_messages, user_message
from ..engine import Engine
from ..examples import Examples
from ..parts import (
    Link,
    chat_box,
    clear_when_done,
    connect,
    connect_stop,
    example_box,
    more_pictures,
    prompt_box,
    run_buttons,
    status_line,
    upload,
    user_of,
)


def build(engine: Engine, examples: Examples) -> Link:
    """Lays the tab out and connects it."""
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            image = upload("Picture", height=220)
            image_2, image_3 = more_pictures()
            question = prompt_box(engine, "Question", "What to know about the picture")
            run, stop = run_buttons("Ask")
            labels = [row[0] for row in examples.ask]
            example_box(examples.note, examples.ask, [question, image, image_2], labels)
        with gr.Column(scale=7, min_width=300):
            chat = chat_box("Show a picture and ask about it. Later questions know what came before.")
            status = status_line()
            forget = gr.Button("New conversation", size="md")
    conversation = gr.State([], time_to_live=engine.settings.delete_after)

    def ask(
        request: gr.Request,
        question: str,
        image: str | None = None,
        image_2: str | None = None,
        image_3: str | None = None,
        conversation: list[dict] | None = None,
    ):
        """The next answer of this session's conversation.  Pictures shown once need not be shown again."""
        messages = [*conversation, user_message(question, (image, image_2, image_3), engine.settings)]
        for update in engine.ask(messages, user=user_of(request)):
            answer = {"role": "assistant", "content": update.segments}
            shown = shown_messages([*messages, answer], running=not update.is_last)
            yield shown, [*messages, answer] if update.stage == "done" else conversation, update

    def start_anew() -> tuple[list, list]:
        """Forgets this session's conversation."""
        return [], []

    link = Link("ask", {"prompt": question})
    event = connect(
        [run.click, question.submit],
        ask,
        [question, image, image_2, image_3, conversation],
        [chat, conversation, status],
        stop,
        api_name="ask",
        link=link,
    )
    clear_when_done(event, status, [question, image, image_2, image_3])
    forget.click(start_anew, None, [chat, conversation], queue=False, api_name="forget", show_progress="hidden")
    chat.clear(start_anew, None, [chat, conversation], queue=False, api_visibility="private")
    connect_stop(engine, stop)
    return link
