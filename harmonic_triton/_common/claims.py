"""One writer of a directory at a time, across processes; the system takes the lock back when its process dies."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class InUseError(RuntimeError):
    """Another run writes to the same place."""


class Claim:
    """The right to write to a directory: a locked file in it. It ends with :meth:`release`, this object or the process.

    Args:
        path: the lock's file; its directory is made.
        lent: a later claim in the same process may take it over, but not while :meth:`working`.

    Raises:
        InUseError: another process holds it, which is named, or this one does.
    """

    def __init__(self, path: Path, *, lent: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.lent, self._busy = path, lent, threading.Lock()
        key = os.path.realpath(path)
        with _registry:
            holder = _claims.get(key)
            if holder is not None and holder.held:
                holder._give_way()
            descriptor = open_or_create(os.fspath(path), 0)
            self._close = weakref.finalize(self, os.close, descriptor)
            try:
                self._take(descriptor)
                _claims[key] = self
            except BaseException:  # an interruption too: a notebook keeps the frame, and with it this object
                self._close()
                raise

    def _take(self, descriptor: int) -> None:
        """Lock the file, and write whose it is."""
        try:
            lock(descriptor)
        except (BlockingIOError, PermissionError):
            found = os.pread(descriptor, 200, 0).decode(errors="replace").strip() if hasattr(os, "pread") else ""
            raise InUseError(
                f"{self.path.parent} is being written by {found or 'another process'}: wait for it or end it, or take"
                " another directory"
            ) from None
        except OSError:  # a file system without locks
            pass
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    @property
    def held(self) -> bool:
        return self._close.alive

    def _give_way(self) -> None:
        """Release to another claim of this process, if that is allowed now."""
        if not (self.lent and self._busy.acquire(blocking=False)):
            raise InUseError(
                f"{self.path.parent} is being written by another object or thread of this process: end or close() that"
                " first, or take another directory"
            )
        self.release()
        self._busy.release()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While in here it is not taken over.

        Raises:
            InUseError: it was.
        """
        with self._busy:
            if not self.held:
                raise InUseError(
                    f"a later call in this process has taken {self.path.parent} over from this iterator; go on with that"
                    " call's"
                )
            yield

    def release(self) -> None:
        """Let others have it."""
        self._close()


_claims: weakref.WeakValueDictionary[str, Claim] = weakref.WeakValueDictionary()
_registry = threading.Lock()


def _forget_claims() -> None:
    """In a forked child: a lock is its parent's, and must not outlive it in children such as data loaders."""
    global _registry
    _registry = threading.Lock()
    for claim in list(_claims.values()):
        claim.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_claims)


def lock(descriptor: int) -> None:
    """Lock a file for as long as the descriptor is open, or raise OSError at once."""
    system: Any
    try:
        import fcntl as system
    except ImportError:  # Windows
        import msvcrt as system

        os.lseek(descriptor, 2**30, os.SEEK_SET)  # away from what is written; a lock there needs no bytes
        try:
            system.locking(descriptor, system.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return
    system.flock(descriptor, system.LOCK_EX | system.LOCK_NB)


def open_or_create(name: str, _: int) -> int:
    """Open what may be there, but no link to it."""
    return os.open(name, os.O_RDWR | os.O_CREAT | PLAIN, 0o666)
