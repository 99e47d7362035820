"""What programs around the library need of it: `doctor` and `verify`, peak memory, files never half written, and colours."""

from harmonic_triton._common.files import replacing as replacing
from harmonic_triton._common.files import write_text as write_text
from harmonic_triton._common.palette import DASHES as DASHES
from harmonic_triton._common.palette import MARKERS as MARKERS
from harmonic_triton._common.palette import PALETTE as PALETTE
from harmonic_triton._common.palette import line_style as line_style
