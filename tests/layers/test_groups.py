from collections import OrderedDict

import pytest
import timm
import torch
from layered import assert_is_a_partition, resnet, vit
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from metalr_hf import layer_groups
from metalr_hf.layers.groups import check_layer_groups, split_param_groups
from metalr_hf.models import Classifier
from metalr_hf.models.timm import wrap_timm_model


def convnext():
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1]))


def swin():
    return SwinForImageClassification(SwinConfig(embed_dim=8, depths=[1, 2], num_heads=[1, 2], image_size=32))


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (vit, ["stem", "layers.0", "layers.1", "layers.2", "head"]),
        (
            resnet,
            ["stem", "encoder.stages.0.layers.0", "encoder.stages.0.layers.1", "encoder.stages.1", "head"],
        ),
        (
            convnext,
            [
                "stem",
                "encoder.stages.0.layers.0",
                "encoder.stages.1.downsampling_layer",
                "encoder.stages.1.layers.0",
                "encoder.stages.2.downsampling_layer",
                "encoder.stages.2.layers.0",
                "encoder.stages.2.layers.1",
                "encoder.stages.3.downsampling_layer",
                "encoder.stages.3.layers.0",
                "head",
            ],
        ),
        (
            swin,
            [
                "stem",
                "encoder.layers.0.blocks.0",
                "encoder.layers.0.downsample",
                "encoder.layers.1.blocks.0",
                "encoder.layers.1.blocks.1",
                "head",
            ],
        ),
    ],
)
def test_hugging_face_models_are_grouped_by_block(make, layers):
    model = make()
    groups = layer_groups(model)
    assert list(groups) == layers
    assert_is_a_partition(model, groups)
    assert all(name.startswith("classifier") for name in groups["head"])


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "resnet18"])
def test_layers_come_in_the_order_of_a_forward_pass(name):
    model = timm.create_model(name, num_classes=3).eval()
    groups = layer_groups(model)
    layer_of = {member: layer for layer, members in groups.items() for member in members}
    touched = []
    for path, module in model.named_modules():
        own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
        if own:
            module.register_forward_pre_hook(lambda *_, layer=layer_of[own[0]]: touched.append(layer))
    size = model.pretrained_cfg["input_size"][-1]
    model(torch.zeros(1, 3, size, size))
    assert list(dict.fromkeys(touched)) == list(groups)


def test_wrappers_of_a_single_module_are_looked_through():
    bare = timm.create_model("test_resnet", num_classes=3)
    expected = layer_groups(bare)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = bare
            self.loss = nn.CrossEntropyLoss()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Wrapper()

    for wrapped, prefix in ((wrap_timm_model(bare), "timm_model."), (Outer(), "module.network.")):
        groups = layer_groups(wrapped)
        assert groups == {layer: [prefix + name for name in members] for layer, members in expected.items()}


def test_a_plain_module_is_grouped_by_its_children_and_norms_go_with_the_layer_before():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))
    groups = layer_groups(model)
    assert groups == {
        "0": ["0.weight", "0.bias", "1.weight", "1.bias"],
        "3": ["3.weight", "3.bias"],
        "head": ["4.weight", "4.bias"],
    }
    single = nn.Linear(2, 2)
    assert_is_a_partition(single, layer_groups(single))


@pytest.mark.parametrize("wrap", [Classifier, lambda net: nn.ModuleDict({"module": net})], ids=["ours", "any"])
def test_a_sequence_has_the_same_layers_in_a_wrapper(wrap):
    stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    for net in (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)),
        nn.Sequential(stem, nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), nn.Flatten(), nn.Linear(16, 2)),
        nn.Sequential(timm.create_model("test_resnet", num_classes=0), nn.Flatten(), nn.Linear(96, 2)),
    ):
        expected, found = layer_groups(net), layer_groups(wrap(net))
        assert list(found) == list(expected)
        assert [[name.partition(".")[2] for name in names] for names in found.values()] == list(expected.values())
        assert len(found) > 1


