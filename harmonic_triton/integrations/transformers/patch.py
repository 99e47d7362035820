"""A model's class is exchanged for one that is the same but for its loss; nothing of its forward pass is copied."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import warnings
from typing import Any, Literal

from torch import Tensor, nn

from harmonic_triton._common import validate
from harmonic_triton._common.dispatch import BACKENDS
from harmonic_triton.integrations.transformers.config import ATTRIBUTE, config_class, register_class, transformers
from harmonic_triton.integrations.transformers.forward import check_whole, compute_loss, heads_of, run
from harmonic_triton.integrations.transformers.head import CrossEntropyLinear, HarmonicLinear, LossHead

Mode = Literal["harmonic", "cross_entropy"]
HEADS: dict[str, type[LossHead]] = {"harmonic": HarmonicLinear, "cross_entropy": CrossEntropyLinear}
CONVERTED = "{} (now harmonic)"  # the name of weights that are no longer those of that name


def apply_harmonic_loss(
    model: Any,
    n: float | None = None,
    eps: float = 0.0,
    *,
    mode: Mode = "harmonic",
    uniform_mix: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Any:
    """Train and sample a causal language model of ``transformers`` with the harmonic loss, in place.

    With labels the model computes the fused loss, without the N x V matrix, from whatever it would have passed to its loss
    function (``shift_labels``, ``num_items_in_batch``, ``ignore_index``); an auxiliary loss of its own is kept.
    Without labels ``logits`` are log-probabilities, which ``generate`` takes as they are. Beside a loss, ``logits`` are formed
    when somebody uses them (under ``torch.compile`` they are None). ``save_pretrained`` writes a checkpoint that
    ``AutoModelForCausalLM`` loads, patched, wherever this module is imported; elsewhere loading it is an error.

    Args:
        model: a ``PreTrainedModel`` with an output embedding that is an ``nn.Linear``, tied or not. Patch it before it is
            wrapped, compiled, sharded or given adapters.
        n, eps: as in :func:`harmonic_triton.linear_harmonic_loss`; None is sqrt(D).
        mode: "cross_entropy" for the model's own loss from :func:`harmonic_triton.linear_cross_entropy`. Nothing but time and
            memory changes, hence neither do the files that the model writes.
        uniform_mix, label_smoothing: of the loss, saved with the model; ``uniform_mix`` of the harmonic loss alone.
        z_loss: of cross-entropy alone.
        backend, memory_budget: of the loss, not saved: they belong to a machine.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: the model cannot be patched, with the reason, or an argument is wrong. What a model does to its
            logits after the head (soft-capping, scaling) is followed by cross-entropy and refused by the harmonic loss, in the
            first forward pass.
    """
    loss = _options(mode, n, eps, uniform_mix, label_smoothing, z_loss, backend, memory_budget)
    base = _checked(model)
    settings: dict[str, float] = {}
    if mode == "harmonic":
        width = model.get_output_embeddings().in_features
        settings = {"n": math.sqrt(width) if n is None else float(n), "eps": float(eps)}
    if _is_patched(model):
        _same_again(model, mode, settings, loss)
        return model
    if mode == "harmonic":
        if model.get_output_embeddings().bias is not None:
            raise ValueError(
                "the output embedding has a bias, and distances have none: a class vector that is moved does what a bias would"
            )
        if model.name_or_path:
            _warn_of_conversion(model)
        stored = {**settings, **{name: loss[name] for name in ("uniform_mix", "label_smoothing") if loss[name]}}
        _exchange_config(model, config_class(base), stored)
    model.__class__ = _patched_class(base, mode)
    _adopt(model.get_output_embeddings(), mode, settings, loss)
    return model


def remove_harmonic_loss(model: Any) -> Any:
    """Undo :func:`apply_harmonic_loss`, in either mode, in place.

    The model computes its own loss and logits again. Weights stay as they are: those of the harmonic loss give logits that mean
    nothing until they have been trained.

    Returns:
        The model.

    Raises:
        ValueError: the model is not patched.
    """
    if not _is_patched(model):
        raise ValueError(f"{type(model).__name__} is not patched")
    for head in heads_of(model):
        plain: Any = head
        plain.__class__ = nn.Linear
        for name in ("n", "eps", "loss_options"):
            vars(plain).pop(name, None)
    if hasattr(model.config, ATTRIBUTE):
        _exchange_config(model, model.patched_from.config_class, None)
    model.__class__ = model.patched_from
    return model


def harmonic_class(base: Any) -> Any:
    """The class that a model of class ``base`` becomes: ``harmonic_class(LlamaForCausalLM).from_pretrained(...)``."""
    return _patched_class(base, "harmonic")


@functools.cache
def _patched_class(base: Any, mode: Mode) -> Any:
    """``base`` with another loss. Names stay: much of ``transformers`` and its users branch on those of class and module."""
    _computes_loss(base)
    place = list(inspect.signature(base.forward).parameters).index("labels") - 1

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        loss = dict(getattr(config, ATTRIBUTE)) if mode == "harmonic" else {}
        settings = {name: loss.pop(name) for name in ("n", "eps") if name in loss}
        _is_causal(self)
        _adopt(self.get_output_embeddings(), mode, settings, loss)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[place] if len(args) > place else kwargs.get("labels")
        if labels is None and mode == "cross_entropy":
            return base.forward(self, *args, **kwargs)
        return run(self, base.forward, labels is not None, args, kwargs)

    del forward.__wrapped__  # accelerate would put it back in place of this one, where it takes off its own wrappers
    vars(forward)["__signature__"] = inspect.signature(base.forward)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name == "forward":
            inner = inspect.unwrap(value)
            if getattr(inner, "__func__", inner) is not forward:
                raise TypeError(
                    "the model's forward would be replaced by one that does not wrap it, and the loss with it (Liger's kernels do"
                    " so: use_liger_kernel=False, or fused_linear_cross_entropy=False in its configuration); a wrapper says what"
                    " it wraps by functools.wraps"
                )
        base.__setattr__(self, name, value)

    def set_output_embeddings(self: Any, new: Any) -> None:
        old = heads_of(self)[0]
        base.set_output_embeddings(self, new)
        if type(new) is nn.Linear:
            settings = {name: getattr(old, name) for name in ("n", "eps") if hasattr(old, name)}
            _adopt(new, mode, settings, old.loss_options)

    def reduce(self: Any, protocol: Any) -> Any:
        return (_blank, (base, mode), *object.__reduce_ex__(self, protocol)[2:])

    def loss_function(self: Any) -> Any:
        return functools.partial(compute_loss, self)

    def no_other(self: Any, value: Any) -> None:
        raise TypeError("this model's loss is that of apply_harmonic_loss; call remove_harmonic_loss(model) first")

    own: dict[str, Any] = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__init__": build,
        "__reduce_ex__": reduce,
        "__setattr__": set_attribute,
        "config_class": config_class(base) if mode == "harmonic" else base.config_class,
        "forward": forward,
        "loss_function": property(loss_function, no_other),
        "patched_from": base,
        "set_output_embeddings": set_output_embeddings,
    }
    made: Any = type(base.__name__, (base,), own)
    if mode == "harmonic":
        register_class(base, made)
    return made


def _options(
    mode: Mode,
    n: float | None,
    eps: float,
    uniform_mix: float,
    label_smoothing: float,
    z_loss: float,
    backend: str,
    memory_budget: int | None,
) -> dict[str, Any]:
    """Every argument but the model, checked, and those of the loss beside n and eps."""
    loss = {"label_smoothing": label_smoothing, "backend": backend, "memory_budget": memory_budget}
    validate.between("label_smoothing", label_smoothing, 0.0, 1.0)
    validate.budget(memory_budget)
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend must be one of 'auto', {', '.join(map(repr, BACKENDS))}, got {validate.describe(backend)}"
        )
    if mode == "harmonic":
        validate.exponent(n)
        validate.eps(eps)
        validate.between("uniform_mix", uniform_mix, 0.0)
        if isinstance(n, Tensor):
            raise TypeError("n must be a number: a model's n is part of its configuration")
        if z_loss:
            raise ValueError("z_loss is an option of cross-entropy: HarMax has no logits whose scale could drift")
        loss["uniform_mix"] = uniform_mix
    elif mode == "cross_entropy":
        if n is not None or eps or uniform_mix:
            raise ValueError("n, eps and uniform_mix are options of the harmonic loss; mode is 'cross_entropy'")
        validate.between("z_loss", z_loss, 0.0)
        loss["z_loss"] = z_loss
    else:
        raise ValueError(f"mode must be 'harmonic' or 'cross_entropy', got {validate.describe(mode)}")
    return loss


def _blank(base: Any, mode: Mode) -> Any:
    """An empty model, for pickle and copy."""
    made = _patched_class(base, mode)
    return made.__new__(made)


def _is_patched(model: Any) -> bool:
    return hasattr(type(model), "patched_from")


def _checked(model: Any) -> Any:
    """The class of a model that can be patched, or is.

    Raises:
        TypeError: it cannot, with the reason and the mend.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel of transformers, got {type(model).__name__}; patch the model before it is"
            " wrapped (model.module of DDP, model.base_model.model of PEFT, model._orig_mod of torch.compile)"
        )
    if _is_patched(model):
        return type(model).patched_from
    base, head = type(model), model.get_output_embeddings()
    if type(model.config) is not base.config_class:
        raise TypeError(
            f"the model's configuration must be a {base.config_class.__name__}, got {type(model.config).__name__}"
        )
    if type(head) is not nn.Linear:
        raise TypeError(
            f"the output embedding of {base.__name__} must be an nn.Linear, got {type(head).__name__}; "
            + (
                "only language models with a head have one"
                if head is None
                else "patch it before it is quantized or wrapped"
            )
        )
    _computes_loss(base)
    _is_causal(model)
    if "_loss_function" in vars(model):
        raise TypeError("the model has been given a loss function; delete it first (del model._loss_function)")
    for name, module in (("model", model), ("output embedding", head)):
        if "forward" in vars(module) or getattr(module, "_compiled_call_impl", None) is not None:
            raise TypeError(
                f"the {name}'s forward has been replaced or compiled; patch the model first, then prepare, dispatch or"
                " compile it"
            )
    if type(head.weight.data).__name__ == "DTensor":
        raise TypeError("the output embedding is sharded; patch the model before fully_shard")
    check_whole(model)
    return base


