"""Which blocks make which stage."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from blpipe.config import PartitionConfig
from blpipe.errors import ConfigError
from blpipe.models.build import named_blocks, plain_names
from blpipe.plugins import call, did_you_mean, import_target


def partition(config: PartitionConfig, blocks: nn.Sequential) -> list[nn.Sequential]:
    """Cut `blocks` into the stages that the config asks for: contiguous runs, named as in the whole.

    Raises:
        ConfigError: more stages than blocks, cuts that name no block or are out of order, a `target` that
            returns no cuts, or a parameter that two stages would share.
    """
    items = named_blocks(blocks)
    names = [name for name, _ in items]
    if config.cuts is None and config.stage_count > len(names):
        raise ConfigError(f"partition.stages: {config.stage_count} stages need as many blocks, but the model has "
                          f"{len(names)} ({names[0]}…{names[-1]}); use at most {len(names)} stages or a deeper model")
    if config.target is not None:
        function = import_target("partition.target", config.target)
        starts = _starts("partition.target", call("partition.target", function, blocks, config.stage_count,
                                                  **config.args), names)
        if len(starts) != config.stage_count:
            raise ConfigError(f"partition.target: {config.target!r} made {len(starts)} stages; "
                              f"partition.stages asks for {config.stage_count}")
    elif config.cuts is not None:
        starts = _starts("partition.cuts", config.cuts, names)
    else:
        assert config.strategy == "even", "balanced cuts are settled before"
        starts = even_starts(len(names), config.stage_count)
    stages = [nn.Sequential(OrderedDict(items[start:stop]))
              for start, stop in zip(starts, [*starts[1:], len(names)], strict=True)]
    _refuse_shared_parameters(stages)
    return stages


def even_starts(blocks: int, stages: int) -> list[int]:
    """The index of each stage's first block when stages differ by at most one block.

    The longer stages come last: a model's last block is mostly its small classifier.
    """
    size, longer = divmod(blocks, stages)
    return [k * size + max(0, k - (stages - longer)) for k in range(stages)]


def _starts(key: str, cuts: Sequence[str], names: list[str]) -> list[int]:
    """The first block of each stage, from the names of the blocks that stages 2, 3, … begin with."""
    if not isinstance(cuts, list | tuple):
        raise ConfigError(f"{key}: it returned a {type(cuts).__name__}; return the list of the names of the blocks "
                          "that stages 2, 3, … begin with")
    starts = [0]
    for cut in cuts:
        if cut not in names:
            raise ConfigError(f"{key}: no block is named {cut!r}{did_you_mean(str(cut), dict.fromkeys(names))}; "
                              f"the blocks are {', '.join(names)}")
        index = names.index(cut)
        if index <= starts[-1]:
            raise ConfigError(f"{key}: {cut!r} is out of order: each cut must come after the one before, "
                              f"and the first stage begins with {names[0]!r} anyway")
        starts.append(index)
    return starts


def _refuse_shared_parameters(stages: list[nn.Sequential]) -> None:
    owner: dict[nn.Parameter, tuple[int, str]] = {}
    for number, stage in enumerate(stages, start=1):
        plain = plain_names(stage)
        for name, parameter in stage.named_parameters():
            first, first_name = owner.setdefault(parameter, (number, plain[name]))
            if first != number:
                raise ConfigError(f"partition: {first_name} (stage {first}) and {plain[name]} (stage {number}) are one "
                                  "parameter; cut so that both are in one stage, or untie them")
