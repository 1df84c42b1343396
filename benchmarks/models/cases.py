"""The models: one of every module of timm, a few more where a module holds unlike ones, and models of Transformers."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

CLASSES, TOKENS, LENGTH = 10, 256, 32


@dataclass(frozen=True)
class Case:
    """A model, and the samples that it takes.

    Args:
        library: the package that holds it.
        model: its name there.
        target: what makes it, as `model.target`, with `args`.
        shape: of a sample, images or tokens.
        tokens: how many different ones there are; None for images.
        every_position: whether each token has a label of its own.
        live_tensors: how many may pass between two blocks, as `model.live_tensors`.
    """

    library: str
    model: str
    target: str
    args: dict[str, Any]
    shape: tuple[int, ...]
    tokens: int | None = None
    every_position: bool = False
    classes: int = field(default=CLASSES)
    live_tensors: int = 1

    @property
    def name(self) -> dict[str, str]:
        """The library and the model."""
        return {"library": self.library, "model": self.model}


# By size of the images: 64, or another where a model asks for one.
TIMM = {
    64: """caformer_s18 convmixer_768_32 convnext_atto convnextv2_atto cpubone_nano cs3darknet_s csatv2 cspnext_tiny
        cspresnet50 darknet53 davit_tiny densenet121 dla34 dpn68 edgenext_xx_small efficientnet_b0 efficientnetv2_rw_t
        efficientvim_m1 efficientvit_b0 ese_vovnet19b_slim fasternet_t0 fastvit_t8 focalnet_tiny_srf ghostnet_100
        hardcorenas_a hgnetv2_b0 hieradet_small hrnet_w18_small iformer_t inception_next_atto lambda_resnet26t
        lcnetv2_small legacy_seresnet18 lowformer_b0 mambaout_femto mnasnet_100 mobilenetv3_small_100
        mobilenetv4_conv_small mobilenetv5_base mobileone_s1 mobilevit_xxs nextvit_small nfnet_f0 poolformer_s12
        pvt_v2_b0 rdnet_tiny regnety_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s resnest14d resnet18
        resnetv2_50 resnext50_32x4d rexnet_100 selecsls42 seresnet50 shvit_s1 skresnet18 starnet_s1 tiny_vit_5m_224
        tinynet_a tresnet_m vgg11 vovnet39a xception41""",
    96: "inception_resnet_v2 inception_v3 inception_v4 nasnetalarge pnasnet5large xception",
    224: """beit_base_patch16_224 cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convit_tiny deit3_small_patch16_224
        deit_tiny_patch16_224 efficientformer_l1 efficientformerv2_s0 efficientvit_m0 eva02_tiny_patch14_224
        gcvit_xxtiny gmlp_ti16_224 hiera_tiny_224 levit_128s mixer_s32_224 mvitv2_tiny nest_tiny pit_ti_224
        resmlp_12_224 samvit_base_patch16_224 sequencer2d_s swiftformer_xs swin_tiny_patch4_window7_224
        swinv2_cr_tiny_224 tnt_s_patch16_224 twins_pcpvt_small visformer_tiny vit_relpos_small_patch16_224
        vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xcit_nano_12_p16_224""",
    240: "crossvit_tiny_240",
    256: "botnet26t_256 halonet_h1 maxvit_rmlp_pico_rw_256 swinv2_tiny_window8_256",
}
# Others are made with more arguments, the largest with four layers.
TIMM_WITH_ARGS: dict[str, tuple[int, dict[str, Any]]] = {
    "deepseek_vit_412m": (56, {"depth": 4}),
    "gemma4_vit_167m": (64, {"depth": 4}),
    "naflexvit_base_patch16_gap": (64, {"depth": 4}),
    "qwen3_vit_88m": (64, {"depth": 4}),
    "vit_small_patch14_dinov2": (56, {"img_size": 56}),
}
# Those that pass several tensors along most of their layers are tried with as many at a cut, too.
TIMM_LIVE = {"coat_tiny": 3, "crossvit_tiny_240": 2, "dla34": 2, "efficientvim_m1": 3, "gemma4_vit_167m": 3,
             "hrnet_w18_small": 2, "mobilenetv5_base": 2, "nasnetalarge": 2, "pnasnet5large": 2, "resnest14d": 2,
             "tnt_s_patch16_224": 2}

# Without `use_cache`, and with embeddings that are not tied: a weight that two stages share is refused.
_TEXT = {"vocab_size": TOKENS, "pad_token_id": 0, "use_cache": False, "tie_word_embeddings": False}
_LAYERS = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
_GPT = _TEXT | {"n_embd": 64, "n_layer": 4, "n_head": 4}
_PLAIN = _TEXT | _LAYERS
_GROUPED = _PLAIN | {"num_key_value_heads": 2, "head_dim": 16}  # grouped-query attention
_EXPERTS = _GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "experts_implementation": "batched_mm"}
_LABELS = {"num_labels": CLASSES}
_IMAGE = _LAYERS | _LABELS | {"image_size": 32, "patch_size": 8}

EVERY_POSITION: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": _GPT,
    "GPTJForCausalLM": _GPT | {"rotary_dim": 8},
    "GPTNeoXForCausalLM": _PLAIN,
    "OPTForCausalLM": _PLAIN | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "BloomForCausalLM": _TEXT | {"hidden_size": 64, "n_layer": 4, "n_head": 4},
    "FalconForCausalLM": _PLAIN,
    "PhiForCausalLM": _PLAIN,
    "Phi3ForCausalLM": _GROUPED,
    "LlamaForCausalLM": _GROUPED,
    "MistralForCausalLM": _GROUPED,
    "Qwen2ForCausalLM": _GROUPED,
    "Qwen3ForCausalLM": _GROUPED,
    "GemmaForCausalLM": _GROUPED,
    "Gemma2ForCausalLM": _GROUPED,
    "Gemma3ForCausalLM": _GROUPED,
    "Olmo2ForCausalLM": _GROUPED,
    "SmolLM3ForCausalLM": _GROUPED,
    "MixtralForCausalLM": _EXPERTS | {"num_local_experts": 4},
    "MixtralForCausalLM, grouped_mm": _EXPERTS | {"num_local_experts": 4, "experts_implementation": "grouped_mm"},
    "Qwen3MoeForCausalLM": _EXPERTS | {"num_experts": 4},
    "GptOssForCausalLM": _EXPERTS | {"num_local_experts": 4},
    "DeepseekV3ForCausalLM": _EXPERTS | {
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 32,
        "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    "MambaForCausalLM": _PLAIN,
    "BertForMaskedLM": _PLAIN,
    "ModernBertForMaskedLM": _PLAIN,
}
TEXTS: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": _PLAIN | _LABELS,
    "RobertaForSequenceClassification": _PLAIN | _LABELS,
    "DistilBertForSequenceClassification": _TEXT | _LABELS | {
        "dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 128},
    "AlbertForSequenceClassification": _PLAIN | _LABELS | {"embedding_size": 32},
    "ElectraForSequenceClassification": _PLAIN | _LABELS | {"embedding_size": 32},
    "DebertaV2ForSequenceClassification": _PLAIN | _LABELS,
}
MASKED = ("BertForSequenceClassification", "RobertaForSequenceClassification", "DistilBertForSequenceClassification",
          "ElectraForSequenceClassification")  # which give every layer the mask of the padding
IMAGES: dict[str, tuple[int, dict[str, Any]]] = {
    "ViTForImageClassification": (32, _IMAGE),
    "DeiTForImageClassification": (32, _IMAGE),
    "BeitForImageClassification": (32, _IMAGE),
    "Dinov2ForImageClassification": (32, _IMAGE),
    "SwinForImageClassification": (224, _LABELS),
    "ResNetForImageClassification": (64, _LABELS),
    "RegNetForImageClassification": (64, _LABELS),
    "ConvNextForImageClassification": (64, _LABELS),
    "ConvNextV2ForImageClassification": (64, _LABELS),
    "EfficientNetForImageClassification": (64, _LABELS),
    "MobileViTForImageClassification": (64, _LABELS | {"image_size": 64}),
    "SegformerForImageClassification": (64, _LABELS),
}


def all_cases() -> list[Case]:
    """Every model, those of timm by name."""
    cases = [*sorted(_timm(), key=lambda case: case.model), *_transformers()]
    return [*cases, *(_with_more_live(case) for case in cases if case.model in TIMM_LIVE),
            *(_masked(model, live) for model in MASKED for live in (1, 2))]


def _timm() -> Iterator[Case]:
    sizes = {model: (size, dict[str, Any]()) for size, names in TIMM.items() for model in names.split()}
    for model, (size, args) in (sizes | TIMM_WITH_ARGS).items():
        yield Case("timm", model, "timm:create_model", {"model_name": model, "num_classes": CLASSES} | args,
                   (3, size, size))


def _transformers() -> Iterator[Case]:
    for model, config in EVERY_POSITION.items():
        yield _transformer(model, config, (LENGTH,), TOKENS, True, TOKENS)
    for model, config in TEXTS.items():
        yield _transformer(model, config, (LENGTH,), TOKENS)
    for model, (size, config) in IMAGES.items():
        yield _transformer(model, config, (3, size, size))


def _transformer(model: str, config: dict[str, Any], *more: Any) -> Case:
    return Case("transformers", model, "benchmarks.models.transformers_models:untrained",
                {"architecture": model.partition(",")[0]} | config, *more)


def _with_more_live(case: Case) -> Case:
    live = TIMM_LIVE[case.model]
    return replace(case, model=f"{case.model}, {live} live", live_tensors=live)


def _masked(model: str, live: int) -> Case:
    name = f"{model}, masked" + (f", {live} live" if live > 1 else "")
    return replace(_transformer(name, TEXTS[model] | {"masked": True}, (LENGTH,), TOKENS), live_tensors=live)
