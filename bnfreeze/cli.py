"""The command: `bnfreeze inspect`, `diff`, `snapshot`, `verify`, `explain`, `completion`.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 clean; 1 findings of level error
(`inspect`) or a difference (`diff`, `verify`); 2 wrong usage, unreadable or refused. Nothing that
takes time to import is imported before it is needed: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from bnfreeze.arguments import command_parser, unknown_command
from bnfreeze.errors import BnfreezeError

if TYPE_CHECKING:
    from bnfreeze.inspection.checkpoint import CheckpointInspection

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and give its exit code.

    Args:
        arguments: what follows the command's name; None takes them from the process.
    """
    # A name may have characters that the terminal's encoding does not have.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser, commands = command_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        parser.error(unknown_command(arguments[0], commands))
    options = parser.parse_args(arguments)
    # The process ends soon: collecting garbage while a large pickle is read only costs time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        code = _COMMANDS[options.command](options)
        sys.stdout.flush()
        return code
    except BnfreezeError as error:
        return _complain(str(error))
    except MemoryError:
        return _complain("Out of memory.")
    except BrokenPipeError:
        # The reader of the output closed it (`| head`): that is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # Reading has errors of its own: this is an output that could not be written.
        return _complain(f"{error.filename or 'stdout'}: cannot be written: {error.strerror}.")
    except KeyboardInterrupt:
        return 130
    except Exception:
        return _complain_of_defect()
    finally:
        if collecting:
            gc.enable()


def _inspect(options: argparse.Namespace) -> int:
    from bnfreeze.inspection.inspect import inspect_checkpoint

    _check_outputs(options)
    shown: list[CheckpointInspection] = []
    files: list[dict[str, Any]] = []
    code = 0
    for path in options.paths:
        try:
            inspection = inspect_checkpoint(
                path, key=options.key, select=options.select, sort=options.sort
            )
        except BnfreezeError as error:
            # The others are shown all the same.
            code = _complain(str(error))
            files.append(
                {"path": path, "error": {"kind": type(error).__name__, "message": str(error)}}
            )
            continue
        shown.append(inspection)
        files.append(
            {name: fact for name, fact in inspection.to_dict().items() if name != "schema"}
        )
        # A model that was not read may hold anything.
        code = max(code, 2 if inspection.unread else 0 if inspection.ok else 1)
    if options.json:
        _print_json({"schema": 2, "ok": code == 0, "files": files})
    elif options.plain:
        for inspection in shown:
            prefix = (inspection.origin.path,) if len(options.paths) > 1 else ()
            _print_lines([(*prefix, *line) for line in inspection.lines()])
    else:
        _print_sheets(shown)
    _save_pictures(options, shown)
    return code


def _diff(options: argparse.Namespace) -> int:
    from bnfreeze.checkpoints import open_checkpoint
    from bnfreeze.inspection.origin import Found
    from bnfreeze.verification.diff import diff_found

    _check_outputs(options)
    with open_checkpoint(options.first) as first, open_checkpoint(options.second) as second:
        before, after = (Found.in_checkpoint(one, options.key) for one in (first, second))
        with _Progress("comparing tensor") as progress:
            found = diff_found(before, after, select=options.select, progress=progress)
    if options.json:
        _print_json(found.to_dict())
    elif options.plain:
        _print_lines(found.lines())
    else:
        _print_sheets([found])
    _save_pictures(options, [found])
    return 0 if found.ok else 1


def _snapshot(options: argparse.Namespace) -> int:
    from bnfreeze.checkpoints import naming_file, open_checkpoint, tensors_by_name
    from bnfreeze.inspection.inspect import selected
    from bnfreeze.verification.snapshot import Snapshot
    from bnfreeze.verification.stored import snapshot_of

    if not options.output:
        raise BnfreezeError("-o: the name of a file is empty.")
    if os.path.exists(options.output):
        try:
            Snapshot.load(options.output)  # only an earlier snapshot may be overwritten
        except (BnfreezeError, OSError):
            raise BnfreezeError(f"{options.output} exists and is not a snapshot.") from None
    with open_checkpoint(options.path) as checkpoint:
        found = checkpoint.chosen(options.key)
        with naming_file(checkpoint.path):
            parts = selected(found.all if options.all else found.models, options.select)
            plain = found.models[0].key if len(found.models) == 1 else None
            tensors = tensors_by_name(parts, plain)
            taken = snapshot_of(tensors, everything=options.all, digest=options.digest)
    taken.save(options.output)
    _print_lines([(f"{options.output}: {len(taken)} tensors of {options.path}",)])
    return 0


