"""The config: what is read, what is refused and how, and that nothing else can come out."""

import re
import textwrap

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from blpipe.config import Config, MethodConfig
from blpipe.config_file import dump_config, load_config, parse_config
from blpipe.errors import ConfigError

SMALLEST = {"name": "run", "model": "mlp", "partition": {"stages": 2}}
SMALLEST_YAML = "model: mlp\npartition: {stages: 2}\n"
PROPERTY = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


def parsed(**sections) -> Config:
    return parse_config(SMALLEST | sections)


def problems(**sections) -> tuple[str, ...]:
    with pytest.raises(ConfigError, match=".") as caught:
        parsed(**sections)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


@pytest.fixture
def load(tmp_path):
    """Load a config from YAML text and overrides."""
    def load(text: str = SMALLEST_YAML, *overrides: str, file: str = "run.yaml") -> Config:
        path = tmp_path / file
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return load_config(path, overrides)
    return load


# What is read.

def test_the_smallest_config_gets_the_documented_defaults():
    config = parsed()
    assert (config.model.name, config.model.target, config.model.args) == ("mlp", None, {})
    assert config.data.name == "digits"
    assert (config.method.name, config.method.head.name, config.method.loss.name) == (
        "backlink", "conv", "cross_entropy")
    assert (config.method.link.length, config.method.link.delay, config.method.link.weight) == (1, 1, 1.0)


def test_args_alone_keep_the_default_name():
    config = parsed(data={"args": {"a": 1}}, method={"head": {"args": {"hidden": 3}}})
    assert (config.data.name, config.method.head.name) == ("digits", "conv")


def test_a_target_takes_the_place_of_the_default_name():
    assert parsed(data={"target": "mine:data"}).data.name is None


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", ".1e-2", "1.0e-3", "0.001"])
def test_exponents_are_numbers_in_files_args_and_overrides(load, text):
    read = load(SMALLEST_YAML + f"optimizer: {{lr: {text}, args: {{weight_decay: {text}}}}}")
    given = load(SMALLEST_YAML, f"optimizer.lr={text}", f"optimizer.args.weight_decay={text}")
    nested = load(SMALLEST_YAML, f"optimizer.args={{deep: [{text}]}}")
    assert read.optimizer.lr == given.optimizer.lr == 0.001
    assert read.optimizer.args == given.optimizer.args == {"weight_decay": 0.001}
    assert nested.optimizer.args == {"deep": [0.001]}


@pytest.mark.parametrize("text", ["e3", "1e", "1e-3x", "'1e-3'", "resnet1e3"])
def test_texts_that_look_like_exponents_stay_texts(load, text):
    assert load(SMALLEST_YAML, f"model.args.x={text}").model.args == {"x": text.strip("'")}


def test_whole_numbers_are_read_where_a_float_is_wanted():
    config = parsed(optimizer={"lr": 1}, schedule={"milestones": [5, 7.5]})
    assert config.optimizer.lr == 1.0
    assert config.schedule.milestones == (5.0, 7.5)


def test_the_name_defaults_to_the_stem_of_the_file(load):
    assert load(file="deep.er-run.yaml").name == "deep.er-run"
    assert load("name: own\n" + SMALLEST_YAML).name == "own"
    assert load(SMALLEST_YAML, "name=given").name == "given"


def test_a_byte_order_mark_is_skipped(load):
    assert load("\ufeff" + SMALLEST_YAML) == load()


@pytest.mark.parametrize("length", ["all", 0, 3])
def test_link_length_takes_numbers_and_all(length):
    assert parsed(method={"link": {"length": length}}).method.link.length == length


def test_a_config_is_frozen_all_the_way_down():
    config = parsed()
    for section, key in ((config, "seed"), (config.method.link, "delay"), (config.train, "epochs")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 2)


def test_configs_do_not_share_their_args():
    one, other = parsed(), parsed()
    one.method.head.args["hidden"] = 3
    one.data.args["x"] = 3
    assert other.method.head.args == other.data.args == MethodConfig().head.args == {}


def test_stage_count_comes_from_stages_or_cuts():
    assert parsed().partition.stage_count == 2
    assert parsed(partition={"cuts": ["a", "b"]}).partition.stage_count == 3
    assert parsed(partition={"cuts": ["a", "b"], "stages": 3}).partition.stage_count == 3
    assert parsed(partition={"cuts": []}).partition.stage_count == 1
    assert parsed(partition={"cuts": [1, "b"]}).partition.cuts == ("1", "b")  # an nn.Sequential's own names


