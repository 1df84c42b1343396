"""Everything that is fixed before a run starts, checked without running anything."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn

from blpipe.boundary import Boundary
from blpipe.config import Config
from blpipe.config_types import WirePrecision
from blpipe.data import Mixing
from blpipe.errors import ConfigError, one_line
from blpipe.heads import build_head
from blpipe.links import Links, stage_links
from blpipe.losses import build_loss
from blpipe.models import build_model
from blpipe.models.build import model_notes, named_blocks, parameter_names
from blpipe.optim import build_optimizer, check_patterns, check_schedule
from blpipe.partition import check_stage_count, partition
from blpipe.parts import check_averaged, check_hooks, check_kept, check_own, check_reached_by_name
from blpipe.shapes import layer_calls, make_boundaries, trace_module, trace_shapes
from blpipe.specs import DataSpec, Share, TensorSpec
from blpipe.steps import Step, batch_sizes, evaluation_sizes, step_sizes, training_sizes
from blpipe.text import blocks_text, dtype_name

_IN_FLOAT32 = "have the model in float32, and set train.precision=bf16 to compute in bfloat16"


@dataclass(frozen=True)
class Network:
    """The plain model before it is cut, and what passes between its blocks.

    Args:
        outputs: by microbatch size, the output of every block in order.
        boundaries: what a head after each block is built for; the last one is the model's own output.
    """

    config: Config
    data: DataSpec
    model: nn.Sequential
    outputs: dict[int, list[TensorSpec]]
    boundaries: list[Boundary]

    @cached_property
    def block_names(self) -> list[str]:
        """Names of all blocks in order."""
        return [name for name, _ in named_blocks(self.model)]

    @cached_property
    def stage_of_block(self) -> list[int]:
        """The index of each block's stage, where heads or losses differ by stage; else 0, which stands for all."""
        method = self.config.method
        if self.config.partition.unsettled or not (isinstance(method.head, tuple) or isinstance(method.loss, tuple)):
            return [0] * len(self.model)
        return [k for k, stage in enumerate(partition(self.config.partition, self.model)) for _ in stage]


