"""A byte-level language model for blpipe: a text, transformer blocks, a head for every position, a loss in bits.

Shapes: B windows a batch, T = `length` bytes a window, D = `dim`, 256 possible bytes. The README shows this file
without its docstrings.
"""

import numpy as np
import torch
from torch import nn


def text(path, length):
    """(train, test) of any file: its first nine tenths and the rest, as windows [T] with the bytes that follow, [T]."""
    windows = torch.from_numpy(np.fromfile(path, np.uint8)).long().unfold(0, length + 1, length)
    splits = windows.tensor_split([len(windows) * 9 // 10])
    train, test = (torch.utils.data.TensorDataset(part[:, :-1], part[:, 1:]) for part in splits)
    train.classes = range(256)
    return train, test


class Embedding(nn.Module):
    """Bytes, int64 [B, T], to the sum of two learned embeddings, of the byte and of its place: [B, T, D]."""

    def __init__(self, length, dim):
        super().__init__()
        self.byte, self.place = (nn.Parameter(0.02 * torch.randn(size, dim)) for size in (256, length))

    def forward(self, x):
        """The sum."""
        return self.byte[x] + self.place


class Block(nn.Module):
    """Causal self-attention, then an MLP, each of the normalised input and added to it: [B, T, D] to [B, T, D]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.out = heads, nn.Linear(dim, dim)
        self.qkv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim))
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        """Attend, then transform every position."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def blocks(length, dim, heads, depth):
    """The model: embed, block0, block1, …, and output, which gives the logits of the next byte [B, T, 256]."""
    middle = {f"block{i}": Block(dim, heads) for i in range(depth)}
    return {"embed": Embedding(length, dim), **middle, "output": nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 256))}


def head(boundary):
    """What turns a stage's output [B, T, D] into logits of its own, [B, T, 256]."""
    return nn.Sequential(nn.LayerNorm(boundary.shape[-1]), nn.Linear(boundary.shape[-1], boundary.classes))


def bits():
    """Cross-entropy in bits per byte, the mean over all positions."""
    return lambda logits, targets: nn.functional.cross_entropy(logits.mT, targets) / np.log(2)
