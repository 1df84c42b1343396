"""Names and targets: how a config refers to a part, built in or the user's own."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from blpipe.config import Named
from blpipe.errors import ConfigError, one_line


def resolve(key: str, part: Named, built_in: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The callable that `part` names, from `built_in` or imported from its `target`.

    Raises:
        ConfigError: an unknown name, or a target that cannot be imported.
    """
    if part.target is not None:
        return import_target(f"{key}.target", part.target)
    assert part.name is not None
    if part.name not in built_in:
        raise ConfigError(f"{key}.name: unknown {part.name!r}{did_you_mean(part.name, built_in)}; "
                          f"one of {', '.join(sorted(built_in))}, or {key}.target for your own")
    return built_in[part.name]


def import_target(key: str, target: str) -> Callable[..., Any]:
    """Import "package.module:function"; the working directory counts as a place to import from."""
    module_name, colon, attribute = target.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(f"{key}: {target!r} is not of the form package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: cannot import {target!r}: {type(error).__name__}: {one_line(error)}; "
                          "check the spelling, and run from the folder that holds the module") from error
    if not callable(found):
        raise ConfigError(f"{key}: {target!r} is a {type(found).__name__}, not a function")
    return found


def call(key: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a part's builder; what goes wrong in it becomes a ConfigError that names `key`.

    Raises:
        ConfigError: the keyword arguments do not fit its signature, or it raised.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some C functions have none; the call will tell
        signature = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
                                       inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        allowed = list(signature.parameters)[len(args):]
        raise ConfigError(f"{key}.args: {error}; it takes {', '.join(allowed) or 'no arguments'}") from error
    try:
        return function(*args, **kwargs)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        given = f" (with args {kwargs})" if kwargs else ""
        raise ConfigError(f"{key}: {type(error).__name__}: {one_line(error)}{given}") from error


def did_you_mean(name: str, known: Mapping[str, Any]) -> str:
    """A suggestion in brackets where `known` has a close match, else nothing."""
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

