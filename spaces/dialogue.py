"""A conversation as the engine reads it and as `gr.Chatbot` shows it."""

from collections.abc import Sequence
from typing import Any

from .settings import SpaceSettings
from .shown import shown_file
from .uploads import read_image

THOUGHT_NAMES = {"global_thought": "Thought about the whole answer", "image_thought": "Thought before a picture"}


def user_message(text: str, paths: Sequence[str | None], settings: SpaceSettings) -> dict[str, Any]:
    """A turn of the user; `paths` are uploads, which are checked here, or `None`.

    Raises:
        UserError: if an upload is refused.
    """
    images = [{"type": "image", "image": read_image(path, settings)} for path in paths if path]
    return {"role": "user", "content": [(text or "").strip(), *images]}


def shown_messages(messages: Sequence[dict[str, Any]], *, running: bool = False) -> list[dict[str, Any]]:
    """A conversation for `gr.Chatbot`; thoughts are folded away, pictures described for those who don't see them.

    Args:
        messages: as [`Engine.ask`] takes them.
        running (`bool`): whether the last of them is still being written.
    """
    shown = []
    for message in messages:
        for part in message["content"]:
            said = _shown_part(part, message["role"])
            if said is not None:
                shown.append(said)
    if running and shown and "title" in shown[-1].get("metadata", {}):
        shown[-1]["metadata"]["status"] = "pending"
    return shown


def _shown_part(part: Any, role: str) -> dict[str, Any] | None:
    if isinstance(part, str):
        return {"role": role, "content": part} if part else None
    image = part["image"] if isinstance(part, dict) else getattr(part, "image", None)
    if image is not None:
        return {"role": role, "content": {"path": shown_file(image), "alt_text": "Picture"}}
    if part.kind == "image":  # its size is known, and no more
        return None
    text = part.text.strip()
    if not text:
        return None
    if part.kind == "text":
        return {"role": role, "content": text}
    return {"role": role, "content": text, "metadata": {"title": THOUGHT_NAMES[part.kind], "status": "done"}}


__all__ = ["shown_messages", "user_message"]
