"""The version, where everything that writes it can import it without importing the package's halves."""

__version__ = "0.1.0"