@dataclass(frozen=True)
class Plan:
    """The plain model, its stages, and what crosses each boundary, in one replica of the pipeline.

    Args:
        outputs: by microbatch size, the output of every stage in order.
        boundaries: what the head of each stage is built for; the last one is the model's own output.
        links: what goes back through each stage.
        replica: which one, from 0.
    """

    config: Config
    data: DataSpec
    model: nn.Sequential
    stages: list[nn.Sequential]
    outputs: dict[int, list[TensorSpec]]
    boundaries: list[Boundary]
    links: list[Links]
    replica: int = 0

    @property
    def share(self) -> Share:
        """What this replica takes of every batch."""
        return Share(self.replica, self.config.train.replicas)

    @property
    def classes(self) -> int:
        """Number of logits of the model."""
        return self.boundaries[-1].classes

    def block_names(self, stage: int) -> list[str]:
        """Names of the blocks of the stage with this index, from 0."""
        return [name for name, _ in named_blocks(self.stages[stage])]

    @property
    def starts(self) -> list[int]:
        """The index of each stage's first block."""
        return [0, *accumulate(len(stage) for stage in self.stages[:-1])]

    @property
    def stage_names(self) -> list[str]:
        """The first and the last block of every stage."""
        return [blocks_text(self.block_names(k)) for k in range(len(self.stages))]

    @property
    def delay(self) -> int:
        """How many microbatches late an error of the next stage is."""
        return self.config.method.link.delay_in_microbatches(self.config.train.microbatches)

    @cached_property
    def mixing(self) -> Mixing | None:
        """Of training images with each other; None without."""
        augment = self.config.data.augment
        return Mixing(augment, self.config.seed, self.data.shape) if augment.mixes else None

    @cached_property
    def step_sizes(self) -> list[tuple[int, ...]]:
        """The microbatch sizes of every step of an epoch."""
        return step_sizes(self.data.train_samples, self.config, self.replica)

    @property
    def samples_per_epoch(self) -> int:
        """Training samples that an epoch goes through, in all replicas."""
        return sum(batch_sizes(self.data.train_samples, self.config))

    def train_steps(self, epoch: int) -> list[Step]:
        """The steps of one epoch, from 0."""
        first, batches = epoch * len(self.step_sizes), batch_sizes(self.data.train_samples, self.config)
        return [Step(first + i, sizes, batch - sum(sizes))
                for i, (sizes, batch) in enumerate(zip(self.step_sizes, batches, strict=True))]

    def evaluation_sizes(self) -> list[int]:
        """Batch sizes of one evaluation."""
        return evaluation_sizes(self.data.test_samples, self.config)[self.replica::self.config.train.replicas]

    def has_head(self, index: int) -> bool:
        """Whether the stage with this index, from 0, has a head; the last one has the model's own end instead."""
        method = self.config.method
        return index < len(self.stages) - 1 and method.name != "bp" and not method.stage_head(index).left_out

    def has_loss(self, index: int) -> bool:
        """Whether the stage with this index, from 0, has a loss."""
        return index == len(self.stages) - 1 or self.has_head(index)

    def build_head(self, index: int) -> nn.Module:
        """The head of the stage with this index, from 0."""
        method = self.config.method
        return build_head(method.stage_head(index), self.boundaries[index], self.config.seed,
                          self.block_names(index)[-1], method.head_key(index))

    def build_loss(self, index: int) -> nn.Module:
        """The loss of the stage with this index, from 0."""
        method = self.config.method
        return build_loss(method.stage_loss(index), self.boundaries[index], self.config.seed,
                          self.block_names(index)[-1], method.loss_key(index))

    def input(self, size: int) -> TensorSpec:
        """What the first stage reads, for `size` samples."""
        return self.data.batch(size)

    def activation(self, size: int, stage: int) -> TensorSpec:
        """An activation on its way, in training, from the stage with this index, from 0, for `size` samples."""
        return self._sent(size, stage, self.config.train.wire)

    def error(self, size: int, stage: int) -> TensorSpec:
        """An error on its way to the stage with this index, from 0, for `size` samples."""
        return self._sent(size, stage, self.config.method.link.wire)

    def _sent(self, size: int, stage: int, wire: WirePrecision) -> TensorSpec:
        spec = self.outputs[size][stage]
        return spec._replace(dtype=torch.bfloat16) if wire == "bf16" else spec

    def channels_last(self, stage: int) -> bool:
        """Whether the map between the stage with this index, from 0, and the next one is laid out channels last.

        So it is where the model is, and the map's channels come first in its shape.
        """
        boundary = self.boundaries[stage]
        plain_map = boundary.is_map and not boundary.channels_last and not boundary.packing
        return self.config.train.channels_last and plain_map

    def targets(self, size: int) -> TensorSpec:
        """The targets that travel with the activations, for `size` samples."""
        return self.data.targets(size)


def make_network(config: Config, data: DataSpec, pretrained: bool = True) -> Network:
    """Build the model and trace its shapes, block by block.

    Args:
        pretrained: see `build_model`.

    Raises:
        ConfigError: a model or a batch size that does not fit the data.
    """
    if config.train.batch_size > data.train_samples:
        raise ConfigError(f"train.batch_size: {config.train.batch_size} is more than the {data.train_samples} training "
                          f"samples; use at most {data.train_samples}")
    last_batch, replicas = batch_sizes(data.train_samples, config)[-1], config.train.replicas
    if last_batch < replicas:
        raise ConfigError(f"train.replicas: {replicas}, but the last batch of an epoch has {last_batch} samples, one "
                          "for each at least; set train.drop_last=true, or another train.batch_size")
    model = build_model(config.model, data, config.seed, pretrained)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ConfigError(f"model: {name} is {dtype_name(parameter.dtype)}, in which small steps are lost; "
                              f"{_IN_FLOAT32}")
    check_stage_count(config.partition, model)
    training = training_sizes(data, config)
    with layer_calls(model) as calls:
        traced = {size: trace_shapes(model, data, size, training=True, calls=calls) for size in training}
    for size in {*evaluation_sizes(data.test_samples, config)}:
        evaluated = trace_shapes(model, data, size, training=False)
        trained = traced.setdefault(size, evaluated)
        other = [name for name, spec in evaluated.items() if trained[name] != spec]
        if other:  # one layout serves both, where stages exchange messages
            raise ConfigError(f"model: block {other[0]} gives {_told(trained[other[0]])} in training and "
                              f"{_told(evaluated[other[0]])} in evaluation; have it give the same in both")
    return Network(config, data, model, {size: list(specs.values()) for size, specs in traced.items()},
                   make_boundaries(model, next(iter(traced.values())), calls, data))


def _told(spec: TensorSpec) -> str:
    return f"{list(spec.shape)} of {dtype_name(spec.dtype)}"


