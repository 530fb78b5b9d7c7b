"""Exceptions that a user of `sd` can cause; each message ends with a remedy."""


class SDError(Exception):
    """Base class of user-facing errors; command lines print the message alone and exit with status 2."""


class ConfigError(SDError, ValueError):
    """An unknown, contradictory or impossible option, preset or YAML key."""


class CheckpointError(SDError, ValueError):
    """A checkpoint that is damaged, malicious, incomplete or of a different model than requested."""


class Unavailable(SDError, RuntimeError):
    """A requested backend or feature that cannot run on this machine; the message gives the reason."""


class BadImage(SDError, RuntimeError):
    """An output image that is NaN or of one constant colour; it is never saved."""


class SDWarning(UserWarning):
    """Input that is used in part or changed, such as a truncated prompt; command lines print it in one line on stderr."""


def printable(text: str) -> str:
    """Escape unprintable characters, so that names from an untrusted file cannot control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