def test_a_head_is_named_as_in_the_network_or_as_in_its_wrapper():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    timm_model = timm.create_model("test_vit")
    for model, wrapped, name, prefix in (
        (net, Classifier(net), "2", "network."),
        (timm_model, wrap_timm_model(timm_model), "blocks.5", "timm_model."),
    ):
        expected = [prefix + member for member in layer_groups(model, head=name)["head"]]
        assert layer_groups(wrapped, head=name)["head"] == expected
        assert layer_groups(wrapped, head=prefix + name)["head"] == expected
    with pytest.raises(ValueError, match="'9', named as the head, is no module"):
        layer_groups(Classifier(net), head="9")


def test_a_frozen_head_is_told():
    model = vit()
    model.classifier.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"The head of .* is frozen: 'layers.2', the last layer that is trained"):
        assert list(layer_groups(model))[-1] == "layers.2"


def test_frozen_parameters_belong_to_none_and_tied_ones_to_one():
    model = vit()
    model.vit.embeddings.requires_grad_(False)
    assert list(layer_groups(model)) == ["layers.0", "layers.1", "layers.2", "head"]
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    assert_is_a_partition(tied, layer_groups(tied))


def test_coarser_and_finer():
    model = timm.create_model("test_convnext")
    assert len(layer_groups(model, "stage")) < len(layer_groups(model)) < len(layer_groups(model, "tensor"))
    assert list(layer_groups(vit(), "tensor").values())[-1] == ["classifier.bias"]
    assert list(layer_groups(resnet(), "stage")) == ["stem", "encoder.stages.0", "encoder.stages.1", "head"]
    with pytest.raises(ValueError, match="granularity='fine' must be one of 'block', 'stage', 'tensor'"):
        layer_groups(model, "fine")


def test_a_head_named_by_hand_does_not_take_the_names_of_another():
    model = nn.Sequential(OrderedDict(stem=nn.Linear(2, 2), head=nn.Linear(2, 2), out=nn.Linear(2, 2)))
    groups = layer_groups(model, "tensor", head="out")
    assert list(groups)[-2:] == ["head.weight", "head.bias"]
    assert sorted(name for names in groups.values() for name in names) == sorted(dict(model.named_parameters()))


def test_layers_edited_by_hand_print():
    groups = layer_groups(nn.Sequential(OrderedDict(stem=nn.Linear(2, 2), head=nn.Linear(2, 2))))
    groups["mine"] = groups.pop("stem")
    assert "mine" in str(groups)
    assert groups.parameters == {"head": 6, "mine": 6}


def test_param_groups_are_split_by_layer_and_keep_their_options():
    stem, head = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [
        {"params": [head.weight, stem.weight], "weight_decay": 0.1, "lr": 1e-3},
        {"params": [stem.bias], "weight_decay": 0.0, "lr": 1e-3},
    ]
    split = split_param_groups(groups, {"stem": list(stem.parameters()), "head": list(head.parameters())})
    assert [(group["layer"], group["weight_decay"]) for group in split] == [("stem", 0.1), ("stem", 0.0), ("head", 0.1)]
    assert split[0]["params"][0] is stem.weight
    assert "layer" not in groups[0]
    with pytest.raises(ValueError, match=r"parameter of shape \(2, 2\) that belongs to no layer"):
        split_param_groups(groups, {"stem": list(stem.parameters())})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"all": ["weight"]}, "misses the trainable 'bias'"),
        ({"a": ["weight", "bias"], "b": ["bias"]}, "names 'bias' twice, in layers 'a' and 'b'"),
        (
            {"a": ["weight", "bias", "weigth"]},
            "'weigth' in layer 'a', which the model does not have. Did you mean 'weight'",
        ),
    ],
)
def test_a_map_that_does_not_fit_is_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        check_layer_groups(nn.Linear(2, 2), groups)


def test_a_list_of_layers_is_no_map():
    with pytest.raises(TypeError, match=r"layer_groups is a list: give a dictionary from the name of a layer"):
        check_layer_groups(nn.Linear(2, 2), [["weight"], ["bias"]])


def test_a_frozen_parameter_in_a_map_and_a_frozen_model_are_refused():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="names 'bias' in layer 'a', which is frozen"):
        check_layer_groups(model, {"a": ["weight", "bias"]})
    model.requires_grad_(False)
    for refused in (lambda: layer_groups(model), lambda: check_layer_groups(model, {})):
        with pytest.raises(ValueError, match="no trainable parameter"):
            refused()