# Overrides.

def test_overrides_reach_any_depth_and_the_last_one_wins(load):
    config = load(SMALLEST_YAML, "train.epochs=3", "train.epochs=4", "model.args.a.b=[1, x]",
                  "method.link.length=all", "data.augment={crop: 1}")
    assert config.train.epochs == 4
    assert config.model.args == {"a": {"b": [1, "x"]}}
    assert (config.method.link.length, config.data.augment.crop) == ("all", 1)


def test_an_override_keeps_its_section_otherwise_as_it_was(load):
    config = load(SMALLEST_YAML + "train: {epochs: 7, batch_size: 32}", "train.batch_size=16")
    assert (config.train.epochs, config.train.batch_size) == (7, 16)


def test_an_override_below_a_short_form_keeps_its_name(load):
    config = load(SMALLEST_YAML, "method.head=linear", "method.head.args.hidden=3", "model.args.hidden=[4]")
    assert (config.method.head.name, config.method.head.args) == ("linear", {"hidden": 3})
    assert (config.model.name, config.model.args) == ("mlp", {"hidden": [4]})


def test_an_override_below_a_list_keeps_the_rest_of_it(load):
    config = load(SMALLEST_YAML, "partition={stages: 3}", "method.head=[conv, linear]", "method.head.0.args.hidden=3",
                  "method.head.1=mlp_sr")
    assert [(head.name, head.args) for head in config.method.head] == [("conv", {"hidden": 3}), ("mlp_sr", {})]


@pytest.mark.parametrize("key", ["args.hidden", "2", "-1.args"])
def test_an_override_below_a_list_needs_a_number_that_it_has(load, key):
    with pytest.raises(ConfigError, match=re.escape(f"method.head.{key}: method.head is a list of 2; give the number "
                                                    "of one of them, such as method.head.0, or the whole list")):
        load(SMALLEST_YAML, "method.head=[conv, linear]", f"method.head.{key}=3")


def test_an_override_fills_an_empty_section(load):
    assert load(SMALLEST_YAML + "train:\n", "train.epochs=3").train.epochs == 3


def test_the_value_of_an_override_may_hold_equals_signs(load):
    assert load(SMALLEST_YAML, "model.args.x=a=b").model.args == {"x": "a=b"}


@pytest.mark.parametrize("override", ["train.epochs", "=3", "", ".epochs=3", "train..epochs=3", "train.=3"])
def test_malformed_overrides_are_refused_with_an_example(load, override):
    with pytest.raises(ConfigError, match=re.escape(f"{override}: an override is key.sub=value, such as")):
        load(SMALLEST_YAML, override)


def test_an_override_that_is_no_yaml_is_refused_with_its_path(load):
    with pytest.raises(ConfigError, match=r"^model\.args\.x=\[1: not valid YAML: "):
        load(SMALLEST_YAML, "model.args.x=[1")


@pytest.mark.parametrize(("key", "meant"), [
    ("train.lr", "optimizer.lr"), ("optimizer.learning_rate", "optimizer.lr"), ("lr", "optimizer.lr"),
    ("optimizer.weight_decay", "optimizer.args.weight_decay"), ("train.epoch", "train.epochs"),
    ("train.max_epochs", "train.epochs"), ("train.early_stopping", "train.patience"),
    ("model.pretrained", "model.weights"), ("init_from", "model.weights"),
    ("train.label_smoothing", "method.loss={name: cross_entropy, args: {label_smoothing: …}}"),
    *((f"train.{key}", "optimizer.clip_norm") for key in ("grad_clip", "clip_grad", "max_grad_norm")),
    ("train.gradient_clip_val", "optimizer.clip_norm"), ("train.accumulate", "train.microbatches"),
    ("train.accumulate_grad_batches", "train.microbatches"), ("gradient_accumulation_steps", "train.microbatches"),
    ("train.amp", "train.precision"), ("train.mixed_precision", "train.precision"), ("train.fp16", "train.precision"),
    ("optimizer.ema", "train.ema"), ("train.model_ema_decay", "train.ema")])
def test_what_other_systems_call_a_key_is_told_where_it_is(load, key, meant):
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: unknown key; did you mean {re.escape(meant)}\?$"):
        load(SMALLEST_YAML, f"{key}=0.1")


