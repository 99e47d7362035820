"""What programs around the library need of it: the commands ``doctor`` and ``verify``, peak memory, and files never half written."""

from harmonic_triton._common.files import replacing as replacing
from harmonic_triton._common.files import write_text as write_text
