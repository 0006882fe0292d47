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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from bnfreeze.arguments import command_parser, unknown_command
from bnfreeze.errors import BnfreezeError
from bnfreeze.output import (
    ProgressLine,
    check_outputs,
    complain,
    complain_of_defect,
    exit_code,
    print_json,
    print_line,
    show,
)

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

    check_outputs(options)
    shown: list[CheckpointInspection] = []
    refused: dict[str, dict[str, Any]] = {}
    code = 0
    for path in options.paths:
        try:
            with ProgressLine(path):
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
            refused[path] = {"kind": type(error).__name__, "message": str(error)}
        else:
            shown.append(found)
            code = max(code, exit_code(found))

    def data() -> dict[str, Any]:
        left = iter(shown)
        files = [
            {"path": path, "error": refused[path]} if path in refused else next(left).to_dict()
            for path in options.paths
        ]
        for file in files:
            file.pop("schema", None)
        return {"schema": 2, "ok": code == 0, "files": files}

    several = len(options.paths) > 1
    show(
        options,
        shown,
        data,
        lambda: [
            (*([one.origin.path] if several else []), *line)
            for one in shown
            for line in one.lines()
        ],
    )
    return code


def _diff(options: argparse.Namespace) -> int:
    from bnfreeze.checkpoints import open_checkpoint
    from bnfreeze.inspection.origin import Found
    from bnfreeze.verification.diff import diff_found

    check_outputs(options)
    keys = (options.key if one is None else one for one in (options.key_a, options.key_b))
    with ProgressLine(options.second) as progress, ExitStack() as stack:
        paths = (options.first, options.second)
        opened = [stack.enter_context(open_checkpoint(path)) for path in paths]
        first, second = (Found(one.chosen(k), one) for one, k in zip(opened, keys, strict=True))
        prefixes = dict(options.map) if options.map else None
        found = diff_found(
            first, second, select=options.select, prefixes=prefixes, progress=progress
        )
    show(options, [found], found.to_dict, found.lines)
    return exit_code(found)


def _snapshot(options: argparse.Namespace) -> int:
    from bnfreeze.checkpoints import naming_file, open_checkpoint, tensors_by_name
    from bnfreeze.inspection.inspect import selected
    from bnfreeze.verification.stored import snapshot_of

    if not options.output:
        raise BnfreezeError("-o: the name of a file is empty.")
    # Only an earlier snapshot may be overwritten.
    if os.path.exists(options.output) and not _is_snapshot(options.output):
        raise BnfreezeError(f"{options.output} exists and is not a snapshot.")
    with ProgressLine(options.path) as progress, open_checkpoint(options.path) as checkpoint:
        found = checkpoint.chosen(options.key)
        with naming_file(checkpoint.path):
            parts = selected(found.all if options.all else found.models, options.select)
            plain = found.models[0].key if len(found.models) == 1 else None
            tensors = tensors_by_name(parts, plain)
            taken = snapshot_of(
                tensors, everything=options.all, digest=options.digest, progress=progress
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

    check_outputs(options)
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
    with ProgressLine(options.path) as progress, open_checkpoint(options.path) as checkpoint:
        found = Found(checkpoint.chosen(options.key), checkpoint)
        with naming_file(checkpoint.path):
            report = verify_found(found, before, select=options.select, progress=progress)
    show(
        options,
        [report],
        report.to_dict,
        lambda: [(one.name, one.kind, what_changed(one)) for one in report.drifts],
    )
    return exit_code(report)


def _explain(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from bnfreeze.finding_kinds import KINDS
    from bnfreeze.findings import finding_kind

    kinds = [finding_kind(options.code)] if options.code else KINDS
    if options.json:
        print_json({"schema": 2, "findings": [asdict(kind) for kind in kinds]})
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
