"""Both losses for any causal language model of Hugging Face's ``transformers``.

Importing this module teaches ``AutoConfig`` and ``AutoModelForCausalLM`` to load what a patched model has saved::

    import harmonic_triton.integrations.transformers as harmonic

    model = harmonic.apply_harmonic_loss(AutoModelForCausalLM.from_config(config), n=28.0)
"""

from harmonic_triton.integrations.transformers.config import register
from harmonic_triton.integrations.transformers.patch import (
    apply_harmonic_loss,
    harmonic_class,
    remove_harmonic_loss,
)

__all__ = ["apply_harmonic_loss", "harmonic_class", "remove_harmonic_loss"]

register(harmonic_class)
