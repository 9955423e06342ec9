"""Exports networks of torchvision, timm and transformers with random weights, for models.py.

    python benchmarks/networks.py DIR [NAME ...]

Writes DIR/NAME.onnx and DIR/NAME.npz (`in:NAME`, and onnxruntime's results as `out:NAME`) for the
names given, or for all; without a DIR it lists the names. What cannot be exported is named and left
out. Needs torch, torchvision, timm, transformers, onnxscript and onnxruntime, best in an
environment of its own. Statistics of batch normalisation get random values, so that no step of a
network is an identity.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

IMAGE = (1, 3, 224, 224)
Axes = Mapping[int, str]
BATCH: Axes = {0: "batch"}
TOKENS: Axes = {0: "batch", 1: "tokens"}
VOCABULARY = 8000


@dataclass(frozen=True)
class Network:
    """A module, its inputs, and per input the axes of symbolic size."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    symbolic: Sequence[Axes] = ()


class Reading(nn.Module):
    """A module of which `read` takes the tensors that become results."""

    def __init__(self, module: nn.Module, read: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.read = module, read

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.read(self.module, *inputs)


def image(*shape: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(*(shape or IMAGE)),)


def tokens(*shape: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    def make() -> tuple[torch.Tensor, ...]:
        ids = torch.randint(0, VOCABULARY, shape)
        return ids, torch.ones_like(ids)  # and a mask

    return make


# ---- networks of images -------------------------------------------------------------------------
TORCHVISION: dict[str, tuple[int, ...]] = {
    "resnet34": IMAGE, "vgg16": IMAGE, "alexnet": IMAGE, "densenet121": IMAGE, "mnasnet1_0": IMAGE,
    "resnext50_32x4d": IMAGE, "wide_resnet50_2": IMAGE, "shufflenet_v2_x1_0": IMAGE,
    "mobilenet_v3_large": IMAGE, "efficientnet_b0": IMAGE, "efficientnet_v2_s": IMAGE,
    "regnet_y_400mf": IMAGE, "squeezenet1_0": IMAGE, "convnext_tiny": IMAGE, "swin_t": IMAGE,
    "maxvit_t": IMAGE, "googlenet": IMAGE, "inception_v3": (1, 3, 299, 299),
    "vgg11_bn": (4, 3, 224, 224), "mobilenet_v3_small": IMAGE, "vit_b_32": IMAGE,
    "resnext101_32x8d": IMAGE, "regnet_x_800mf": IMAGE, "shufflenet_v2_x0_5": (8, 3, 224, 224),
}  # fmt: skip
SEGMENTATION = {
    "fcn_resnet50": IMAGE, "deeplabv3_resnet50": IMAGE,
    "deeplabv3_mobilenet_v3_large": (1, 3, 256, 256), "lraspp_mobilenet_v3_large": (1, 3, 256, 256),
}  # fmt: skip
VIDEO = dict.fromkeys(("r3d_18", "mc3_18", "r2plus1d_18"), (1, 3, 8, 112, 112))
TIMM = {
    224: (
        "mixer_s16_224", "ghostnet_100", "hrnet_w18_small", "efficientnet_lite0", "rexnet_100",
        "deit_tiny_patch16_224", "mobilenetv4_conv_small", "poolformer_s12", "dla34", "repvgg_a0",
        "res2net50_26w_4s", "seresnet50", "efficientformer_l1", "levit_128", "coat_tiny",
        "pvt_v2_b0", "resnest14d", "dpn68", "selecsls42b", "vovnet39a", "mobileone_s0",
        "gmlp_s16_224", "resmlp_12_224", "twins_svt_small", "convnextv2_atto", "nf_resnet50",
        "tf_efficientnet_b0", "cait_xxs24_224", "xcit_nano_12_p16_224", "eca_nfnet_l0", "gernet_s",
        "darknet53", "hardcorenas_a", "tinynet_a", "lcnet_100", "repvit_m0_9", "efficientvit_b0",
        "efficientvit_m2", "convmixer_768_32", "eva02_tiny_patch14_224", "davit_tiny",
        "focalnet_tiny_srf", "gcvit_xxtiny", "visformer_tiny", "sequencer2d_s", "starnet_s1",
        "mambaout_femto", "skresnet18", "inception_next_tiny", "nest_tiny", "shvit_s1",
        "convnextv2_nano", "seresnext26t_32x4d", "hgnetv2_b0", "regnetx_008", "regnetx_016",
        "regnety_032", "regnety_080", "densenet161", "densenet264d", "dpn92", "convnext_atto",
        "coatnet_bn_0_rw_224", "twins_pcpvt_small", "res2net50d", "skresnet50d", "fbnetc_100",
        "mobilenetv2_075", "seresnet50t", "fasternet_s", "ghostnetv3_050", "xcit_small_24_p8_224",
        "regnetz_b16", "lowformer_b0",
    ),
    240: ("crossvit_9_240",),
    256: (
        "cspdarknet53", "fastvit_t8", "edgenext_small", "swinv2_tiny_window8_256", "mobilevit_s",
        "mobilevitv2_100", "lambda_resnet26t", "botnet26t_256", "halonet26t",
        "ecaresnet26t", "maxvit_rmlp_pico_rw_256", "mobilevit_xxs", "hieradet_small",
    ),
    299: ("xception41",),
    300: ("efficientnet_b3",),
}  # fmt: skip


def _torchvision(name: str, video: bool = False) -> nn.Module:
    from torchvision import models

    options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(models.video if video else models, name)(weights=None, **options)


def _segmentation(name: str) -> nn.Module:
    from torchvision.models import segmentation

    module = getattr(segmentation, name)(weights=None, weights_backbone=None)
    return Reading(module, lambda m, x: m(x)["out"])


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def _of_images() -> dict[str, Network]:
    found = {n: Network(lambda n=n: _torchvision(n), image(*s)) for n, s in TORCHVISION.items()}
    found |= {n: Network(lambda n=n: _segmentation(n), image(*s)) for n, s in SEGMENTATION.items()}
    found |= {n: Network(lambda n=n: _torchvision(n, True), image(*s)) for n, s in VIDEO.items()}
    for size, names in TIMM.items():
        found |= {n: Network(lambda n=n: _timm(n), image(1, 3, size, size)) for n in names}
    found["mobilenet_v2_batch"] = Network(
        lambda: _torchvision("mobilenet_v2"), image(8, 3, 224, 224), [BATCH]
    )
    return found


# ---- networks of text and sound -----------------------------------------------------------------
def _transformers(kind: str, read: Callable[..., Any], /, **config: Any) -> nn.Module:
    """The module of a class and a configuration whose name begins alike."""
    import transformers

    module = getattr(transformers, kind)
    return Reading(module(module.config_class(**config)), read)


def _hidden(m: nn.Module, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    return (m(x) if mask is None else m(input_ids=x, attention_mask=mask)).last_hidden_state


def _logits(m: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> Any:
    return m(input_ids=x, attention_mask=mask, use_cache=False).logits


SMALL = {
    "hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 1536,
}  # fmt: skip
DECODER = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "pad_token_id": 0,
    "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
}  # fmt: skip


def _encoder(kind: str, rows: int, length: int, **config: Any) -> Network:
    return Network(
        lambda: _transformers(kind, _hidden, **config),
        tokens(rows, length),
        [TOKENS, TOKENS],
    )


def _decoder(kind: str, **config: Any) -> Network:
    return Network(
        lambda: _transformers(kind, _logits, **config),
        tokens(1, 64),
        [TOKENS, TOKENS],
    )


def _of_sequences() -> dict[str, Network]:
    def sound(read: Callable[..., Any], kind: str, *shape: int, **config: Any) -> Network:
        return Network(lambda: _transformers(kind, read, **config), image(*shape))

    layers = {"num_hidden_layers": 4}
    return {
        "albert": _encoder("AlbertModel", 1, 128, **(SMALL | {"hidden_size": 768})),
        "bert_tiny": _encoder(
            "BertModel", 1, 32, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=512,
        ),
        "electra": _encoder("ElectraModel", 2, 128, num_hidden_layers=6),
        "minilm": _encoder("BertModel", 4, 64, **SMALL),
        "mobilebert": _encoder("MobileBertModel", 1, 128, num_hidden_layers=6),
        "roberta": _encoder("RobertaModel", 2, 48, **layers),
        "squeezebert": _encoder("SqueezeBertModel", 1, 128, **layers),
        "bloom": _decoder(
            "BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=512, n_layer=4, n_head=8
        ),
        "gemma": _decoder("GemmaForCausalLM", **DECODER, head_dim=64),
        "gpt2_small": _decoder("GPT2LMHeadModel", n_layer=3, vocab_size=VOCABULARY),
        "llama": _decoder("LlamaForCausalLM", **DECODER),
        "mistral": _decoder("MistralForCausalLM", **DECODER, sliding_window=None),
        "phi": _decoder("PhiForCausalLM", **(DECODER | {"num_key_value_heads": 12})),
        "qwen3": _decoder("Qwen3ForCausalLM", **DECODER, head_dim=64),
        "wav2vec2": sound(lambda m, x: m(x).logits, "Wav2Vec2ForCTC", 1, 16000, **layers),
        "wavlm": sound(_hidden, "WavLMModel", 1, 16000, **layers),
        "ast": sound(_hidden, "ASTModel", 1, 1024, 128, **SMALL),
        "clip_vision": Network(
            lambda: _transformers("CLIPVisionModel", lambda m, x: m(x).pooler_output, **layers),
            image(), [BATCH],
        ),
        "dinov2": Network(
            lambda: _transformers(
                "Dinov2Model", _hidden, hidden_size=384, num_attention_heads=6, patch_size=14,
                num_hidden_layers=4, image_size=224,
            ),
            image(), [{0: "batch", 2: "height", 3: "width"}],
        ),
        "segformer": Network(
            lambda: _transformers("SegformerForSemanticSegmentation", lambda m, x: m(x).logits),
            image(1, 3, 256, 256), [BATCH],
        ),
        "bilstm": Network(
            lambda: Reading(
                nn.LSTM(128, 256, 2, bidirectional=True, batch_first=True), lambda m, x: m(x)[0]
            ),
            image(1, 80, 128), [TOKENS],
        ),
        "gru": Network(
            lambda: Reading(nn.GRU(64, 128, 2, batch_first=True), lambda m, x: m(x)[0]),
            image(1, 100, 64), [TOKENS],
        ),
        "nn_transformer": Network(
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(256, 8, 1024, norm_first=True), 4,
                enable_nested_tensor=False,
            ),
            image(64, 4, 256), [{0: "tokens", 1: "batch"}],
        ),
    }  # fmt: skip


NETWORKS = {**_of_images(), **_of_sequences()}


# ---- export -------------------------------------------------------------------------------------
def export(name: str, network: Network, folder: Path) -> None:
    """Writes a network and its data."""
    import onnxruntime

    torch.manual_seed(0)
    module, inputs = network.make().eval(), network.inputs()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_var is not None:
            nn.init.uniform_(part.running_mean, -0.1, 0.1)
            nn.init.uniform_(part.running_var, 0.7, 1.3)
    names = [f"input{k}" for k in range(len(inputs))]
    path = folder / f"{name}.onnx"
    with torch.no_grad():
        torch.onnx.export(
            module, inputs, str(path), input_names=names, opset_version=17, dynamo=False,
            dynamic_axes=dict(zip(names, network.symbolic, strict=False)),
        )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {k: x.numpy() for k, x in zip(names, inputs, strict=True)}
    feeds = {k.name: feeds[k.name] for k in session.get_inputs()}
    results = zip(session.get_outputs(), session.run(None, feeds), strict=True)
    arrays = {f"in:{k}": x for k, x in feeds.items()} | {f"out:{k.name}": x for k, x in results}
    np.savez(path.with_suffix(".npz"), **arrays)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(NETWORKS))
    if args.folder is None or unknown:
        print(*NETWORKS)
        if unknown:
            print("no such network:", *unknown, file=sys.stderr)
        return bool(unknown)
    args.folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    failed = []
    for name in args.names or NETWORKS:
        try:
            export(name, NETWORKS[name], args.folder)
        except Exception as e:  # of any library: the others are exported all the same
            failed.append(name)
            print(f"{name}: {type(e).__name__}: {str(e).splitlines()[0]}", file=sys.stderr)
        else:
            print(name)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
