"""Whether blocks compute what the plain model computes, bit for bit, and have its state_dict."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blpipe.models.build import plain_metadata, plain_names
from blpipe.models.compare import kept_buffers

EQUAL = {"training": 0.0, "evaluation": 0.0, "buffers": True}
"""What `differences` finds where there are none."""


def differences(plain: nn.Module, blocks: nn.Module, x: Tensor) -> dict[str, float | bool]:
    """The largest difference of the outputs in either mode, and whether training leaves the same buffers.

    Args:
        plain: whose own modules the blocks have.
        x: a batch of samples.
    """
    (wanted, left), (found, then) = _observed(plain, plain, x), _observed(blocks, plain, x)
    apart: dict[str, float | bool] = dict(zip(("training", "evaluation"), map(_apart, found, wanted), strict=True))
    apart["buffers"] = all(map(torch.equal, left, then))
    return apart


def _observed(model: nn.Module, plain: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of `model`, and the buffers that `plain` has then; they are as before afterwards."""
    with kept_buffers(plain):
        return outputs(model, x), [buffer.clone() for buffer in plain.buffers()]


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """In training, with random numbers from a seed, and then in evaluation. Of several outputs the first counts."""
    found = []
    for training in (True, False):
        torch.manual_seed(1)
        found.append(tree_leaves(model.train(training)(x.clone()))[0])
    return found


def plain_state(blocks: nn.Sequential) -> OrderedDict[str, Tensor]:
    """The state_dict of the blocks under the plain model's names."""
    names = plain_names(blocks)
    state = OrderedDict((names[key], tensor) for key, tensor in blocks.state_dict().items())
    state._metadata = plain_metadata(blocks)  # type: ignore[attr-defined]
    return state


def _apart(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return 0.0 if torch.equal(one, other) else float((one - other).abs().max())
