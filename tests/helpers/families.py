"""One small real model of each of many families of vision backbones, untrained."""

import timm
import torch
import transformers
from timm.models.densenet import DenseNet
from timm.models.eva import Eva
from timm.models.inception_v3 import InceptionV3
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.vgg import VGG
from torch import nn

CLASSES = 3

TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}
PYRAMID = {"num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [2, 2, 2, 2]}
MOBILE_VIT = {
    "image_size": 64,
    "hidden_sizes": [8, 8, 16],
    "neck_hidden_sizes": [4, 8, 8, 8, 8, 8, 16],
    "num_attention_heads": 2,
}
DETR_SIZES = {"layers": 2, "ffn_dim": 16, "attention_heads": 2}


class Classifier(nn.Module):
    """A network that gives logits, as Trainer wants a model to be."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixel_values, labels=None):
        logits = self.network(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def hugging_face(name, image_size=32, **settings):
    class_ = getattr(transformers, name)
    model = class_(class_.config_class(num_labels=CLASSES, image_size=image_size, **settings))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # transformers' own initialisation is made to be overwritten: from it gradients vanish on their way down.
            nn.init.kaiming_normal_(module.weight)
    return model


def vit(name, **settings):
    return hugging_face(name, **{**TRANSFORMER, **settings})


def tower(name, config):
    vision = {**TRANSFORMER, "image_size": 32}
    model = getattr(transformers, name)
    return model(getattr(transformers, config)(vision_config=vision, num_labels=CLASSES))


def upernet():
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=backbone, hidden_size=8, num_labels=CLASSES, auxiliary_in_channels=8, auxiliary_channels=8
        )
    )


IMAGE_CLASSIFIERS = {
    "ViT": lambda: vit("ViTForImageClassification"),
    "DeiT": lambda: vit("DeiTForImageClassification"),
    "BEiT": lambda: vit("BeitForImageClassification"),
    "Data2Vec": lambda: vit("Data2VecVisionForImageClassification"),
    "DINOv2": lambda: vit("Dinov2ForImageClassification", mlp_ratio=2),
    "DINOv2 with registers": lambda: vit("Dinov2WithRegistersForImageClassification", mlp_ratio=2),
    "I-JEPA": lambda: vit("IJepaForImageClassification"),
    "ViT-MSN": lambda: vit("ViTMSNForImageClassification"),
    "SigLIP vision": lambda: tower("SiglipForImageClassification", "SiglipConfig"),
    "CLIP vision": lambda: tower("CLIPForImageClassification", "CLIPConfig"),
    "Swin": lambda: hugging_face(
        "SwinForImageClassification", window_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2]
    ),
    "SwinV2": lambda: hugging_face(
        "Swinv2ForImageClassification", window_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2]
    ),
    "Hiera": lambda: hugging_face(
        "HieraForImageClassification", image_size=[224, 224], embed_dim=8, depths=[1, 1, 2, 1]
    ),
    "ConvNeXt": lambda: hugging_face("ConvNextForImageClassification", **STAGES),
    "ConvNeXtV2": lambda: hugging_face("ConvNextV2ForImageClassification", **STAGES),
    "ResNet": lambda: hugging_face("ResNetForImageClassification", embedding_size=8, **STAGES),
    "RegNet": lambda: hugging_face("RegNetForImageClassification", embedding_size=8, groups_width=4, **STAGES),
    "BiT": lambda: hugging_face("BitForImageClassification", embedding_size=8, num_groups=4, **STAGES),
    "EfficientNet": lambda: hugging_face(
        "EfficientNetForImageClassification",
        image_size=64,
        depth_coefficient=0.5,
        width_coefficient=0.25,
        hidden_dim=320,
    ),
    "MobileNetV1": lambda: hugging_face(
        "MobileNetV1ForImageClassification", image_size=64, classifier_dropout_prob=0.1, depth_multiplier=0.25
    ),
    "MobileNetV2": lambda: hugging_face("MobileNetV2ForImageClassification", image_size=64, depth_multiplier=0.25),
    "MobileViT": lambda: hugging_face("MobileViTForImageClassification", **MOBILE_VIT),
    "MobileViTV2": lambda: hugging_face("MobileViTV2ForImageClassification", image_size=64, width_multiplier=0.25),
    "LeViT": lambda: hugging_face(
        "LevitForImageClassification",
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[1, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "PVT": lambda: hugging_face("PvtForImageClassification", **STAGES, **PYRAMID),
    "PVTv2": lambda: hugging_face("PvtV2ForImageClassification", **STAGES, **PYRAMID),
    "PoolFormer": lambda: hugging_face("PoolFormerForImageClassification", **STAGES),
    "SegFormer": lambda: hugging_face("SegformerForImageClassification", **STAGES, **PYRAMID),
    "CvT": lambda: hugging_face(
        "CvtForImageClassification",
        embed_dim=[8, 16, 16],
        num_heads=[1, 2, 2],
        depth=[1, 2, 3],
        drop_path_rate=[0.0, 0.0, 0.0],
    ),
    "FocalNet": lambda: hugging_face("FocalNetForImageClassification", embed_dim=8, depths=[1, 1, 2, 1]),
    "SwiftFormer": lambda: hugging_face(
        "SwiftFormerForImageClassification", image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16]
    ),
    "VGG": lambda: Classifier(
        VGG(cfg=[8, "M", 8, "M", 16, "M", 16, 16, "M", 16, "M"], num_classes=CLASSES, mlp_ratio=0.02)
    ),
    "DenseNet": lambda: Classifier(DenseNet(growth_rate=4, block_config=(2, 2, 2), num_classes=CLASSES)),
    "Inception": lambda: Classifier(InceptionV3(num_classes=CLASSES)),
    "EVA": lambda: Classifier(
        Eva(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=CLASSES, use_rot_pos_emb=True)
    ),
    "RegNetY": lambda: Classifier(
        RegNet(RegNetCfg(depth=6, w0=8, wa=8, wm=2.0, group_size=8, se_ratio=0.25), num_classes=CLASSES)
    ),
    "MobileNetV3": lambda: Classifier(timm.create_model("mobilenetv3_small_050", num_classes=CLASSES)),
    "MobileNetV4": lambda: Classifier(timm.create_model("mobilenetv4_conv_small_035", num_classes=CLASSES)),
    "ByobNet": lambda: Classifier(timm.create_model("test_byobnet", num_classes=CLASSES)),
    "NFNet": lambda: Classifier(timm.create_model("test_nfnet", num_classes=CLASSES)),
    "MambaOut": lambda: Classifier(timm.create_model("test_mambaout", num_classes=CLASSES)),
}
SEGMENTERS = {
    "SegFormer": lambda: hugging_face(
        "SegformerForSemanticSegmentation", decoder_hidden_size=8, reshape_last_stage=True, **STAGES, **PYRAMID
    ),
    "UperNet": upernet,
    "BEiT": lambda: vit(
        "BeitForSemanticSegmentation", num_hidden_layers=4, out_indices=[1, 2, 3, 4], pool_scales=[1, 2]
    ),
    "DPT": lambda: vit(
        "DPTForSemanticSegmentation",
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
    ),
    "MobileViT": lambda: hugging_face("MobileViTForSemanticSegmentation", **MOBILE_VIT, aspp_out_channels=8),
    "MobileNetV2": lambda: hugging_face("MobileNetV2ForSemanticSegmentation", image_size=64, depth_multiplier=0.25),
}
DETECTORS = {
    "YOLOS": lambda: vit("YolosForObjectDetection", image_size=[32, 32], num_detection_tokens=5),
    "DETR": lambda: transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            backbone_config=transformers.ResNetConfig(embedding_size=8, **STAGES, out_features=["stage4"]),
            **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in DETR_SIZES.items()},
            d_model=16,
            num_queries=5,
            num_labels=CLASSES,
        )
    ),
}
SIZES = {
    "EfficientNet": 64,
    "MobileNetV1": 64,
    "MobileViT": 64,
    "MobileViTV2": 64,
    "LeViT": 64,
    "SwiftFormer": 64,
    "Hiera": 224,
    "Inception": 80,
    "MobileNetV2": 64,
}


def boxes_for(batch):
    """Random images with two boxes each."""
    return [
        {
            "pixel_values": torch.randn(3, 32, 32),
            "labels": {"class_labels": torch.randint(CLASSES, (2,)), "boxes": 0.1 + 0.4 * torch.rand(2, 4)},
        }
        for _ in range(batch)
    ]


def keep_labels_apart(rows):
    labels = [row["labels"] for row in rows]
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}


def images_for(name, batch, segmentation=False):
    """Random images and labels that fit a model of this family."""
    size = SIZES.get(name, 32)
    shape = (batch, size, size) if segmentation else (batch,)
    return [
        {"pixel_values": image, "labels": label}
        for image, label in zip(torch.randn(batch, 3, size, size), torch.randint(CLASSES, shape), strict=True)
    ]