@pytest.mark.parametrize(("key", "told"), [
    ("train.max_steps", "there is none; give train.epochs")])
def test_what_other_systems_have_and_we_do_not_is_told(load, key, told):
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: unknown key; {re.escape(told)}$"):
        load(SMALLEST_YAML, f"{key}=3")


def test_what_other_systems_call_a_value_is_told_as_ours(load):
    with pytest.raises(ConfigError, match=r"\(did you mean 'bf16'\?\)"):
        load(SMALLEST_YAML, "train.precision=bfloat16")


def test_an_unknown_key_in_an_override_is_refused_like_one_in_the_file(load):
    with pytest.raises(ConfigError, match=r"^train\.epoch: unknown key; did you mean train\.epochs\?$"):
        load(SMALLEST_YAML, "train.epoch=3")


# What is refused.

@pytest.mark.parametrize(("sections", "expected"), [
    ({"modle": "mlp"}, "modle: unknown key; did you mean model?"),
    ({"train": {"epoch": 1}}, "train.epoch: unknown key; did you mean train.epochs?"),
    ({"method": {"link": {"lenght": 1}}}, "method.link.lenght: unknown key; did you mean method.link.length?"),
    ({"data": {"augment": {"flips": True}}}, "data.augment.flips: unknown key; did you mean data.augment.flip?"),
    ({"delay": 1}, "delay: unknown key; did you mean method.link.delay?"),
    ({"train": {"weight": 1}}, "train.weight: unknown key; did you mean method.link.weight?"),
    ({"qqqqqqqqqqqqqqqq": 1}, "qqqqqqqqqqqqqqqq: unknown key"),
])
def test_unknown_keys_are_refused_with_path_and_suggestion(sections, expected):
    assert problems(**sections) == (expected,)


def test_every_error_is_said_at_once_a_line_each():
    with pytest.raises(ConfigError, match="model: is required") as caught:
        parse_config({"name": "run", "partition": {"stages": 0}, "seed": "x", "train": {"epoch": 1},
                      "method": {"link": {"delay": -1}}})
    keys = [problem.partition(":")[0] for problem in caught.value.problems]
    assert sorted(keys) == ["method.link.delay", "model", "partition.stages", "seed", "train.epoch"]
    assert str(caught.value).splitlines() == list(caught.value.problems)


@pytest.mark.parametrize(("sections", "key", "value"), [
    ({"seed": "1"}, "seed", "'1'"),
    ({"seed": 1.0}, "seed", "1.0"),
    ({"seed": True}, "seed", "True"),
    ({"seed": -1}, "seed", "-1"),
    ({"name": 3}, "name", "3"),
    ({"name": "a/b"}, "name", "'a/b'"),
    ({"name": "../up"}, "name", "'../up'"),
    ({"name": ""}, "name", "''"),
    ({"model": 3}, "model", "3"),
    ({"train": []}, "train", r"\[\]"),
    ({"train": {"epochs": 0}}, "train.epochs", "0"),
    ({"train": {"epochs": 2.5}}, "train.epochs", "2.5"),
    ({"train": {"drop_last": 1}}, "train.drop_last", "1"),
    ({"train": {"drop_last": "yes"}}, "train.drop_last", "'yes'"),
    ({"optimizer": {"lr": "0.1"}}, "optimizer.lr", "'0.1'"),
    ({"optimizer": {"lr": True}}, "optimizer.lr", "True"),
    ({"optimizer": {"lr": 0}}, "optimizer.lr", "0"),
    ({"optimizer": {"args": [1]}}, "optimizer.args", r"\[1\]"),
    ({"method": {"name": "backlinks"}}, "method.name", "'backlinks'"),
    ({"method": {"link": {"delay": -1}}}, "method.link.delay", "-1"),
    ({"method": {"link": {"delay": 1.5}}}, "method.link.delay", "1.5"),
    ({"schedule": {"name": "sine"}}, "schedule.name", "'sine'"),
    ({"schedule": {"milestones": ["1"]}}, "schedule.milestones.0", "'1'"),
    ({"schedule": {"milestones": "12"}}, "schedule.milestones", "'12'"),
    ({"schedule": {"final": 1.5}}, "schedule.final", "1.5"),
    ({"partition": {"cuts": "abc"}}, "partition.cuts", "'abc'"),
    ({"partition": {"cuts": [1.5]}}, "partition.cuts.0", "1.5"),
    ({"data": {"normalize": {"mean": [0], "std": [0]}}}, "data.normalize.std.0", "0"),
])
def test_wrong_types_and_values_are_refused_with_path_and_value(sections, key, value):
    said, = problems(**sections)
    assert re.fullmatch(rf"{re.escape(key)}: .+, got {value}", said)


