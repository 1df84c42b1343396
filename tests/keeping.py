"""A model whose code keeps tensors that it makes once, and asserts what values are.

Not in a test's own file, whose asserts pytest rewrites.
"""

from functools import lru_cache

import torch
from torch import fx, nn


class Masked(nn.Module):
    """Makes its mask once, and cannot be traced."""

    def __init__(self):
        super().__init__()
        self.mask = None
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.mask is None:
            self.mask = torch.ones(8, 8).tril()
        return x @ self.mask if x.sum() > -1e9 else x


@lru_cache
def table(size):
    return torch.arange(float(size))


@fx.wrap
def shifted(x):
    return x + table(x.shape[-1])


class Keeping(nn.Module):
    """Keeps tensors that it makes once, in a module and beside a function, and has a part called as our notes are."""

    def __init__(self):
        super().__init__()
        self.first, self.masked, self.notes = nn.Linear(8, 8), Masked(), nn.Linear(8, 3)

    def forward(self, x):
        assert torch.isfinite(x).all()
        return self.notes(shifted(self.masked(self.first(x))))
