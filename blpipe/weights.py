"""Weights that the user has, with which the model of a run begins."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from blpipe.checkpoint.state import model_state
from blpipe.config import Config, ModelConfig
from blpipe.errors import ConfigError, UserError, one_line, printable
from blpipe.models.build import plain_names
from blpipe.plugins import unmatched
from blpipe.resume import StartPoint, find
from blpipe.run_folder import run_folder_of

_KEYS = ("state_dict", "model_state_dict", "model")  # under which a file may hold the state_dict, beside other things
_PREFIXES = ("module.", "_orig_mod.")  # which DDP and torch.compile put before all names
_SAFETENSORS = ".safetensors"  # how the names of Hugging Face's files of tensors end
_SHOWN = 3  # names of a kind that a message tells, and patterns


def given(config: Config) -> StartPoint:
    """Where a run begins that goes on from no checkpoint: with `model.weights`, if the config has such.

    Raises:
        ConfigError: they are a folder that is no run and no checkpoint, or of which nothing would be left.
    """
    if config.model.weights is None:
        return StartPoint()
    path = Path(config.model.weights)
    if not path.is_dir():
        return StartPoint(weights=path)
    try:
        found = find(path)
    except UserError as error:
        raise ConfigError(*(f"model.weights: {line}" for line in str(error).splitlines())) from error
    assert found.checkpoint is not None
    if found.checkpoint.resolve().is_relative_to(run_folder_of(config).resolve()):
        raise ConfigError(f"model.weights: {path} is in this run's own folder, which begins empty; give the run "
                          "another name=…")
    return StartPoint(notes=[*found.notes, f"model.weights: those of {found.checkpoint}"], weights=found.checkpoint)


def load(start_point: StartPoint, config: ModelConfig, model: nn.Sequential) -> None:
    """Put the weights that a run begins with, if there are any, into the parameters and buffers of its model.

    Raises:
        ConfigError: they cannot be read, or do not fit the model in names or shapes.
    """
    path = start_point.weights
    if path is None:
        return
    names, values = plain_names(model), model.state_dict()
    own = {plain: values[name] for name, plain in names.items()}
    state = model_state(path) if path.is_dir() else _without_prefix(_read(path), own)
    wrapper = _wrapper_of(own, state)
    state = {wrapper + name: tensor for name, tensor in state.items()}
    names_of = {name: {name, name.removeprefix(wrapper)} for name in {**own, **state}}  # in the model, and in the file
    left_out = {name for name, both in names_of.items()
                if any(fnmatchcase(one, each) for one in both for each in config.weights_except)}
    unlike = {name: f"{name} {list(tensor.shape)} for {list(own[name].shape)}" for name, tensor in state.items()
              if name in own and name not in left_out and tensor.shape != own[name].shape}
    unknown = [name for name in state if name not in own and name not in left_out]
    taken = state.keys() & own.keys() - left_out - unlike.keys()
    missing = _copy(path, {name: state[plain] for name, plain in names.items() if plain in taken}, model)
    lacking = [plain for plain in dict.fromkeys(names[name] for name in missing)
               if plain not in left_out and plain not in unlike]
    problems = _problems(path, len(own), unlike, lacking, unknown)
    problems += unmatched("model.weights_except", config.weights_except, [*set().union(*names_of.values())])
    if problems:
        raise ConfigError(*problems)


def _copy(path: Path, state: Mapping[str, Tensor], model: nn.Sequential) -> list[str]:
    """Returns what is missing for the model, but for what torch's modules do without.

    Such are the batches that a BatchNorm has counted, which earlier versions of it did not.
    """
    try:
        return model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise ConfigError(f"model.weights: {path}: cannot be copied to the model: {one_line(error)}; give tensors "
                          "with values, one for each place") from error


def _problems(path: Path, count: int, unlike: Mapping[str, str], lacking: list[str], unknown: list[str]) -> list[str]:
    """Which of the model's names, so many in all, do not fit those of the weights, a line for each way.

    Args:
        unlike: those of another shape, with what to say of each.
    """
    remedy = _remedy([*unlike, *lacking, *unknown])
    kinds = ((list(unlike.values()), f"of the model's {count} have another shape"),
             (lacking, f"of the model's {count} are not there"), (unknown, "are none of the model's"))
    return [f"model.weights: {path}: {len(names)} {what}: {_shown(names)}; {remedy}" for names, what in kinds if names]


def _shown(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return printable(", ".join(names[:_SHOWN]), 1000) + (f" and {more} more" if more > 0 else "")


def _remedy(names: list[str]) -> str:
    """What to do about names that do not fit; with patterns of them, where they are in few modules."""
    patterns = list(dict.fromkeys(f"{name.rpartition('.')[0]}.*" if "." in name else name for name in names))
    if len(patterns) > _SHOWN:
        return "give weights of this model, or leave names out by model.weights_except"
    return f"leave them out by model.weights_except: [{printable(', '.join(patterns))}], or give weights of this model"


def _read(path: Path) -> Mapping[str, Tensor]:
    """The state_dict in a file."""
    try:
        with path.open("rb") as file:
            loaded = _load_safetensors(path) if path.suffix == _SAFETENSORS else torch.load(
                file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"model.weights: cannot read {path}: {error.strerror}; give a file, a run folder or one of "
                          "its checkpoints") from error
    except ImportError:
        raise ConfigError(f"model.weights: {path}: needs safetensors; run `pip install safetensors`") from None
    except Exception as error:  # torch raises almost anything for a file that is not its own
        raise ConfigError(f"model.weights: {path}: cannot be read as tensors that torch.save wrote "
                          f"({type(error).__name__}); write it by torch.save(model.state_dict(), …)") from error
    inner = [loaded[key] for key in _KEYS if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)]
    state = inner[0] if inner else loaded
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(tensor, Tensor)
                                              for name, tensor in state.items()):
        raise ConfigError(f"model.weights: {path}: holds no state_dict of tensors alone; write it by "
                          "torch.save(model.state_dict(), …)")
    return state


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file
    return load_file(path)


def _without_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without what wrappers put before all names, where the model's own names do not begin with it."""
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state) and not all(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _wrapper_of(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What a wrapper of the user's puts before all of the model's names, where those of a file fit without."""
    wrapper = f"{next(iter(own), '').partition('.')[0]}."
    wraps = all(name.startswith(wrapper) for name in own) and not own.keys() & state.keys()
    return wrapper if wraps and own.keys() & {wrapper + name for name in state} else ""
