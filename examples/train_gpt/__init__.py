"""Train a GPT with the harmonic loss, beside the same GPT with cross-entropy: ``python -m examples.train_gpt``."""

from importlib.util import find_spec

_missing = [name for name in ("tokenizers", "tqdm", "matplotlib") if find_spec(name) is None]
if _missing:
    raise ImportError(f"examples.train_gpt needs {', '.join(_missing)}: pip install harmonic-triton[examples]")