def make_plan(config: Config, data: DataSpec, network: Network | None = None, replica: int = 0) -> Plan:
    """Cut the model into stages and check that all parts fit; no process group, no training.

    Args:
        network: the one of this config and data, where it is there already.
        replica: of the pipeline, from 0.

    Raises:
        ConfigError: anything in `config` that does not fit together or does not fit the data.
    """
    network = network or make_network(config, data)
    stages = partition(config.partition, network.model)
    ends = [end - 1 for end in accumulate(len(stage) for stage in stages)]
    plan = Plan(
        config, data, network.model, stages,
        outputs={size: [specs[end] for end in ends] for size, specs in network.outputs.items()},
        boundaries=[network.boundaries[end] for end in ends],
        links=stage_links(config.method, [len(stage) for stage in stages]), replica=replica)
    _check_boundaries(plan)
    _check_links(plan)
    heads_and_losses: list[nn.Module] = []
    names: list[str] = []
    for k, stage in enumerate(stages):
        head: nn.Module = nn.Identity()
        logits = next(iter(plan.outputs.values()))[-1]
        if plan.has_head(k):
            head, logits = _checked_head(plan, k)
        loss = _checked_loss(plan, k, logits) if plan.has_loss(k) else nn.Identity()
        build_optimizer(config.optimizer, stage.parameters(), [p for part in (head, loss) for p in part.parameters()])
        check_kept(plan.block_names(k), stage, head, loss)
        if config.method.name != "bp":
            check_hooks(plan.block_names(k), stage, head, loss)
        if plan.links[k].hops_in and config.method.link.delay:
            check_reached_by_name(plan.block_names(k), stage[len(stage) - plan.links[k].tail:])
        if config.train.ema is not None:
            check_averaged(plan.block_names(k), stage, head, loss)
        check_own(k, {config.method.head_key(k): head, config.method.loss_key(k): loss}, heads_and_losses)
        heads_and_losses += head, loss
        names += parameter_names(stage, head, loss).values()
    check_patterns(config.optimizer, names)
    for key, schedule in (("schedule", config.schedule), ("method.link.schedule", config.method.link.schedule)):
        check_schedule(key, schedule, len(plan.step_sizes), config.train.epochs)
    return plan


def notices(plan: Plan) -> list[str]:
    """What a user may want to know of how the config was read, a line each."""
    lines = model_notes(plan.model)
    if plan.config.partition.strategy == "balanced":
        lines.append(f"partition: balanced by {plan.config.partition.costs} costs; "
                     f"cuts: [{', '.join(plan.config.partition.cuts or ())}]")
    if plan.data.labelled and plan.classes > plan.data.classes:
        lines.append(f"model: it gives {plan.classes} logits, and the data have {plan.data.classes} classes")
    schedule, epochs = plan.config.schedule, plan.config.train.epochs
    if schedule.name == "multistep" and not schedule.milestones:
        lines.append("schedule: multistep without milestones changes nothing")
    if schedule.warmup_epochs >= epochs:
        lines.append(f"schedule.warmup_epochs: {schedule.warmup_epochs:g} are not over after train.epochs, {epochs}")
    return lines + _notices_of_links(plan)


def _notices_of_links(plan: Plan) -> list[str]:
    link, lines = plan.config.method.link, list[str]()
    if not any(links.hops_in for links in plan.links):
        return lines
    short = [k + 1 for k, stage in enumerate(plan.stages[:-1]) if link.length != "all" and len(stage) < link.length]
    if short:
        lines.append(f"method.link.length: {link.length} is more than some stages have; stages "
                     f"{', '.join(map(str, short))} use all of their blocks")
    steps, microbatches = len(plan.step_sizes), sum(map(len, plan.step_sizes))
    if steps > 1 and plan.delay >= microbatches:  # of a single step the end is where its errors belong
        count, what = (steps, "steps") if link.delay_unit == "batch" else (microbatches, "microbatches")
        lines.append(f"method.link.delay: {link.delay}, and an epoch has {count} {what}: all errors wait for its end; "
                     f"give less than {count}")
    return lines


