"""What kernels of both halves round by; needs Triton."""

import triton
import triton.language as tl


@triton.jit
def narrow(value, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """Round fp32 to the nearest value of ``dtype``; the interpreter's own conversion to bf16 truncates."""
    if UPCAST and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & -65536).to(tl.float32, bitcast=True)
    return value.to(dtype)
