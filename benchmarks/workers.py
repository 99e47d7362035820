"""Work in a process of its own: a module of benchmarks is run with an order as JSON; its last line is the answer."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.machine import ROOT

WORKER_SECONDS = 1800
LIBRARIES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Worker:
    """A process that has begun; :meth:`answer` waits for its end.

    Args:
        module: ``benchmarks.<module>`` reads its :func:`order` and gives a :func:`reply`.
        order: what is to be done.
        threads: of every library; None leaves them to torch.
        python: the interpreter, of another environment perhaps.
        environment: variables beside this process's own.
    """

    def __init__(
        self, module: str, order: Mapping[str, Any], threads: int | None = None, python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        variables = {} if threads is None else dict.fromkeys(LIBRARIES, str(threads))
        if python != sys.executable:
            variables["PYTHONPATH"] = str(ROOT)  # this environment's packages are not for another one
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                [python, "-W", "ignore", "-m", f"benchmarks.{module}", json.dumps(order)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                env={**os.environ, **variables, **(environment or {})},
            )  # fmt: skip
        except OSError as error:
            self._reason = f"{python} does not run: {error}"

    def answer(self) -> tuple[dict[str, Any] | None, str | None]:
        """(answer, None), or (None, why not)."""
        if self._process is None:
            return None, self._reason
        try:
            said, complaint = self._process.communicate(timeout=WORKER_SECONDS)
        except BaseException as stopped:
            self._process.kill()
            self._process.wait()
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            return None, f"it took longer than {WORKER_SECONDS} s"
        status, lines = self._process.returncode, said.splitlines()
        if status < 0:
            return None, f"killed by signal {-status} (9 is usually: out of memory)"
        if status or not lines:
            return None, f"exit status {status}: {(complaint.strip().splitlines() or ['no message'])[-1]}"
        return json.loads(lines[-1]), None


def order() -> dict[str, Any]:
    """What this process was asked to do."""
    if len(sys.argv) != 2:
        sys.exit("this module answers another process; measure with 'python -m benchmarks --suite NAME'")
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def reply(answer: Mapping[str, Any]) -> None:
    """Answer the process that asked."""
    print(json.dumps(answer))
