"""Triton's interpreter in half of its time: what it does again in every call is remembered.

It exchanges the functions of ``triton.language`` for its own at every launch, and again at every call of a function from a
kernel, where they are exchanged already; it finds them by looking through whole modules; and it describes the shape and
type of every value anew. What a kernel computes is untouched. Written for Triton 3.6 to 3.9.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter

language = interpreter.tl


def install() -> None:
    """Remember from now on, in this process."""
    exchange_the_language_once_a_launch()
    look_types_up_once()
    describe_blocks_once()
    describe_values_once()


def exchange_the_language_once_a_launch() -> None:
    exchange = interpreter._patch_lang
    exchanged: set[str] = set()  # modules, in the launch under way

    @functools.cache
    def builtins(owner: Any) -> list[tuple[str, Any]]:
        return [(name, member) for name, member in inspect.getmembers(owner) if language.core.is_builtin(member)]

    @functools.cache
    def modules(function: Callable[..., Any]) -> set[str]:
        everything = function.__globals__.values()
        return {module.__name__ for module in (language, language.core) if any(value is module for value in everything)}

    def exchange_builtins(owner: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins(owner):
            interpreter._patch_attr(owner, name, member, builder, scope)

    def exchange_once(function: Callable[..., Any]) -> Any:
        wanted, launched = modules(function), not exchanged
        if wanted <= exchanged:
            return None  # the caller drops it: a scope is restored where the launch ends
        scope = exchange(function)
        exchanged.update(wanted)
        if launched:
            restore = scope.restore
            scope.restore = lambda: (restore(), exchanged.clear())
        return scope

    interpreter._patch_builtin, interpreter._patch_lang = exchange_builtins, exchange_once


def look_types_up_once() -> None:
    look_up, known = interpreter._get_np_dtype, {}

    def numpy_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = look_up(kind)
        return known[name]

    interpreter._get_np_dtype = numpy_dtype


def describe_blocks_once() -> None:
    describe, known = language.core.block_type.__init__, {}

    def described(block: Any, element: Any, shape: Any) -> None:
        try:
            key = element, tuple(shape)
            found = known.get(key)
        except TypeError:  # pointers have no hash
            return describe(block, element, shape)
        if found is None:
            describe(block, element, shape)
            known[key] = dict(vars(block))
        else:
            vars(block).update(found)

    language.core.block_type.__init__ = described


def describe_values_once() -> None:
    describe, known = language.core.tensor.__init__, {}

    def described(value: Any, handle: Any, kind: Any) -> None:
        found = known.get(kind.name)
        if found is None:
            describe(value, handle, kind)
            known[kind.name] = {name: part for name, part in vars(value).items() if name in ("shape", "numel")}
        else:
            vars(value).update(found)
            value.handle, value.type, value.dtype = handle, kind, kind.scalar

    language.core.tensor.__init__ = described
