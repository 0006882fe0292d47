"""Completion for shells, made from the command's parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Final

__all__ = ["SHELLS", "completion"]

SHELLS: Final = ("bash", "zsh", "fish")

_BASH: Final = """\
_bnfreeze() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} command= words= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${{COMP_WORDS[i]}} in -*) ;; *) command=${{COMP_WORDS[i]}}; break ;; esac
    done
    case $command:${{COMP_WORDS[COMP_CWORD-1]}} in
{values}
    esac
    case $command in
{options}
    esac
    case $command:$word in
        {wordy}) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
        *) COMPREPLY=() ;;
    esac
}}
complete -o default -F _bnfreeze bnfreeze
"""

# zsh runs the script of bash.
_ZSH: Final = """\
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""


def completion(
    parser: argparse.ArgumentParser, shell: str, arguments: Mapping[str, Iterable[str]]
) -> str:
    """The script that makes a shell complete the command.

    Args:
        parser: the command's parser, with its subcommands.
        shell: one of `SHELLS`.
        arguments: for a subcommand whose arguments are no files, what they can be.
    """
    commands = _commands(parser)
    if shell == "fish":
        return _fish(parser, commands, arguments)
    values, options = [], []
    for name, command in commands.items():
        words = [option for action in command._actions for option in action.option_strings]
        words += arguments.get(name, ())
        for action in command._actions:
            choices = " ".join(map(str, action.choices or ()))
            if choices and action.option_strings:
                values += [
                    f'        {name}:{option}) COMPREPLY=($(compgen -W "{choices}" -- "$word"));'
                    " return ;;"
                    for option in action.option_strings
                ]
        options.append(f'        {name}) words="{" ".join(words)}" ;;')
    top = [option for action in parser._actions for option in action.option_strings]
    options.append(f'        "") words="{" ".join([*commands, *top])}" ;;')
    # Elsewhere the shell completes the names of files.
    wordy = " | ".join(["*:-*", ":*", *(f"{name}:*" for name in arguments)])
    script = _BASH.format(values="\n".join(values), options="\n".join(options), wordy=wordy)
    return script if shell == "bash" else f"{_ZSH}{script}"


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _fish(
    parser: argparse.ArgumentParser,
    commands: dict[str, argparse.ArgumentParser],
    arguments: Mapping[str, Iterable[str]],
) -> str:
    lines = [
        f"complete -c bnfreeze -f -n '__fish_use_subcommand' -a {name}" for name in commands
    ] + [
        f"complete -c bnfreeze -f -n '__fish_seen_subcommand_from {name}' -a '{' '.join(words)}'"
        for name, words in arguments.items()
    ]
    for name, command in {"": parser, **commands}.items():
        when = f"__fish_seen_subcommand_from {name}" if name else "__fish_use_subcommand"
        for action in command._actions:
            flags = " ".join(
                f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
                for option in action.option_strings
            )
            choices = " ".join(map(str, action.choices or ()))
            about = (action.help or "").replace("\\", "\\\\").replace("'", "\\'")
            values = f" -x -a '{choices}'" if choices else ""
            needs = " -r" if action.nargs != 0 and action.option_strings and not choices else ""
            if flags:
                lines.append(
                    f"complete -c bnfreeze -n '{when}' {flags}{values}{needs} -d '{about}'"
                )
    return "\n".join(lines) + "\n"
