"""A program that is forked is as fresh as one that Python starts."""

import os
import signal
import subprocess
import sys

import fresh

import harmonic_triton

SHOWS = """
    import atexit, os, sys
    print(__name__, sys.argv[1:], os.getcwd(), os.environ["WORD"], len(os.environ), file=sys.stderr)
    print([name for name in ("triton", "harmonic_triton", "torch._dynamo") if name in sys.modules], flush=True)
    atexit.register(lambda: print("and ends"))
    os.system("echo 'says a child'")
    if len(sys.argv) > 1:
        sys.exit(int(sys.argv[1]))
"""


def test_a_program_is_what_it_would_be_by_itself(tmp_path):
    done = fresh.run(SHOWS, 3, cwd=tmp_path, env={"WORD": "here"})
    assert done.returncode == 3
    assert done.stderr == f"__main__ ['3'] {os.path.realpath(tmp_path)} here 1\n"
    assert done.stdout.splitlines() == ["[]", "says a child", "and ends"]
    assert fresh.run(SHOWS, env={**os.environ, "WORD": ""}).returncode == 0


def test_what_one_leaves_behind_the_next_does_not_see():
    leaves = "import builtins, os, torch; builtins.left = os.environ['LEFT'] = '1'; torch.set_num_threads(3)"
    finds = "import builtins, os, torch; print(hasattr(builtins, 'left'), os.getenv('LEFT'), torch.get_num_threads())"
    before = fresh.run(finds).stdout
    assert before.startswith("False None ")
    assert fresh.run(leaves).returncode == 0
    assert fresh.run(finds).stdout == before


def test_neither_random_numbers_nor_the_search_path_are_shared(tmp_path, monkeypatch):
    """Else a program that forgets its seed would repeat itself, and one would find modules that lie beside a test."""
    shows = "import sys, torch; print(torch.rand(1).item()); print(sys.path)"
    monkeypatch.syspath_prepend(tmp_path)
    (first, path), (second, _) = (fresh.run(shows).stdout.splitlines() for _ in range(2))
    assert first != second
    alone = subprocess.run([sys.executable, "-c", shows], cwd=fresh.ROOT, capture_output=True, text=True)
    assert path == alone.stdout.splitlines()[1]


def test_errors_and_signals_are_its_exit_status():
    for program, status, words in (
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("raise SystemExit", 0, ""),
    ):
        done = fresh.run(program)
        assert (done.returncode, done.stdout) == (status, "")
        assert words in done.stderr
    started = fresh.Started("import time; time.sleep(60)")
    assert started.wait(timeout=0.5).returncode == -signal.SIGKILL


def test_a_module_runs_as_a_program():
    done = fresh.run(fresh.module("harmonic_triton"), "--version")
    assert done.stdout.split() == [harmonic_triton.__version__]
