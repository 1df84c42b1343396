"""What must hold between the sections of a config, each of which is right by itself."""

from collections.abc import Iterator

from blpipe.config import Config, ModelConfig, TrainConfig
from blpipe.links import hops


def conflicts(config: Config) -> Iterator[str]:
    """All keys that do not go together, on one line each: the key, its value and the remedy."""
    yield from _of_weights(config.model)
    lists = [*_of_lists(config)]
    yield from lists or _of_heads(config)
    yield from _of_links(config)
    yield from _of_recomputing(config)
    yield from _of_patience(config.train)
    if config.method.name == "bp":
        yield from _of_bp(config)


def _of_weights(model: ModelConfig) -> Iterator[str]:
    if model.weights is None and model.weights_except:
        yield (f"model.weights_except: {list(model.weights_except)}, and no model.weights; give them, or leave "
               "model.weights_except out")
    theirs = model.args.get("weights")
    if model.weights is not None and theirs is not None and (model.name or "").startswith("torchvision/"):
        yield (f"model.weights: {model.weights}, and model.args.weights: {theirs} are both for the model to begin "
               "with; leave one of them out")


def _of_lists(config: Config) -> Iterator[str]:
    """Lists with a part or a number for each stage."""
    method, stages = config.method, config.partition.stage_count
    for key, value, count in (("head", method.head, stages - 1), ("loss", method.loss, stages),
                              ("link.weight", method.link.weight, stages - 1)):
        if isinstance(value, tuple) and len(value) != count:
            which = "one for each" if count == stages else "one for each but the last"
            yield (f"method.{key}: a list of {len(value)} for {stages} stages; give {count}, {which}, or one value for "
                   "all")
    for key, parts in (("head", method.head), ("loss", method.loss)):
        if config.partition.unsettled and isinstance(parts, tuple) and any(part != parts[0] for part in parts):
            yield (f"method.{key}: a list needs stages that are fixed, and partition.strategy balanced looks for them; "
                   f"give one {key}, or partition.cuts")


def _of_heads(config: Config) -> Iterator[str]:
    """A stage without a head has no local loss, so nothing must learn from one: at most a line."""
    method, stages = config.method, config.partition.stage_count
    headless = [k for k in range(stages - 1) if method.stage_head(k).left_out]
    if method.name == "bp" or not headless:
        return
    key, or_heads = method.head_key(headless[0]), "or leave the heads in"
    hops_in = hops(method, stages)
    taught = [k for k in headless if k and 1 in hops_in[k - 1]]
    if method.local_weight:
        yield (f"{key}: none, and with method.local_weight {method.local_weight:g} a stage learns from its own head's "
               f"loss; set method.local_weight=0, {or_heads}")
    elif method.link.normalize:
        yield f"{key}: none, and method.link.normalize takes a local gradient's norm; set it to false, {or_heads}"
    elif taught:
        yield (f"{method.head_key(taught[0])}: none, and stage {taught[0]} learns from the loss of stage "
               f"{taught[0] + 1}; set method.link.take=farthest and method.link.reach=all, {or_heads}")


def _of_links(config: Config) -> Iterator[str]:
    method, link = config.method, config.method.link
    if method.name != "bp" and method.local_weight == 0.0 and config.partition.stage_count > 1 and not method.linked:
        yield ("method.local_weight: 0, and no link: only the last stage would learn; set method.local_weight=1, or a "
               "link of weight, length and reach above 0")
    if link.joint and not link.off and (link.reach != 1 or link.normalize):
        key, value = ("reach", 1) if link.reach != 1 else ("normalize", "false")
        yield (f"method.link.joint: true joins the local loss and the next stage's error as they are; set "
               f"method.link.{key}={value}, or leave method.link.joint out")


def _of_recomputing(config: Config) -> Iterator[str]:
    graphs = config.runtime.cuda_graphs and config.method.name != "bp"
    for key, on in (("train.compile", config.train.compile), ("runtime.cuda_graphs", graphs)):
        if config.train.recompute and on:
            yield f"train.recompute: true, which goes without {key}; set one of them to false"


def _of_patience(train: TrainConfig) -> Iterator[str]:
    if train.patience is not None and train.eval_every_epochs == 0:
        yield (f"train.patience: {train.patience} counts evaluations, and with train.eval_every_epochs 0 there is one, "
               "at the end; set that to 1 or more, or leave train.patience out")


def _of_bp(config: Config) -> Iterator[str]:
    if config.train.wire == "bf16":
        yield "train.wire: bf16, but torch's schedules send the activations of bp as they are; leave train.wire out"
    if config.optimizer.clip_norm is not None and config.partition.stage_count > 1:
        yield (f"optimizer.clip_norm: {config.optimizer.clip_norm} would clip each stage by itself, which changes bp "
               "with the partition; leave it out, or train bp in one stage")
    if config.runtime.trace:
        yield "runtime.trace traces stage programs, and method bp runs none; set runtime.trace=false"