def _computes_loss(base: Any) -> None:
    """Raise where a model class does not leave the loss to ``self.loss_function``."""
    names = inspect.unwrap(base.forward).__code__.co_names
    if "labels" not in inspect.signature(base.forward).parameters or not {"loss_function", "super"} & set(names):
        raise TypeError(
            f"{base.__name__} computes its loss within its forward pass, or none; only models that call"
            " self.loss_function can be patched"
        )


def _is_causal(model: Any) -> None:
    """Raise where a model's own loss is another than that of a causal language model, whose labels are shifted."""
    losses = transformers.modeling_utils.LOSS_MAPPING
    own = losses.get(model.loss_type, losses["ForCausalLM"])
    if own is not losses["ForCausalLM"]:
        raise TypeError(
            f"the loss of {type(model).__name__} is {own.__name__}, which does not shift its labels as that of a causal language"
            " model does; only causal language models can be patched"
        )


def _adopt(head: Any, mode: Mode, settings: dict[str, float], loss: dict[str, Any]) -> None:
    """Make an ``nn.Linear`` the head of a loss."""
    if type(head) is not nn.Linear:
        raise TypeError(f"the output embedding must be an nn.Linear, got {type(head).__name__}")
    head.__class__ = HEADS[mode]
    vars(head).update(settings, loss_options=loss)


