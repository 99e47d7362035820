"""Train a GPT with the harmonic loss, beside the same GPT with cross-entropy: ``python -m examples.train_gpt``."""