@pytest.mark.parametrize("length", [-1, True, "some", 1.0, None, [1]])
def test_any_other_link_length_is_refused(length):
    assert problems(method={"link": {"length": length}}) == (
        f"method.link.length: must be a number of blocks ≥ 0, or all, got {length!r}",)


@pytest.mark.parametrize(("batch_size", "microbatches", "fits"), [(64, 3, (2, 4)), (64, 48, (32, 64)), (7, 6, (1, 7))])
def test_microbatches_that_do_not_divide_are_refused_with_the_nearest_that_do(batch_size, microbatches, fits):
    said, = problems(train={"batch_size": batch_size, "microbatches": microbatches})
    assert said.startswith(f"train: microbatches {microbatches} does not divide batch_size {batch_size}; ")
    assert int(said.rpartition(" ")[2]) in fits


@pytest.mark.parametrize(("part", "message"), [
    ({"name": "a", "target": "b:c"}, "has the name a and the target b:c; leave one out, or set it to null"),
    ({}, "give a name or a target (package.module:function)")])
def test_a_part_has_either_a_name_or_a_target(part, message):
    assert problems(model=part) == (f"model: {message}",)


def test_a_schedule_by_name_has_no_args():
    assert problems(schedule={"name": "cosine", "args": {"final": 0.1}}) == (
        "schedule: args are for a target; cosine has keys of its own, such as final: see configs/README.md",)


@pytest.mark.parametrize(("partition", "message"), [
    ({"cuts": ["a"], "stages": 3}, "partition: 1 cuts make 2 stages, but stages is 3; leave stages out"),
    ({"cuts": ["a"], "target": "b:c"}, "partition: give cuts or a target, not both"),
    ({"target": "b:c"}, "partition: give stages (how many) or cuts (the block that each later stage begins with)"),
    ({}, "partition: give stages (how many) or cuts (the block that each later stage begins with)"),
    ({"stages": 2, "target": "b:c", "strategy": "balanced"},
     "partition: give a target or strategy: balanced, not both; a target needs no strategy"),
    ({"stages": 2, "args": {"by": "size"}}, "partition: args {'by': 'size'} are for a target, or for a strategy that a "
                                            "package registered; leave them out"),
])
def test_a_partition_that_contradicts_itself_is_refused(partition, message):
    assert problems(partition=partition) == (message,)


def test_all_conflicts_between_keys_are_told_at_once():
    said = problems(method={"name": "bp", "head": ["conv", "conv"]}, optimizer={"clip_norm": 1},
                    train={"recompute": True, "compile": True, "wire": "bf16"}, runtime={"trace": True},
                    partition={"stages": 2})
    keys = ["method.head", "train.recompute", "train.wire", "optimizer.clip_norm", "runtime.trace"]
    assert [re.split("[: ]", line)[0] for line in said] == keys


def test_all_conflicts_within_a_section_are_told_beside_what_is_wrong_elsewhere():
    said = problems(partition={"stages": 2, "speeds": [1], "memory_limit": "1GiB", "args": {"a": 1}},
                    train={"epochs": "many"})
    assert [line.partition(" ")[0] for line in said] == ["partition:"] * 3 + ["train.epochs:"]


@pytest.mark.parametrize("text", ["seed: 1\nseed: 1\n", "train: {epochs: 1, epochs: 2}\n",
                                  "model: {args: {a: [{b: 1, b: 2}]}}\n"])
def test_a_key_given_twice_is_refused_with_its_line(load, text):
    with pytest.raises(ConfigError, match=r"not valid YAML: the key '\w+' is given twice .* line \d"):
        load(text)


@pytest.mark.parametrize("text", ["a: b: c", "a: [", "a: *unknown", "a:\n\tb: 1", "a: \x07", "--- 1\n--- 2", "a: !x 1",
                                  "? [1]\n: 2", "[" * 600, "seed: 0x_", "x: 2001-99-99"])
