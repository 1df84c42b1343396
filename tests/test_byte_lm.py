"""The byte-level language model of benchmarks/: a second domain through the plug-in keys alone."""

import sys

import pytest
import torch
import yaml
from conftest import REPOSITORY, assert_same_run, metrics_of, train_in_processes, train_locally

from blpipe.config_file import dump_config, load_config
from blpipe.data import open_data
from blpipe.plan import make_plan

CONFIG = REPOSITORY / "benchmarks/byte_lm/byte_lm_k4.yaml"
TEXT = "Backward links, one stage back. " * 400 + "😀"  # bytes in the held-out part that training never saw


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """A text file; the repository's root is the working directory."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "path", [str(REPOSITORY), *sys.path])
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def byte_lm(path):
    """The module."""
    from benchmarks.byte_lm import byte_lm
    return byte_lm


def test_the_shipped_config_fits_together(path):
    command = f"# torchrun --standalone --nproc-per-node=4 -m blpipe train {CONFIG.relative_to(REPOSITORY)}"
    assert CONFIG.read_text().startswith(command)
    config = load_config(CONFIG, [f"data.args.path={path}"])
    assert config.name == CONFIG.stem
    plan = make_plan(config, open_data(config.data, config.seed).spec)
    assert [plan.block_names(k)[0] for k in range(4)] == ["embed", "block2", "block4", "block6"]
    assert plan.classes == 256


def test_it_trains_alike_in_both_engines_and_its_bits_per_byte_fall(path, tmp_path):
    config = load_config(CONFIG, [
        f"data.args={{path: {path}, length: 16}}", "model.args={length: 16, dim: 16, heads: 2, depth: 8}",
        "data.train_samples=320", "data.test_samples=40", "train={epochs: 2, batch_size: 16}",
        "partition={cuts: [block4]}", "runtime.device=cpu"])
    tree = yaml.safe_load(dump_config(config))
    local = train_locally(tree, tmp_path)
    assert_same_run(local, *train_in_processes([tree], 2, tmp_path))
    for first, last in zip(metrics_of(local)[:2], metrics_of(local)[2:], strict=True):
        assert last[3] < first[3]  # training loss
        assert last[5] < 6.5  # on held-out text; a uniform guess has 8 bits


def test_windows_hold_the_text_in_order_and_the_byte_after_each(byte_lm, path):
    text = list(TEXT.encode())
    train, test = byte_lm.text(path, 16)
    windows = [*train, *test]
    assert len(train) == len(windows) * 9 // 10
    for index, (x, y) in enumerate(windows):
        assert x.tolist() == text[16 * index:16 * (index + 1)]
        assert y.tolist() == text[16 * index + 1:16 * (index + 1) + 1]
    assert len(windows) == (len(text) - 1) // 16
    assert len(train.classes) == 256


def test_no_position_sees_what_comes_after_it(byte_lm):
    model = torch.nn.Sequential(*byte_lm.blocks(length=8, dim=16, heads=2, depth=2).values())
    x = torch.randint(256, (3, 8))
    changed = x.clone()
    changed[:, 5] += 1
    changed %= 256
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_the_loss_of_a_uniform_guess_is_eight_bits(byte_lm):
    loss = byte_lm.bits()(torch.zeros(2, 4, 256), torch.randint(256, (2, 4)))
    assert loss.item() == pytest.approx(8.0)
