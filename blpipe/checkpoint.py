"""Checkpoints: the whole state of a drained pipeline, by torch's distributed checkpointing (DCP).

A checkpoint is keyed by names, not by stages or processes: `model/<the plain model's name>`,
`head/<block before it>/<parameter>`, `loss/<block before it>/<parameter>`, `optimizer/<parameter>/<state>`,
`random/<stage>/<device>`. It is written aside and renamed when complete. Reading one never runs code from it:
it holds tensors, and an index that is unpickled for DCP's own classes alone.
"""

import json
import pickle
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from blpipe.errors import CheckpointError, UserError, one_line
from blpipe.models.build import plain_metadata, plain_names
from blpipe.plan import Plan
from blpipe.stage import Stage

_PROGRESS = "progress.json"


def save(run: Path, epochs_done: int, plan: Plan, stages: dict[int, Stage],
         group: dist.ProcessGroup | None = None) -> None:
    """Save every stage after `epochs_done` epochs, and drop the checkpoint before.

    Args:
        stages: this process's, by index.
        group: of all processes; None where there is one.
    """
    leader = group is None or dist.get_rank() == 0
    target = run / "checkpoints" / f"epoch_{epochs_done:05d}"
    partial = target.with_name(f".{target.name}.partial")
    state = {key: tensor for index, stage in stages.items() for key, tensor in _state(plan, index, stage).items()}
    try:
        if leader:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        if group is not None:
            dist.barrier(group)
        with _without_warning():
            dcp.save(state, checkpoint_id=partial, process_group=group, no_dist=group is None)
        if leader:
            (partial / _PROGRESS).write_text(json.dumps(
                {"epochs_done": epochs_done, "metadata": plain_metadata(plan.model)}))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for old in checkpoints(run):
                if old != target:
                    shutil.rmtree(old)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        raise CheckpointError(f"cannot write the checkpoint {target}: {one_line(error)}; "
                              "the checkpoint before it is still there") from error


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in run.glob(f"checkpoints/epoch_*/{_PROGRESS}"))