def test_malformed_yaml_is_refused_on_one_line_with_the_files_name(load, text):
    with pytest.raises(ConfigError, match=r"run\.yaml: not valid YAML: .") as caught:
        load(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1", "text", "1: 2", "null: 1", "# nothing"])
def test_a_file_that_is_no_mapping_of_keys_is_refused(load, text):
    with pytest.raises(ConfigError, match=r"run\.yaml: must be a mapping of keys to values, such as `model: "):
        load(text)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file; the shipped configs are in configs/"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"is a directory; give a file, of a run folder \S+/config\.yaml$"):
        load_config(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"bytes\.yaml: cannot be read: .*utf-8"):
        load_config(tmp_path / "bytes.yaml")


@pytest.mark.parametrize("tree", [None, [], 3, "text", {1: 2}, {("a",): 1}])
def test_trees_that_are_no_mapping_of_keys_are_refused(tree):
    with pytest.raises(ConfigError, match="^config: must be a mapping of keys to values|is required"):
        parse_config(tree)


@pytest.mark.parametrize("text", ["!!map [1]", "!!set [1]", "!!bool maybe", "!!int ''", "!!timestamp x"])
@pytest.mark.parametrize("where", ["file", "override"])
def test_yaml_tags_that_do_not_fit_are_refused(load, text, where):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(*[SMALLEST_YAML + f"seed: {text}\n"] if where == "file" else [SMALLEST_YAML, f"seed={text}"])


def test_an_override_that_is_too_deep_is_refused(load):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(SMALLEST_YAML, "seed=" + "[" * 600)


def test_yaml_merge_keys_are_merged(load):
    config = load(SMALLEST_YAML + "method: {head: &head {name: linear, args: {a: 1}}, loss: {<<: *head, name: own}}")
    assert (config.method.loss.name, config.method.loss.args) == ("own", {"a": 1})


# The round trip.

def is_exponent(text: str) -> bool:
    return re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+", text) is not None


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x85"), max_size=6).filter(
    lambda text: not is_exponent(text))
numbers = st.floats(allow_nan=False, allow_infinity=False)
leaves = st.none() | st.booleans() | st.integers() | numbers | texts | st.sampled_from(
    ["yes", "no", "null", "~", "1", "0x1", "1_0", "12:30:00", "2020-01-01", "=", "<<", "- a", "a: b", "#", " a", "é\n"])
arguments = st.dictionaries(texts, st.recursive(leaves, lambda below: st.lists(below, max_size=3)
                                                | st.dictionaries(texts, below, max_size=3), max_leaves=5), max_size=3)
positive = st.floats(0.0, 1e9, exclude_min=True)
part = st.fixed_dictionaries({"name": texts}, optional={"args": arguments}) | st.fixed_dictionaries(
    {"target": texts}, optional={"args": arguments})
configs = st.fixed_dictionaries(
    {"name": st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,6}", fullmatch=True).filter(lambda n: not is_exponent(n)),
     "model": part,
     "partition": st.fixed_dictionaries({"stages": st.integers(1, 99)}) | st.fixed_dictionaries(
         {"cuts": st.lists(texts, max_size=3)})},
    optional={
        "seed": st.integers(0, 2**70),
        "data": part.flatmap(lambda data: st.fixed_dictionaries({}, optional={
            "root": texts.filter(lambda text: "\0" not in text),
            "augment": st.fixed_dictionaries({"crop": st.integers(0, 9), "flip": st.booleans(),
                                              "mixup": st.floats(0.1, 9.0), "cutmix": st.just(0.0),
                                              "transforms": st.lists(part | texts, max_size=3)}),
            "normalize": st.fixed_dictionaries({"mean": st.lists(numbers, max_size=3),
                                                "std": st.lists(positive, max_size=3)})}).map(lambda d: data | d)),
        "method": st.fixed_dictionaries({}, optional={
            "name": st.sampled_from(["bp", "greedy", "backlink"]), "head": part, "loss": part,
            "link": st.fixed_dictionaries({}, optional={
                "length": st.integers(0, 9) | st.just("all"), "delay": st.integers(0, 9), "weight": numbers})}),
        "optimizer": st.fixed_dictionaries({}, optional={
            "name": texts, "lr": positive, "decay": st.sampled_from(["all", "matrices"]), "args": arguments}),
        "schedule": st.fixed_dictionaries({}, optional={
            "name": st.sampled_from(["constant", "cosine", "multistep", "one-cycle"]),
            "milestones": st.lists(positive, max_size=3), "final": st.floats(0.0, 1.0)}),
        "train": st.fixed_dictionaries({"microbatches": st.integers(1, 4)}, optional={
            "batch_size": st.just(24), "drop_last": st.booleans(), "recompute": st.booleans()}).filter(
                lambda train: "batch_size" in train or train["microbatches"] != 3),
    })


