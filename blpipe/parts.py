"""What the parts of a stage must be like, whatever they compute: blocks, head and loss."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from blpipe.errors import ConfigError
from blpipe.shapes import EVERY_MODULE
from blpipe.text import blocks_text


def check_kept(blocks: list[str], *parts: nn.Module) -> None:
    """That all of a stage's parts can be trained and saved. Raises ConfigError."""
    where = f"in the stage {blocks_text(blocks)}"
    for part in parts:
        for name, value in part.state_dict().items():
            if not isinstance(value, torch.Tensor):
                raise ConfigError(f"model: {name} {where} is a {type(value).__name__} in the state_dict, and a "
                                  "checkpoint holds tensors alone; register it as a buffer, or leave it out")
            if value.layout is torch.strided and any(step == 0 for size, step in zip(value.shape, value.stride(),
                                                                                     strict=True) if size > 1):
                raise ConfigError(f"model: {name} {where} is expanded, and a checkpoint could not be read back into "
                                  "what several elements share; add .contiguous()")
        for name, module in part.named_modules():
            if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
                continue
            if module.sparse:
                raise ConfigError(f"model: {name} {where} has sparse gradients, which stages do not add up; build it "
                                  "with sparse=False")
            if module.max_norm is not None:
                raise ConfigError(f"model: {name} {where} writes to its weight in forward, which a late link would "
                                  "lose; build it without max_norm")


def check_hooks(blocks: list[str], *parts: nn.Module) -> None:
    """That no parameter waits for its gradient to be accumulated, as `bp` alone does it. Raises ConfigError."""
    for name, parameter in (each for part in parts for each in part.named_parameters()):
        if parameter.requires_grad and parameter._post_accumulate_grad_hooks:
            raise ConfigError(f"model: {name} in the stage {blocks_text(blocks)} has a hook of "
                              "register_post_accumulate_grad_hook, which runs with method.name=bp alone; take it out, "
                              "or use register_hook")


def check_reached_by_name(blocks: list[str], tail: nn.Sequential) -> None:
    """That a late link can put other weights in the place of all that it trains. Raises ConfigError."""
    for name, parameter in tail.named_parameters():
        if parameter.requires_grad and parameter._backward_hooks:
            raise ConfigError(f"model: {name} in the stage {blocks_text(blocks)} has a gradient hook, which the "
                              "gradients of a late link do not pass, as they are those of a copy; take it out, or set "
                              "method.link.delay=0")
    for name, key in _kept_elsewhere(tail):
        raise ConfigError(f"model: {name} in the stage {blocks_text(blocks)} keeps a parameter in {key!r} too, past "
                          "which a late link cannot put the weights of its forward; keep it under its registered name "
                          "alone, or in an nn.ParameterList")


def check_averaged(blocks: list[str], *parts: nn.Module) -> None:
    """That averages can be put in the place of all weights that are trained. Raises ConfigError."""
    for name, key in (each for part in parts for each in _kept_elsewhere(part)):
        raise ConfigError(f"train.ema: {name} in the stage {blocks_text(blocks)} keeps a parameter in {key!r} too, "
                          "past which an average cannot be put in its place; keep it under its registered name alone, "
                          "or in an nn.ParameterList, or leave train.ema out")


def _kept_elsewhere(part: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules with an attribute that holds a trained parameter beside its registered name, and that attribute."""
    for name, module in part.named_modules():
        for key, value in vars(module).items():
            own = key not in EVERY_MODULE and not type(module).__module__.startswith("torch.")
            if own and any(isinstance(leaf, nn.Parameter) and leaf.requires_grad for leaf in tree_leaves(value)):
                yield name, key


def check_own(stage: int, parts: Mapping[str, nn.Module], others: Iterable[nn.Module]) -> None:
    """That a stage's head and loss are not those of another one, which in a process of its own would learn by itself.

    Args:
        stage: its index, from 0.
        parts: by their keys in the config.
        others: of the stages before.

    Raises:
        ConfigError: they share a parameter that is trained.
    """
    taken = set(map(id, _trained(others)))
    for key, part in parts.items():
        if any(id(parameter) in taken for parameter in _trained([part])):
            raise ConfigError(f"{key}: stage {stage + 1} has the parameters of an earlier stage's; have the target "
                              "make a new module each time")


def _trained(parts: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    return (p for part in parts for p in part.parameters() if p.requires_grad)
