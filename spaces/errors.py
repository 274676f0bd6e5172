"""Errors as people should read them: what to do, and nothing of the server's insides."""

import logging
import secrets

logger = logging.getLogger(__name__)


class UserError(ValueError):
    """A request that cannot be served.  The message says what to do, and names nothing of the server."""


def explain(error: Exception) -> str:
    """A sentence for people about an error.  What it was in full goes to the log, under the number it names."""
    if isinstance(error, UserError):
        return str(error)
    number = secrets.token_hex(4)
    logger.error("error %s", number, exc_info=error)
    if type(error).__name__ == "OutOfMemoryError":
        return f"The server has not enough memory for this. Ask for fewer or smaller images. (Error {number})"
    if "NaN or infinite" in str(error):
        return f"The model computed something that is no number. Try another seed. (Error {number})"
    return f"Something went wrong on the server. Try again, or with other settings. (Error {number})"


__all__ = ["UserError", "explain"]
