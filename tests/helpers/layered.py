"""Small models of transformers with a few layers, and what their layers must be."""

from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification


def vit():
    return ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, image_size=32)
    )


def resnet():
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1]))


def names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def assert_is_a_partition(model, groups):
    grouped = [name for members in groups.values() for name in members]
    assert sorted(grouped) == sorted(names(model))