def latest(run: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        UserError: there is none.
    """
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run}: holds no checkpoint yet; train it from the start, with --overwrite")
    return found[-1]


def epochs_done(checkpoint: Path) -> int:
    """How many epochs a checkpoint has behind it."""
    return _progress(checkpoint)["epochs_done"]


def _progress(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / _PROGRESS).read_text())


def load(checkpoint: Path, plan: Plan, stages: dict[int, Stage]) -> None:
    """Put a checkpoint's state into `stages`; they must be those of the run that saved it.

    A random stream of a device that the run did not have starts anew.
    """
    load_weights(checkpoint, plan, stages)
    for index, stage in stages.items():
        mine = (f"random/{index}/", *(f"optimizer/{name}/" for _, name in _optimized(plan, index, stage)))
        state = read(checkpoint, _starting_with(mine))
        stage.stream.state = [state.get(f"random/{index}/{i}", fresh) for i, fresh in enumerate(stage.stream.state)]
        _load_optimizer(plan, index, stage, state)


def load_weights(checkpoint: Path, plan: Plan, stages: dict[int, Stage]) -> None:
    """Put a checkpoint's weights and buffers into the blocks, heads and losses of `stages`.

    Raises:
        UserError: a damaged checkpoint, or one of another model.
    """
    for index, stage in stages.items():
        _load_module(checkpoint, "model/", stage.blocks, plain_names(stage.blocks))
        for prefix, part in _own_parts(plan, index, stage):
            _load_module(checkpoint, prefix, part, {name: name for name in part.state_dict()})


def _load_module(checkpoint: Path, prefix: str, module: torch.nn.Module, names: dict[str, str]) -> None:
    """`names`: from those in the module's state_dict to those in the checkpoint."""
    keys = {prefix + name for name in names.values()}
    state = read(checkpoint, keys.__contains__)
    if state.keys() != keys:
        raise UserError(f"{checkpoint}: holds no {min(keys - state.keys())}; it belongs to another model or partition")
    module.load_state_dict({name: state[prefix + stored] for name, stored in names.items()})


def model_state(checkpoint: Path) -> dict[str, Tensor]:
    """The plain model's state_dict, with its modules' versions as `torch.nn.Module.load_state_dict` reads them."""
    state = OrderedDict((key.removeprefix("model/"), tensor)
                        for key, tensor in read(checkpoint, _starting_with(("model/",))).items())
    state._metadata = _progress(checkpoint).get("metadata", {})  # type: ignore[attr-defined]
    return state


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
        with _without_warning():
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:
        raise UserError(f"{checkpoint}: is damaged, or no checkpoint: {type(error).__name__}: "
                        f"{one_line(error)}") from error
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
        if (module, name) in self._OTHERS:
            return super().find_class(module, name)
        if module in (self._DCP, "torch", "pathlib", "pathlib._local") and "." not in name:
            found = super().find_class(module, name)
            is_class = isinstance(found, type)
            if isinstance(found, torch.dtype) or (is_class and issubclass(found, PurePath)) or \
                    (is_class and module == self._DCP == found.__module__):
                return found
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which no checkpoint needs")


@contextmanager
def _without_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what no_dist asks for
        yield


def _state(plan: Plan, index: int, stage: Stage) -> dict[str, Tensor]:
    own = stage.blocks.state_dict()
    state = {f"model/{plain}": own[name] for name, plain in plain_names(stage.blocks).items()}
    for prefix, part in _own_parts(plan, index, stage):
        state |= {prefix + name: tensor for name, tensor in part.state_dict().items()}
    if stage.optimizer is not None:
        names: dict[Tensor, str] = dict(_optimized(plan, index, stage))
        state |= {f"optimizer/{names[parameter]}/{key}": value
                  for parameter, values in stage.optimizer.state.items()
                  for key, value in values.items() if isinstance(value, Tensor)}
    return state | {f"random/{index}/{i}": tensor for i, tensor in enumerate(stage.stream.state)}


def _own_parts(plan: Plan, index: int, stage: Stage) -> list[tuple[str, torch.nn.Module]]:
    """The head and the loss of a stage, which are not the plain model's, each with the prefix of its names."""
    boundary = plan.block_names(index)[-1]
    head = [] if stage.head is None else [(f"head/{boundary}/", stage.head)]
    return [*head, (f"loss/{boundary}/", stage.loss)]


def _load_optimizer(plan: Plan, index: int, stage: Stage, state: dict[str, Tensor]) -> None:
    if stage.optimizer is None:
        return
    loaded = stage.optimizer.state_dict()
    names = [name for _, name in _optimized(plan, index, stage)]
    loaded["state"] = {
        number: {key.removeprefix(f"optimizer/{name}/"): tensor for key, tensor in state.items()
                 if key.startswith(f"optimizer/{name}/")}
        for number, name in enumerate(names)}
    loaded["state"] = {number: values for number, values in loaded["state"].items() if values}
    stage.optimizer.load_state_dict(loaded)
    for parameter, values in stage.optimizer.state.items():  # laid out as the weights are, as it was when saved
        values |= {key: torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
                   for key, value in values.items() if isinstance(value, Tensor) and value.shape == parameter.shape}


def _optimized(plan: Plan, index: int, stage: Stage) -> Iterable[tuple[torch.nn.Parameter, str]]:
    """The optimizer's parameters in its order, with their names in the checkpoint."""
    plain = plain_names(stage.blocks)
    named = [*((p, plain[name]) for name, p in stage.blocks.named_parameters()),
             *((p, prefix + name) for prefix, part in _own_parts(plan, index, stage)
               for name, p in part.named_parameters())]
    return [(p, name) for p, name in named if p.requires_grad]
