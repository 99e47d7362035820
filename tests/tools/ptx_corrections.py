"""Two corrections of the PTX emulator, shown to be needed by ``tests/emulate/test_corrections.py``.

**A part of a warp waits at a .sync instruction until the other parts are there.** PTX ISA on ``shfl.sync`` (and ``vote``,
``redux``, ``bar.warp.sync`` alike): it "will cause executing thread to wait until all non-exited threads corresponding to
membermask have executed" it. The emulator lets a part that comes to a shuffle before the others run on, and then raises; a vote
it counts without them. In lockstep the lowest program counter goes first and that does not happen, but
``Options(order="random")`` may take either part of a warp that parted at a branch, such as the one around the subnormal results
of an fp64 exp2. Here such instructions begin a basic block, and a group of threads that would enter one waits while other
parts of its warps can still run. A mask of less than a warp is taken for the whole warp.

**The error of an approximate instruction is a function of its operands.** ``Options(worst_case="random")`` draws one for
every thread and execution, so that threads that compute one number twice, as layouts with copies do, seem to store different
ones. Here its sign is a hash of the exact result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from ptx_emulator import launcher, machine
from ptx_emulator.numerics import Approximate
from ptx_emulator.tma import Bulk

MEETING = ("shfl", "vote", "redux", "elect", "ldmatrix", "stmatrix", "mma", "wgmma")


def meets(instruction) -> bool:
    """Whether a warp must be whole to execute it."""
    parts = instruction.parts
    return bool(parts) and (parts[0] in MEETING or parts[:3] == ("bar", "warp", "sync"))


class Waiting(Bulk):
    """The emulator's machine, whose warps wait for their other parts."""

    def _decode(self, function):
        body = function.body
        function.body = []
        for instruction in body:
            if meets(instruction):  # a label is where a basic block begins
                function.body.append(type(instruction)("label", operands=(f"meeting {len(function.body)}",)))
            function.body.append(instruction)
        try:
            blocks = super()._decode(function)
        finally:
            function.body = body
        self.meeting = {at for at, block in enumerate(blocks) if block.steps and hasattr(block.steps[0], "meets")}
        return blocks

    def _step(self, instruction):
        decoded = super()._step(instruction)
        if not meets(instruction):
            return decoded

        def step(mask):
            decoded(mask)

        step.meets = True
        return step

    def _next(self, groups, lockstep):
        ready = {key: mask for key, mask in groups.items() if not self._waits(key, groups)}
        return super()._next(ready or groups, lockstep)

    def _waits(self, key, groups) -> bool:
        """Whether a group stands before such an instruction with a warp that is not whole, and the rest may come."""
        mask = groups[key]
        if key[0] not in self.meeting or mask is True or len(groups) == 1:
            return False
        by_warp = mask.reshape(-1, 32)
        parted = by_warp.any(1) & ~by_warp.all(1)
        if not parted.any():
            return False
        missing = np.repeat(parted, 32) & ~mask
        return any(bool((other & missing).any()) for one, other in groups.items() if one != key and other is not True)


class Repeatable(Approximate):
    """The emulator's approximate instructions, off by the same each time."""

    def _sign(self, like):
        if self.worst != "random":
            return super()._sign(like)
        bits = np.asarray(like, np.float64).view(np.uint64) + np.uint64(self.seed)
        return np.where(bits * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(63), 1.0, -1.0)

    def __init__(self, worst=None, seed=0) -> None:
        super().__init__(worst, seed)
        self.seed = seed


@contextmanager
def corrected() -> Iterator[None]:
    """Launches of the emulator are executed with both corrections."""
    with mock.patch.object(launcher, "Bulk", Waiting), mock.patch.object(machine, "Approximate", Repeatable):
        yield
