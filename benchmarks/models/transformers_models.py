"""Models of Transformers as modules that return logits, as a `model.target`."""

from typing import Any

import transformers
from torch import Tensor, nn


class Logits(nn.Module):
    """Samples [batch, …] to the logits of a model of Transformers, which returns more."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens or images."""
        return self.model(x).logits


def untrained(architecture: str, **config: Any) -> Logits:
    """A model of the class `architecture` with random weights, of this config."""
    model = getattr(transformers, architecture)
    return Logits(model(model.config_class(**config)))
