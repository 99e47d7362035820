"""How kernels of both halves may bring operands to the matrix units; needs Triton."""

import triton

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
UNFENCED = ("sm90", "sm100") if VERSION < (3, 8) else ()
# There the matrix units read shared memory through a proxy of its own. Triton before 3.8, some of 3.7's patch releases apart, puts
# no fence.proxy.async between asynchronous copies to it and the instruction that reads them (its pull request 9610), so that
# older contents may be read. What is stored by threads is fenced.


def stages(arch: str, num_stages: int, bytes_per_operand: int) -> int:
    """``num_stages`` of a loop that loads operands of a product by pointers, or 1, synchronous, where it must be.

    Products of fp32 operands do not run on matrix units.
    """
    return 1 if arch in UNFENCED and bytes_per_operand < 4 else num_stages
