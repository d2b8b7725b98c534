"""Layers of all architectures that timm and transformers know, built without weights."""

import warnings

import pytest
import timm
import torch
import torchvision
from architectures import (
    hugging_face_classes,
    hugging_face_network,
    image_shape,
    layers_by_first_use,
    timm_network,
    without_weights,
)

from metalr_hf import layer_groups

PARTS = 4
TIMM_SAMPLE = [
    *("resnet18", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"),
    *("convnext_atto", "tf_efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002", "densenet121", "vgg11"),
    *("poolformer_s12", "levit_128s", "pit_ti_224", "mobilevit_xxs", "beit_base_patch16_224", "resnetv2_50"),
    *("coatnet_0_224", "efficientformer_l1", "eva02_tiny_patch14_224", "inception_v3", "pvt_v2_b0", "hrnet_w18_small"),
    *("maxvit_tiny_tf_224", "csatv2", "rdnet_tiny", "efficientvit_b0", "crossvit_9_240", "selecsls42b", "dla34"),
]
TORCHVISION_SAMPLE = [
    *("resnet18", "convnext_tiny", "vit_b_16", "swin_t", "mobilenet_v3_small", "densenet121", "efficientnet_b0"),
    *("deeplabv3_resnet50", "r3d_18", "maxvit_t"),
]
SEGMENTERS = ("Segformer", "UperNet", "DPT", "MobileViT", "Beit")
CLASSIFIERS = ("ViT", "Swinv2", "ConvNextV2", "Pvt", "PoolFormer", "Bit", "CLIP", "Cvt")
# Order of use where it is not that of the layers, and why.
ORDER_DIFFERS = {
    "EfficientViM": "timm's matcher puts the norms of all stages into the last block",
    "EfficientViMDistilled": "timm's matcher puts the norms of all stages into the last block",
}
NOT_BUILT = {
    "DinatForImageClassification": "needs natten",
    "DinatBackbone": "needs natten",
    "ConvNextBackbone": "its default configuration is faulty",
    "ConvNextV2Backbone": "its default configuration is faulty",
    "FocalNetBackbone": "its default configuration is faulty",
    "Sapiens2ForSemanticSegmentation": "its default configuration has no sizes for the head",
    "PPOCRV5ServerDetForObjectDetection": "its default configuration has no backbone",
    "PPOCRV6MediumDetForObjectDetection": "its default configuration has no backbone",
}


def fault_of(model, *, has_head=True, run=False):
    """What is wrong with the layers of a model, or nothing."""
    with warnings.catch_warnings():
        # Backbones have no head, and say so.
        warnings.simplefilter("error" if has_head else "ignore")
        groups = layer_groups(model)
        stages = layer_groups(model, "stage")
    trainable = sorted(name for name, p in model.named_parameters() if p.requires_grad)
    for layers in (groups, stages):
        if sorted(name for members in layers.values() for name in members) != trainable:
            return "not every parameter is in one layer"
    if len(groups) < 4:
        return f"only {len(groups)} layers"
    if len(stages) > len(groups):
        return "more stages than blocks"
    if any(".".join(layer.split(".")[:1]).isdigit() for layer in groups):
        return "layers called by mere numbers"
    if has_head and list(groups)[-1] != "head":
        return "no head"
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    for path in (classifier,) if isinstance(classifier, str) else classifier:
        if any(name not in groups["head"] for name in trainable if name.startswith(f"{path}.")):
            return f"{path} is not in the head"
    if run:
        used = layers_by_first_use(model, groups)
        if used != [layer for layer in groups if layer in used]:
            return f"used as {used}"
    return None


def timm_faults(names):
    faults, run = {}, set(ORDER_DIFFERS)
    for name in names:
        model = timm_network(name)
        has_head = bool(model.pretrained_cfg.get("classifier")) and getattr(model, "num_classes", 0) > 0
        class_name = type(model).__name__
        faults[name] = fault_of(model, has_head=has_head, run=class_name not in run)
        run.add(class_name)
    return {name: fault for name, fault in faults.items() if fault}


@pytest.mark.parametrize("name", TIMM_SAMPLE)
def test_layers_of_timm_architectures(name):
    assert timm_faults([name]) == {}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_layers_of_architectures_of_every_timm_module(part):
    faults = {}
    for module in timm.list_modules()[part::PARTS]:
        names = timm.list_models(module=module)
        faults |= timm_faults(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]) if names else [])
    assert faults == {}


@pytest.mark.parametrize("name", TORCHVISION_SAMPLE)
def test_layers_of_torchvision_networks(name):
    options = {"weights_backbone": None} if name.startswith("deeplab") else {}
    with without_weights():
        model = torchvision.models.get_model(name, weights=None, **options).eval()
    assert fault_of(model) is None
    shape = (1, 3, 8, 112, 112) if name == "r3d_18" else (1, 3, 224, 224)
    with torch.device("meta"):
        images = torch.zeros(shape)
    groups = layer_groups(model)
    assert layers_by_first_use(model, groups, images) == list(groups)


@pytest.mark.parametrize("family", SEGMENTERS)
def test_layers_of_segmenters(family):
    (pair,) = [p for p in hugging_face_classes("semantic segmentation") if p[1] == f"{family}ForSemanticSegmentation"]
    model = hugging_face_network(*pair)
    assert fault_of(model, run=True) is None


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_layers_of_classifiers(family):
    (pair,) = [p for p in hugging_face_classes("image classification") if p[1] == f"{family}ForImageClassification"]
    assert fault_of(hugging_face_network(*pair), run=True) is None


# What does not run on the meta device, or not on an image alone.
NOT_RUN = ("Perceiver", "ImageGPT", "ShieldGemma2", "Siglip2", "OneFormer", "Eomt", "Mask2Former", "Videomt", "RfDetr")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize(
    "task", ["image classification", "semantic segmentation", "universal segmentation", "object detection", "backbone"]
)
def test_layers_of_all_transformers_classes(task, part):
    faults = {}
    for kind, name in hugging_face_classes(task)[part::4]:
        if name not in NOT_BUILT:
            model = hugging_face_network(kind, name)
            has_head = task != "backbone"
            # Detectors look at their heads again and again, and choose by what they find.
            run = task != "object detection" and not name.startswith(NOT_RUN) and "Detr" not in name
            faults[name] = fault_of(model, has_head=has_head, run=run and image_shape(model) is not None)
    assert {name: fault for name, fault in faults.items() if fault} == {}
