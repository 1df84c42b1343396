"""Models of Transformers as modules that return logits, as a `model.target`."""

from typing import Any

import transformers
from torch import Tensor, nn


class Logits(nn.Module):
    """Samples [batch, …] to the logits of a model of Transformers, which returns more.

    Args:
        masked: whether no token attends to those that are 0.
    """

    def __init__(self, model: nn.Module, masked: bool):
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens or images."""
        return self.model(x, attention_mask=(x != 0).long()).logits if self.masked else self.model(x).logits


def untrained(architecture: str, masked: bool = False, **config: Any) -> Logits:
    """A model of the class `architecture` with random weights, of this config; see `Logits`."""
    model = getattr(transformers, architecture)
    return Logits(model(model.config_class(**config)), masked)
