"""Which blocks make which stage."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from torch import nn

from blpipe.config import PartitionConfig
from blpipe.errors import ConfigError
from blpipe.models.build import named_blocks, plain_names, why_uncut
from blpipe.plugins import by_name, call, did_you_mean, import_target
from blpipe.text import stages_text


def partition(config: PartitionConfig, blocks: nn.Sequential) -> list[nn.Sequential]:
    """Cut `blocks` into the stages that the config asks for: contiguous runs, named as in the whole.

    Raises:
        ConfigError: more stages than blocks, cuts that name no block or are out of order, a function that
            returns neither cuts nor stages that fit, or what stages would share (see `kept_together`).
    """
    items = named_blocks(blocks)
    names = [name for name, _ in items]
    check_stage_count(config, blocks)
    if config.target is not None:
        function = import_target("partition.target", config.target)
        starts = _returned("partition.target", call("partition.target", function, blocks, config.stage_count,
                                                    **config.args), items, config.stage_count)
    elif config.cuts is not None:
        starts = _starts("partition.cuts", config.cuts, items)
    elif (strategy := by_name("partition.strategy", config.strategy, BUILT_IN)) is even_starts:
        assert config.strategy == "even", "balanced cuts are settled before"
        starts = even_starts(len(names), config.stage_count)
    else:
        starts = _returned("partition.strategy", call("partition", strategy, blocks, config.stage_count,
                                                      **config.args), items, config.stage_count)
    stages = [nn.Sequential(OrderedDict(items[start:stop]))
              for start, stop in zip(starts, [*starts[1:], len(names)], strict=True)]
    _refuse_shared(stages)
    return stages


def check_stage_count(config: PartitionConfig, blocks: nn.Sequential) -> None:
    """Refuse more stages than blocks.

    Raises:
        ConfigError: as above.
    """
    names = [name for name, _ in named_blocks(blocks)]
    if config.cuts is None and config.stage_count > len(names):
        other = "".join(f", or a model that can be cut into more: {why}" for why in why_uncut(blocks))
        raise ConfigError(f"partition.stages: {config.stage_count} stages need as many blocks, but the model has "
                          f"{len(names)} ({names[0]}…{names[-1]}); use at most {stages_text(len(names))}"
                          f"{other or ' or a deeper model'}")


def even_starts(blocks: int, stages: int) -> list[int]:
    """The index of each stage's first block when stages differ by at most one block.

    The longer stages come last: a model's last block is mostly its small classifier.
    """
    size, longer = divmod(blocks, stages)
    return [k * size + max(0, k - (stages - longer)) for k in range(stages)]


BUILT_IN = {"even": even_starts, "balanced": even_starts}  # balanced: once settled, it is cuts


Items = list[tuple[str, nn.Module]]  # a model's blocks with their names, in order


def _returned(key: str, returned: Any, items: Items, stages: int) -> list[int]:
    """The first block of each stage, from what a function returned: cuts, or a list of block names for each stage."""
    if not isinstance(returned, list | tuple):
        raise ConfigError(f"{key}: it returned a {type(returned).__name__}; return the list of the names of the blocks "
                          "that stages 2, 3, … begin with, or a list of block names for each stage")
    whole = len(returned) > 0 and all(isinstance(stage, list | tuple) for stage in returned)
    starts = _starts_of_whole(key, returned, items) if whole else _starts(key, returned, items)
    if len(starts) != stages:
        raise ConfigError(f"{key}: it made {len(starts)} stages; partition.stages asks for {stages}")
    return starts


def _starts_of_whole(key: str, stages: Sequence[Sequence[str]], items: Items) -> list[int]:
    """The first block of each stage, from the names of all blocks of each: every block once, in the model's order."""
    owner: dict[str, int] = {}
    for number, stage in enumerate(stages, start=1):
        if not stage:
            raise ConfigError(f"{key}: stage {number} is empty; give each stage at least one block, or ask for fewer")
        for name in stage:
            _check_name(key, name, items)
            if name in owner:
                raise ConfigError(f"{key}: {name!r} is in stage {owner[name]} and again in stage {number}; put each "
                                  "block into one stage, once")
            owner[name] = number
    names = [name for name, _ in items]
    missing = [name for name in names if name not in owner]
    if missing:
        raise ConfigError(f"{key}: no stage holds {', '.join(map(repr, missing))}; put each block into a stage")
    for name, wanted in zip(owner, names, strict=True):
        if name != wanted:
            raise ConfigError(f"{key}: {name!r} (stage {owner[name]}) is out of order: {wanted!r} (stage "
                              f"{owner[wanted]}) comes before it; stages are runs of blocks in the model's order")
    return [0, *accumulate(len(stage) for stage in stages[:-1])]