@settings(PROPERTY, max_examples=60)
@given(tree=configs)
def test_a_dumped_config_is_read_back_equal(folder, tree):
    config = parse_config(tree)
    path = folder / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert dump_config(again) == dump_config(config)


@pytest.mark.parametrize("change", [{"name": "1e3"}, {"model": {"name": "mlp", "args": {"x": "1e-3"}}},
                                    {"model": {"name": "mlp", "args": {"1e-3": 1}}}])
def test_texts_that_read_as_exponents_survive_the_round_trip(load, change):
    config = parsed(**change)
    assert load(dump_config(config)) == config


def test_a_next_line_character_survives_the_round_trip(load):
    config = parsed(model={"name": "a\x85b"})
    assert load(dump_config(config)) == config


def test_infinite_arguments_survive_the_round_trip(load):
    config = load(SMALLEST_YAML + "optimizer: {args: {max_norm: .inf}}")
    assert load(dump_config(config)) == config


# Whatever is given: a Config or a ConfigError.

def config_or_error(function, *args) -> Config | None:
    try:
        config = function(*args)
    except ConfigError:
        return None
    assert isinstance(config, Config)
    return config


KEYS = ["name", "seed", "model", "data", "partition", "method", "optimizer", "schedule", "train", "checkpoint",
        "runtime", "target", "args", "head", "loss", "link", "length", "delay", "weight", "lr", "stages", "cuts",
        "epochs", "batch_size", "microbatches", "milestones", "augment", "transforms", "decay", "normalize",
        "mean", "std"]
FRAGMENTS = [*KEYS, ": ", ":\n", "\n", "\n  ", "- ", "{", "}", "[", "]", ", ", "&a ", "*a", "<<: ", "? ", "|\n",
             ">\n", "'", '"', "#", "---\n", "...\n", "%", "@", "=", "1e-3", "-1", "12:30", "2020-01-01", "0x", ".inf",
             ".nan", "~", "yes", "mlp", SMALLEST_YAML]
yaml_like = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
untagged = st.text(max_size=60).filter(lambda text: "!" not in text)
key_paths = st.lists(st.sampled_from([*KEYS, "0", "x"]), min_size=1, max_size=4).map(".".join)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 999) | st.floats() | st.text(max_size=5) | st.sampled_from(KEYS),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(
        st.sampled_from(KEYS) | st.text(max_size=5) | st.integers(0, 3), below, max_size=4), max_leaves=12)


@PROPERTY
@given(text=untagged | yaml_like | yaml_like.map(SMALLEST_YAML.__add__))
def test_any_text_as_a_file_gives_a_config_or_a_config_error(folder, text):
    path = folder / "any.yaml"
    path.write_bytes(text.encode("utf-8"))
    config_or_error(load_config, path)


@PROPERTY
@given(data=st.binary(max_size=40).filter(lambda data: b"!" not in data))
def test_any_bytes_as_a_file_give_a_config_or_a_config_error(folder, data):
    path = folder / "bytes.yaml"
    path.write_bytes(data)
    config_or_error(load_config, path)


@PROPERTY
@given(overrides=st.lists(untagged | st.tuples(key_paths, yaml_like).map("=".join), max_size=4))
def test_any_overrides_give_a_config_or_a_config_error(folder, overrides):
    path = folder / "smallest.yaml"
    path.write_text(SMALLEST_YAML)
    config_or_error(load_config, path, overrides)


@PROPERTY
@given(tree=json_like)
def test_any_tree_gives_a_config_or_a_config_error(tree):
    config_or_error(parse_config, tree)


@PROPERTY
@given(tree=configs, path=st.lists(st.sampled_from(KEYS), min_size=1, max_size=3), value=json_like)
def test_a_valid_tree_with_any_value_anywhere_gives_a_config_or_a_config_error(tree, path, value):
    section = tree
    for key in path[:-1]:
        section[key] = section = section[key] if isinstance(section.get(key), dict) else {}
    section[path[-1]] = value
    config_or_error(parse_config, tree)


# One value, or one for each stage.

def with_method(**method):
    return parse_config({"name": "run", "model": "mlp", "partition": {"stages": 3}, "method": method})


