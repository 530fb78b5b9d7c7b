"""`python -m perf`: usage errors of the commands."""

from __future__ import annotations

import pytest

from perf.__main__ import COMMANDS, main
from perf.analysis.verdicts import ExitCode


@pytest.mark.parametrize(
    "arguments, option",
    [
        (["merge", "a.json", "--output="], "--output"),
        (["merge", "a.json", "--output", ""], "--output"),
        (["report", "a.json", "--summary=", "--output", "x"], "--summary"),
        (["compare", "a.json", "b.json", "--storage", " "], "--storage"),
        (["doctor", "--python="], "--python"),
        (["show", ""], "an argument"),
    ],
    ids=" ".join,
)
def test_empty_value_is_a_usage_error(arguments, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == ExitCode.REFUSED
    assert f"error: {option}: the value is empty; is a variable unset?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["nonsense"])
    assert caught.value.code == ExitCode.REFUSED
    err = capsys.readouterr().err
    assert all(name in err for name in COMMANDS)
