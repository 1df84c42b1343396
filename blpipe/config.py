"""The config: every key, nested, typed and frozen. What must hold between keys is in config_rules.py."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from blpipe.config_types import (
    BlockName,
    ByName,
    Bytes,
    Each,
    FolderName,
    Fraction,
    Named,
    NotNegative,
    PathText,
    Positive,
    Processes,
    Section,
    WirePrecision,
)


class ModelConfig(Named):
    """The plain model.

    weights: that it begins with, parameters and buffers: a file with its state_dict, a run folder or a checkpoint.
    weights_except: patterns of names, such as `fc.*`, that are not taken from there, nor looked for.
    live_tensors: how many tensors may pass between two blocks of a model that is cut into such.
    """

    weights: PathText | None = None
    weights_except: tuple[str, ...] = Field(default=(), strict=False)
    live_tensors: Positive = 1


class NormalizeConfig(Section):
    """Per-channel mean and standard deviation, for values scaled to 0…1."""

    mean: tuple[float, ...] = Field(strict=False)
    std: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(strict=False)


def _alpha(value: float) -> float:
    if value == 0.0 or 1e-3 <= value <= 1e3:
        return value
    raise ValueError("must be 0, for none, or from 0.001 to 1000")


class AugmentConfig(Section):
    """Augmentation of training images: reflect-pad by `crop` pixels and crop back; flip left-right.

    mixup, cutmix: after, of two images each; the α of their Beta distribution, 0 for none.
    transforms: before, of each image by itself: classes of torchvision.transforms.v2, or targets that return a
    function of an image.
    """

    crop: NotNegative = 0
    flip: bool = False
    mixup: Annotated[float, AfterValidator(_alpha)] = 0.0
    cutmix: Annotated[float, AfterValidator(_alpha)] = 0.0
    transforms: tuple[Named, ...] = Field(default=(), strict=False)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return bool(self.mixup or self.cutmix)


class DataConfig(Named):
    """Where the images come from and how they are prepared.

    bad_samples: what becomes of a sample that its data set cannot read; `skip`: the next readable one of its split
    stands in for it.
    validation_samples: how many training samples are held out, and evaluated in place of the test samples.
    """

    default = "digits"

    root: PathText | None = None
    download: bool = False
    normalize: NormalizeConfig | None = None
    augment: AugmentConfig = AugmentConfig()
    workers: Processes = 0
    bad_samples: Literal["refuse", "skip"] = "refuse"
    place: Literal["auto", "host", "device"] = "auto"
    train_samples: Positive | None = None
    test_samples: Positive | None = None
    validation_samples: Positive | None = None

    @property
    def evaluated(self) -> str:
        """Which samples are evaluated, in words: `validation` where some are held out, else `test`."""
        return "test" if self.validation_samples is None else "validation"


class PartitionConfig(Section):
    """How the blocks are cut into stages."""

    stages: Annotated[int, Field(ge=1, le=1024)] | None = None
    strategy: str = "even"
    cuts: tuple[BlockName, ...] | None = Field(default=None, strict=False)
    target: str | None = None
    args: dict[str, Any] = {}
    costs: Literal["measured", "analytic"] = "measured"
    speeds: tuple[Annotated[float, Field(gt=0.0)], ...] | None = Field(default=None, strict=False)
    memory_limit: Bytes = None

    @model_validator(mode="after")
    def _consistent(self) -> "PartitionConfig":
        if self.cuts is not None and self.target is not None:
            raise ValueError("give cuts or a target, not both")
        if self.cuts is not None and self.stages not in (None, len(self.cuts) + 1):
            raise ValueError(f"{len(self.cuts)} cuts make {len(self.cuts) + 1} stages, but stages is {self.stages}; "
                             "leave stages out")
        if self.cuts is None and self.stages is None:
            raise ValueError("give stages (how many) or cuts (the block that each later stage begins with)")
        problems = [*self._conflicts()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _conflicts(self) -> Iterator[str]:
        if self.speeds is not None and len(self.speeds) != self.stage_count:
            yield f"{len(self.speeds)} speeds for {self.stage_count} stages; give one a stage, or none"
        if self.target is not None and self.strategy != "even":
            yield f"give a target or strategy: {self.strategy}, not both; a target needs no strategy"
        if self.args and self.target is None and self.strategy in ("even", "balanced"):
            yield f"args {self.args} are for a target, or for a strategy that a package registered; leave them out"
        if self.memory_limit is not None and self.strategy != "balanced":
            yield "memory_limit needs strategy: balanced, which finds the cuts that keep it"

    @property
    def stage_count(self) -> int:
        """K, the number of stages."""
        if self.cuts is not None:
            return len(self.cuts) + 1
        assert self.stages is not None
        return self.stages

    @property
    def unsettled(self) -> bool:
        """Whether the cuts are still to be found."""
        return self.strategy == "balanced" and self.cuts is None and self.target is None


class ScheduleConfig(Named):
    """A factor over training: on `optimizer.lr`, or on λ. See `blpipe.optim.lr_factor`."""

    default = "constant"

    name: Literal["constant", "linear", "cosine", "multistep", "one-cycle"] | None = "constant"
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    final: Fraction = 0.0
    milestones: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(default=(), strict=False)
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    peak: Fraction = 0.3
    start: Fraction = 0.04

    @model_validator(mode="after")
    def _args_are_a_targets(self) -> "ScheduleConfig":
        if self.args and self.target is None:
            raise ValueError(f"args are for a target; {self.name} has keys of its own, such as final: see "
                             "configs/README.md")
        return self


def _count_or_all(value: Any, info: ValidationInfo) -> Any:
    if value == "all" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError(f"must be a number of {'blocks' if info.field_name == 'length' else 'stages'} ≥ 0, or all")


class LinkConfig(Section):
    """The backward link: how far, how late and how strongly errors go back.

    length: how many of a stage's last blocks an error runs through, or `all`.
    delay: d, how late an error is; delay_unit: in batches or microbatches.
    weight: λ, one number or one for each stage but the last; schedule: a factor on it over training.
    reach: r, how many stages back an error travels, or `all`.
    take: whether each of these errors trains a stage, or only the farthest.
    joint: whether one backward takes the local gradient through the tail together with the error.
    normalize: whether a link gradient is scaled to the norm of the local one.
    wire: the precision of errors that are sent.
    keep: the tail's graph until its errors are there, or only its input, to run it again.
    """

    length: Annotated[Any, AfterValidator(_count_or_all)] = 1
    delay: NotNegative = 1
    delay_unit: Literal["batch", "microbatch"] = "batch"
    weight: Each[float] = 1.0
    schedule: ScheduleConfig = ScheduleConfig()
    reach: Annotated[Any, AfterValidator(_count_or_all)] = 1
    take: Literal["every", "farthest"] = "every"
    joint: bool = False
    normalize: bool = False
    wire: WirePrecision = "full"
    keep: Literal["graph", "recompute"] = "graph"

    def stage_weight(self, stage: int) -> float:
        """λ of the stage with this index, from 0."""
        return self.weight[stage] if isinstance(self.weight, tuple) else self.weight

    def delay_in_microbatches(self, microbatches: int) -> int:
        """How many microbatches late an error of the next stage is, with so many a batch."""
        return self.delay * microbatches if self.delay_unit == "batch" else self.delay

    @property
    def off(self) -> bool:
        """Whether no error goes back at all."""
        weights = self.weight if isinstance(self.weight, tuple) else (self.weight,)
        return self.length == 0 or self.reach == 0 or not any(weights)


class HeadConfig(Named):
    """An auxiliary classifier, or `none`: then the stage has no local loss."""

    default = "conv"

    @model_validator(mode="after")
    def _none_takes_nothing(self) -> "HeadConfig":
        if self.left_out and self.args:
            raise ValueError(f"none takes no args, and has {self.args}; leave them out")
        return self

    @property
    def left_out(self) -> bool:
        """Whether there is none."""
        return self.name == "none"


class LossConfig(Named):
    """A local loss."""

    default = "cross_entropy"


class MethodConfig(ByName):
    """How the stages learn.

    head: of every stage but the last, or a list with one for each of them. loss: of every stage, or a list with
    one for each. local_weight: α, how much of its own local loss trains the blocks of a stage before the last.
    """

    name: Literal["bp", "greedy", "backlink"] = "backlink"
    head: Each[HeadConfig] = HeadConfig()
    loss: Each[LossConfig] = LossConfig()
    local_weight: Annotated[float, Field(ge=0.0)] = 1.0
    link: LinkConfig = LinkConfig()

    @property
    def linked(self) -> bool:
        """Whether any error goes back."""
        return self.name == "backlink" and not self.link.off

    def stage_head(self, stage: int) -> HeadConfig:
        """The head of the stage with this index, from 0."""
        return self.head[stage] if isinstance(self.head, tuple) else self.head

    def stage_loss(self, stage: int) -> LossConfig:
        """The loss of the stage with this index, from 0."""
        return self.loss[stage] if isinstance(self.loss, tuple) else self.loss

    def head_key(self, stage: int) -> str:
        """Where the config has the head of the stage with this index, from 0."""
        return f"method.head.{stage}" if isinstance(self.head, tuple) else "method.head"

    def loss_key(self, stage: int) -> str:
        """Where the config has the loss of the stage with this index, from 0."""
        return f"method.loss.{stage}" if isinstance(self.loss, tuple) else "method.loss"

    def with_parts_of(self, stages: Sequence[int]) -> "MethodConfig":
        """This method over other stages: stage i takes the head and the loss of our stage `stages[i]`.

        Where that is our last one, which has no head, and stage i needs one, it takes the head before.
        """
        parts: dict[str, Any] = {}
        if isinstance(self.head, tuple):
            parts["head"] = tuple(self.head[min(stage, len(self.head) - 1)] for stage in stages[:-1])
        if isinstance(self.loss, tuple):
            parts["loss"] = tuple(self.loss[stage] for stage in stages)
        return self.model_copy(update=parts)


class OptimizerConfig(Named):
    """Any optimizer of torch.optim, by its name (upper or lower case), or a target.

    lr_factors: on `lr`, of the parameters whose names match a pattern such as `layer1.*`; the last one that matches
    counts. Names are the plain model's, and `head/<block before it>/…` and `loss/<block before it>/…`.
    clip_norm: what the norm of a stage's gradients, all together, is scaled down to where it is larger. decay: which
    parameters its weight_decay is for: all, or `matrices`, those of two dimensions and more.
    """

    default = "sgd"

    name: str | None = default
    lr: Annotated[float, Field(gt=0.0)] = 0.1
    lr_factors: dict[str, Annotated[float, Field(ge=0.0)]] = {}
    clip_norm: Annotated[float, Field(gt=0.0)] | None = None
    decay: Literal["all", "matrices"] = "all"


class TrainConfig(Section):
    """Epochs and batches, and how they are computed.

    replicas: how many copies of the pipeline share every batch.
    microbatches: into how many a replica's share of a batch is cut.
    recompute: whether a block stores only its input, and reruns its forward during its backward.
    compile: whether blocks and heads are compiled.
    wire: the precision of activations that are sent.
    on_nonfinite: what becomes of a step in which a stage's loss is NaN or infinite.
    ema: the decay of an exponential moving average of the weights, which is evaluated in their place.
    patience: after how many evaluations in a row without a better one the run ends; None: only after all epochs.
    """

    epochs: Positive = 10
    batch_size: Positive = 64
    replicas: Positive = 1
    microbatches: Positive = 1
    drop_last: bool = False
    eval_batch_size: Positive | None = None
    eval_every_epochs: NotNegative = 1
    patience: Positive | None = None
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    channels_last: bool = False
    recompute: bool = False
    compile: bool = False
    wire: WirePrecision = "full"
    on_nonfinite: Literal["stop", "skip", "ignore"] = "stop"
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None

    @model_validator(mode="after")
    def _microbatches_divide(self) -> "TrainConfig":
        for key, value, size, whole in (("replicas", self.replicas, self.batch_size, "batch_size"),
                                        ("microbatches", self.microbatches, self.batch_size // self.replicas,
                                         "batch_size" if self.replicas == 1 else "a replica's share of")):
            if size % value:
                fitting = next(m for m in range(min(value, 4096), 0, -1) if size % m == 0)
                raise ValueError(f"{key} {value} does not divide {whole} {size}; one that does: {fitting}")
        return self

    @property
    def microbatch_size(self) -> int:
        """Samples in a microbatch of a full batch."""
        return self.batch_size // self.replicas // self.microbatches


class CheckpointConfig(Section):
    """When the state is saved: every so many epochs and steps (0: never), and always at the end.

    keep: how many checkpoints, the last ones; best: whether that of the best accuracy is kept too, or of values that of
    the least loss.
    """

    every_epochs: NotNegative = 1
    every_steps: NotNegative = 0
    keep: Positive = 2
    best: bool = True


class RuntimeConfig(Section):
    """Where and how the run executes. On a CPU nothing but `threads` changes results (`engine`: to rounding for `bp`).

    cuda_graphs: on a GPU, whether a stage launches what it computes on a microbatch as CUDA graphs; `bp` has none.
    deterministic: whether operations that have no deterministic algorithm are refused, for the whole process.
    log_every_steps: after how many steps a line says how the run gets on; 0 for none.
    keep_memory: whether a process keeps the host's memory that it frees, instead of giving it back after every step.
    """

    engine: Literal["auto", "local", "pipeline"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[Processes, Field(ge=1)] | None = None
    runs: PathText = "runs"
    cuda_graphs: bool = False
    deterministic: bool = False
    keep_memory: bool = True
    progress: bool = True
    log_every_steps: NotNegative = 0
    trace: bool = False
    tensorboard: bool = False
    timeout_seconds: Annotated[float, Field(gt=0.0, le=1e6)] = 600.0


class Config(Section):
    """A whole run."""

    name: FolderName
    seed: NotNegative = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    partition: PartitionConfig
    method: MethodConfig = MethodConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def processes(self) -> int:
        """Of the pipeline engine: one for each stage of each replica."""
        return self.partition.stage_count * self.train.replicas
