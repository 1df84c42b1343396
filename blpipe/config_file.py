"""Config files: from YAML and overrides to a config and back, and what is wrong with one, in one line each."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from blpipe.config import Config
from blpipe.config_rules import conflicts
from blpipe.config_types import EACH, ONE, Section
from blpipe.errors import ConfigError, one_line, printable

S = TypeVar("S", bound=Section)

Overrides = Sequence[str] | Mapping[str, Any]
"""Keys to set in a config: as on the command line, "key.sub=value", or values by their "key.sub"."""

_MOST_BYTES = 64 * 1024  # of a file; PyYAML reads such a one in seconds
_MOST_VALUES, _DEEPEST = 20_000, 50  # of a file or an override, every alias written out
_MOST_PROBLEMS = 50  # that are told of one config

# What other systems call our keys and values.
_ALSO_CALLED = {
    "model.weights": ("pretrained", "init_from", "load_from"),
    "optimizer.lr": ("learning_rate",),
    "optimizer.args.weight_decay": ("weight_decay",),
    "optimizer.args.momentum": ("momentum",),
    "optimizer.clip_norm": ("gradient_clipping", "grad_clip", "clip_grad", "max_grad_norm", "gradient_clip_val"),
    "train.epochs": ("num_epochs", "max_epochs"),
    "train.patience": ("early_stopping", "early_stopping_patience"),
    "train.microbatches": ("accumulate", "accumulate_grad_batches", "gradient_accumulation_steps"),
    "train.precision": ("amp", "mixed_precision", "fp16"),
    "train.ema": ("ema", "ema_decay", "model_ema", "model_ema_decay"),
    "data.workers": ("num_workers",),
    "method.loss={name: cross_entropy, args: {label_smoothing: …}}": ("label_smoothing",)}
_OUR_KEYS = {name: key for key, names in _ALSO_CALLED.items() for name in names}
_NOT_THERE = {"max_steps": "there is none; give train.epochs"}
_VALUES_ALSO_CALLED = {"bfloat16": "bf16", "fp32": "float32"}

_EXPONENT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-3 is a number, and a key given twice and too much of anything are errors."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f"it holds more than {_MOST_VALUES:,} values",
                                                    node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for (tag, value), count in keys.items():
            if count > 1 and not tag.endswith(":merge"):
                raise yaml.constructor.ConstructorError(None, None, f"the key {value!r} is given twice",
                                                        node.start_mark)
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, known: dict[yaml.Node, int], depth: int = 0) -> int:
    """How many values a node holds, itself included, with every alias written out. `known`: those counted before.

    Aliases share what they stand for until something prints or copies it: then ten short lines can be a billion values.
    """
    if node not in known:
        if depth > _DEEPEST:
            raise yaml.constructor.ConstructorError(None, None, f"it is more than {_DEEPEST} deep, or holds itself",
                                                    node.start_mark)
        below = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for pair in below for part in pair] if isinstance(node, yaml.MappingNode) else below
        known[node] = 1 + sum(_written_out(part, known, depth + 1) for part in parts)
    return known[node]


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back equal: a text such as 1e-3 in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def load_config(path: str | Path, overrides: Overrides = ()) -> Config:
    """Read the YAML file at `path`, apply `overrides`, and check it all.

    The run's `name` is the file's stem where the config has none.

    Raises:
        ConfigError: with every problem found, each on its own line with its key path.
    """
    tree = read_yaml(Path(path))
    tree.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(path).stem).strip("-.") or "run")
    return config_of_tree(tree, overrides, str(path))


def config_of_tree(tree: Mapping[str, Any], overrides: Overrides = (), source: str = "config") -> Config:
    """Apply `overrides` to a nested dictionary of keys, and check it all. It stays as it is.

    Args:
        source: what messages call it.

    Raises:
        ConfigError: with every problem found, each on its own line with its key path.
    """
    tree = dict(tree)
    for path, value in parsed(overrides).items():
        set_key(tree, path, value)
    config = parse_config(tree)
    try:
        text = dump_config(config)
        if len(text.encode()) > _MOST_BYTES:
            raise ValueError(f"{len(text.encode()):,} bytes with every key and a line a value, of {_MOST_BYTES:,}")
        yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: holds what a run folder's config.yaml cannot: {one_line(error)}; give less, "
                          "or in another form") from None
    return config


def parse_config(tree: dict[str, Any]) -> Config:
    """Check a nested dictionary of keys: each by itself, and if all are right, together.

    Raises:
        ConfigError: with every problem found, each on its own line with its key path.
    """
    config = parse_as(Config, tree)
    problems = [*conflicts(config)]
    if problems:
        raise ConfigError(*problems)
    return config


def parse_as(kind: type[S], tree: dict[str, Any]) -> S:
    """Check a nested dictionary of keys as a `kind` of config. Raises ConfigError with every problem found."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [line for each in found[:_MOST_PROBLEMS] for line in _explain(each, kind)]
        more = len(found) - _MOST_PROBLEMS
        raise ConfigError(*problems, *([f"config: {more:,} more of this kind"] if more > 0 else [])) from None


