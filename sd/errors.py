"""Exceptions and warnings that a user of `sd` can cause; each message ends with a remedy."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class SDError(Exception):
    """Base class of user-facing errors; command lines print the message alone and exit with status 2."""


class ConfigError(SDError, ValueError):
    """An unknown, contradictory or impossible option, preset or YAML key."""


class CheckpointError(SDError, ValueError):
    """A checkpoint that is damaged, malicious, incomplete or of a different model than requested."""


class Unavailable(SDError, RuntimeError):
    """A requested backend or feature that cannot run on this machine; the message gives the reason."""


class BadImage(SDError, RuntimeError):
    """An output image that is NaN or all black; it is never saved."""


class Diverged(SDError, RuntimeError):
    """A training whose loss is not finite; it stops, and its last checkpoint remains."""


class SDWarning(UserWarning):
    """Input that is used in part or changed, such as a truncated prompt; command lines print it in one line on stderr."""


class CheckpointWarning(SDWarning):
    """Contents of a checkpoint that are not used; the model is loaded without them."""


def printable(text: str) -> str:
    """Escape unprintable characters, so that names from an untrusted file cannot control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first names, separated by commas, and the number of the others."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


@contextmanager
def checkpoint_warnings_as_lines() -> Iterator[None]:
    """Print every CheckpointWarning as one line on stderr, without the line of code that Python adds."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: object) -> None:
            if issubclass(category, CheckpointWarning):
                print(f"warning: {printable(str(message))}", file=sys.stderr)
            else:
                others(message, category, *place)  # type: ignore[arg-type]

        warnings.simplefilter("always", CheckpointWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield
