"""Arguments from config against a signature: unknown names, missing ones and wrong plain types, in the user's words."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints

WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    types.NoneType: "null",
    list: "a list",
    tuple: "a list",
    Sequence: "a list",
    dict: "a mapping",
    Mapping: "a mapping",
}

LISTS = (list, tuple, Sequence)


def check_arguments(
    function: Callable[..., Any], config: Mapping[str, Any], *arguments: Any, key: str, name: str | None = None
) -> None:
    """Check that ``function(*arguments, **config)`` is a call that its signature and its annotations allow.

    Args:
        function: a function or class; its annotations of plain types, literals and containers count, others do not.
        config: keyword arguments from config; objects made from nested targets are not looked at.
        arguments: positional ones.
        key: where ``config`` stands, such as ``optimizer``; empty for the top level.
        name: what the function is called in messages; None for its own name.

    Raises:
        ValueError: naming the config key of the first argument that is unknown, missing or of another type.
    """
    signature = _with_options(function)
    try:
        signature.bind(*arguments, **config)
    except TypeError as error:
        names = list(signature.parameters)[len(arguments) :]
        unknown = [argument for argument in config if argument not in names][:1]
        where = ".".join([key, *unknown] if key else unknown) or name
        raise ValueError(f"{where}: {name or function.__name__} {error}; it takes {', '.join(names)}") from None
    for argument, value in config.items():
        parameter = signature.parameters.get(argument)
        if parameter and value != parameter.default and not _fits(value, parameter.annotation):
            where = f"{key}.{argument}" if key else argument
            raise ValueError(f"{where}={value!r}: use {_words(parameter.annotation)}")


def _with_options(function: Callable[..., Any]) -> inspect.Signature:
    """The signature with resolved annotations, and with ``**options: Unpack[Options]`` as the single options."""
    signature = inspect.signature(function)
    try:
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except NameError:  # an annotation imported for type checkers only
        hints = {}
    parameters = []
    for parameter in signature.parameters.values():
        hint = hints.get(parameter.name, Any)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and get_origin(hint) is Unpack:
            options = get_type_hints(get_args(hint)[0])
            parameters += [
                inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=..., annotation=kind)
                for option, kind in options.items()
            ]
        else:
            parameters.append(parameter.replace(annotation=hint))
    return signature.replace(parameters=parameters)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a config is one that ``hint`` allows; True for values and hints that are not plain."""
    if not isinstance(value, bool | int | float | str | list | dict | types.NoneType):
        return True
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, member) for member in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    kind = origin or hint
    if not isinstance(kind, type) or kind in (object, Any):
        return True
    if isinstance(value, str):
        return kind is str
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if kind in LISTS:
        elements = get_args(hint)[:1]
        return isinstance(value, list) and all(_fits(one, element) for one in value for element in elements)
    return isinstance(value, kind)


def _words(hint: Any) -> str:
    """What to use for ``hint``, as far as a config can: classes of other kinds are left out."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(words for member in get_args(hint) if (words := _words(member))))
    if origin is Literal:
        return " or ".join(str(choice) for choice in get_args(hint))
    kind = origin or hint
    of = [words for element in get_args(hint)[:1] if kind in LISTS and (words := _words(element))]
    return WORDS.get(kind, "") + "".join(f", each {words}" for words in of)