def dump_config(config: Config) -> str:
    """The config as YAML, every key resolved; `load_config` reads it back equal."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The nested dictionary of keys in a YAML file. Raises ConfigError where there is none."""
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; the shipped configs are in configs/") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory; give a file, of a run folder {path / 'config.yaml'}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if len(text) > _MOST_BYTES:
        raise ConfigError(f"{path}: holds more than {_MOST_BYTES:,} bytes, so it is no config")
    try:
        tree = _parse_yaml(text.decode(), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path}: must be a mapping of keys to values, such as `model: {{name: mlp}}`")
    return tree


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # for a value that does not fit its explicit tag, PyYAML raises almost anything
        message = one_line(error).replace('in "<unicode string>", ', "at ")
        raise ConfigError(f"{source}: not valid YAML: {message}") from None


def parsed(overrides: Overrides) -> dict[str, Any]:
    """The values to set, by their keys, in the order in which they are set. Raises ConfigError."""
    if isinstance(overrides, Mapping):
        for key in overrides:
            if not isinstance(key, str) or not all(key.split(".")):
                raise ConfigError(f"{printable(repr(key))}: a key to set is key.sub, such as train.epochs")
        return dict(overrides)
    values: dict[str, Any] = {}
    for override in [overrides] if isinstance(overrides, str) else overrides:
        path, equals, text = override.partition("=")
        if not equals or not all(path.split(".")):
            raise ConfigError(f"{printable(override)}: an override is key.sub=value, such as train.epochs=3")
        values.pop(path, None)  # what is given again comes after all before
        values[path] = _parse_yaml(text, printable(override))
    return values


def set_key(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the key at `path` ("key.sub", in a list "key.0") of a nested dictionary; sections on the way are copied, or
    made.

    Raises:
        ConfigError: the path goes through a list, and not by the number of one of its values.
    """
    keys, section = path.split("."), tree
    place: Any = keys[0]
    for depth, key in enumerate(keys[1:], start=1):
        below = section[place] if isinstance(section, list) else section.get(place)
        if isinstance(below, list | tuple) and not (key.isascii() and key.isdecimal() and int(key) < len(below)):
            name = ".".join(keys[:depth])
            raise ConfigError(f"{printable(path)}: {printable(name)} is a list of {len(below)}; give the number of one "
                              f"of them, such as {printable(name)}.0, or the whole list")
        section[place] = _copied(below)
        section = section[place]
        place = int(key) if isinstance(section, list) else key
    section[place] = value


def _copied(section: Any) -> Any:
    if isinstance(section, str):  # the short form of {name: …}
        return {"name": section}
    if isinstance(section, list | tuple):
        return list(section)
    return section.copy() if isinstance(section, dict) else {}


def _explain(error: Any, kind: type[BaseModel]) -> list[str]:
    """What is wrong, a line each: a section may have several conflicts."""
    path = printable(".".join(str(part) for part in error["loc"] if part not in (ONE, EACH))) or "config"
    if error["type"] == "extra_forbidden":
        return [f"{path}: unknown key{_suggest(path, kind)}"]
    if error["type"] == "model_type":
        return [f"{path}: must be a mapping of keys to values, got {_shown(error['input'])}"]
    if error["type"] == "missing":
        return [f"{path}: is required, and not given"]
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("valid tuple", "valid list")
    value = error["input"]
    if error["type"] == "literal_error":
        given = _shown(value).strip("'")
        close = get_close_matches(_VALUES_ALSO_CALLED.get(given, given), re.findall(r"'([^']+)'", message), n=1)
        message += f" (did you mean {close[0]!r}?)" if close else ""
    got = "" if isinstance(value, dict | BaseModel) else f", got {_shown(value)}"
    return [f"{path}: {line}{got}" for line in message.split("\n")]


def _shown(value: Any) -> str:
    """A value in a message."""
    try:
        return printable(repr(value))
    except (ValueError, RecursionError):  # of a number with thousands of digits
        return f"{type(value).__name__} that is too large to show"


def _suggest(path: str, kind: type[BaseModel]) -> str:
    known, last = list(_key_paths(kind)), path.rpartition(".")[2]
    if kind is Config and last in _NOT_THERE:
        return f"; {_NOT_THERE[last]}"
    by_last_part = [key for key in known if key.rpartition(".")[2] == last]
    also = [_OUR_KEYS[last]] if kind is Config and last in _OUR_KEYS else []
    close = also or get_close_matches(path, by_last_part, n=1, cutoff=0.0) or \
        get_close_matches(path, known, n=1, cutoff=0.75) or get_close_matches(path, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _key_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in _kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from _key_paths(kind, f"{prefix}{name}.")


def _kinds(annotation: Any) -> Iterator[Any]:
    """A type, and those that it is made of, but not what lists of it hold."""
    yield annotation
    if get_origin(annotation) is not tuple:
        for part in get_args(annotation):
            yield from _kinds(part)