def test_heads_losses_and_link_weights_are_one_for_all_or_one_for_each():
    one = with_method(head="linear", loss="cross_entropy", link={"weight": 0.5}).method
    assert [one.stage_head(k).name for k in range(2)] == ["linear", "linear"]
    assert [one.link.stage_weight(k) for k in range(2)] == [0.5, 0.5]
    each = with_method(head=["linear", {"name": "conv", "args": {"hidden": 3}}], link={"weight": [1, 0.5]},
                       loss=["cross_entropy", {"target": "a:b"}, "cross_entropy"])
    assert [each.method.stage_head(k).name for k in range(2)] == ["linear", "conv"]
    assert each.method.stage_loss(1).target == "a:b"
    assert [each.method.link.stage_weight(k) for k in range(2)] == [1.0, 0.5]
    assert parse_config(yaml.safe_load(dump_config(each))) == each


BY_LINKS = {"local_weight": 0.0, "link": {"length": "all"}}


@pytest.mark.parametrize("method", [
    {"head": ["none", "conv"], **BY_LINKS}, {"name": "bp", "head": "none"},
    {"head": "none", "local_weight": 0.0, "link": {"length": "all", "reach": "all", "take": "farthest"}}])
def test_heads_whose_losses_teach_nothing_can_be_left_out(method):
    assert with_method(**method).method.stage_head(0).left_out


@pytest.mark.parametrize(("method", "message"), [
    ({"head": ["linear"]}, r"^method\.head: a list of 1 for 3 stages; give 2, one for each but the last, or one "),
    ({"loss": ["cross_entropy"] * 2}, r"^method\.loss: a list of 2 for 3 stages; give 3, one for each, or one value "),
    ({"link": {"weight": [1.0] * 3}}, r"^method\.link\.weight: a list of 3 for 3 stages; give 2, one for each but "),
    ({"head": []}, r"^method\.head: give at least one, got \[\]$"),
    ({"head": ["linear", {"nam": "conv"}]}, r"^method\.head\.1\.nam: unknown key; did you mean method\.head\.nam"),
    ({"link": {"weight": [1.0, "a"]}}, r"^method\.link\.weight\.1: should be a valid number, got 'a'$"),
    ({"link": {"reach": -1}}, r"^method\.link\.reach: must be a number of stages ≥ 0, or all, got -1$"),
    ({"local_weight": -1}, r"^method\.local_weight: .*greater than or equal to 0, got -1$"),
    ({"local_weight": 0.0, "link": {"reach": 0}}, r"^method\.local_weight: 0, and no link: only the last stage "),
    ({"link": {"joint": True, "reach": 2}}, r"^method\.link\.joint: true joins .*; set method\.link\.reach=1, or "),
    ({"link": {"joint": True, "normalize": True}}, r"^method\.link\.joint: true .*; set method\.link\.normalize=false"),
    ({"name": "greedy", "local_weight": 0.0}, r"^method\.local_weight: 0, and no link: only the last stage would "),
    ({"head": "none"}, r"^method\.head: none, and with method\.local_weight 1 a stage learns from its own head's "),
    ({"head": "none", **BY_LINKS}, r"^method\.head: none, and stage 1 learns from the loss of stage 2; set "),
    ({"head": ["conv", "none"], **BY_LINKS}, r"^method\.head\.1: none, and stage 1 learns from the loss of stage 2; "),
    ({"head": ["none", "conv"], "local_weight": 0.0, "link": {"length": "all", "normalize": True}},
     r"^method\.head\.0: none, and method\.link\.normalize takes a local gradient's norm; set it to false, "),
    ({"head": {"name": "none", "args": {"hidden": 3}}}, r"^method\.head: none takes no args, and has \{'hidden': 3\}"),
])
def test_what_does_not_fit_the_stages_is_refused(method, message):
    with pytest.raises(ConfigError, match=message):
        with_method(**method)


def test_gradients_of_bp_are_not_clipped_stage_by_stage():
    clipped = {"optimizer": {"clip_norm": 1.0}}
    assert parsed(**clipped).optimizer.clip_norm == 1.0
    assert parsed(method="bp", partition={"stages": 1}, **clipped).optimizer.clip_norm == 1.0
    problem, = problems(method="bp", **clipped)
    assert problem.startswith("optimizer.clip_norm: 1.0 would clip each stage by itself")
    problem, = problems(optimizer={"clip_norm": 0.0})
    assert problem == "optimizer.clip_norm: should be greater than 0, got 0.0"
