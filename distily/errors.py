"""Errors that a user is meant to read: one line that names the key, the value, what is allowed and the nearest spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistilyError(Exception):
    """The user's input is wrong: shown as one line per mistake, exit code 2."""

    exit_code = 2


class RunError(DistilyError):
    """The run or the machine failed, not the input: one line, exit code 1."""

    exit_code = 1


class Interrupted(DistilyError):
    """The user stopped the run; a checkpoint was written first: exit code 130."""

    exit_code = 130


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is spelt most like ``word``, or None if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """One line for an unknown name: what it was, the nearest spelling, and all that is allowed."""
    known = sorted(known)
    close = nearest(word, known)
    guess = f"; did you mean {close!r}?" if close else "."
    allowed = ", ".join(known) if known else "nothing"
    return f"{what} {word!r} is unknown{guess} Allowed: {allowed}."


def wrong(key: str, value: object, allowed: str) -> str:
    """One line for a known key with a value that it cannot take."""
    return f"{key}: {value!r} is not allowed; allowed: {allowed}."
