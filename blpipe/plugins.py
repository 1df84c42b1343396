"""Names and targets: how a config refers to a part, built in, registered by a package, or the user's own."""

import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache, partial, wraps
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from blpipe.config_types import Named
from blpipe.errors import ConfigError, one_line, printable
from blpipe.seeds import fixed_randomness

GROUPS = {"model": "blpipe.models", "data": "blpipe.data", "data.augment.transforms": "blpipe.transforms",
          "partition": "blpipe.partitions", "method.head": "blpipe.heads", "method.loss": "blpipe.losses",
          "optimizer": "blpipe.optimizers"}
"""By a part's section of the config: the entry point group in which packages register theirs."""

_IMPORT_SEED = 0
"""Of what a module draws as it is imported: the same in every process, and nothing of what is drawn after."""


def resolve(key: str, part: Named, built_in: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The callable that `part` names, or imported from its `target`.

    Raises:
        ConfigError: as `by_name` does, or a target that cannot be imported.
    """
    if part.target is not None:
        return import_target(f"{key}.target", part.target)
    assert part.name is not None
    return by_name(f"{key}.name", part.name, built_in)


def by_name(key: str, name: str, built_in: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The callable that the config calls `name` at `key`: from `built_in`, or registered by an installed package.

    What is registered in the group of the key's section is what its `target` would be, under a plain name.

    Raises:
        ConfigError: no such name, more than one, or a plug-in that cannot be imported; calling a plug-in that raises.
    """
    section = key.rpartition(".")[0]
    group = GROUPS.get(re.sub(r"\.\d+$", "", section))  # of a list too
    plug_ins = _entry_points(group, tuple(sys.path)) if group is not None else ()
    found = [plug_in for plug_in in plug_ins if plug_in.name == name]
    holders = ["blpipe itself"] * (name in built_in) + [_origin(plug_in) for plug_in in found]
    if not holders:
        known = dict.fromkeys([*built_in, *(plug_in.name for plug_in in plug_ins)])
        raise ConfigError(f"{key}: unknown {name!r}{did_you_mean(name, known)}; one of {', '.join(sorted(known))}, "
                          f"or {section}.target for your own")
    if len(holders) > 1:
        raise ConfigError(f"{key}: {name!r} is registered by {' and '.join(holders)}; uninstall all but one, or give "
                          f"{section}.target {found[0].value!r} in place of the name")
    return _load(key, found[0]) if found else built_in[name]


@lru_cache
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """What the packages on `path`, sys.path, register in `group`; a look-up reads a file of each of them."""
    return tuple(entry_points(group=group))


def _origin(plug_in: EntryPoint) -> str:
    package = "an unknown package" if plug_in.dist is None else f"{plug_in.dist.name} {plug_in.dist.version}"
    return f"{package} ({plug_in.value})"


def _load(key: str, plug_in: EntryPoint) -> Callable[..., Any]:
    said = f"{key}: {plug_in.name!r} of {_origin(plug_in)}"
    try:
        with fixed_randomness(_IMPORT_SEED):
            function = plug_in.load()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{said} cannot be imported: {type(error).__name__}: {one_line(error)}; "
                          "mend or uninstall that package") from error
    if not callable(function):
        raise ConfigError(f"{said} is a {type(function).__name__}, not a function; mend or uninstall that package")

    @wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            given = f" with args {kwargs}" if kwargs else ""
            raise ConfigError(f"{said} raised {type(error).__name__}{given}: {one_line(error)}") from error

    return named


def import_target(key: str, target: str) -> Callable[..., Any]:
    """Import "package.module:function"; the working directory counts as a place to import from."""
    module_name, colon, attribute = target.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(f"{key}: {target!r} is not of the form package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        if module_name not in sys.modules:
            with fixed_randomness(_IMPORT_SEED):
                importlib.import_module(module_name)
        found = getattr(sys.modules[module_name], attribute)
    except ConfigError:
        raise
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"{key}: cannot import {target!r}: {type(error).__name__}: {one_line(error)}{_place(error)}; "
                          "check the spelling, and run from the folder that holds the module") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}: cannot import {target!r}: {type(error).__name__}: {one_line(error)}{_place(error)}; "
                          "mend the module") from error
    if not callable(found):
        raise ConfigError(f"{key}: {target!r} is a {type(found).__name__}, not a function")
    return found


def target_text(key: str, function: Callable[..., Any]) -> str:
    """The target that `import_target` finds this function by, in this process or in a later one.

    Of a script that runs as `__main__` it is in the module of the script's own name; in a notebook it stays there.

    Raises:
        ConfigError: no module has it under a name.
    """
    module, name = (getattr(function, attribute, "") for attribute in ("__module__", "__qualname__"))
    if not name.isidentifier() or getattr(sys.modules.get(module), name, None) is not function:
        raise ConfigError(f"{key}: {printable(repr(function))} is no function of a module's top level, so that no "
                          "other process finds it; define it there by `def`, and give it values by args")
    if module == "__main__":
        main = sys.modules[module]
        spec, file = getattr(main, "__spec__", None), Path(getattr(main, "__file__", None) or "")
        module = spec.name if spec else file.stem if file.is_file() else module
    return f"{module}:{name}"


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a builder's signature has a parameter of this name."""
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # some C functions have none
        return False


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
        ours = function.keywords if isinstance(function, partial) else {}
        allowed = [name for name in list(signature.parameters)[len(args):] if name not in ours]
        raise ConfigError(f"{key}.args: {error}; it takes {', '.join(allowed) or 'no arguments'}") from error
    try:
        return function(*args, **deepcopy(kwargs))  # it may change them, and the config is saved later
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        given = f" (with args {kwargs})" if kwargs else ""
        raise ConfigError(f"{key}: {type(error).__name__}: {one_line(error)}{given}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """Where in the user's code it was raised, to be put after its message; nothing for code that is installed."""
    installed = (str(Path(__file__).parent), *sysconfig.get_paths().values(), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(installed)]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def unmatched(key: str, patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """What is wrong with each of these shell-like patterns that matches none of the parameters' names, a line each."""
    return [f"{key}: {pattern!r} matches no parameter{did_you_mean(pattern, dict.fromkeys(names))}; names are as in a "
            "state_dict" for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


def did_you_mean(name: str, known: Mapping[str, Any]) -> str:
    """A suggestion in brackets where `known` has a close match, else nothing."""
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

