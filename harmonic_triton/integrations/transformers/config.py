"""How a patched model is written to disk: so that it comes back patched, and never as the plain model.

In memory a configuration keeps its class's name and model type, on which much of ``transformers`` and its users branch. On
disk it says ``model_type: harmonic_triton``, which ``AutoConfig`` does not know before this package is imported, its
architectures begin with "Harmonic", and in place of the model's width stands a sentence, which the configuration class of the
plain model refuses and shows. (Trainer reads a checkpoint's configuration as a ``PreTrainedConfig``, which has no width.)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, cast

from harmonic_triton._common.extras import needs

TRANSFORMERS = "pip install 'harmonic-triton[transformers]'"
transformers = needs("transformers", "harmonic_triton.integrations.transformers", install=TRANSFORMERS)
OLDEST = (5, 5)  # which loads extra states
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"harmonic_triton.integrations.transformers needs transformers >= {OLDEST[0]}.{OLDEST[1]}, and {transformers.__version__}"
        f" is installed: {TRANSFORMERS}"
    )

MODEL_TYPE = "harmonic_triton"
PREFIX = "Harmonic"
VERSION = 1
HOW = "import harmonic_triton.integrations.transformers, then AutoModelForCausalLM.from_pretrained"
REFUSAL = f"trained with the harmonic loss: as logits these weights mean nothing. To load them: {HOW}"
ATTRIBUTE = "harmonic_loss"  # of a configuration: what the weights mean, and what they are trained with


def to_disk(values: dict[str, Any], architecture: str, widths: dict[str, str]) -> dict[str, Any]:
    """A configuration's entries as they are written.

    Args:
        values: the entries of a plain one.
        architecture: the name of the model class.
        widths: by part of the configuration ("" for the whole), what it calls the width of the model.
    """
    written, kept = dict(values), {}
    for part, width in widths.items():
        at = written if not part else dict(written[part])
        if part:
            written[part] = at
        kept[part] = {width: at[width]}
        at[width] = REFUSAL
    written["model_type"] = MODEL_TYPE
    written["architectures"] = [PREFIX + name for name in values.get("architectures") or ()]
    written[ATTRIBUTE] = {
        **values[ATTRIBUTE], "architecture": architecture, "base_model_type": values["model_type"], "version": VERSION,
        "replaced": kept,
    }  # fmt: skip
    return written


def from_disk(values: dict[str, Any], where: str = "this configuration") -> tuple[dict[str, Any], str]:
    """The inverse: entries and architecture. What was not written by :func:`to_disk` is refused."""
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{where} is that of a plain {values.get('model_type')} model; load it as that and call apply_harmonic_loss"
        )
    stored = dict(values[ATTRIBUTE])
    if stored.pop("version") != VERSION:
        raise ValueError(f"{where} was written by another version of harmonic_triton than this one; install that one")
    plain = {**values, "model_type": stored.pop("base_model_type")}
    for part, width in stored.pop("replaced").items():
        if part:
            plain[part] = {**plain[part], **width}
        else:
            plain.update(width)
    plain["architectures"] = [name.removeprefix(PREFIX) for name in values["architectures"]]
    architecture = stored.pop("architecture")
    plain[ATTRIBUTE] = stored
    return plain, architecture


def _widths(config: Any, values: dict[str, Any]) -> dict[str, str]:
    """What a configuration, and those within it that have a vocabulary, call the width of the model."""
    found = {}
    for part in ("", *(name for name, value in values.items() if isinstance(value, dict) and "vocab_size" in value)):
        held = getattr(config, part) if part else config
        width = getattr(held, "attribute_map", {}).get("hidden_size", "hidden_size")
        if width in (values[part] if part else values):
            found[part] = width
    return found


@functools.cache
def config_class(owner: Any) -> Any:
    """The configuration class of a model class ``owner``, read and written as above."""
    base = owner.config_class

    def to_json_string(self: Any, use_diff: bool = True) -> str:
        values = json.loads(base.to_json_string(self, use_diff=use_diff))
        return json.dumps(to_disk(values, owner.__name__, _widths(self, values)), indent=2, sort_keys=True) + "\n"

    def get_config_dict(cls: Any, /, name: Any, **kwargs: Any) -> Any:
        values, unused = base.get_config_dict.__func__(cls, name, **kwargs)
        return from_disk(values, str(name))[0], unused

    def reduce(self: Any, protocol: Any) -> Any:
        return (_blank, (owner,), *object.__reduce_ex__(self, protocol)[2:])

    own: dict[str, Any] = {
        "__module__": base.__module__,
        "__reduce_ex__": reduce,
        "to_json_string": to_json_string,
        "get_config_dict": classmethod(get_config_dict),
    }
    return type(base.__name__, (base,), own)


def _blank(owner: Any) -> Any:
    """An empty configuration, for pickle and copy."""
    made = config_class(owner)
    return made.__new__(made)


def register_class(base: Any, made: Any) -> None:
    """Let every ``AutoModelFor...`` that knows ``base`` give ``made`` for a configuration of ours."""
    for mapping in vars(transformers.models.auto.modeling_auto).values():
        if type(mapping).__name__ != "_LazyAutoMapping":
            continue
        known = mapping.get(base.config_class, None)
        if base is known or (isinstance(known, tuple) and base in known):
            mapping.register(made.config_class, made, exist_ok=True)
    transformers.AutoModelForCausalLM.register(made.config_class, made, exist_ok=True)


def register(harmonic_class: Callable[[Any], Any]) -> None:
    """Let ``AutoConfig`` and ``AutoModelForCausalLM`` load what has been saved."""

    class Stored:
        """What stands for every patched architecture in the list of configurations."""

        @classmethod
        def from_dict(cls, values: dict[str, Any], **kwargs: Any) -> Any:
            plain, name = from_disk(values)
            base = getattr(transformers, name, None)
            if base is None:
                raise ValueError(
                    f"transformers has no class {name!r}: load it as"
                    f" harmonic_class({name}).from_pretrained(...), with the class that was patched"
                )
            return harmonic_class(base).config_class.from_dict(plain, **kwargs)

    mapping = cast(Any, transformers.models.auto.configuration_auto).CONFIG_MAPPING
    mapping.register(MODEL_TYPE, Stored, exist_ok=True)
