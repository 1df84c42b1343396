"""Models with several tensors on their way at a cut: these are packed, and all is as in the plain model."""

import re
from math import prod

import pytest
import torch
import torch.nn.functional as F
import traceable
from conftest import assert_same_run, small_config, train_in_processes, train_locally
from families import assert_same_state
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import blpipe
from blpipe.checkpoint.folders import newest_intact
from blpipe.checkpoint.state import model_state
from blpipe.config_file import parse_config
from blpipe.data import open_data
from blpipe.errors import ConfigError
from blpipe.models.packing import pack, part_of
from blpipe.plan import make_plan


class Convolution(nn.Module):
    """With BatchNorm and dropout."""

    def __init__(self, taken: int, given: int):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(taken, given, 3, 1, 1), nn.BatchNorm2d(given)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W]."""
        return F.dropout(F.relu(self.bn(self.conv(x))), 0.1, self.training)


class UNet(nn.Module):
    """Two maps wait for the way up while the third goes down; five classes for every pixel."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.bottom = Convolution(2, 3), Convolution(3, 4), Convolution(4, 6)
        self.up2, self.up1, self.out = Convolution(10, 4), Convolution(7, 3), nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 2, H, W] to [B, H, W, 5]."""
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        up = self.bottom(F.max_pool2d(second, 2))
        up = self.up2(torch.cat([F.interpolate(up, scale_factor=2.0), second], 1))
        up = self.up1(torch.cat([F.interpolate(up, scale_factor=2.0), first], 1))
        return self.out(up).permute(0, 2, 3, 1)


class Layer(nn.Module):
    """Attention of one head to the tokens that a mask leaves."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x_BTD: Tensor, mask: Tensor) -> Tensor:
        """A mask of bools, or one that is added."""
        q, k, v = self.qkv(x_BTD).chunk(3, -1)
        return x_BTD + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Masked(nn.Module):
    """Every layer needs the mask of the padding, besides its tokens."""

    def __init__(self, added: bool = False):
        super().__init__()
        self.embedding, self.added = nn.Embedding(20, 8), added
        self.layers, self.fc = nn.ModuleList(Layer() for _ in range(4)), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, 4]."""
        mask = (tokens != 0)[:, None, :].expand(-1, tokens.shape[1], -1)
        if self.added:
            mask = torch.where(mask, 0.0, -1e9)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.fc(x[:, 0])


class MaskedAnew(Masked):
    """The tokens themselves are on their way."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, 4]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, tokens.bool()[:, None, :].expand(-1, tokens.shape[1], -1))
        return self.fc(x[:, 0])


class Nested(nn.Module):
    """Parts of the tokens are samples of their own beside the tokens."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(4))
        self.outer = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.embedding, self.fc = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, 4]."""
        x = self.embedding(tokens)
        parts = x.reshape(-1, 4, 2)  # [B · T, 4, 2]
        for inner, outer in zip(self.inner, self.outer, strict=True):
            parts = parts + inner(parts)
            x = x + outer(x + parts.reshape(x.shape))
        return self.fc(x.mean(1))


def scenes() -> tuple:
    """Images of 8×8, and a class for every pixel, which follows from its first channel."""
    x = torch.rand(56, 2, 8, 8)
    y = (5 * x[:, 0]).long().clamp(max=4)
    return (x[:40], y[:40]), (x[40:], y[40:])


def texts() -> tuple:
    """Six tokens, the last ones of which may be padding, and a class."""
    x = torch.randint(1, 20, (56, 6))
    x[:, 3:] *= torch.rand(56, 3).gt(0.5)
    return (x[:40], x[:40, 0] % 4), (x[40:], x[40:, 0] % 4)


def samples(model: nn.Module, size: int = 3) -> Tensor:
    """A batch for a model of these."""
    return torch.rand(size, 2, 8, 8) if isinstance(model, UNet) else torch.randint(0, 11, (size, 6))


def config(name: str, model: str, data: str, live: int = 3, **changes) -> dict:
    """A run of two epochs, in batches of 16, the last one of which holds 8."""
    changes = {"partition__stages": 4} | changes
    return small_config(name, model={"target": f"test_live_tensors:{model}", "live_tensors": live},
                        data={"target": f"test_live_tensors:{data}"}, **changes)


def plan_of(tree: dict):
    """The plan of a config."""
    parsed = parse_config(tree)
    return make_plan(parsed, open_data(parsed.data, 0).spec)


