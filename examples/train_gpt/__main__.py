"""``python -m examples.train_gpt``, ``torchrun -m examples.train_gpt`` or ``python examples/train_gpt``."""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.train_gpt.train import main

if __name__ == "__main__":
    sys.exit(main())
