"""The product of the scores kernel without what the kernel makes of it: the same tiles, loads and order of tiles.

What remains is one addition an entry, without which nothing would be computed. The scores kernel's time less this one's is
what its epilogue costs where products do not hide it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from harmonic_triton.fused.triton.launch import Launch
from harmonic_triton.fused.triton.scores import place_of, product_tile


@triton.jit
def bare_product_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, sums_ptr,  # (N, D), (V, D), out (class tiles, N)
    N, V, D, stride_xn, stride_xd, stride_wv, stride_wd,
    TMA: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Sums of x w^T over the classes of each tile."""
    row_tiles = tl.cdiv(N, BLOCK_N)
    col_tiles = tl.cdiv(V, BLOCK_V)
    for tile in range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0)):
        row_tile, col_tile = place_of(tile, row_tiles, col_tiles, GROUP)
        row = row_tile * BLOCK_N
        dot = product_tile(
            x_ptr, w_ptr, row, col_tile * BLOCK_V, N, V, D, stride_xn, stride_xd, stride_wv, stride_wd,
            TMA, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST,
        )  # fmt: skip
        rows = row + tl.arange(0, BLOCK_N)
        tl.store(sums_ptr + col_tile.to(tl.int64) * N + rows, tl.sum(dot, 1), mask=rows < N)


def launch_product(call: Launch, sums: Tensor) -> None:
    """As ``launch_scores`` would launch the scores kernel over all classes; ``sums`` is (class tiles, N)."""
    config, x, w = call.config, call.x, call.w
    programs = triton.cdiv(call.tokens, config.block_n) * triton.cdiv(call.classes, config.block_v)
    if call.tma:
        x = TensorDescriptor.from_tensor(x, [config.block_n, config.block_d])
        w = TensorDescriptor.from_tensor(w, [config.block_v, config.block_d])
        if call.x.is_cuda:
            programs = min(programs, torch.cuda.get_device_properties(call.x.device).multi_processor_count)
    needed = ("TMA", "UPCAST", "BLOCK_N", "BLOCK_V", "BLOCK_D", "GROUP", "num_warps", "num_stages", "enable_fp_fusion")
    told = {name: call.tile[name] for name in needed}
    bare_product_kernel[(programs,)](x, w, sums, call.tokens, call.classes, call.features, *call.strides, **told)
