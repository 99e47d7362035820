"""Benchmarks of the harmonic loss beside everything it would replace: ``python -m benchmarks --help``."""


class UsageError(ValueError):
    """A request that cannot be served; the message names the argument and the mend."""
