"""The README's own commands, in a copy of the repository with a virtual environment of its own."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
COMMANDS = [command.replace("\\\n", "") for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
            for command in re.split(r"(?<!\\)\n", block.strip())]
ACTIVATE = COMMANDS[2]
FILES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", README, re.S))
# What the network would bring; everything else of the command stays.
SYNTHETIC = "data='{name: synthetic, args: {shape: [3, 32, 32], classes: 10, samples: 16}}' train.epochs=1 " \
    "train.batch_size=8"
# Only the first run of the quickstart has to learn. That of the name `often` has steps after the 160th.
FEW = {"byte_lm_k4": " train.epochs=1 data.train_samples=160 data.test_samples=64",
       "configs/quickstart.yaml": " data.train_samples=350 data.test_samples=64", "name=often": " train.batch_size=8"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's files, and a .venv that borrows every installed package but blpipe itself."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("benchmarks", "blpipe", "configs", "launch"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, folder)
    venv.create(folder / ".venv", with_pip=False)
    borrowed = folder / ".venv/lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (borrowed / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    return folder


def run(command, folder, timeout=110):
    """A command line as a user's shell would run it, pip and torchrun being at hand."""
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=timeout,
                          env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""})
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(240)
def test_the_quickstart_installs_trains_and_reaches_97_percent(copy):
    assert COMMANDS[0] == "bash launch/quickstart.sh"
    output = run(COMMANDS[0], copy, timeout=230)
    assert "run folder: runs/quickstart" in output
    result = json.loads((copy / "runs/quickstart/result.json").read_text())
    assert result["engine"] == "pipeline"
    assert result["val_accuracy"] >= 0.97
    assert len(result["stages"]) == 4


def test_the_test_command_is_this_one_and_then_the_environment_is_activated():
    assert COMMANDS[1] == "bash launch/test.sh"
    assert "launch/test.sh" in (REPOSITORY / ".ci/run").read_text()
    assert ACTIVATE == "source .venv/bin/activate"


@pytest.mark.parametrize("command", COMMANDS[3:])
def test_the_other_commands_run_in_the_order_of_the_readme(copy, command):
    offline = command.replace("data.download=true", SYNTHETIC)
    if command in COMMANDS[:COMMANDS.index(command)]:
        offline += " --overwrite"
    for part, fewer in FEW.items():
        if part in command and " plan " not in command:
            offline = offline.partition("#")[0] + fewer
    run(f"{ACTIVATE} && {offline}", copy)


def test_the_worked_example_is_the_shipped_file_in_under_forty_lines():
    name, code = next(iter(FILES.items()))
    assert code.count("\n") + 1 < 40
    assert without_docstrings(code) == without_docstrings((REPOSITORY / name).read_text())


def without_docstrings(code):
    """The code, laid out anew."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)


def test_the_shown_output_has_the_shape_of_the_real_one():
    shown = re.search(r"It ends with\n\n```\n(.*?)```", README, re.S)[1].splitlines()
    assert shown[-6].split() == ["stage", "blocks", "parameters", "accuracy", "busy", "waiting"]
    assert float(re.findall(r"([\d.]+) %", shown[-2])[0]) >= 97.0
    assert shown[-1] == "run folder: runs/quickstart"
