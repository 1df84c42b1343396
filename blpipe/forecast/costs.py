"""What each block and each head costs: seconds measured on a device, or estimated where nothing should run."""

from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blpipe.config import LossConfig, OptimizerConfig, TrainConfig
from blpipe.data import Data
from blpipe.device import use_channels_last
from blpipe.errors import ConfigError, one_line
from blpipe.forecast.ledger import Ledger, without_values
from blpipe.heads import build_head
from blpipe.losses import LocalLoss, build_loss
from blpipe.models.build import named_blocks
from blpipe.models.copies import copied
from blpipe.optim import build_optimizer
from blpipe.plan import Network, check_loss
from blpipe.precision import Precision
from blpipe.shapes import likeness
from blpipe.specs import Share, TensorSpec
from blpipe.steps import training_sizes

# Nominal speeds for estimates: (floating-point operations, bytes of memory traffic) a second.
NOMINAL = {"cpu": (5e10, 1e10), "cuda": (4e13, 2e12)}
_MEASURE_SECONDS = 0.3  # spent on each distinct block, as far as three rounds allow
_MOST_ROUNDS = 10


@dataclass(frozen=True)
class Cost:
    """Of a block, or of a head with its loss, for one microbatch on one device.

    Args:
        forward, backward: seconds; the backward gives the gradients of the input and of the parameters.
        input_backward, weight_backward: seconds for one of them alone.
        step: seconds of the optimizer step, once a batch.
        flops: floating-point operations of forward and backward, a multiply-add counting as two.
        params: number of parameters.
        param_bytes, saved_bytes, output_bytes: of the parameters; of what a forward keeps for its backward,
            output included; of the output.
    """

    forward: float
    backward: float
    input_backward: float
    weight_backward: float
    step: float
    flops: int
    params: int
    param_bytes: int
    saved_bytes: int
    output_bytes: int

    def without(self, step_call: float) -> "Cost":
        """The same, less what every call of an optimizer step takes."""
        return replace(self, step=max(0.0, self.step - step_call))


@dataclass(frozen=True)
class Profile:
    """The costs of a network, block by block.

    Args:
        blocks: of every block.
        heads: of a head with its loss after every block, None where no head fits; after the last block it is the
            loss alone.
        feed: seconds that the first stage needs to read and prepare a microbatch.
        step_call: seconds of an optimizer step that do not depend on the number of parameters.
        device: that the costs are of.
        measured: whether seconds were measured; estimates otherwise.
    """

    network: Network
    blocks: list[Cost]
    heads: list[Cost | None]
    feed: float
    step_call: float
    device: torch.device
    measured: bool

    @cached_property
    def sums(self) -> dict[str, NDArray[np.float64]]:
        """By field of `Cost`, its sum over the first i blocks, i = 0 … N."""
        return {field.name: np.cumsum([0.0] + [getattr(block, field.name) for block in self.blocks])
                for field in fields(Cost)}

    @cached_property
    def head_seconds(self) -> NDArray[np.float64]:
        """Forward and backward of the head behind i blocks, i = 0 … N; infinity where none fits."""
        return np.array([np.inf] + [np.inf if h is None else h.forward + h.backward for h in self.heads])

    @cached_property
    def head_step(self) -> NDArray[np.float64]:
        """The optimizer step of the head behind i blocks, i = 0 … N."""
        return np.array([0.0] + [0.0 if head is None else head.step for head in self.heads])


FREE = Cost(0.0, 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0, 0)  # of a head that is left out


