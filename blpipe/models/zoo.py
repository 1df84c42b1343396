"""torchvision's classification models, as `torchvision/<name>`."""

from collections.abc import Mapping
from typing import Any

import torch
import torchvision.models as zoo
from torch import nn

from blpipe.errors import ConfigError, one_line
from blpipe.plugins import call, did_you_mean

PREFIX = "torchvision/"
_WITH_AUXILIARY = ("googlenet", "inception_v3")


def torchvision_model(name: str, args: Mapping[str, Any], classes: int, pretrained: bool = True) -> nn.Module:
    """The plain model `torchvision/<name>`, built by torchvision with `args`.

    Args:
        name: with the prefix.
        args: torchvision's own. `weights` names pretrained weights, such as DEFAULT or IMAGENET1K_V2. With a
            `num_classes` other than theirs, the layers that it changes start anew. googlenet and inception_v3 are
            built without auxiliary classifiers, since local heads do their work; with `aux_logits: true` they are
            there, but are not run.
        classes: `num_classes` where `args` give neither that nor `weights`.
        pretrained: whether to fetch `weights`; else the model is as with them but for its values, which a checkpoint
            will give.

    Raises:
        ConfigError: an unknown model, weights that it does not have or that cannot be had, or arguments that it
            does not take.
    """
    known = {PREFIX + model: model for model in zoo.list_models(module=zoo)}
    if name not in known:
        raise ConfigError(f"model.name: unknown {name!r}{did_you_mean(name, known)}; torchvision.models.list_models() "
                          "names its models, of which those for classification are here")
    builder = zoo.get_model_builder(known[name])
    args = {"aux_logits": False} | dict(args) if known[name] in _WITH_AUXILIARY else dict(args)
    weights = _weights(known[name], args.pop("weights", None))
    if weights is None:
        return _plain(builder, args, classes)
    own = len(weights.meta["categories"])
    wanted = args.pop("num_classes", own)
    if not pretrained:
        return _plain(builder, _implied(known[name], weights) | args, wanted)
    without = args.get("aux_logits") is False  # the weights come with them
    model = _pretrained(builder, weights, {name: value for name, value in args.items()
                                           if name != "aux_logits" or not without})
    if without:
        _remove_auxiliary(model)
    if wanted != own:
        _renew(model, _plain(builder, _implied(known[name], weights) | args, wanted))
    return model


def _remove_auxiliary(model: nn.Module) -> None:
    """As torchvision builds it with `aux_logits: false`."""
    model.aux_logits = False  # type: ignore[assignment]
    for name in ("aux1", "aux2", "AuxLogits"):
        if hasattr(model, name):
            setattr(model, name, None)


def _weights(model: str, name: Any) -> Any:
    if name is None:
        return None
    known = zoo.get_model_weights(model)
    text = str(name).removeprefix(f"{known.__name__}.")
    if text not in known.__members__:
        names = dict.fromkeys(known.__members__)
        raise ConfigError(f"model.args.weights: {model} has no weights {name!r}{did_you_mean(text, names)}; "
                          f"one of {', '.join(names)}")
    return known[text]


def _plain(builder: Any, args: Mapping[str, Any], classes: int) -> nn.Module:
    defaults: dict[str, Any] = {"num_classes": classes}
    if "aux_logits" in args:
        defaults["init_weights"] = True
    return call("model", builder, **defaults | dict(args))


def _implied(model: str, weights: Any) -> dict[str, Any]:
    """The arguments, besides `num_classes`, that torchvision derives from weights."""
    if model in _WITH_AUXILIARY:
        return {"transform_input": True}
    if model.startswith("vit_"):
        return {"image_size": weights.meta["min_size"][0]}
    return {"input_size": weights.meta["min_size"]} if model == "maxvit_t" else {}


def _pretrained(builder: Any, weights: Any, args: Mapping[str, Any]) -> nn.Module:
    try:
        weights.get_state_dict(progress=False, check_hash=True)  # so that what fails is the download
    except (OSError, RuntimeError, EOFError) as error:
        file = weights.url.rpartition("/")[2]
        raise ConfigError(f"model.args.weights: cannot fetch {weights.url}: {one_line(error)}; put the file there "
                          f"yourself: {torch.hub.get_dir()}/checkpoints/{file}") from error
    return call("model", builder, weights=weights, progress=False, **args)


def _renew(model: nn.Module, fresh: nn.Module) -> None:
    """Replace the modules of `model` that have other shapes in `fresh` by those."""
    for path, module in list(model.named_modules()):
        other = fresh.get_submodule(path)
        if [p.shape for p in module.parameters(False)] != [p.shape for p in other.parameters(False)]:
            owner, _, last = path.rpartition(".")
            setattr(model.get_submodule(owner), last, other)
