"""Malformed input by machine: whatever is given, an error of ours, one line each, or what was meant; nothing else.

The examples are the same on every run. tests/test_config.py and tests/test_data_sets.py have the single cases.
"""

import io
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, small_config, train_locally
from data_under_test import arrays
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from test_config import FRAGMENTS, KEYS, SMALLEST, SMALLEST_YAML, json_like

from blpipe import cli, runs
from blpipe.checkpoint.folders import check, checkpoints
from blpipe.checkpoint.state import model_state, read
from blpipe.config import Config, DataConfig
from blpipe.config_file import dump_config, load_config, parse_config
from blpipe.data import open_data
from blpipe.errors import ConfigError, UserError
from blpipe.run_folder import make_ready


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


def touch(*_: Any) -> None:
    """What no file may call."""
    raise SystemExit("a file ran code")


class RunsCode:
    """Calls `touch` when it is unpickled."""

    def __reduce__(self):
        return touch, ()


def check_lines(error: UserError) -> None:
    """Each problem is one line that a terminal can show."""
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    assert problems
    assert all(problem.isprintable() and 0 < len(problem) < 3000 for problem in problems), problems


def accepted(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns; None where it raises an error of ours."""
    try:
        return function(*args)
    except UserError as error:
        check_lines(error)
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bad")


# Configs.

def deep(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


itself: list = []
itself.append(itself)
WILD = [
    10**30, -10**30, 10**5000, -10**5000, 2**63, 1e308, -0.0, float("nan"), float("inf"), b"", b"\xff\x00", "", "\0",
    "\x1b[31m", "a\nb", "\ud800", "\u2028", "x" * 5000, "all", "1e999", "-", "../..", "a:b", ":", "a.b:c", ".:x",
    "~nobody/x", [], {}, [[]], [None], (), set(), {"a": set()}, deep(60), deep(3000), itself, Ellipsis, object, *KEYS]
extremes = st.integers(0, len(WILD) - 1).map(lambda i: WILD[i])  # hypothesis cannot print all of them
wild = extremes | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=4) | json_like


def paths_of(tree: dict, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*prefix, key))


DEFAULTS = parse_config(SMALLEST | {"data": {"normalize": {"mean": [0.5], "std": [0.5]}}}).model_dump()
PATHS = list(paths_of(DEFAULTS))
odd_keys = st.sampled_from(["x", "", "\0", "a\nb", "\x1b[31m", "\ud800", "x" * 5000, "a.b", *KEYS])
places = st.sampled_from(PATHS) | st.tuples(st.sampled_from(PATHS), odd_keys).map(lambda both: (*both[0], both[1]))


def changed(tree: dict, path: tuple[str, ...], value: Any) -> dict:
    """A copy with a value put at a path, through whatever stood in its way."""
    key, *rest = path
    below = tree.get(key)
    return tree | {key: changed(below if isinstance(below, dict) else {}, tuple(rest), value) if rest else value}


@examples(400)
@given(changes=st.lists(st.tuples(places, wild), min_size=1, max_size=3))
@example(changes=[(("data", "target"), "\x1f")])
@example(changes=[(("partition", "stages"), 10**18), (("method", "head"), "none")])  # answered at once
def test_a_config_with_any_values_in_it(changes):
    tree = DEFAULTS
    for path, value in changes:
        tree = changed(tree, path, value)
    config = accepted(parse_config, tree)
    assert config is None or isinstance(config, Config)


TAGGED = [f"!!{tag} " for tag in (
    "python/object/apply:test_bad_input.touch", "python/object/new:test_bad_input.RunsCode",
    "python/name:test_bad_input.touch", "python/module:os", "python/tuple", "binary", "set", "omap", "pairs", "int",
    "float", "bool", "null", "timestamp", "merge", "value", "map", "seq", "str")]
SNIPPETS = [*FRAGMENTS, *TAGGED, "!x ", "%TAG ! tag:yaml.org,2002:python/\n---\n", "%YAML 9.9\n---\n", "&a [*a]",
            "{<<: *a}", "<<: [*a, *a]", "\0", "\x07", "\x85", "\ufeff", "\ud7ff", "\t", "0x" + "f" * 5000, "9" * 5000,
            "1:2:3", "2001-99-99", "'\\x00'", '"\\ud800"', '"\\x1b["', '"a\\nb"', "[" * 60, "{a: " * 60, "- " * 60]
any_yaml = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=4), max_size=12).map("".join)
any_file = st.tuples(st.sampled_from(["", SMALLEST_YAML, SMALLEST_YAML + "seed: "]), any_yaml).map("".join)


def loaded(path: Path, overrides: tuple[str, ...] = ()) -> Config | None:
    """The config, which then survives a run folder; None where it is refused."""
    config = accepted(load_config, path, overrides)
    if config is not None:
        path.write_text(dump_config(config))
        assert parse_config(yaml.safe_load(dump_config(config))).name == config.name
        assert accepted(load_config, path) is not None
    return config


@examples(400)
@given(text=any_file)
def test_any_text_with_tags_anchors_and_merges_as_a_file(folder, text):
    path = folder / "any.yaml"
    path.write_bytes(text.encode("utf-8", "replace"))
    loaded(path)


@examples(200)
@given(source=st.sampled_from(sorted((REPOSITORY / "configs").glob("*.yaml"))), data=st.data())
def test_a_shipped_config_damaged_anywhere(folder, source, data):
    path = folder / "damaged.yaml"
    path.write_bytes(damaged(source.read_bytes(), data))
    loaded(path)


@examples(400)
@given(overrides=st.lists(any_yaml | st.tuples(places.map(".".join), any_yaml).map("=".join), min_size=1, max_size=3))
def test_any_overrides(folder, overrides):
    path = folder / "smallest.yaml"
    path.write_text(SMALLEST_YAML)
    loaded(path, tuple(overrides))


def laughs(levels: int, line: str) -> str:
    """Anchors a1, a2, …, each `line` with the one before nine times in it."""
    return "".join(f"  x{i}: &a{i} {line.format(', '.join([f'*a{i - 1}'] * 9))}\n" for i in range(1, levels))


@pytest.mark.parametrize("text", [
    "seed:\n  x0: &a0 [1]\n" + laughs(12, "[{}]"),
    "model:\n name: mlp\n args:\n  x0: &a0 [1]\n" + laughs(12, "[{}]"),
    "data:\n  x0: &a0 {k: 1}\n" + laughs(12, "{{<<: [{}]}}"),
    "seed: &a [*a]", "model: {name: mlp, args: &a {x: *a}}", "seed: &a {<<: *a}",
    "seed: [" + "1, " * 20_000 + "]", "model: {name: mlp, args: {x: " + "[" * 51 + "]" * 51 + "}}"])
def test_what_is_too_much_when_written_out_is_refused_at_once(folder, text):
    path = folder / "much.yaml"
    path.write_text(text + "\npartition: {stages: 2}\n")
    with pytest.raises(ConfigError, match=r"much\.yaml: not valid YAML: it (holds more than 20,000 values|is more than "
                                          r"50 deep, or holds itself) at line \d+"):
        load_config(path)


@pytest.mark.parametrize(("value", "why"), [
    ("[" + "1, " * 9_000 + "]", r"\d\d,\d\d\d bytes with every key and a line a value, of 65,536; give less"),
    ("[" * 50 + "]" * 50, "it is more than 50 deep")], ids=["long", "deep"])
def test_what_a_run_folder_could_not_keep_is_refused_before(folder, value, why):
    """It can be read in its own file, or as an override."""
    path = folder / "much.yaml"
    path.write_text("partition: {stages: 2}\nmodel: {name: mlp, args: {x: 1}}\n")
    with pytest.raises(ConfigError, match=rf"much\.yaml: holds what a run folder's config\.yaml cannot: {why}"):
        load_config(path, [f"model.args.x={value}"])


def test_a_file_of_more_than_64_kib_is_refused_unread(folder):
    path = folder / "long.yaml"
    path.write_text(SMALLEST_YAML + "#" * (64 * 1024 - len(SMALLEST_YAML)))
    assert load_config(path).model.name == "mlp"
    path.write_text(path.read_text() + "#")
    with pytest.raises(ConfigError, match=r"long\.yaml: holds more than 65,536 bytes, so it is no config"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"/dev/zero: holds more than"):
        load_config("/dev/zero")


def test_thousands_of_problems_are_told_by_the_first(folder):
    path = folder / "many.yaml"
    path.write_text(SMALLEST_YAML + "".join(f"k{i}: 1\n" for i in range(3000)))
    with pytest.raises(ConfigError, match="k0: unknown key") as caught:
        load_config(path)
    assert caught.value.problems[-1] == "config: 2,950 more of this kind"
    assert len(caught.value.problems) == 51


@pytest.mark.parametrize(("key", "value"), [("runtime.threads", 10**5), ("data.workers", 10**5),
                                            ("runtime.runs", '"a\\0b"'), ("runtime.runs", '"\\ud800"'),
                                            ("runtime.runs", "é" * 128), ("runtime.runs", "a/" * 1500),
                                            ("name", "x" * 201), ("data.root", '"a\\0b"')])
def test_what_would_end_the_process_is_refused(folder, key, value):
    path = folder / "smallest.yaml"
    path.write_text(SMALLEST_YAML)
    with pytest.raises(ConfigError, match=rf"^{key}: "):
        load_config(path, [f"{key}={value}"])


# Arrays.

def damaged(whole: bytes, data: st.DataObject) -> bytes:
    """Bytes cut, flipped, removed, doubled or overwritten, one to three times."""
    for _ in range(data.draw(st.integers(1, 3))):
        start, length = data.draw(st.integers(0, len(whole))), data.draw(st.integers(1, 9))
        before, middle, after = whole[:start], whole[start:start + length], whole[start + length:]
        whole = data.draw(st.sampled_from([
            before, before + after, before + middle + middle + after, after + before,
            before + bytes(b ^ 1 << data.draw(st.integers(0, 7)) for b in middle[:1]) + middle[1:] + after,
            before + data.draw(st.sampled_from([b"\0", b"\xff", b"PK\x03\x04", b"PK\x01\x02"])) * length + after]))
    return whole


def opened(path: Path) -> Any:
    return open_data(DataConfig(name="arrays", root=str(path)), 0)


def zipped(save: Callable[..., None] = np.savez, **changes: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays(**changes))
    return buffer.getvalue()


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required:UserWarning")
def test_a_damaged_npz_file_is_refused_or_holds_what_it_held(folder, save):
    path, whole = folder / "a.npz", zipped(save)
    path.write_bytes(whole)
    x, y = next(opened(path).test_batches(9))

    @examples(400)
    @given(data=st.data())
    def check(data):
        path.write_bytes(damaged(whole, data))
        found = accepted(opened, path)
        if found is not None:
            batch = next(found.test_batches(9))
            assert torch.equal(batch[0], x)
            assert torch.equal(batch[1], y)

    check()


def with_member(name: str, content: bytes) -> bytes:
    """A sound .npz file but for one array, whose bytes are these; the checksums fit."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(zipped())) as source, zipfile.ZipFile(buffer, "w") as target:
        for member in source.namelist():
            target.writestr(member, content if member == f"{name}.npy" else source.read(member))
    return buffer.getvalue()


def npy(header: str, values: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1", "replace")
    return b"\x93NUMPY" + version + len(text).to_bytes(4 if version > b"\x01\x00" else 2, "little") + text + values


lengths = st.integers(0, 9) | st.sampled_from([-1, 2**31, 2**62, 2**63, 2**64, 10**30, 10**5, "3", None, 1.5, True])
shapes = st.lists(lengths, max_size=5).map(tuple)
descriptions = st.sampled_from(["|u1", "<i8", ">i8", "|O", "O", "<f4", "|V9", "<M8[s]", "|S0", "<U999999999", "", "x",
                                [("a", "|O")], [("a", "<i8")], ("<i8", (2, 2)), ("|u1", (2**40,)), None, 7])
headers = st.fixed_dictionaries({"descr": descriptions, "fortran_order": st.booleans() | st.none(),
                                 "shape": shapes | lengths}).map(repr) | st.text(max_size=40) | st.sampled_from(
    ["(" * 9000, "[" * 9000, "-" * 9000 + "1", "{'descr': " * 500, "9" * 9000, "__import__('os').abort()"])


@examples(300)
@given(name=st.sampled_from(["train_x", "train_y", "test_x", "test_y"]), header=headers, values=st.binary(max_size=80),
       version=st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"]))
@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required:UserWarning")
def test_any_array_header_in_a_sound_zip_file(folder, name, header, values, version):
    path = folder / "h.npz"
    path.write_bytes(with_member(name, npy(header, values, version)))
    accepted(opened, path)


@pytest.mark.parametrize("shape", [(2**36, 4, 4, 3), (2**62, 2**62, 1, 1), (10**4, 100, 100, 3), (-1, -4, 4, 3)])
@pytest.mark.parametrize("lies", [False, True])
def test_a_huge_declared_shape_is_given_no_memory(folder, shape, lies, monkeypatch):
    path = folder / "huge.npz"
    path.write_bytes(with_member("train_x", npy(repr({"descr": "|u1", "fortran_order": False, "shape": shape}), b"12")))
    if lies:  # the directory of the zip file as well
        read = zipfile.ZipFile.getinfo

        def lying(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
            info = read(archive, name)
            info.file_size = 2**60
            return info

        monkeypatch.setattr(zipfile.ZipFile, "getinfo", lying)
    with little_memory(), pytest.raises(ConfigError, match=r"train_x in '.*huge\.npz' has the shape \[.*, and fewer"):
        opened(path)


def test_an_array_of_more_values_than_its_shape_says_is_refused(folder):
    path = folder / "more.npz"
    header = repr({"descr": "|u1", "fortran_order": False, "shape": (6, 4, 4, 3)})
    path.write_bytes(with_member("train_x", npy(header, bytes(6 * 4 * 4 * 3 + 1))))
    with pytest.raises(ConfigError, match=r"ValueError: train_x goes on after its \[6, 4, 4, 3\] values"):
        opened(path)


@pytest.mark.parametrize("name", ["train_x", "train_y", "test_x", "test_y"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_never_unpickled(folder, name, save):
    path = folder / "pickle.npz"
    shape = np.shape(arrays()[name])
    objects = np.full(shape, None, dtype=object)
    objects.flat[0] = RunsCode()
    path.write_bytes(zipped(save, **{name: objects}))
    with pytest.raises(ConfigError, match=rf"^data\.root: {name} is object, but must be "):
        opened(path)


# Checkpoints.

@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of a small run."""
    place = tmp_path_factory.mktemp("saved")
    torch.set_num_threads(1)
    return checkpoints(train_locally(small_config("small", train__epochs=1), place))[-1]


def everything(path: Path) -> dict[str, torch.Tensor]:
    check(path)
    return read(path, lambda key: True) | model_state(path)


@pytest.fixture(scope="module")
def whole(saved) -> dict[str, torch.Tensor]:
    return everything(saved)


def check_checkpoint(path: Path, whole: dict[str, torch.Tensor]) -> None:
    """It is refused, or holds what it held."""
    found = accepted(everything, path)
    if found is not None:
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key].nan_to_num(), whole[key].nan_to_num()) for key in whole)


@settings(examples(60), phases=[Phase.generate])
@given(data=st.data())
def test_a_checkpoint_with_a_damaged_file(saved, whole, folder, data):
    copied = folder / "copied"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(saved, copied)
    path = data.draw(st.sampled_from(sorted(copied.iterdir())))
    path.write_bytes(damaged(path.read_bytes(), data))
    check_checkpoint(copied, whole)


@pytest.mark.parametrize("damage", ["missing", "empty", "folder", "swapped"])
def test_a_checkpoint_with_a_file_that_is_no_longer_what_it_was(saved, whole, folder, damage):
    for name in sorted(path.name for path in saved.iterdir()):
        copied = folder / "lacking"
        shutil.rmtree(copied, ignore_errors=True)
        shutil.copytree(saved, copied)
        path = copied / name
        other = next(file for file in sorted(copied.iterdir()) if file != path)
        if damage == "swapped":
            path.write_bytes((saved / other.name).read_bytes())
            other.write_bytes((saved / name).read_bytes())
        else:
            path.unlink()
        if damage == "empty":
            path.touch()
        if damage == "folder":
            path.mkdir()
        check_checkpoint(copied, whole)


# The command line.

CLI_PATHS = [path for path in PATHS if "args" not in path]
plausible = st.integers(0, 99) | st.booleans() | st.floats(0.0, 99.0) | st.none() | st.lists(
    st.integers(0, 5) | st.sampled_from(["linear", "1", "4"]), max_size=3) | st.sampled_from(
    [2**31, 2**63, 10**30, 1e300, "all", "linear", "conv", "digits", "arrays", "imagefolder", "mlp", "bp", "greedy",
     "balanced", "cosine", "adamw", "skip", "16GiB", "nowhere", "a:b", "\x1b[31m", "é" * 300])


@examples(150)
@given(changes=st.lists(st.tuples(st.sampled_from(CLI_PATHS), plausible | extremes), min_size=1, max_size=3))
def test_a_config_on_the_command_line_is_a_run_or_one_line_a_problem(folder, changes):
    tree = small_config("small", train__epochs=1)
    for path, value in changes:
        tree = changed(tree, path, value)
    with pytest.MonkeyPatch.context() as patch:
        check_train(folder / "cli", lambda: yaml.dump(tree), patch)


@examples(20)
@given(text=any_file)
def test_any_file_on_the_command_line_is_a_run_or_one_line_a_problem(folder, text):
    with pytest.MonkeyPatch.context() as patch:
        check_train(folder / "cli", lambda: text.encode("utf-8", "replace").decode(), patch)


def check_train(place: Path, text: Callable[[], str], patch: pytest.MonkeyPatch) -> None:
    """`train` in an empty folder, but for the training itself: a whole run folder, or nothing but lines of ours."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    patch.chdir(place)
    patch.setattr(runs, "_train", lambda engine, run, _: (
        make_ready(run.folder, run.plan.config, run.start_point), runs._Outcome())[1])
    try:
        (place / "bad.yaml").write_text(text())
    except (TypeError, ValueError, yaml.YAMLError, RecursionError):  # no such file can be
        return
    said, errors = io.StringIO(), io.StringIO()
    patch.setattr("sys.stdout", said)
    patch.setattr("sys.stderr", errors)
    try:
        code = cli.main(["train", "bad.yaml"])
    except SystemExit as stop:
        code = stop.code
    made = sorted(path.name for path in place.iterdir() if path.name != "bad.yaml")
    lines = errors.getvalue().splitlines()
    if code == 0:
        assert (len(made), lines) == (1, [])
        assert load_config(next(place.glob("*/*/config.yaml"))) is not None
    else:
        assert (code, made) == (2, []), lines
        assert lines
        assert all(line.startswith("blpipe: ") and line.isprintable() for line in lines), lines
