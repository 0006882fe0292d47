"""The command: `bnfreeze inspect`, `diff`, `snapshot`, `verify`, `explain`.

Each calls a function of the library, and `_show` prints what it returns. The class of the result
decides what is in its table: `CheckpointInspection.sheet` in `bnfreeze.inspection.checkpoint`,
`Diff.sheet` in `bnfreeze.verification.diff_report`. `bnfreeze.tables` draws it.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 clean; 1 findings of level error
(`inspect`) or a difference (`diff`, `verify`); 2 wrong usage, unreadable or refused. Nothing that
takes time to import is imported before it is needed: `--help` answers at once.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from bnfreeze.arguments import command_parser, unknown_command
from bnfreeze.errors import BnfreezeError
from bnfreeze.output import complain, complain_of_defect, print_json, print_line, progress_line

if TYPE_CHECKING:
    from bnfreeze.inspection.checkpoint import CheckpointInspection
    from bnfreeze.tables import Printable
    from bnfreeze.verification.diff_report import Diff
    from bnfreeze.verification.drift import DriftReport


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
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how a line can go on
        import argcomplete

        argcomplete.autocomplete(parser)
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
        return complain(str(error))
    except MemoryError:
        return complain("Out of memory.")
    except BrokenPipeError:
        # The reader of the output closed it (`| head`): that is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # Reading has errors of its own: this is an output that could not be written.
        return complain(f"{error.filename or 'stdout'}: cannot be written: {error.strerror}.")
    except KeyboardInterrupt:
        return 130
    except Exception:
        return complain_of_defect()
    finally:
        if collecting:
            gc.enable()


def _inspect(options: argparse.Namespace) -> int:
    from bnfreeze.inspection.inspect import inspect_checkpoint

    _check_outputs(options)
    results: list[CheckpointInspection | dict[str, Any]] = []
    code = 0
    for path in options.paths:
        try:
            with progress_line(path):
                found = inspect_checkpoint(
                    path,
                    key=options.key,
                    select=options.select,
                    sort=options.sort,
                    weights=options.weights,
                )
        except BnfreezeError as error:
            # The others are shown all the same.
            code = complain(str(error))
            failure = {"kind": type(error).__name__, "message": str(error)}
            results.append({"path": path, "error": failure})
        else:
            results.append(found)
            code = max(code, _exit_code(found))
    shown = [one for one in results if not isinstance(one, dict)]

    def data() -> dict[str, Any]:
        files = [one if isinstance(one, dict) else one.to_dict() for one in results]
        for file in files:
            file.pop("schema", None)
        return {"schema": 2, "ok": code == 0, "files": files}

    def lines() -> list[tuple[str, ...]]:
        several = len(options.paths) > 1
        return [
            (one.origin.path, *line) if several else line for one in shown for line in one.lines()
        ]

    _show(options, shown, data, lines)
    return code


def _diff(options: argparse.Namespace) -> int:
    from bnfreeze.verification.diff import diff

    _check_outputs(options)
    key_a, key_b = (options.key if one is None else one for one in (options.key_a, options.key_b))
    with progress_line(options.second) as progress:
        found = diff(
            options.first,
            options.second,
            select=options.select,
            key=(key_a, key_b),
            prefixes=dict(options.map) if options.map else None,
            progress=progress,
        )
    _show(options, [found], found.to_dict, found.lines)
    return _exit_code(found)


def _snapshot(options: argparse.Namespace) -> int:
    from bnfreeze.checkpoints import naming_file, open_checkpoint, tensors_by_name
    from bnfreeze.inspection.inspect import selected
    from bnfreeze.verification.stored import snapshot_of

    # Only an earlier snapshot may be overwritten.
    if os.path.exists(options.output) and not _is_snapshot(options.output):
        raise BnfreezeError(f"{options.output} exists and is not a snapshot.")
    with progress_line(options.path) as progress, open_checkpoint(options.path) as checkpoint:
        found = checkpoint.chosen(options.key)
        with naming_file(checkpoint.path):
            parts = selected(found.all if options.all else found.models, options.select)
            plain = found.models[0].key if len(found.models) == 1 else None
            tensors = tensors_by_name(parts, plain)
            taken = snapshot_of(
                tensors, parts, everything=options.all, digest=options.digest, progress=progress
            )
    taken.save(options.output)
    print_line(f"{options.output}: {len(taken)} tensors of {options.path}")
    return 0


def _is_snapshot(path: str) -> bool:
    from bnfreeze.verification.snapshot import Snapshot

    try:
        Snapshot.load(path)
    except (BnfreezeError, OSError):
        return False
    return True


def _verify(options: argparse.Namespace) -> int:
    from bnfreeze.checkpoints import naming_file, open_checkpoint
    from bnfreeze.inspection.origin import Found
    from bnfreeze.verification.drift import what_changed
    from bnfreeze.verification.snapshot import Snapshot
    from bnfreeze.verification.stored import verify_found

    _check_outputs(options)
    try:
        before = Snapshot.load(options.snapshot)
    except BnfreezeError as error:
        if not _is_snapshot(options.path):
            raise
        raise BnfreezeError(
            f"{error} {options.path} is a snapshot: are the arguments swapped?"
        ) from None
    except OSError as error:
        raise BnfreezeError(f"{options.snapshot}: cannot be opened: {error.strerror}.") from None
    with progress_line(options.path) as progress, open_checkpoint(options.path) as checkpoint:
        found = Found(checkpoint.chosen(options.key), checkpoint)
        with naming_file(checkpoint.path):
            report = verify_found(found, before, select=options.select, progress=progress)
    _show(
        options,
        [report],
        report.to_dict,
        lambda: [(one.name, one.kind, what_changed(one)) for one in report.drifts],
    )
    return _exit_code(report)


def _filled(line: str, width: int) -> str:
    from textwrap import fill

    return fill(line, width, break_long_words=False, break_on_hyphens=False)


def _explain(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from bnfreeze.findings import KINDS, PAGES, finding_kind

    kinds = [finding_kind(options.code)] if options.code else [*KINDS.values()]
    if options.json:
        print_json({"schema": 2, "findings": [asdict(kind) for kind in kinds]})
    elif options.code:
        width = shutil.get_terminal_size().columns
        for line in PAGES[kinds[0].code].splitlines():
            sys.stdout.write(f"{line if line.startswith('    ') else _filled(line, width)}\n")
    else:
        width = max(len(kind.code) for kind in kinds)
        sys.stdout.writelines(f"{kind.code:{width}}  {kind.title}\n" for kind in kinds)
    return 0


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse to write over anything but an earlier picture: it may be the checkpoint itself."""
    for output in filter(None, (options.html, options.svg)):
        if os.path.isfile(output):
            with open(output, "rb") as file:
                head = file.read(16)
            if head and not head.lower().startswith((b"<svg", b"<!doctype html")):
                raise BnfreezeError(f"{output}: is there already, and is no picture.")


