"""Runs the command on untrusted files: each time in a process of its own, with limits.

Starting Python and importing NumPy takes longer than most files do. So one process imports them
once, and forks for each command.
"""

import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

GIGABYTE = 2**30
ENVIRONMENT = {
    **os.environ,
    # The C library's own threads would take address space by the gigabyte.
    "OPENBLAS_NUM_THREADS": "1",
    "COLUMNS": "120",
    "PYTHONWARNINGS": "error",
}


class Commands:
    """A process that runs commands; `run` gives what `subprocess.run` gives."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.commands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def run(self, *arguments):
        self._server.stdin.write(json.dumps([*map(str, arguments)]) + "\n")
        self._server.stdin.flush()
        return SimpleNamespace(**json.loads(self._server.stdout.readline()))

    def close(self):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def limit():
    resource.setrlimit(resource.RLIMIT_AS, (3 * GIGABYTE // 2, 3 * GIGABYTE // 2))
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))


def serve():
    import io
    import tempfile

    import bnfreeze.cli
    import bnfreeze.inspection.inspect

    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                limit()
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                for name, number in (("stdout", 1), ("stderr", 2)):
                    setattr(sys, name, io.TextIOWrapper(os.fdopen(number, "wb"), "utf-8"))
                code = 70
                try:
                    code = bnfreeze.cli.main(json.loads(line))
                except SystemExit as stop:
                    code = stop.code
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            answer = {"returncode": os.waitstatus_to_exitcode(status)}
            for name, file in (("stdout", out), ("stderr", err)):
                file.seek(0)
                answer[name] = file.read().decode()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
