"""What is in a checkpoint: the whole state of a drained pipeline, by torch's distributed checkpointing (DCP).

A checkpoint is keyed by names, not by stages or processes: `model/<the plain model's name>`,
`head/<block before it>/<parameter>`, `loss/<block before it>/<parameter>`, `optimizer/<parameter>/<state>`, with
`train.ema` `ema/<key of a weight>` and `ema_steps/<model/block, or head or loss>` (averages, and the steps in them),
`random/<stage>/<device>`, `held/<step>.<microbatch>.<hop>/<parameter>` (gradients of links that are due later),
`tally/<stage>` and `seconds/<stage>` (sums of the epoch under way). These four are each replica's own: `.<replica>`
follows the stage, or the hop, in all replicas but the first. The rest is alike in all of them.

Reading a checkpoint never runs code from it: it holds tensors, and an index that is unpickled for DCP's own classes
alone.
"""

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from blpipe.checkpoint.folders import config_of, damaged, manifest
from blpipe.checkpoint.optimizers import load_optimizer, optimizer_state
from blpipe.ema import Average
from blpipe.engines.common import Engine
from blpipe.engines.reports import EpochSums
from blpipe.errors import UserError, one_line
from blpipe.models.build import named_blocks, own_parts, parameter_names, plain_names
from blpipe.plan import Plan
from blpipe.stage import Held, Stage
from blpipe.tally import Tally


def load(checkpoint: Path, plan: Plan, engine: Engine) -> list[str]:
    """Put a checkpoint's state into the stages of `engine`: all of it, where it was saved with the same stages.

    Other stages take what follows the names of blocks: weights, buffers, their averages and their optimizer's state.
    Heads and losses go to boundaries that are still there.

    Returns:
        What a user may want to know, a line each.

    Raises:
        UserError: a damaged checkpoint, or one of another model.
    """
    saved, replicas = manifest(checkpoint), config_of(checkpoint).train.replicas
    alike = saved.stages == [plan.block_names(k) for k in range(len(plan.stages))]
    same = alike and replicas == plan.config.train.replicas
    seated = {(r, k): stage for r, stages in engine.replicas.items() for k, stage in stages.items()}
    for (replica, index), stage in seated.items():
        load_weights(checkpoint, [stage], strict=alike)
        _load_averages(checkpoint, stage)
        if stage.update.optimizer is not None:
            names = _optimized(stage)
            load_optimizer(stage.update.optimizer, names, read(checkpoint, _starting_with(
                tuple(f"optimizer/{name}/" for name in names.values()))))
        if same:
            seat = _seat(index, replica)
            state = read(checkpoint, _starting_with((f"random/{seat}/",)))
            # A random stream of a device that the run did not have starts anew.
            stage.stream.state = [state.get(f"random/{seat}/{i}", new) for i, new in enumerate(stage.stream.state)]
            _load_held(checkpoint, stage, replica)
    sums = read(checkpoint, _starting_with(("tally/", "seconds/")))
    if not same:
        taken = max(float(seconds[-1]) for key, seconds in sums.items() if key.startswith("seconds/"))
        engine.restore_sums({seat: EpochSums(Tally(), train_seconds=taken) for seat in seated})
        return [*([] if alike else _notes_on_other_stages(saved.stages, plan)),
                "random streams begin anew, and errors under way and gradients due later are left out"]
    engine.restore_sums({
        (replica, index): EpochSums(Tally.of(sums[f"tally/{_seat(index, replica)}"].tolist()),
                                    *sums[f"seconds/{_seat(index, replica)}"].tolist())
        for replica, index in seated})
    return []


def _seat(index: int, replica: int) -> str:
    """The name of a stage of a replica in keys."""
    return f"{index}.{replica}" if replica else f"{index}"


def _notes_on_other_stages(before: list[list[str]], plan: Plan) -> list[str]:
    ends = {names[-1] for names in before[:-1]}
    now = [plan.block_names(k)[-1] for k in range(len(plan.stages)) if plan.has_head(k)]
    kept, new = [name for name in now if name in ends], [name for name in now if name not in ends]
    heads = [f"those after {', '.join(names)} are {how}" for names, how in ((kept, "kept"), (new, "new")) if names]
    return [f"the checkpoint is of {len(before)} stages, and this run has {len(plan.stages)}; "
            f"heads: {'; '.join(heads) or 'none'}"]