MODELS = {"UNet": (UNet, 3), "Masked": (Masked, 2), "Added": (lambda: Masked(added=True), 2),
          "Nested": (Nested, 2), "Padded": (traceable.PaddedLayers, 2)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_are_the_model_with_its_gradients(name, training):
    build, live = MODELS[name]
    torch.manual_seed(0)
    model = build().train(training)
    x, expected = samples(model), {}
    blocks = blpipe.blocks_of(model, samples(model, 1), live_tensors=live).train(training)
    assert len(blocks) >= 5 and blocks.packings
    for network in (model, blocks):
        torch.manual_seed(1)
        model.zero_grad()
        out = network(x)
        out.square().sum().backward()
        found = {"output": out.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}
        expected = expected or found
    assert all(torch.equal(found[each], tensor) for each, tensor in expected.items())
    assert_same_state(model, blocks)


class Gated(nn.Module):
    """A number for each sample is made last, and read by the next layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.gates = nn.Embedding(20, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(2))
        self.layers, self.fc = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, 4]."""
        x = self.embedding(tokens)
        for gate, layer in zip(self.gates, self.layers, strict=True):
            each = gate(x.mean(1)).squeeze(-1)
            x = layer(x) * each[:, None, None]
        return self.fc(x.mean(1))


def test_what_heads_read_has_a_shape_that_they_can_read():
    packings = blpipe.blocks_of(Gated(), samples(Gated()), live_tensors=2).packings
    assert {packing.main.shape for packing in packings.values()} == {(6, 8)}
    assert any(packing.parts[-1].shape == () for packing in packings.values())


def test_blocks_end_where_the_fewest_tensors_pass():
    model = UNet()
    whole = blpipe.blocks_of(model, samples(model))
    assert list(whole._modules) == ["down1", "down2", "up1", "out"] and not whole.packings
    for live in (2, 3):
        blocks = blpipe.blocks_of(model, samples(model), live_tensors=live)
        assert list(blocks._modules) == ["down1", "down2", "bottom", "up2", "up1", "out"]
        passing = {name: [part.shape for part in packing.parts] for name, packing in blocks.packings.items()}
        assert passing == {"down2": [(3, 8, 8), (4, 4, 4)], "bottom": [(3, 8, 8), (10, 4, 4)]}


def test_what_no_weights_come_before_gets_no_gradient():
    model = Masked(added=True)
    blocks = blpipe.blocks_of(model, samples(model), live_tensors=2)
    mask, x = blocks.packings["embedding"].parts
    assert (mask.shape, mask.is_learned) == ((6, 6), False) and (x.shape, x.is_learned) == ((6, 8), True)
    packed = blocks[0](samples(model)).detach().requires_grad_()
    assert not part_of(packed, *mask).requires_grad and part_of(packed, *x).requires_grad
    blocks[1:](packed).sum().backward()
    assert not packed.grad[:, :36].any() and packed.grad[:, 36:].any()


@given(parts=st.lists(st.tuples(st.integers(1, 3), st.lists(st.integers(1, 3), max_size=3), st.booleans()), min_size=1,
                      max_size=4), batch=st.integers(1, 3))
def test_packed_tensors_come_out_as_they_went_in(parts, batch):
    parts = [*parts, (1, [2], False)]  # there is one that learns
    tensors = [torch.rand(shape[::-1] + [batch * rows]).permute(*range(len(shape), -1, -1)) for rows, shape, _ in parts]
    tensors = [x > 0.5 if is_mask else x for x, (_, _, is_mask) in zip(tensors, parts, strict=True)]
    packed, start = pack(batch, *tensors), 0
    for x, (rows, shape, is_mask) in zip(tensors, parts, strict=True):
        restored = part_of(packed, start, rows, tuple(shape), is_mask, True)
        assert restored.dtype == x.dtype and torch.equal(restored, x) and restored.is_contiguous()
        start += rows * prod(shape)
    assert packed.shape == (batch, start)


def test_both_engines_train_them_bit_for_bit(tmp_path):
    last_loss = {"head": "none", "local_weight": 0.0,
                 "link": {"reach": "all", "take": "farthest", "length": "all", "delay": 1, "delay_unit": "microbatch"}}
    trees = [
        config("pixels", "UNet", "scenes", train__microbatches=2, train__wire="bf16", train__channels_last=True,
               data__augment={"crop": 1, "flip": True}),
        config("last_loss", "UNet", "scenes", method=last_loss, train__microbatches=2),
        config("masked", "Masked", "texts", 2, method__loss="supcon", method__link__length="all",
               train__recompute=True),
    ]
    for tree, run in zip(trees, train_in_processes(trees, 4, tmp_path), strict=True):
        local = train_locally(tree, tmp_path)
        assert_same_run(run, local)
        model = Masked() if tree["name"] == "masked" else UNet()
        model.load_state_dict(model_state(newest_intact(local)[0]), strict=True)


def test_heads_and_losses_read_the_newest_tensor():
    plan = plan_of(config("a", "UNet", "scenes", partition__cuts=["down2", "bottom", "up2"], train__channels_last=True,
                          method__loss={"target": "test_live_tensors:seen"}))
    assert [boundary.shape for boundary in plan.boundaries] == [(3, 8, 8), (4, 4, 4), (10, 4, 4), (8, 8, 5)]
    assert [plan.activation(16, k).shape for k in range(3)] == [(16, 3, 8, 8), (16, 256), (16, 352)]
    assert [plan.channels_last(k) for k in range(3)] == [True, False, False]
    for k in (1, 2):
        x, packed = torch.randn(16, *plan.boundaries[k].shape), plan.activation(16, k).shape
        given = pack(16, torch.randn(16, 3, 8, 8), x)
        assert given.shape == packed
        assert plan.build_head(k)(given).shape == (16, 8, 8, 5)
        assert plan.build_loss(k)(torch.zeros(()), torch.zeros(()), given) == x.sum()


def test_a_head_for_another_shape_is_told_what_it_reads():
    with pytest.raises(ConfigError, match=r"^method\.head \(after block down2\) cannot take an input of shape "
                                          r"\[16, 4, 4, 4\] .*; make it for this shape$"):
        plan_of(config("a", "UNet", "scenes", partition__cuts=["bottom", "up2", "up1"],
                       method__head={"target": "test_live_tensors:of_six_channels"}))


def of_six_channels(boundary) -> nn.Module:
    """A head for the bottom alone."""
    return nn.Conv2d(6, boundary.classes, 1)


def seen(boundary) -> object:
    """A loss that tells what it is given of a stage's output."""
    return lambda logits, targets, x: x.sum()


class TwoTypes(nn.Module):
    """Its sum has more digits than what the layers give."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(20, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.fc = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, 4]."""
        x = self.embedding(tokens).mean(1)
        total = x.double()
        for layer in self.layers:
            x = layer(x)
            total = total + x
        return self.fc(total.float())


class TimeFirst(nn.Module):
    """The batch is the second dimension inside."""

    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.Embedding(20, 8), nn.Linear(8, 4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 3, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, 4]."""
        return self.fc(self.encoder(self.embedding(tokens).transpose(0, 1))[0])


@pytest.mark.parametrize(("model", "live", "note"), [
    (UNet, 1, r".* a single tensor is live, and between its layers at least 2 are \(dropout in down1, conv2d in "
              r"down2\.conv\); with model\.live_tensors=2 the largest block has 37%"),
    (Masked, 1, r".* at least 2 are \(expand in its forward, embedding in embedding\); with model\.live_tensors=2 the "
                r"largest block has \d+%"),
    (MaskedAnew, 3, r".*: between its layers the model's input, embedding in embedding, expand in its forward cannot "
                    r"pass; the model's input is int64"),
    (TwoTypes, 2, r".*: between its layers linear in layers\.0, add in its forward cannot pass; they are float32 and "
                  r"float64"),
    (TimeFirst, 1, r".*: between its layers transformerencoderlayer in encoder\.layers\.0 cannot pass; "
                   r"transformerencoderlayer in encoder\.layers\.0 is \[6, batch, 8\], whose batch is not first"),
    (Masked, 2, ""), (UNet, 2, "")])
def test_a_note_tells_which_number_of_tensors_is_enough_or_what_cannot_be_packed(model, live, note):
    uncut = blpipe.blocks_of(model(), samples(model()), live_tensors=live).uncut
    assert re.fullmatch(note, "".join(uncut)), uncut


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ConfigError, match=r"^live_tensors: 2 tensors are packed by their shapes; give an example too$"):
        blpipe.blocks_of(UNet(), live_tensors=2)
    with pytest.raises(ConfigError, match=r"^partition\.stages: 4 stages need .* with model\.live_tensors=2 the "):
        plan_of(config("a", "Masked", "texts", 1))
    with pytest.raises(ConfigError, match=r"^model\.live_tensors: 2, and the model comes as blocks, .*; leave it at 1"):
        plan_of(small_config("a", model={"target": "models_under_test:conv_net", "live_tensors": 2}))
    with pytest.raises(ConfigError, match=r"^model\.live_tensors: .* greater than or equal to 1"):
        parse_config(config("a", "Masked", "texts", 0))
    assert plan_of(config("a", "Masked", "texts", 2, train__wire="bf16"))  # masks of bools are exact in it
    with pytest.raises(ConfigError, match=r"^train\.wire: bf16 would round numbers that stage 1 passes on as they "
                                          r"came, such as a mask to be added or an index; set train\.wire=full$"):
        plan_of(config("a", "added", "texts", 2, train__wire="bf16"))


def added() -> nn.Module:
    """The mask is of numbers."""
    return Masked(added=True)
