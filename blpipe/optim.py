"""Optimizers by their torch name or a target, and the learning rate as a pure function of the step."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import nn

from blpipe.config import OptimizerConfig, ScheduleConfig
from blpipe.errors import ConfigError
from blpipe.plugins import by_name, call, import_target, resolve, unmatched

_NEEDS_MORE = {"lbfgs": "it calls the model again", "sparseadam": "it wants sparse gradients"}


def build_optimizer(config: OptimizerConfig, *groups: Iterable[nn.Parameter],
                    names: Mapping[nn.Parameter, str] | None = None) -> torch.optim.Optimizer | None:
    """The optimizer that the config names, over the parameters that require a gradient; None without any.

    Args:
        groups: of parameters that begin to learn in the same step. They stay apart where the optimizer is fused, as
            torch's fused SGD has the momentum of all of a group or of none; else one group takes less time. Where
            `decay` leaves out some, or `lr_factors` differ, these are groups of their own.
        names: of the parameters, for `lr_factors`; None leaves them out.

    Raises:
        ConfigError: unknown name, one that a stage cannot run, or arguments that do not fit.
    """
    kind, key = _kind(config), "optimizer.target" if config.target else "optimizer.name"
    if config.called.lower() != "sgd" and "lr" not in config.model_fields_set:
        raise ConfigError(f"optimizer.lr: is not given, and its default, {config.lr}, is for sgd; give "
                          f"{config.called} one, such as optimizer.lr=0.001")
    if "lr" in config.args:
        raise ConfigError(f"optimizer.args.lr: got {config.args['lr']!r}; the learning rate is optimizer.lr")
    apart = groups if config.args.get("fused") else [chain(*groups)]
    trainable = [group for parameters in apart for group in _groups(config, parameters, names or {})]
    if not trainable:
        return None
    # YAML has lists where torch's betas want a tuple.
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in config.args.items()}
    optimizer = call("optimizer", partial(kind, lr=config.lr), trainable, **args)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"{key}: {config.called!r} returned a {type(optimizer).__name__}; return a "
                          "torch.optim.Optimizer")
    try:
        inspect.signature(optimizer.step).bind()
    except TypeError as error:
        raise ConfigError(f"{key}: {config.called!r} does not fit stages: its step wants more ({error}), and is "
                          "called with nothing; use another") from error
    if config.decay != "all" and not optimizer.defaults.get("weight_decay"):
        raise ConfigError(f"optimizer.decay: {config.decay}, but {config.called} has no weight_decay here; "
                          "give it optimizer.args.weight_decay, or leave it out")
    return optimizer


def _kind(config: OptimizerConfig) -> Callable[..., torch.optim.Optimizer]:
    """What makes the optimizer, of groups of parameters, `lr` and `args`."""
    if config.name is None:
        return resolve("optimizer", config, {})
    known = {name.lower(): value for name, value in vars(torch.optim).items()
             if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
             and value is not torch.optim.Optimizer}
    name = config.name.lower()
    if name in _NEEDS_MORE:
        raise ConfigError(f"optimizer.name: {config.name!r} does not fit stages: {_NEEDS_MORE[name]}; use adamw or sgd")
    usable = {each: kind for each, kind in known.items() if each not in _NEEDS_MORE}
    return by_name("optimizer.name", name if name in usable else config.name, usable)


def _lr_factor_of(config: OptimizerConfig, name: str) -> float:
    """The factor on the learning rate of the parameter with this name."""
    return next((factor for pattern, factor in reversed(config.lr_factors.items()) if fnmatchcase(name, pattern)), 1.0)


def check_patterns(config: OptimizerConfig, names: Sequence[str]) -> None:
    """Refuse a pattern of `lr_factors` that none of all parameters' names matches.

    Patterns of heads and losses stay where there are none, as for `bp`.

    Raises:
        ConfigError: as above.
    """
    parts = any("/" in name for name in names)
    patterns = [pattern for pattern in config.lr_factors if parts or "/" not in pattern]
    problems = unmatched("optimizer.lr_factors", patterns, names)
    if problems:
        raise ConfigError(*(f"{problem}, and head/<block before it>/…" for problem in problems))


def _groups(config: OptimizerConfig, parameters: Iterable[nn.Parameter],
            names: Mapping[nn.Parameter, str]) -> list[dict[str, Any]]:
    """torch's groups of the parameters that require a gradient: alike in learning rate and weight decay."""
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            decays = config.decay == "all" or parameter.dim() > 1
            found.setdefault((_lr_factor_of(config, names.get(parameter, "")), decays), []).append(parameter)
    return [{"params": alike, "lr": config.lr * factor, **({} if decays else {"weight_decay": 0.0})}
            for (factor, decays), alike in found.items()]


def lr_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The factor of a schedule (on `optimizer.lr`, or on λ) for step 0 ≤ `step` < `steps_per_epoch` · `epochs`.

    A linear warm-up over `warmup_epochs`, then:
    constant: 1; multistep: times `gamma` at each of `milestones` (epochs);
    linear, cosine: from 1 to `final` over the epochs that remain;
    one-cycle: from `start` up to 1 at the share `peak` of the steps that remain, then down to `final`,
    both along a cosine (Smith & Topin, arXiv 1708.07120);
    a target: what it returns for the share of the steps that remain which is done, from 0 on and less than 1.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, steps_per_epoch * epochs - warmup)
    if config.target is not None:
        return _factor_of(config.target, import_target("schedule.target", config.target)(done, **config.args), done)
    if config.name == "constant":
        return 1.0
    if config.name == "linear":
        return 1.0 + (config.final - 1.0) * done
    if config.name == "multistep":
        return config.gamma ** sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
    if config.name == "cosine":
        return _cosine(1.0, config.final, done)
    if done < config.peak:
        return _cosine(config.start, 1.0, done / config.peak)
    return _cosine(1.0, config.final, (done - config.peak) / max(1e-12, 1.0 - config.peak))


def check_schedule(key: str, config: ScheduleConfig, steps_per_epoch: int, epochs: int) -> None:
    """Try a schedule's target, for its first step and its last one.

    Raises:
        ConfigError: it cannot be imported or called, or returns no factor.
    """
    if config.target is None:
        return
    function, steps = import_target(f"{key}.target", config.target), steps_per_epoch * epochs
    for done in (0.0, (steps - 1) / steps):
        returned = call(key, function, done, **config.args)
        try:
            _factor_of(config.target, returned, done)
        except ValueError as error:
            raise ConfigError(f"{key}.target: {error}") from error


def _factor_of(target: str, returned: Any, done: float) -> float:
    """What a schedule's target returned, as a factor. Raises ValueError where it is none."""
    if not isinstance(returned, Real) or not 0.0 <= float(returned) < math.inf:
        raise ValueError(f"{target!r} returned {returned!r} for {done:g}; return a number, 0 or more, for a share of "
                         "the steps from 0 on and less than 1")
    return float(returned)


def _cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * (1.0 + math.cos(math.pi * share)) / 2.0
