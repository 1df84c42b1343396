"""Models as users write them, for the tests of blocks: nothing but a forward."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class DropPath(nn.Module):
    """Stochastic depth, with control flow that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5)


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.fc, self.drop = nn.LayerNorm(width), nn.Linear(width, width), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.fc(self.norm(x)))


class Residuals(nn.Module):
    """The batch size is read first and used last; a further argument keeps its default."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(4, 8), nn.ModuleList(Residual(8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch = x.shape[0]
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        if mask is not None:
            x = x * mask
        return self.head(x.reshape(batch, -1))


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(width, 3 * width), nn.Linear(width, width), 0.2

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.size()
        q, k, v = self.qkv(x).split(D, dim=2)
        q, k, v = (part.view(B, T, 2, D // 2).transpose(1, 2) for part in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0, is_causal=True)
        return self.out(x.transpose(1, 2).reshape(B, T, D))


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    """A small GPT: logits for every token; its output layer can share the embedding's weight."""

    def __init__(self, tied: bool = True):
        super().__init__()
        self.tokens, self.positions, self.dropout = nn.Embedding(11, 8), nn.Embedding(6, 8), nn.Dropout(0.1)
        self.layers, self.norm = nn.ModuleList(Layer(8) for _ in range(3)), nn.LayerNorm(8)
        self.logits = nn.Linear(8, 11, bias=False)
        if tied:
            self.logits.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        _, length = tokens.size()
        x = self.dropout(self.tokens(tokens) + self.positions(torch.arange(0, length, device=tokens.device)))
        for layer in self.layers:
            x = layer(x)
        return self.logits(self.norm(x))


class InPlace(nn.Module):
    """What is overwritten is used again under its other name, at the ends of blocks and inside them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        x = self.a(x)
        same = x
        same += 1
        x *= 2
        x = self.relu(x) + same
        x = self.b(x)
        x.relu_()
        positive = x > 0
        x = x * positive + (positive & (x < 1))
        x = self.c(x) + positive
        y = F.leaky_relu_(x, 0.1)
        torch.tanh_(x)
        x.pow_(2)
        return F.relu(self.d(y + x), inplace=True)


class Preactivated(nn.Module):
    """Its first layer overwrites its input, which it uses again."""

    def __init__(self):
        super().__init__()
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(x)) + x


class Preactivations(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), Preactivated(), Preactivated()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class Tensors(nn.Module):
    """Every kind of tensor that a module may hold or make, a counter, and a layer that is never used."""

    def __init__(self):
        super().__init__()
        self.fc, self.unused, self.scale = nn.Linear(4, 4), nn.Linear(2, 2), torch.full((4,), 2.0)
        self.register_buffer("shift", torch.rand(4), persistent=False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return F.dropout(self.fc(x * self.scale) + self.shift + self.count, 0.5, self.training) + torch.arange(4)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.cell(x).relu()
        return self.out(x)


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, parts: tuple[Tensor, ...]) -> Tensor:
        return self.fc(torch.cat(parts, 1))


class Auxiliary(nn.Module):
    """In training a dict with another output first; layers that return tuples on the way."""

    def __init__(self):
        super().__init__()
        self.a, self.auxiliary, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.memory, self.joined = nn.LSTM(4, 4, batch_first=True), Joined()

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        x = self.a(x)
        auxiliary = self.auxiliary(x)
        x, _ = self.memory(self.joined(x.chunk(2, dim=1))[:, None])
        x = self.b(x[:, 0])
        return {"auxiliary": auxiliary, "out": x} if self.training else x


class Wrapped(nn.Module):
    """A model inside a model."""

    def __init__(self):
        super().__init__()
        self.inner = Preactivations()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class WrappedLayers(Wrapped):
    def __init__(self):
        super().__init__()
        self.inner = InPlace()


class ControlFlow(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x  # line "control flow"


class InModule(nn.Module):
    """The same in a module that holds most of the model."""

    def __init__(self):
        super().__init__()
        self.net, self.head = ControlFlow(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class OverwritesUnderView(ControlFlow):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        first = x[:, 0]
        x += 1  # line "view"
        return first


class OtherInTraining(ControlFlow):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return x * 2 if self.training else x  # line "mode"


class FixedNoise(ControlFlow):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.randn(4)  # line "noise"


class TwoInputs(ControlFlow):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x) + y


class Window(nn.Module):
    """Works on pairs of tokens, which become rows of a larger batch, as in Swin."""

    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(2 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        pairs = self.fc(x.view(batch, length // 2, 2 * width).reshape(-1, 2 * width))
        rows = pairs.shape[0] // (length // 2)
        return x + pairs.view(rows, length, width)


class Windows(nn.Module):
    """Sizes decide what is done, and are read before the layers after which they are used."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Linear(4, 8), nn.ModuleList(Window(8) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        x = self.embed(x)
        if length % 2:
            x, length = F.pad(x, (0, 0, 0, 1)), length + 1
        for layer in self.layers:
            x = layer(x)
        assert x.ndim == 3 and x.shape[1] == length, "padded"
        assert len(x[0]) == length
        steps = sum(self.head(x[:, step]) for step in range(length))
        return steps.reshape(batch, x.shape[2:].numel() - 5) / x.numel() * batch