def _exit_code(result: CheckpointInspection | Diff | DriftReport) -> int:
    """0 if the result is clean; 2 if a model was not read, which may hold anything; else 1."""
    return 2 if getattr(result, "unread", ()) else 0 if result.ok else 1


def _show(
    options: argparse.Namespace,
    reports: Sequence[Printable],
    data: Callable[[], dict[str, Any]],
    lines: Callable[[], Sequence[tuple[str, ...]]],
) -> None:
    """Print the results in the form that was asked for, and save their pictures."""
    if options.json:
        print_json(data())
    elif options.plain:
        for line in lines():
            print_line(*line)
    else:
        from rich.console import Console

        from bnfreeze.tables import draw

        console = Console()
        # Not written by rich, which handles a closed pipe in its own way.
        with console.capture() as captured:
            draw(reports, console)
        sys.stdout.write(captured.get())
    if options.html or options.svg:
        from bnfreeze.files import write_whole
        from bnfreeze.html import page
        from bnfreeze.tables import svg_of

        if options.html:
            write_whole(options.html, page([report.sheet() for report in reports]))
        if options.svg:
            write_whole(options.svg, svg_of(reports))


_COMMANDS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "inspect": _inspect,
    "diff": _diff,
    "snapshot": _snapshot,
    "verify": _verify,
    "explain": _explain,
}
