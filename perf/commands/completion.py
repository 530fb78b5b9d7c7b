"""`python -m perf completion SHELL`: a script that completes commands, options and sets in a shell."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping

from perf.analysis.verdicts import ExitCode
from perf.commands import COMMANDS
from perf.configurations.sets import SETS

# A word that begins with - is an option, and the rest are files, except for the sets of `list` and `run`.
BASH = """_sd_perf() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" candidates=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        candidates="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$candidates" -- "$word"))
}}
complete -o default -F _sd_perf sd-perf
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n" + BASH
FISH = "complete -c sd-perf -n __fish_use_subcommand -f -a '{commands}'\n{lines}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `completion`."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help='for bash: eval "$(sd-perf completion bash)"')


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    candidates = {name: _candidates(name, module) for name, (module, _) in COMMANDS.items()}
    print(script(args.shell, candidates), end="")
    return ExitCode.OK


def _candidates(name: str, module: str) -> list[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(module).add_arguments(parser)
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    return [*options, *(SETS if name in ("list", "run") else ())]


def script(shell: str, candidates: Mapping[str, list[str]]) -> str:
    """The completion script of a shell. candidates: what may follow each command."""
    commands = " ".join(candidates)
    if shell == "fish":
        lines = [
            f"complete -c sd-perf -n '__fish_seen_subcommand_from {name}' -a '{' '.join(after)}'"
            for name, after in candidates.items()
        ]
        return FISH.format(commands=commands, lines="\n".join(lines))
    cases = "\n".join(f'            {name}) candidates="{" ".join(after)}" ;;' for name, after in candidates.items())
    return (ZSH if shell == "zsh" else BASH).format(commands=commands, cases=cases)
