"""Models as ordered, named blocks; see `build_model`."""

from blpipe.models.build import build_model
from blpipe.models.mlp import mlp
from blpipe.models.resnet_cifar import resnet_cifar
from blpipe.models.vgg_cifar import vgg_cifar

__all__ = ["build_model", "mlp", "resnet_cifar", "vgg_cifar"]
