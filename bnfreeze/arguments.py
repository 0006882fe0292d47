"""The arguments of the command: its parser, and nothing that takes long to import."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, Final

_EXAMPLES: Final = """\
examples:
  bnfreeze inspect resnet50.pth                    the norm layers, as a tree
  bnfreeze inspect run/*.ckpt --plain | grep nonfinite   one line a layer, of several files
  bnfreeze inspect last.pt --key model_ema         one of several models in the file
  bnfreeze inspect model.safetensors --sort dead   the layers with most dead channels first
  bnfreeze diff start.pt end.pt                    did the backbone really stay frozen?
  bnfreeze diff start.pt end.pt --select backbone  exit code 1 if anything in it moved
  bnfreeze diff a.pth b.ckpt --map =model.student  names of b with this prefix more
  bnfreeze diff start.pt end.pt --key-b model_ema  compare with the average
  bnfreeze snapshot start.pt -o start.safetensors  save the statistics, to compare with later
  bnfreeze verify end.pt start.safetensors         exit code 1 if anything in it moved
  bnfreeze explain never-trained                   what a finding means, and how to mend it
  bnfreeze inspect a.pt --json | jq .files[0].ok   for scripts

completion, after pip install 'bnfreeze[completion]', in ~/.bashrc or ~/.zshrc:
  eval "$(register-python-argcomplete bnfreeze)"

exit codes: 0 clean; 1 findings of level error, or a difference; 2 wrong usage, unreadable, refused.
Nothing in a file is run or imported; no option changes that.
"""

_SORTS: Final = ("name", "features", "batches", "mean", "var", "dead")


def unknown_command(word: str, commands: Sequence[str]) -> str:
    """What to say of a word that is no command."""
    close = difflib.get_close_matches(word, commands, n=1)
    if close:
        return f"there is no command {word!r}; did you mean {close[0]!r}?"
    if os.path.exists(word):
        return f"there is no command {word!r}; did you mean: bnfreeze inspect {shlex.quote(word)}"
    return f"there is no command {word!r}; the commands are {', '.join(commands)}"


def command_parser() -> tuple[argparse.ArgumentParser, tuple[str, ...]]:
    """The parser and the names of the commands."""
    parser = argparse.ArgumentParser(
        prog="bnfreeze",
        description="Inspect the batch norm layers in checkpoints, and compare checkpoints.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    inspect = _command(commands, "inspect", "show the norm layers of checkpoints", "layer")
    inspect.add_argument("paths", nargs="+", metavar="CKPT", help="a file or a folder")
    inspect.add_argument(
        "--sort",
        choices=_SORTS,
        default="",
        help="list the layers sorted by this, the most unusual first, and not as a tree",
    )
    inspect.add_argument("--weights", action="store_true", help="the range of the weights, too")
    diff = _command(commands, "diff", "compare two checkpoints bit by bit", "tensor")
    diff.add_argument("first", metavar="A", help="the earlier checkpoint")
    diff.add_argument("second", metavar="B", help="the later one")
    diff.add_argument("--key-a", metavar="NAME", help="which of several models in A")
    diff.add_argument("--key-b", metavar="NAME", help="which of several models in B")
    diff.add_argument(
        "--map",
        action="append",
        type=_prefixes,
        metavar="OLD=NEW",
        help="names that begin with OLD in A begin with NEW in B, as '=model.backbone' (may be "
        "repeated); without it, the prefix is found out",
    )
    snap = _command(commands, "snapshot", "save a checkpoint's statistics")
    snap.add_argument("path", metavar="CKPT", help="a file or a folder")
    snap.add_argument("-o", "--output", required=True, metavar="FILE", help="where to write it")
    snap.add_argument(
        "--all", action="store_true", help="every tensor, not only those of norm layers"
    )
    snap.add_argument("--digest", action="store_true", help="SHA-256 digests, not a copy")
    verify = _command(commands, "verify", "compare a checkpoint with a snapshot", "change")
    verify.add_argument("path", metavar="CKPT", help="a file or a folder")
    verify.add_argument("snapshot", metavar="FILE", help="what snapshot wrote, or Snapshot.save")
    explain = commands.add_parser("explain", help="say what a finding means", allow_abbrev=False)
    code = explain.add_argument(
        "code", nargs="?", metavar="CODE", help="its code; without it, list all"
    )
    code.completer = _codes  # type: ignore[attr-defined]  # argcomplete calls it
    explain.add_argument("--json", action="store_true", help="print one JSON object")
    return parser, tuple(commands.choices)


def _codes(**_: object) -> list[str]:
    from bnfreeze.findings import KINDS

    return [*KINDS]


def _prefixes(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW")
    return old, new


def _command(commands: Any, name: str, what: str, each: str = "") -> argparse.ArgumentParser:
    """A subcommand with the options that all have, and `each` of whose results is a line."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog="Reads files of torch.save (zip and legacy, whole models too), torch.jit.save and "
        "torch.export.save, safetensors, *.index.json of shards, pickled and zipped NumPy arrays, "
        "ONNX, and folders of torch.distributed.checkpoint and Hugging Face, by their content; as "
        "a URL, too (https://, hf://, s3://), and from standard input (-).",
        allow_abbrev=False,
    )
    command.add_argument(
        "--select",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only these modules: 'backbone', 'layer4.**.bn?' (may be repeated)",
    )
    command.add_argument(
        "--key", metavar="NAME", help="one of several models in a file; all are read without it"
    )
    if not each:
        return command
    forms = command.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print one JSON object")
    forms.add_argument("--plain", action="store_true", help=f"print one line for each {each}")
    command.add_argument("--html", metavar="FILE", help="save a page that sorts and folds")
    command.add_argument("--svg", metavar="FILE", help="save the picture as SVG")
    return command


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        sys.stdout.write(f"bnfreeze {version('bnfreeze')}\n")
        parser.exit()
