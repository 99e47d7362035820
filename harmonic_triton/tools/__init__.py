"""The commands that look at this machine: ``doctor`` and ``verify``."""
