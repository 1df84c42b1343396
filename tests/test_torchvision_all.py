"""Every classification model of torchvision: its blocks are the model, and it trains in both engines.

    python -m pytest -m slow tests/test_torchvision_all.py

A model is built in every process: the largest need about 15 GiB of memory, and as much on the disk for a while.
"""

import shutil

import pytest
import torchvision
from conftest import assert_same_run, train_in_processes, train_locally
from families import assert_blocks_are_the_model, one_step

NAMES = torchvision.models.list_models(module=torchvision.models)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_there_are_80_models():
    assert len(NAMES) >= 80


@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_are_the_model(name):
    assert_blocks_are_the_model(name)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_same_in_both_engines(name, tmp_path):
    tree = one_step(name)
    run, = train_in_processes([tree], 4, tmp_path, timeout=1200)
    assert_same_run(run, train_locally(tree, tmp_path))
    shutil.rmtree(tmp_path)