def _check_boundaries(plan: Plan) -> None:
    train = plan.config.train
    needs_float32 = next((f"train.{key}" for key in ("precision", "wire") if getattr(train, key) == "bf16"), None)
    for k, boundary in enumerate(plan.boundaries[:-1]):
        if train.wire == "bf16" and boundary.packing and boundary.packing.has_given_numbers:
            raise ConfigError(f"train.wire: bf16 would round numbers that stage {k + 1} passes on as they came, such "
                              "as a mask to be added or an index; set train.wire=full")
    for specs in plan.outputs.values():
        for k, spec in enumerate(specs):
            if not spec.dtype.is_floating_point:
                raise ConfigError(f"partition: stage {k + 1} ends with block {plan.block_names(k)[-1]}, which gives "
                                  f"{dtype_name(spec.dtype)}; cut where floating-point numbers pass")
            if needs_float32 and spec.dtype != torch.float32:
                name = plan.block_names(k)[-1]
                raise ConfigError(f"{needs_float32}: bf16 is for models in float32, and block {name} gives "
                                  f"{dtype_name(spec.dtype)}; have the model in float32")


def _check_links(plan: Plan) -> None:
    method = plan.config.method
    for k, (links, stage) in enumerate(zip(plan.links, plan.stages, strict=True)):
        too_long = links.need_all_blocks and links.tail < len(stage)
        if too_long and links.passes_on:
            raise ConfigError(f"method.link.reach: {method.link.reach}: stage {k + 1} passes errors on through all of "
                              f"its {len(stage)} blocks, and method.link.length is {method.link.length}; set "
                              "method.link.length=all")
        trained_by_link = bool(links.hops_in) and links.weight != 0.0
        if links.local_weight == 0.0 and (too_long or not trained_by_link):
            remedy = "set method.link.length=all" if trained_by_link else "give it a method.link.weight"
            raise ConfigError(f"method.local_weight: 0, and no link through all blocks of stage {k + 1} "
                              f"({plan.stage_names[k]}): they would not learn; {remedy}, or a local weight above 0")


def _checked_head(plan: Plan, index: int) -> tuple[nn.Module, TensorSpec]:
    """The head, and what it gives."""
    name, key, head = plan.block_names(index)[-1], plan.config.method.head_key(index), plan.build_head(index)
    boundary = plan.boundaries[index]
    for size in training_sizes(plan.data, plan.config):
        given, own = plan.outputs[size][index], head
        if boundary.packing:  # messages are of what the head reads
            given, own = boundary.packing.read(given), head.get_submodule("head")
        output = trace_module(f"{key} (after block {name})", own, given, plan.data, training=True)
        wanted = plan.outputs[size][-1].shape
        types = {p.dtype for p in head.parameters() if p.is_floating_point()}
        if types and given.dtype not in types:  # meta tensors are not checked for that
            raise ConfigError(f"{key}: after block {name} it takes {dtype_name(min(types, key=str))}, and the block "
                              f"gives {dtype_name(given.dtype)}; {_IN_FLOAT32}")
        if output.shape != wanted:
            raise ConfigError(f"{key}: after block {name} it gives {list(output.shape)} of {list(given.shape)}; "
                              f"it must give {list(wanted)}, the logits; give a {key}.target that does")
    return head, output


def _checked_loss(plan: Plan, index: int, logits: TensorSpec) -> nn.Module:
    loss, outputs = plan.build_loss(index), next(iter(plan.outputs.values()))
    check_loss(plan.config.method.loss_key(index), loss, plan.data, min(2, *training_sizes(plan.data, plan.config)),
               logits, outputs[index])
    return loss


def check_loss(key: str, loss: nn.Module, data: DataSpec, samples: int, logits: TensorSpec, x: TensorSpec) -> None:
    """That the loss is a scalar of zeros, for so many `samples`: few, as they have values.

    Args:
        key: of the loss in the config, for messages.
        logits, x: what it is given, of any number of samples.

    Raises:
        ConfigError: it is not, or it raises.
    """
    zeros = [torch.zeros(samples, *spec.shape[1:], dtype=spec.dtype) for spec in (logits, x)]
    shape, dtype = data.targets(samples)
    try:
        value = loss(zeros[0], torch.zeros(shape, dtype=dtype), zeros[1])
    except Exception as error:
        own = {t.dtype for t in (*loss.parameters(), *loss.buffers()) if t.is_floating_point()}
        if own - {logits.dtype, x.dtype}:
            raise ConfigError(f"{key}: its weights are {dtype_name(min(own, key=str))}, and the stage gives "
                              f"{dtype_name(x.dtype)}; have the model and the loss in float32") from error
        raise ConfigError(f"{key}: {type(error).__name__} for logits {list(zeros[0].shape)} and targets "
                          f"{dtype_name(dtype)} {list(shape)}: {one_line(error)}") from error
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        raise ConfigError(f"{key}: the function must return a scalar tensor, the mean over the batch")
