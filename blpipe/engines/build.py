"""How a stage is made, for every engine: its parts on the device, its optimizer, its links."""

from typing import TypeVar

import torch
from torch import nn

from blpipe.config import Config
from blpipe.device import keep_in_place, spare_cudnn_norms, use_channels_last
from blpipe.graphs import Recorder
from blpipe.models.build import parameter_names
from blpipe.optim import build_optimizer
from blpipe.plan import Plan
from blpipe.precision import Precision
from blpipe.seeds import RandomStream, derive_seed
from blpipe.stage import Stage
from blpipe.update import Update

Module = TypeVar("Module", bound=nn.Module)


def has_graphs(config: Config, device: torch.device) -> bool:
    """Whether stages run as CUDA graphs: where the config wants them and the device has them."""
    return config.runtime.cuda_graphs and device.type == "cuda" and config.method.name != "bp"


def recording_stream(plan: Plan, device: torch.device) -> torch.cuda.Stream | None:
    """For CUDA graphs; None without."""
    return torch.cuda.Stream(device) if has_graphs(plan.config, device) else None


def build_stage(plan: Plan, index: int, device: torch.device, recorder: Recorder | None = None,
                beside_receives: bool = False) -> Stage:
    """The stage with this index, from 0, on `device`.

    Args:
        recorder: of CUDA graphs; None to run without.
        beside_receives: whether receives run on the device while it computes.

    Raises:
        ConfigError: a head, loss or optimizer that cannot be built.
    """
    config = plan.config
    blocks = _on(device, plan.stages[index], config.train.channels_last)
    head: nn.Module | None = nn.Identity() if plan.has_loss(index) else None
    if plan.has_head(index):
        head = _on(device, plan.build_head(index), config.train.channels_last)
    loss = _on(device, plan.build_loss(index) if plan.has_loss(index) else nn.Identity(), config.train.channels_last)
    parts = [blocks, loss, *([] if head is None else [head])]
    # With deterministic algorithms in every engine: then all compute the same. What is compiled has kernels of its own.
    alike = device.type == "cuda" and (beside_receives or torch.are_deterministic_algorithms_enabled())
    for part in parts if alike and not config.train.compile else ():
        spare_cudnn_norms(part)
    for part in parts if has_graphs(config, device) else ():
        keep_in_place(part)
    links = plan.links[index]
    waits = links.tail if links.joint else 0  # blocks whose first gradients come with the first error
    early = list(blocks[:len(blocks) - waits].parameters())
    late = [p for p in blocks.parameters() if all(p is not other for other in early)]
    of_head_and_loss = [p for part in (head, loss) if part is not None for p in part.parameters()]
    optimizer = build_optimizer(config.optimizer, early, late, of_head_and_loss,
                                names=parameter_names(blocks, head, loss))
    update = Update(parts, optimizer, clip_norm=config.optimizer.clip_norm,
                    skip_nonfinite=config.train.on_nonfinite == "skip", leads=plan.replica == 0,
                    ema=config.train.ema)
    return Stage(blocks, head, loss, update, links,
                 RandomStream(derive_seed(config.seed, "stage", index, *plan.share.labels), device),
                 precision=Precision(config.train.precision, device), wire=config.train.wire,
                 recompute=config.train.recompute, compile=config.train.compile, recorder=recorder)


def _on(device: torch.device, module: Module, channels_last: bool) -> Module:
    """`module`, moved unless it is there already: fake tensors cannot be moved."""
    there = all(tensor.device == device for tensor in (*module.parameters(), *module.buffers()))
    module = module if there else module.to(device)
    return use_channels_last(module) if channels_last else module
