"""Config files: from YAML and overrides to a config and back, and what is wrong with one, in one line each."""

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from blpipe.config import EACH, ONE, Config, Section
from blpipe.errors import ConfigError, one_line

S = TypeVar("S", bound=Section)

_EXPONENT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-3 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for tag, value in keys:
            if keys.count((tag, value)) > 1 and not tag.endswith(":merge"):
                raise yaml.constructor.ConstructorError(None, None, f"the key {value!r} is given twice",
                                                        node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back equal: a text such as 1e-3 in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at `path`, apply `overrides` ("key.sub=value"), and check it all.

    The run's `name` is the file's stem where the config has none.

    Raises:
        ConfigError: with every problem found, each on its own line with its key path.
    """
    tree = read_yaml(Path(path))
    tree.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(path).stem).strip("-.") or "run")
    for override in overrides:
        _apply(tree, override)
    config = parse_config(tree)
    try:
        dump_config(config)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: holds a value that a run folder's config.yaml cannot: {one_line(error)}") from None
    return config


def parse_config(tree: dict[str, Any]) -> Config:
    """Check a nested dictionary of keys. Raises ConfigError with every problem found."""
    return parse_as(Config, tree)


def parse_as(kind: type[S], tree: dict[str, Any]) -> S:
    """Check a nested dictionary of keys as a `kind` of config. Raises ConfigError with every problem found."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*(_explain(e, kind) for e in error.errors(include_url=False))) from None


def dump_config(config: Config) -> str:
    """The config as YAML, every key resolved; `load_config` reads it back equal."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The nested dictionary of keys in a YAML file. Raises ConfigError where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; the shipped configs are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"{path}: must be a mapping of keys to values, such as `model: {{name: mlp}}`")
    return tree


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # for a value that does not fit its explicit tag, PyYAML raises almost anything
        raise ConfigError(f"{source}: not valid YAML: {one_line(error)}") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override}: an override is key.sub=value, such as train.epochs=3")
    set_key(tree, path, _parse_yaml(text, override))


def set_key(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set the key at `path` ("key.sub") of a nested dictionary; sections on the way there are copied, or made."""
    keys = path.split(".")
    for key in keys[:-1]:
        below = tree.get(key)
        if isinstance(below, str):  # the short form of {name: …}
            below = {"name": below}
        tree[key] = dict(below) if isinstance(below, dict) else {}
        tree = tree[key]
    tree[keys[-1]] = value


def _explain(error: Any, kind: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in error["loc"] if part not in (ONE, EACH)) or "config"
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown key{_suggest(path, kind)}"
    if error["type"] == "model_type":
        return f"{path}: must be a mapping of keys to values, got {error['input']!r}"
    if error["type"] == "missing":
        return f"{path}: is required, and not given"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("valid tuple", "valid list")
    value = error["input"]
    if not error["loc"]:  # of two sections together; the message names the keys
        return message
    if error["type"] == "literal_error":
        close = get_close_matches(str(value), re.findall(r"'([^']+)'", message), n=1)
        message += f" (did you mean {close[0]!r}?)" if close else ""
    return f"{path}: {message}" if isinstance(value, dict | BaseModel) else f"{path}: {message}, got {value!r}"


def _suggest(path: str, kind: type[BaseModel]) -> str:
    known = list(_key_paths(kind))
    by_last_part = [key for key in known if key.rpartition(".")[2] == path.rpartition(".")[2]]
    close = get_close_matches(path, known, n=1, cutoff=0.75) or by_last_part[:1] or \
        get_close_matches(path, known, n=1)
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
