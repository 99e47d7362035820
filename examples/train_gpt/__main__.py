"""``python -m examples.train_gpt``, ``torchrun -m examples.train_gpt`` or ``python examples/train_gpt``."""

import sys
from importlib.util import find_spec
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    missing = [name for name in ("numpy", "tokenizers", "tqdm", "matplotlib") if find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} not installed: pip install {' '.join(missing)}", file=sys.stderr)
        sys.exit(2)
    from examples.train_gpt.train import main

    sys.exit(main())
