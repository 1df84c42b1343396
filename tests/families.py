"""torchvision's classification models: one of each family, and what the tests do with any of them."""

import torch
from torch import nn

from benchmarks.models.same import EQUAL, differences, plain_state
from blpipe.models.blocks import blocks_of
from blpipe.models.zoo import torchvision_model

# But for maxvit, which takes as long as all of these; test_torchvision_all.py has it.
FAMILIES = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5",
            "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
            "swin_v2_t", "vgg11", "vit_b_16")


def smallest(name: str) -> tuple[dict, int]:
    """The `args` and the image size that make a model cheapest to test."""
    if name == "vit_h_14":
        return {"image_size": 28}, 28
    if name.startswith("vit"):
        return {"image_size": 32}, 32
    if name.startswith("vgg"):
        return {"init_weights": False}, 32
    return {}, {"alexnet": 63, "inception_v3": 75, "maxvit_t": 224}.get(name, 32)


def assert_blocks_are_the_model(name: str) -> nn.Sequential:
    """The blocks of a torchvision model compute what it computes, in both modes, and have its state_dict."""
    args, size = smallest(name)
    torch.manual_seed(0)
    plain = torchvision_model(f"torchvision/{name}", args, 5)
    x = torch.rand(2, 3, size, size)
    blocks = blocks_of(plain, x)
    assert differences(plain, blocks, x) == EQUAL
    assert_same_state(plain, blocks)
    return blocks


def assert_same_state(plain: nn.Module, blocks: nn.Sequential) -> None:
    """The blocks' state_dict, under the plain model's names, is the plain model's."""
    own, state = plain_state(blocks), plain.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], tensor) for key, tensor in state.items())
    plain.load_state_dict(own, strict=True)


def one_step(name: str, **more) -> dict:
    """A config that trains a torchvision model for one BackLink step in four stages."""
    args, size = smallest(name)
    return {
        "name": name, "model": {"name": f"torchvision/{name}", "args": args | more},
        "data": {"name": "synthetic", "args": {"shape": [3, size, size], "classes": 2, "samples": 2}},
        "partition": {"stages": 4}, "method": "backlink", "optimizer": {"name": "sgd", "lr": 0.01},
        "train": {"epochs": 1, "batch_size": 2}, "checkpoint": {"every_epochs": 0}, "runtime": {"device": "cpu"},
    }
