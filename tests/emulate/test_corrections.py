"""What ``tests/tools/ptx_corrections.py`` corrects in the emulator: wrong without it, right with it, and no blinder for it."""

import emulation
import numpy as np
import pytest

if emulation.missing():
    pytest.skip(emulation.missing(), allow_module_level=True)

from ptx_corrections import corrected
from ptx_emulator import MemoryFault, Options, run_ptx

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 d)\n"
START = "{ .reg .pred %p1, %p2; .reg .b32 %t, %v, %s; .reg .f32 %f; .reg .b64 %x, %o;\nmov.u32 %t, %tid.x;\n"
STORE = "ld.param.u64 %x, [d]; mul.wide.u32 %o, %t, 4; add.s64 %x, %x, %o; st.global.b32 [%x], %s; ret; }"
PARTED = "setp.lt.u32 %p1, %t, 7; @%p1 bra X;\n"
SEEDS = range(20)
LANE = np.arange(32)


def run(body, **options):
    """What 32 threads store."""
    out = {"d": np.zeros(32, np.uint32)}
    run_ptx(HEAD + START + body + STORE, (1,), 32, ["d"], out, options=Options(**options))
    return out["d"]


SHUFFLE = PARTED + "add.u32 %v, %t, 100; bra Y; X: add.u32 %v, %t, 200; Y: shfl.sync.bfly.b32 %s, %v, 16, 31, -1;\n"
VOTE = PARTED + "setp.ge.u32 %p2, %t, 7; bra Y; X: setp.lt.u32 %p2, %t, 7; Y: vote.sync.ballot.b32 %s, %p2, -1;\n"


def test_parts_of_a_warp_meet_at_a_shuffle():
    def faults():
        count = 0
        for seed in SEEDS:
            try:
                got = run(SHUFFLE, order="random", seed=seed)
            except MemoryFault:
                count += 1
            else:
                np.testing.assert_array_equal(got, (LANE ^ 16) + np.where((LANE ^ 16) < 7, 200, 100))
        return count

    assert faults() > 0  # the emulator by itself
    with corrected():
        assert faults() == 0


def test_parts_of_a_warp_meet_at_a_vote():
    every = lambda: [(run(VOTE, order="random", seed=seed) == 2**32 - 1).all() for seed in SEEDS]
    assert not all(every())
    with corrected():
        assert all(every())


@pytest.mark.parametrize("order", ["forward", "random"])
def test_a_part_that_never_comes_is_a_fault(order):
    """Seven threads wait at a barrier instead of taking part."""
    body = PARTED + "shfl.sync.bfly.b32 %s, %t, 16, 31, -1; X: bar.sync 0;\n"
    with corrected(), pytest.raises(MemoryFault, match="shuffle from a thread that does not take part"):
        run(body, order=order)


def test_random_errors_are_those_of_the_operands():
    """Thirty-two threads that compute one reciprocal get one result; over operands it is off in both directions."""
    spread = "cvt.rn.f32.u32 %f, %t; add.f32 %f, %f, 0f40400000; rcp.approx.f32 %f, %f; mov.b32 %s, %f;\n"
    copies = "and.b32 %t, %t, 0;\n" + spread + "mov.u32 %t, %tid.x;\n"
    assert len(set(run(copies, worst_case="random"))) == 2
    with corrected():
        assert len(set(run(copies, worst_case="random"))) == 1
        exact = 1 / (LANE + 3.0)
        off = run(spread, worst_case="random").view(np.float32) / exact - 1
    assert off.min() < -(2.0**-24) and off.max() > 2.0**-24
    assert (np.abs(off) <= 2.0**-23 + 2.0**-24).all()
