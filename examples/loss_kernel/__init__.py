"""The loss kernel on small models that train in minutes: ``python -m examples.loss_kernel NAME``."""
