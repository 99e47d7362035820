"""The runs behind ``harmonic_triton.recommend``: ``python -m examples.recommend``."""