def _verify(options: argparse.Namespace) -> int:
    from bnfreeze.checkpoints import naming_file, open_checkpoint
    from bnfreeze.inspection.origin import Found
    from bnfreeze.verification.drift import what_changed
    from bnfreeze.verification.snapshot import Snapshot
    from bnfreeze.verification.stored import verify_found

    _check_outputs(options)
    try:
        before = Snapshot.load(options.snapshot)
    except OSError as error:
        raise BnfreezeError(f"{options.snapshot}: cannot be opened: {error.strerror}.") from None
    with open_checkpoint(options.path) as checkpoint:
        found = Found.in_checkpoint(checkpoint, options.key)
        with naming_file(checkpoint.path):
            report = verify_found(found, before, select=options.select)
    if options.json:
        _print_json(report.to_dict())
    elif options.plain:
        _print_lines([(d.name, d.kind, what_changed(d)) for d in report.drifts])
    else:
        _print_sheets([report])
    _save_pictures(options, [report])
    return 0 if report.ok else 1


def _explain(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from bnfreeze.finding_kinds import KINDS
    from bnfreeze.findings import finding_kind

    kinds = [finding_kind(options.code)] if options.code else KINDS
    if options.json:
        _print_json({"schema": 2, "findings": [asdict(kind) for kind in kinds]})
    elif options.code:
        sys.stdout.write(kinds[0].page())
    else:
        width = max(len(kind.code) for kind in kinds)
        sys.stdout.writelines(f"{kind.code:{width}}  {kind.title}\n" for kind in kinds)
    return 0


def _completion(options: argparse.Namespace) -> int:
    from bnfreeze.completion import SHELLS, completion
    from bnfreeze.finding_kinds import KINDS

    arguments = {"explain": [kind.code for kind in KINDS], "completion": SHELLS}
    sys.stdout.write(completion(command_parser()[0], options.shell, arguments))
    return 0


_COMMANDS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "inspect": _inspect,
    "diff": _diff,
    "snapshot": _snapshot,
    "verify": _verify,
    "explain": _explain,
    "completion": _completion,
}


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse to write over anything but an earlier picture: it may be the checkpoint itself."""
    for output in filter(None, (options.html, options.svg)):
        if os.path.isfile(output):
            with open(output, "rb") as file:
                head = file.read(16)
            if head and not head.lower().startswith((b"<svg", b"<!doctype html")):
                raise BnfreezeError(f"{output}: is there already, and is no picture.")


def _save_pictures(options: argparse.Namespace, sheets: Sequence[Any]) -> None:
    from bnfreeze.files import write_whole
    from bnfreeze.tables import html_of, svg_of

    for path, draw in ((options.html, html_of), (options.svg, svg_of)):
        if path:
            write_whole(path, draw(sheets, width=_PICTURE_WIDTH))


# Characters to a line of a saved picture: wide enough for all columns.
_PICTURE_WIDTH: Final = 120


def _print_sheets(sheets: Sequence[Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    # Not written by rich, which handles a closed pipe in its own way.
    with console.capture() as captured:
        for number, sheet in enumerate(sheets):
            if number:
                console.print()
            console.print(sheet)
    sys.stdout.write(captured.get())


def _print_json(value: dict[str, Any]) -> None:
    import json

    # ASCII: what could move a terminal's cursor or turn its text around is written as \u....
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def _print_lines(lines: Sequence[tuple[str, ...]]) -> None:
    from bnfreeze.text import escaped

    for line in lines:
        sys.stdout.write("\t".join(map(escaped, line)) + "\n")


def _complain(message: str) -> int:
    from bnfreeze.text import escaped

    sys.stderr.write(f"bnfreeze: {escaped(message)}\n")
    return 2


def _complain_of_defect() -> int:
    """Show the traceback of an unforeseen error; exit code 1 would say that something differs."""
    import traceback

    from bnfreeze.text import escaped

    for line in traceback.format_exc().splitlines():
        sys.stderr.write(f"{escaped(line)}\n")
    return _complain("This is a defect of bnfreeze: please report it with the lines above.")


class _Progress:
    """A line on stderr that counts: on a terminal, and only after half a second."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._shown = False
        self._next = time.monotonic() + 0.5

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty() and time.monotonic() > self._next:
            self._next = time.monotonic() + 0.1
            self._shown = True
            sys.stderr.write(f"\r{self._what} {done} of {total}")
            sys.stderr.flush()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
