"""Programs in processes of their own, without the two seconds that each would need to import PyTorch.

A process that has imported it, and has run nothing, is forked for every program (multiprocessing's fork server). A
program sees what ``python -c`` would show it: its own ``__main__``, arguments, working directory, environment and exit
status, its own seed and search path, and as many threads as OMP_NUM_THREADS says. Other variables that PyTorch reads while it
is imported come too late, and strings hash as in every other program of the run (PYTHONHASHSEED too comes too late): what
may hang on their order needs a process of its own.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
import traceback
import types
from collections.abc import Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if CONTEXT.get_start_method() == "forkserver":
    CONTEXT.set_forkserver_preload(["torch"])


def module(name: str) -> str:
    """The program that ``python -m name`` runs."""
    return f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


@functools.cache
def _search_path() -> list[str]:
    """Where Python looks for modules by itself: a fork server's children are given the path of this process, tests and all."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = "import sys; print(*sys.path[1:], sep='\\n')"
    return subprocess.run(
        [sys.executable, "-c", program], env=bare, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def _execute(
    program: str, arguments: list[str], search: list[str], cwd: str, environment: dict[str, str], out: str, err: str
) -> None:
    """What the child does: become the program, and end with its exit status."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    torch.seed()  # which all would have in common
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    sys.path[:] = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *search]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    status: object = 0
    try:
        exec(compile(program, "<program>", "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


class Started:
    """A program that runs."""

    def __init__(self, program: str, *arguments: object, cwd: object = ROOT, env: Mapping[str, str] = os.environ):
        self._said = [tempfile.NamedTemporaryFile("r", suffix=name) for name in (".out", ".err")]  # noqa: SIM115
        words = [str(argument) for argument in arguments]
        given = (
            textwrap.dedent(program),
            words,
            _search_path(),
            str(cwd),
            dict(env),
            *(file.name for file in self._said),
        )
        self.process = CONTEXT.Process(target=_execute, args=given)
        self.process.start()

    def wait(self, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Its exit status and what it said; it is killed when time is up."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        out, err = (file.read() for file in self._said)
        for file in self._said:
            file.close()
        return subprocess.CompletedProcess([], self.process.exitcode, out, err)


def run(program: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """A program from its start to its end, as ``subprocess.run([sys.executable, "-c", program, ...])``."""
    return Started(program, *arguments, **options).wait()
