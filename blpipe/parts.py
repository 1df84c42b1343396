"""What the parts of a stage must be like, whatever they compute: blocks, head and loss."""

from collections.abc import Iterable, Mapping

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
        for name, module in part.named_modules():
            if getattr(module, "sparse", False) and isinstance(module, nn.Embedding | nn.EmbeddingBag):
                raise ConfigError(f"model: {name} {where} has sparse gradients, which stages do not add up; build it "
                                  "with sparse=False")
            if getattr(module, "max_norm", None) is not None and isinstance(module, nn.Embedding | nn.EmbeddingBag):
                raise ConfigError(f"model: {name} {where} writes to its weight in forward, which a late link would "
                                  "lose; build it without max_norm")


def check_reached_by_name(blocks: list[str], stage: nn.Sequential) -> None:
    """That a late link can put other weights in the place of all parameters. Raises ConfigError."""
    for name, module in stage.named_modules():
        for key, value in vars(module).items():
            own = key not in EVERY_MODULE and not type(module).__module__.startswith("torch.")
            if own and any(isinstance(leaf, nn.Parameter) for leaf in tree_leaves(value)):
                raise ConfigError(f"model: {name} in the stage {blocks_text(blocks)} keeps a parameter in {key!r} too, "
                                  "past which a late link cannot put the weights of its forward; keep it under its "
                                  "registered name alone, or in an nn.ParameterList")


def check_own(stage: int, parts: Mapping[str, nn.Module], others: Iterable[nn.Module]) -> None:
    """That a stage's head and loss are not those of another one, which in a process of its own would learn by itself.

    Args:
        stage: its index, from 0.
        parts: by their keys in the config.
        others: of the stages before.

    Raises:
        ConfigError: they share a parameter or a buffer.
    """
    taken = {id(tensor) for part in others for tensor in (*part.parameters(), *part.buffers())}
    for key, part in parts.items():
        if any(id(tensor) in taken for tensor in (*part.parameters(), *part.buffers())):
            raise ConfigError(f"{key}: stage {stage + 1} has the tensors of an earlier stage's; have the target make a "
                              "new module each time")