def _same_again(model: Any, mode: Mode, settings: dict[str, float], loss: dict[str, Any]) -> None:
    """A second patch that asks for what there is does nothing; another one is refused."""
    head = heads_of(model)[0]
    has = {name: value for name, value in head.loss_options.items() if value}
    asked = {name: value for name, value in loss.items() if value}
    has.setdefault("backend", "auto")
    same = isinstance(head, HEADS[mode]) and all(getattr(head, name) == value for name, value in settings.items())
    if not same or has != asked:
        raise ValueError(
            f"the model is patched already, otherwise: {head}, {has}; call remove_harmonic_loss(model) first"
        )


def _exchange_config(model: Any, new_class: Any, stored: dict[str, Any] | None) -> None:
    """Give the model, and all of it that shares its configuration, a copy of another class: other models may share the old.

    A checkpoint's name goes out of it while it is patched: an adapter that is saved with it would be put on the plain model.
    """
    memo: dict[int, Any] = {}
    new = copy.deepcopy(model.config, memo)
    new.__class__ = new_class
    name = model.name_or_path
    if stored is None:
        delattr(new, ATTRIBUTE)
        name = name.removesuffix(CONVERTED.format(""))
    else:
        setattr(new, ATTRIBUTE, stored)
        name = CONVERTED.format(name) if name else name
    new.name_or_path = model.name_or_path = name
    for module in model.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, transformers.PreTrainedConfig) and id(value) in memo:
                vars(module)[attribute] = memo[id(value)]


def _warn_of_conversion(model: Any) -> None:
    warnings.warn(
        f"the weights of {model.name_or_path} were trained with cross-entropy: their dot products mean something, their"
        " distances do not yet. Expect a loss far above the model's own at first, compare it with log(V), and train on with"
        " a warm-up. Where hidden states are much longer than class vectors every class looks equally far: scale the"
        " last norm so that both are of a size (harmonic_triton.init_last_norm_). Perplexities of the two losses are"
        " comparable, logits are not."
        f" The model's name is now {CONVERTED.format(model.name_or_path)!r}, so that nothing takes the old weights for these",
        stacklevel=3,
    )