def _starts(key: str, cuts: Sequence[str], items: Items) -> list[int]:
    """The first block of each stage, from the names of the blocks that stages 2, 3, … begin with."""
    names = [name for name, _ in items]
    starts = [0]
    for cut in cuts:
        _check_name(key, cut, items)
        index = names.index(cut)
        if index <= starts[-1]:
            raise ConfigError(f"{key}: {cut!r} is out of order: each cut must come after the one before, "
                              f"and the first stage begins with {names[0]!r} anyway")
        starts.append(index)
    return starts


def _check_name(key: str, name: Any, items: Items) -> None:
    names = [name for name, _ in items]
    if name in names:
        return
    for index, (block_name, block) in enumerate(items):
        if isinstance(name, str) and name in _inner_names(block_name, block):
            around = " or ".join(map(repr, names[index:index + 2]))
            raise ConfigError(f"{key}: {name!r} lies inside block {block_name!r}, where more than one tensor may pass, "
                              f"as beside a residual connection; a stage can begin with {around}")
    raise ConfigError(f"{key}: no block is named {name!r}{did_you_mean(str(name), dict.fromkeys(names))}; "
                      f"the blocks are {', '.join(names)}")


def _inner_names(block_name: str, block: nn.Module) -> set[str]:
    """What a user may call a module inside a block: by its path in the block or in the model, with dots or without."""
    paths = [path for path, _ in block.named_modules() if path]
    spelled = {*paths, *(f"{block_name}.{path}" for path in paths)}
    return spelled | {path.replace(".", "_") for path in spelled}


def kept_together(parts: Iterable[nn.Module]) -> Iterator[tuple[int, int, nn.Parameter | nn.Module]]:
    """What two of these parts, from 0, share, so that they must be in one stage.

    A parameter, or a module with running statistics: each stage would go on with its own, where one process has one.
    """
    owner: dict[nn.Parameter | nn.Module, int] = {}
    for index, part in enumerate(parts):
        held: list[nn.Parameter | nn.Module] = [*part.parameters()]
        held += [module for module in part.modules() if getattr(module, "running_mean", None) is not None]
        for shared in held:
            first = owner.setdefault(shared, index)
            if first != index:
                yield first, index, shared


def _refuse_shared(stages: list[nn.Sequential]) -> None:
    for first, other, shared in kept_together(stages):
        if isinstance(shared, nn.Parameter):
            one, two = (_plain_name(stages[k], shared) for k in (first, other))
            raise ConfigError(f"partition: {one} (stage {first + 1}) and {two} (stage {other + 1}) are one "
                              "parameter; cut so that both are in one stage, or make one of them "
                              "nn.Parameter(weight.clone()) as the model is made")
        name = next(name for name, module in stages[other].named_modules() if module is shared)
        raise ConfigError(f"partition: {name} (stage {other + 1}) is in stage {first + 1} too, and has running "
                          "statistics; cut so that both are in one stage, or use two modules")


def _plain_name(stage: nn.Sequential, wanted: nn.Parameter) -> str:
    return plain_names(stage)[next(name for name, parameter in stage.named_parameters() if parameter is wanted)]