def profile(network: Network, device: torch.device, data: Data | None = None, heads_at: Collection[int] = ()
            ) -> Profile:
    """The costs of all blocks and of a head after each of them; blocks that are alike are looked at once.

    Args:
        device: measured on, or estimated for.
        data: measure, and begin with a batch of these; None estimates without running anything.
        heads_at: the indices of blocks, from 0, behind which a head must fit.

    Raises:
        ConfigError: a block or the last loss cannot be tried, or a head or a loss that must fit, or none of them.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return _profile(network, device, data, heads_at)


def _profile(network: Network, device: torch.device, data: Data | None, heads_at: Collection[int]) -> Profile:
    config = network.config
    size = config.train.microbatch_size
    shape, dtype = network.data.targets(size)
    targets = torch.zeros(shape, dtype=dtype)
    first, feed = None, 0.0
    if data is not None:
        first, targets, feed = _first_microbatch(network, data.to(device), size, device)
    known: dict[Hashable, Cost] = {}

    def cost_of(what: str, module: nn.Module, alike: Hashable, given: TensorSpec, x: Tensor | None = None,
                goal: Tensor | None = None, check: Callable[[], None] = lambda: None) -> Cost:
        key = (alike, given, x is None)
        if key not in known:
            check()
            trial = _Trial(module, given, x, goal, config.train)
            with _trying(what):
                cost = trial.estimate(device)
                known[key] = cost if data is None else trial.measure(device, cost, config.optimizer)
        return known[key]

    inputs = [network.data.batch(size), *network.outputs[size]]
    blocks = [cost_of(f"model: block {name}", block, likeness(block), given, first if i == 0 else None)
              for i, ((name, block), given) in enumerate(zip(named_blocks(network.model), inputs, strict=False))]
    few = min(2, *training_sizes(network.data, config))
    refusals: list[ConfigError] = []

    def check_loss_of(head: _HeadAndLoss, given: TensorSpec) -> None:
        logits = inputs[-1]._replace(dtype=head.type_of_logits(given, device))
        check_loss(head.names[1], head.loss, network.data, few, logits, given)

    def head_cost(head: _HeadAndLoss | Cost | None, given: TensorSpec, must_fit: bool) -> Cost | None:
        if not isinstance(head, _HeadAndLoss):
            return head
        try:
            return cost_of(head.what, head, head.alike, given, goal=targets, check=partial(check_loss_of, head, given))
        except ConfigError as error:
            if must_fit:
                raise
            refusals.append(error)
            return None  # it is built for what passes at other boundaries: no stage can end here

    heads = [head_cost(head, given, i in heads_at or i == len(blocks) - 1)
             for i, (head, given) in enumerate(zip(_heads(network), inputs[1:], strict=True))]
    if refusals and config.method.name != "bp" and not any(heads[:-1]):  # there are no such other boundaries
        raise refusals[0]
    step_call = _step_call_seconds(config.optimizer, device) if data is not None else 0.0
    return Profile(network, [cost.without(step_call) for cost in blocks],
                   [cost.without(step_call) if cost else None for cost in heads], feed, step_call, device,
                   measured=data is not None)


@contextmanager
def _trying(what: str) -> Iterator[None]:
    """Whatever a trial of a part raises becomes a ConfigError that calls the part `what`."""
    tried = "plan and partition.strategy=balanced try each part by itself, without values"
    try:
        yield
    except ConfigError:
        raise
    except DataDependentOutputException as error:
        raise ConfigError(f"{what}: it reads values of its tensors ({error}); {tried}; compute it without, or train "
                          "with partition.cuts, which need no trial") from error
    except Exception as error:
        raise ConfigError(f"{what}: {type(error).__name__}: {one_line(error)}; {tried}; mend it, or train with "
                          "partition.cuts, which need no trial") from error


class _HeadAndLoss(nn.Module):
    """From what passes a boundary to the local loss.

    Args:
        config: of the loss.
        names: what messages call the head, and the loss.
        last: whether it is behind the last block, which has no head.
    """

    def __init__(self, head: nn.Module, loss: nn.Module, config: LossConfig, names: tuple[str, str], last: bool):
        super().__init__()
        self.head, self.loss, self.names, self.what = head, loss, names, names[last]
        # Of logits alone: the same wherever it is. A function's own name would not be.
        self.alike = likeness(head), repr(config) if _of_logits(loss) else likeness(loss)

    def forward(self, x: Tensor, targets: Tensor, precision: Precision) -> Tensor:
        """The local loss."""
        with _trying(self.names[0]):
            logits = precision.run(self.head, x)
        with _trying(self.names[1]):
            return self.loss(logits, targets, x)

    def type_of_logits(self, given: TensorSpec, device: torch.device) -> torch.dtype:
        """Of what the head makes of `given`, in training."""
        with _trying(self.names[0]), FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(given.shape, dtype=given.dtype, device=device)
            logits: Tensor = without_values(self.head, device).train()(x)
            return logits.dtype


def _of_logits(loss: nn.Module) -> bool:
    return isinstance(loss, LocalLoss) and not loss.takes_x


def _heads(network: Network) -> Iterator[_HeadAndLoss | Cost | None]:
    """A head with its loss after every block, by the stage that the block is in; after the last one the loss alone.

    The cost itself where heads are left out, and None where no head fits.
    """
    config, seed, stages = network.config.method, network.config.seed, network.stage_of_block
    method = config.with_parts_of(stages)  # as if each block were a stage
    for i, (name, boundary) in enumerate(zip(network.block_names, network.boundaries, strict=True)):
        if not boundary.last and method.stage_head(i).left_out:
            yield FREE
            continue
        loss_config = method.stage_loss(i)
        try:
            head = nn.Identity() if boundary.last else \
                build_head(method.stage_head(i), boundary, seed, name, config.head_key(stages[i]))
            loss = build_loss(loss_config, boundary, seed, name, config.loss_key(stages[i]))
        except ConfigError:
            if boundary.last:
                raise
            yield None  # no stage can end here
        else:
            names = f"{config.head_key(stages[i])} (after block {name})", config.loss_key(stages[i])
            yield _HeadAndLoss(head, loss, loss_config, names, boundary.last)


def _first_microbatch(network: Network, data: Data, size: int, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """The first microbatch, and the seconds that one takes to be read."""
    train = network.config.train
    batches = data.train_batches(network.config.seed, 0, train.batch_size, train.drop_last,
                                 share=Share(replicas=train.replicas))
    x, targets = next(batches)
    clock = Clock(device)
    count = len(clock.time(lambda: list(islice(batches, 3))))
    seconds = clock.seconds[0] / count if count else 0.0
    return x[:size], targets[:size], seconds / train.microbatches


def _step_call_seconds(config: OptimizerConfig, device: torch.device) -> float:
    parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in ((1, 1), (1,))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer, clock = build_optimizer(config, parameters if config.decay != "all" else parameters[:1]), Clock(device)
    assert optimizer is not None
    for _ in range(_MOST_ROUNDS):
        clock.time(optimizer.step)
    return median(clock.seconds)


Observe = Callable[[Callable[[], Any]], Any]  # calls a function, notes what it cost, returns what it returned


class _Trial:
    """One module, run by itself in training mode, as a copy: the module itself stays as it is.

    Args:
        given: its input.
        x: a real input; random numbers without.
        targets: which a head with its loss takes too; None for a block.
        train: its precision and its layout.
    """

    def __init__(self, module: nn.Module, given: TensorSpec, x: Tensor | None, targets: Tensor | None,
                 train: TrainConfig):
        self._module, self._given, self._x, self._targets, self._train = module, given, x, targets, train

    def estimate(self, device: torch.device) -> Cost:
        """Counted on fake tensors; seconds at nominal speeds."""
        flops_rate, bytes_rate = NOMINAL[device.type]
        counts: list[tuple[int, float]] = []

        def count(run: Callable[[], Any]) -> Any:
            ledger, counter = Ledger(), FlopCounterMode(display=False)
            with counter, ledger:
                returned = run()
            flops = counter.get_total_flops()
            counts.append((flops, flops / flops_rate + ledger.traffic / bytes_rate))
            return returned

        with FakeTensorMode(allow_non_fake_inputs=True):
            module = self._laid_out(without_values(self._module, device))
            x = torch.empty(self._given.shape, dtype=self._given.dtype, device=device)
            targets = None if self._targets is None else torch.empty_like(self._targets, device=device)
            saved, out_bytes = self._held(module, x, targets)
            self._round(module, x, targets, count)
        (flops, forward), (more_flops, backward), (_, for_input), (_, for_weights) = counts
        param_bytes = sum(p.nbytes for p in module.parameters())
        return Cost(forward, backward, for_input, for_weights, 3 * param_bytes / bytes_rate, flops + more_flops,
                    sum(p.numel() for p in module.parameters()), param_bytes, saved, out_bytes)

    def _held(self, module: nn.Module, x: Tensor, targets: Tensor | None) -> tuple[int, int]:
        """Bytes that a forward keeps for its backward, its output included, and those of its output."""
        ledger = Ledger()
        for tensor in (x, *([] if targets is None else [targets]), *module.parameters(), *module.buffers()):
            ledger.count(tensor)
        before = ledger.live
        with ledger:
            out = self._forward(module, x.detach().requires_grad_(x.is_floating_point()), targets)
            return ledger.live - before, out.nbytes

    def measure(self, device: torch.device, cost: Cost, optimizer_config: OptimizerConfig) -> Cost:
        """`cost`, its seconds replaced by medians of measured ones."""
        module = self._laid_out(copied([self._module])[0].to(device))
        optimizer = build_optimizer(optimizer_config, module.parameters())
        x = self._any_input() if self._x is None else self._x
        x, targets = x.to(device), None if self._targets is None else self._targets.to(device)
        rounds: list[list[float]] = []
        started = perf_counter()
        while len(rounds) < 3 or (len(rounds) < _MOST_ROUNDS and perf_counter() - started < _MEASURE_SECONDS):
            clock = Clock(device)
            self._round(module, x, targets, clock.time)
            with _trying("optimizer"):
                clock.time(lambda: optimizer.step() if optimizer is not None else None)
            rounds.append(clock.seconds)
        forward, backward, for_input, for_weights, step = (median(column) for column in zip(*rounds[1:], strict=True))
        return replace(cost, forward=forward, backward=backward, input_backward=for_input,
                       weight_backward=for_weights, step=step)

    def _any_input(self) -> Tensor:
        shape, dtype = self._given
        return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)

    def _round(self, module: nn.Module, x: Tensor, targets: Tensor | None, observe: Observe) -> None:
        """Forward, backward, and the backward for the input and for the parameters alone, each observed."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        x = x.detach().requires_grad_(x.is_floating_point())
        out = observe(lambda: self._forward(module, x, targets))
        gradient = torch.ones_like(out)

        def backward(wanted: list[Tensor]) -> None:
            wanted = [tensor for tensor in wanted if tensor.requires_grad]
            if wanted and out.requires_grad:
                found = torch.autograd.grad(out, wanted, gradient, retain_graph=True, allow_unused=True)
                for tensor, tensor_gradient in zip(wanted, found, strict=True):
                    tensor.grad = tensor_gradient

        observe(lambda: backward([x, *parameters]))
        observe(lambda: backward([x]))
        observe(lambda: backward([*parameters]))

    def _forward(self, module: nn.Module, x: Tensor, targets: Tensor | None) -> Tensor:
        precision = Precision(self._train.precision, x.device)
        return precision.run(module, x) if targets is None else module(x, targets, precision)

    def _laid_out(self, module: nn.Module) -> nn.Module:
        return (use_channels_last(module) if self._train.channels_last else module).train()


class Clock:
    """Seconds of each call, the device's work included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []

    def time(self, run: Callable[[], Any]) -> Any:
        """Call `run` and note its seconds."""
        self._settle()
        started = perf_counter()
        returned = run()
        self._settle()
        self.seconds.append(perf_counter() - started)
        return returned

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
