"""What can go wrong for a user of `sd`: one class per kind of bad input, each with a message that says the way out."""


class SDError(Exception):
    """Base of every error that a user can cause; command lines print its message alone and exit with status 2."""


class ConfigError(SDError, ValueError):
    """An unknown, contradictory or impossible option, preset or YAML key."""


class CheckpointError(SDError, ValueError):
    """A checkpoint that is damaged, malicious, incomplete or of another model than asked for."""


class Unavailable(SDError, RuntimeError):
    """A backend or feature, asked for by name, that cannot run on this machine, with the reason."""


class BadImage(SDError, RuntimeError):
    """A picture that is NaN or of one constant colour; never saved as if it were a result."""


def printable(text: str) -> str:
    """The text with what a terminal would obey escaped: messages quote names from checkpoints, which are anybody's."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)
