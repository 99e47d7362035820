"""Files that a kill at any moment leaves whole, and in which no damage goes unnoticed: every writer of the package is here.

- :func:`replacing`: a file is written beside its place, reaches the disk and takes its name in one rename.
- :func:`seal`, :func:`check_seal`: a checksum of a whole file in the file itself.
- :class:`Blocks`: a file that grows, with a checksum of every block that was appended.

There is one writer at a time: :mod:`harmonic_triton._common.claims`.

The checksum is CRC-32: it sees every flipped bit and every cut, other damage but for one case in 4e9, at a GB a second.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from harmonic_triton._common.claims import PLAIN, lock, open_or_create

SEAL = 8  # hex digits of a seal
PIECE = 2**20  # bytes read at a time


# --- written beside, renamed -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A new file that takes the name ``path`` when the block ends: at every moment that is the old file or the new one.

    The new one has a random name beside ``path`` that nothing had before, so that a planted link is not followed. What
    killed processes have left of earlier tries is removed.

    Raises:
        OSError: the directory cannot be written; the old file is untouched, as after any exception in the block.
        ValueError: the name is a device's, a pipe's or a directory's, which a file must not take.
    """
    path = Path(path)
    if path.exists() and not path.is_symlink() and not path.is_file():
        raise ValueError(f"{path} is no regular file, and would be replaced by one: name a file")
    _sweep(path)
    beside, file = _created(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # renames no open file
                file.close()
            os.replace(beside, path)  # still locked: no other process takes it for one that was left
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def replacing_directory(path: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A new directory that takes the name ``path`` when the block ends, as :func:`replacing` does it for files.

    One that is there is renamed first and removed last: a process killed in between leaves it as ``.NAME.*.old``.

    Args:
        check: raises where ``path`` holds what must not be replaced; called when the block has ended.
    """
    _sweep(path)
    beside = _beside(path)
    beside.mkdir()
    descriptor = os.open(beside, os.O_RDONLY) if os.name == "posix" else None
    try:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                lock(descriptor)
        yield beside
        check()
        former = beside.with_suffix(".old")
        if path.exists():
            os.rename(path, former)
        try:
            os.rename(beside, path)
        except OSError:
            if former.exists():
                os.rename(former, path)
            raise
        shutil.rmtree(former, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
    sync_directory(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """A whole text, in UTF-8, by :func:`replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def _beside(path: Path) -> Path:
    """A new name for what is to become ``path``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _created(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file beside ``path``, locked for as long as it is open."""
    while True:
        name = _beside(path)
        file = open(name, "r+b", opener=_new)  # noqa: SIM115
        taken = False  # by another process, for one that was left, before it was locked
        try:
            lock(file.fileno())
        except (BlockingIOError, PermissionError):
            taken = True
        except OSError:  # a file system without locks: nobody takes it there
            pass
        if not taken and os.fstat(file.fileno()).st_nlink:
            return name, file
        file.close()
        name.unlink(missing_ok=True)


def _new(name: str, _: int) -> int:
    """Open what is not there yet."""
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | PLAIN, 0o666)


def _sweep(path: Path) -> None:
    """Remove what killed processes have left beside ``path``: temporary files and directories that none has locked."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]+\.tmp")
    with contextlib.suppress(OSError):  # no directory yet, or none that may be listed
        for name in [entry.name for entry in os.scandir(path.parent) if pattern.fullmatch(entry.name)]:
            left = path.with_name(name)
            with contextlib.suppress(OSError):  # locked by its writer, or not ours to remove
                folder = left.is_dir() and not left.is_symlink()
                file = os.open(left, (os.O_RDONLY if folder else os.O_RDWR) | PLAIN)
                try:
                    lock(file)
                    if folder:
                        shutil.rmtree(left, ignore_errors=True)
                    elif os.name != "nt":
                        left.unlink()
                finally:
                    os.close(file)
                if os.name == "nt":  # where no open file can be removed
                    left.unlink()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (POSIX; elsewhere the rename alone has to do)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- sealed ----------------------------------------------------------------------------------------------------------


def seal(file: IO[bytes], at: int) -> None:
    """Put the checksum of a file in place of the zeros that it holds at ``at``."""
    file.flush()
    file.seek(at)
    if file.read(SEAL) != b"0" * SEAL:
        raise ValueError(f"there is no room for a seal at {at}")
    checksum = _checksum(file, file.seek(0, os.SEEK_END), start=0)
    file.seek(at)
    file.write(b"%08x" % checksum)


def check_seal(file: IO[bytes], at: int) -> bool:
    """Whether a file is as it was when it was sealed at ``at``."""
    size = file.seek(0, os.SEEK_END)
    file.seek(at)
    found = file.read(SEAL)
    checksum = zlib.crc32(b"0" * SEAL, _checksum(file, at, start=0))
    return found == b"%08x" % _checksum(file, size, start=at + SEAL, checksum=checksum)


def checksum(path: Path) -> str:
    """CRC-32 of a whole file, in hex digits."""
    with open(path, "rb") as file:
        return f"{_checksum(file, file.seek(0, os.SEEK_END), start=0):08x}"


def _checksum(file: IO[bytes], stop: int, *, start: int, checksum: int = 0) -> int:
    """CRC-32 of the bytes from start to stop, after those of ``checksum``."""
    file.seek(start)
    left = stop - start
    while left > 0 and (piece := file.read(min(left, PIECE))):
        checksum = zlib.crc32(piece, checksum)
        left -= len(piece)
    return checksum


# --- grown -----------------------------------------------------------------------------------------------------------


class Blocks:
    """A file of rows of one size, appended in blocks, with a checksum of each.

    The checksums are to be kept in a sealed file (:meth:`state_dict`): they say which rows count. What lies behind those
    is of a killed process, and is written over.

    Args:
        path: the file; it is made at the first block.
        row_bytes: bytes of a row.
        mend: what to do about a damaged file, for the message.
    """

    def __init__(self, path: Path, row_bytes: int, mend: str) -> None:
        self.path, self.row_bytes, self.mend = path, row_bytes, mend
        self.ends: list[int] = []  # rows up to the end of each block
        self.checksums: list[int] = []
        self._checked = 0  # blocks that were written or verified here
        self._file: IO[bytes] | None = None

    @property
    def count(self) -> int:
        """Rows that count."""
        return self.ends[-1] if self.ends else 0

    def append(self, rows: Tensor) -> None:
        """Put rows behind those that count. They are safe after :meth:`sync`."""
        data = rows.detach().contiguous().cpu().view(torch.uint8).numpy().data
        checksum = zlib.crc32(data)  # an interruption in here must not leave one list longer than the other
        file = self.opened()
        file.seek(self.count * self.row_bytes)
        file.write(data)
        file.flush()  # nothing is left for a later moment, when another may be writing
        self.ends.append(self.count + len(rows))
        self.checksums.append(checksum)
        if self._checked == len(self.ends) - 1:
            self._checked += 1

    def opened(self) -> IO[bytes]:
        """The file, for writing."""
        if self._file is None:
            self._file = open(self.path, "r+b", opener=open_or_create)  # noqa: SIM115
        return self._file

    def sync(self) -> None:
        """Bring the rows to the disk, before anything that counts them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def cut(self, count: int) -> None:
        """Count the first rows alone, which end with a block."""
        while self.count > count:
            self.ends.pop()
            self.checksums.pop()
        if self.count != count:
            raise ValueError(f"{self.path}: no block ends after {count} rows; {self.mend}")
        self._checked = min(self._checked, len(self.ends))

    def distrust(self) -> None:
        """Let :meth:`verify` read everything again: another has written to the file."""
        self._checked = 0

    def verify(self, blocks: int | None = None) -> None:
        """Compare the first blocks (all), as far as that was not done yet, with their checksums.

        Raises:
            ValueError: the file is cut off, or a block is not as it was written.
        """
        blocks = len(self.ends) if blocks is None else blocks
        if self._checked >= blocks:
            return
        self.check_size()
        with open(self.path, "rb") as file:
            for number in range(self._checked, blocks):
                start, stop = self._span(number)
                if _checksum(file, stop, start=start) != self.checksums[number]:
                    raise self._damaged(f"rows {start // self.row_bytes} to {stop // self.row_bytes - 1} have changed")
                self._checked = number + 1

    def __iter__(self) -> Iterator[bytearray]:
        """The blocks that count, each compared with its checksum.

        Raises:
            ValueError: as :meth:`verify`.
        """
        if not self.ends:
            return
        self.check_size()
        with open(self.path, "rb") as file:
            for number in range(len(self.ends)):
                start, stop = self._span(number)
                data = bytearray(stop - start)
                file.readinto(data)  # type: ignore[attr-defined]
                if zlib.crc32(data) != self.checksums[number]:
                    raise self._damaged(f"rows {start // self.row_bytes} to {stop // self.row_bytes - 1} have changed")
                yield data

    def check_size(self) -> None:
        """Whether the file is as long as the rows that count.

        Raises:
            ValueError: it is shorter, or not there.
        """
        size, wanted = self.path.stat().st_size if self.path.exists() else 0, self.count * self.row_bytes
        if size < wanted:
            raise self._damaged(f"it has {size} bytes of {wanted}")

    def _span(self, number: int) -> tuple[int, int]:
        first = self.ends[number - 1] if number else 0
        return first * self.row_bytes, self.ends[number] * self.row_bytes

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}; {self.mend}")

    def state_dict(self) -> dict[str, Tensor]:
        """Where the blocks end, (b,) int64, and their checksums, (b,) int64."""
        return {"ends": torch.tensor(self.ends, dtype=torch.int64), "checksums": torch.tensor(self.checksums).long()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Count the rows of a state, whatever the file holds behind them."""
        self.ends, self.checksums, self._checked = state["ends"].tolist(), state["checksums"].tolist(), 0

    def begins_with(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the blocks that count begin with those of a state, which are then verified.

        Raises:
            ValueError: as :meth:`verify`.
        """
        ends, checksums = state["ends"].tolist(), state["checksums"].tolist()
        if self.ends[: len(ends)] != ends or self.checksums[: len(ends)] != checksums:
            return False
        self.verify(len(ends))
        return True

    def close(self) -> None:
        """Close the file until the next block."""
        if self._file is not None:
            self._file.close()
            self._file = None