class GivesItsSize(nn.Module):
    """Beside its output, and writes in a way that cannot be traced."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[int], int]:
        x = x.clone()
        x[:, 0] = 0
        return x, list(x.shape[1:]), len(x)


class PassesSizesOn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.clear, self.b, self.c = nn.Linear(4, 4), GivesItsSize(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, size, batch = self.clear(self.a(x))
        x = self.b(x)
        return self.c(x if size[0] == 4 else -x).view(-1, *size)


class FirstRows(nn.Module):
    """The size of a part of the batch is neither constant nor a multiple of the batch size."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:8].shape[0]
        return self.b(self.a(x)) * rows


class SequenceFirst(nn.Module):
    """Between its ends the batch is the second dimension."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).transpose(0, 1)
        return self.d(self.c(self.b(x)).transpose(0, 1))


class Broadcasts(nn.Module):
    """Decides by the size of the batch."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 4), nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens, positions = self.tokens(x), torch.arange(x.shape[1], device=x.device)[None]
        if x.shape[0] != positions.shape[0] or max(x.shape[0], 1) < 1:
            positions = positions.expand(x.shape[0], -1)
        assert positions.shape == x.shape
        return tokens + self.positions(positions)


class Asserts(ControlFlow):
    """Of values, which nothing but tensors with values can answer."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.sum() < 1e9, "too large"
        assert x.shape[0] % 3 == 0
        assert not x.sum() > 1e9
        assert x.sum() < 1e9 and x.sum() > -1e9
        return self.fc(x)


class DrawsForAKnownShape(ControlFlow):
    """Numbers that tracing would draw once and for all, were the shape known to it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.rand(x.shape[1:], dtype=x.dtype)


class FollowsADtype(ControlFlow):
    """Which autocast changes, after a decision by one that it does not change."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.fc.weight.dtype:
            x = x.to(self.fc.weight.dtype)
        x = self.fc(x)
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device).index_add(0, torch.arange(x.shape[0]), x)


class SizesOneByOne(ControlFlow):
    def forward(self, x: Tensor) -> Tensor:
        state, noise = torch.zeros(x.shape[0], 4), torch.rand(x.shape[0], 1, dtype=x.dtype)
        return self.fc(x + state * torch.ones(4) + noise)


class MakesModules(ControlFlow):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Flatten()(nn.ReLU()(self.fc(x)))


class MakesLayers(ControlFlow):
    def __init__(self):
        super().__init__()
        self.parts = [nn.Linear(4, 4)]

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](self.fc(x))  # line "layer"


class DropsBeforeShortcut(Residual):
    """What follows stochastic depth is out of step in the traces of the modes."""

    def __init__(self, width: int):
        super().__init__(width)
        self.shortcut = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc(self.norm(x))) + self.shortcut(x)


class Shortcuts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), DropsBeforeShortcut(4), DropsBeforeShortcut(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class Checkpointed(Recurrent):
    """Keeps few activations, in training."""

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.cell, x, use_reentrant=False) if self.training else self.cell(x)
        return self.out(x)


class Masked(nn.Module):
    """What it takes from its input at first is needed by every layer."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = x > 0
        for layer in self.layers:
            x = layer(x).masked_fill(mask, 0.0)
        return self.head(x)


class Encoder(nn.Module):
    """torch's encoder, all layers in one module."""

    def __init__(self, nested: bool = True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 3, nn.LayerNorm(8), enable_nested_tensor=nested)
        self.tokens, self.encoder, self.head = nn.Embedding(11, 8), encoder, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(x)).mean(1))


class CausalEncoder(Encoder):
    """It is given a mask, once with the hint that it is causal."""

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(self.encoder(self.tokens(x), mask), mask, None, True).mean(1))


class PaddedEncoder(Encoder):
    """It is given the mask of the padding."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(x), src_key_padding_mask=x > 8)[:, 0])


class PaddedLayers(PaddedEncoder):
    """Which it does not make anything of but for its layers."""

    def __init__(self):
        super().__init__(nested=False)


class Wide(nn.Module):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class MostInOne(nn.Module):
    """Most of the weights are in one of its modules, and few of its layers."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(6)), Wide(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.narrow:
            x = layer(x).relu()
        return self.head(self.wide(x))