def load_weights(checkpoint: Path, stages: Iterable[Stage], strict: bool = True, averaged: bool = False) -> None:
    """Put a checkpoint's weights and buffers into the blocks, heads and losses of `stages`.

    Args:
        strict: whether it must have all of the heads and losses; if not, others stay as they are.
        averaged: whether the averages are taken, where it has any.

    Raises:
        UserError: a damaged checkpoint, or one of another model.
    """
    for stage in stages:
        _load_module(checkpoint, "model/", stage.blocks, plain_names(stage.blocks), averaged)
        for prefix, part in own_parts(stage.blocks, stage.head, stage.loss).items():
            if strict or read(checkpoint, _starting_with((prefix,))):
                _load_module(checkpoint, prefix, part, {name: name for name in part.state_dict()}, averaged)


def _load_module(checkpoint: Path, prefix: str, module: torch.nn.Module, names: dict[str, str],
                 averaged: bool) -> None:
    """`names`: from those in the module's state_dict to those in the checkpoint."""
    keys = {prefix + name for name in names.values()}
    state = read(checkpoint, keys.__contains__)
    if state.keys() != keys:
        raise UserError(f"{checkpoint}: holds no {min(keys - state.keys())}; it belongs to another model or partition")
    state = _averaged(checkpoint, state) if averaged else state
    try:
        module.load_state_dict({name: state[prefix + stored] for name, stored in names.items()})
    except RuntimeError as error:
        raise UserError(f"{checkpoint}: does not fit the model: {one_line(error)}") from error


def model_state(checkpoint: Path, averaged: bool = True) -> dict[str, Tensor]:
    """The plain model's state_dict, with its modules' versions as `torch.nn.Module.load_state_dict` reads them.

    Args:
        averaged: whether the averages are taken, where the checkpoint has any.
    """
    saved = read(checkpoint, _starting_with(("model/",)))
    saved = _averaged(checkpoint, saved) if averaged else saved
    state = OrderedDict((key.removeprefix("model/"), tensor) for key, tensor in saved.items())
    state._metadata = manifest(checkpoint).metadata  # type: ignore[attr-defined]
    return state


def _averaged(checkpoint: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`, with the averages that a checkpoint has in the place of weights."""
    wanted = {f"ema/{key}" for key in state}
    return state | {key.removeprefix("ema/"): tensor for key, tensor in read(checkpoint, wanted.__contains__).items()}


def read(checkpoint: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose keys are wanted, by key.

    Raises:
        UserError: a damaged checkpoint.
    """
    try:
        reader = _TensorReader(checkpoint)
        known = reader.read_metadata().state_dict_metadata
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in known.items()
                 if isinstance(entry, TensorStorageMetadata) and wanted(key)}
        with without_warning():
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:
        raise damaged(checkpoint, f"{type(error).__name__}: {one_line(error)}") from error
    return state


def _starting_with(prefixes: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda key: key.startswith(prefixes)


class _TensorReader(dcp.FileSystemReader):
    """DCP's reader, with an index that can hold nothing but what DCP itself puts there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    _DCP = "torch.distributed.checkpoint.metadata"
    _OTHERS = {("torch", "Size"), ("torch.serialization", "_get_layout"),
               ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # as Python 3.13 calls it
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) in self._OTHERS:
            return super().find_class(module, name)
        if module in (self._DCP, "torch", "pathlib") and "." not in name:
            found = super().find_class(module, name)
            is_class = isinstance(found, type)
            if isinstance(found, torch.dtype) or (is_class and issubclass(found, PurePath)) or \
                    (is_class and module == self._DCP == found.__module__):
                return found
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which no checkpoint needs")


def _enum_member(kind: Any, name: str) -> Enum:
    """What the first releases of Python 3.11 have in an index for a member: `getattr`, for us of its class alone."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"its index asks for {name} of something that is no Enum")
    return kind[name]


@contextmanager
def without_warning() -> Iterator[None]:
    """Silence DCP's warning that a single process saves or loads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what no_dist asks for
        yield


def state_of(engine: Engine) -> dict[str, Tensor]:
    """All that a checkpoint holds of the stages of `engine`; waits for the device."""
    state: dict[str, Tensor] = {}
    for replica, stages in engine.replicas.items():
        for index, stage in stages.items():
            state |= _state_of_replica(index, replica, stage)
            if replica == 0:
                state |= _state_of_stage(stage)
    for (replica, index), sums in engine.epoch_sums().items():
        state[f"tally/{_seat(index, replica)}"] = torch.tensor(sums.tally.state(), dtype=torch.float64)
        state[f"seconds/{_seat(index, replica)}"] = torch.tensor(sums.seconds, dtype=torch.float64)
    return state


def _state_of_replica(index: int, replica: int, stage: Stage) -> dict[str, Tensor]:
    """What each replica has of its own."""
    plain = plain_names(stage.blocks)
    state = {f"held/{_link(link, replica)}/{plain[name]}": gradient
             for link, gradients in stage.held.items() for name, gradient in gradients.items()}
    return state | {f"random/{_seat(index, replica)}/{i}": tensor for i, tensor in enumerate(stage.stream.state)}


def _link(held: Held, replica: int) -> str:
    return ".".join(map(str, [*held, *([replica] if replica else [])]))


def _state_of_stage(stage: Stage) -> dict[str, Tensor]:
    own, plain = stage.blocks.state_dict(), plain_names(stage.blocks)
    state = {f"model/{stored}": own[name] for name, stored in plain.items()}
    for prefix, part in own_parts(stage.blocks, stage.head, stage.loss).items():
        state |= {prefix + name: tensor for name, tensor in part.state_dict().items()}
    if stage.update.optimizer is not None:
        state |= optimizer_state(stage.update.optimizer, _optimized(stage))
    for average, keys, step_keys in _averages(stage):
        state |= {keys[name]: tensor for name, tensor in average.tensors.items()}
        state |= {key: torch.tensor(average.steps) for key in step_keys}
    return state


def _averages(stage: Stage) -> Iterator[tuple[Average, dict[str, str], list[str]]]:
    """Each average of a stage, the keys of its tensors by their names, and the keys of the steps that it has seen.

    Each block has these, as it may come into another stage.
    """
    averages = stage.update.averages
    if not averages:
        return
    yield (averages[stage.blocks], {name: f"ema/model/{stored}" for name, stored in plain_names(stage.blocks).items()},
           [f"ema_steps/model/{block}" for block, _ in named_blocks(stage.blocks)])
    for prefix, part in own_parts(stage.blocks, stage.head, stage.loss).items():
        names = averages[part].tensors
        yield averages[part], {name: f"ema/{prefix}{name}" for name in names}, [f"ema_steps/{prefix.rstrip('/')}"]


def _load_averages(checkpoint: Path, stage: Stage) -> None:
    for average, keys, step_keys in _averages(stage):
        saved = read(checkpoint, {*keys.values(), *step_keys}.__contains__)
        steps = [int(saved[key]) for key in step_keys if key in saved]
        if steps:  # else of a new head or loss
            average.restore({name: saved[keys[name]] for name in average.tensors if keys[name] in saved}, min(steps))


def _load_held(checkpoint: Path, stage: Stage, replica: int) -> None:
    plain_name = plain_names(stage.blocks)
    # Of a layer in two blocks, its first name.
    own = {plain_name[name]: name for name, _ in stage.tail.blocks.named_parameters()}
    stage.held = {}
    for key, gradient in read(checkpoint, lambda key: key.startswith("held/") and key.split("/", 2)[2] in own).items():
        _, link, plain = key.split("/", 2)
        step, micro, hop, *of_replica = map(int, link.split("."))
        if of_replica != ([replica] if replica else []):
            continue
        parameter = stage.blocks.get_parameter(own[plain])
        held = torch.empty_like(parameter, requires_grad=False).copy_(gradient)  # laid out as it was when saved
        stage.held.setdefault((step, micro, hop), {})[own[plain]] = held


def _optimized(stage: Stage) -> dict[Tensor, str]:
    """The names in the checkpoint of the optimizer's parameters."""
    named = parameter_names(stage.blocks, stage.head, stage.loss)
    return {parameter: name for parameter, name in named.items() if parameter.requires_grad}
