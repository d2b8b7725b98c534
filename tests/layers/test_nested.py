"""MONAI's networks get layers that are named by what they are."""

import pytest
import torch
from monai.networks import nets

from metalr_hf import layer_groups
from metalr_hf.layers.nested import nested_levels

SIDES = ["encoder.0", "encoder.1", "encoder.2", "bottleneck", "decoder.0", "decoder.1", "head"]


@pytest.mark.parametrize("num_res_units", [0, 2])
def test_the_levels_of_a_nested_network_are_its_layers_in_order(num_res_units):
    network = nets.UNet(3, 1, 2, (4, 8, 16, 32), (2, 2, 2), num_res_units=num_res_units)
    for granularity in ("block", "stage"):
        assert list(layer_groups(network, granularity)) == SIDES
    seen = []
    for name, path in nested_levels(network.model).items():
        network.model.get_submodule(path).register_forward_hook(lambda *_, name=name: seen.append(name))
    network(torch.zeros(1, 1, 16, 16, 16))
    assert seen == SIDES


def test_the_layers_hold_every_parameter_once():
    network = nets.UNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=2)
    layers = layer_groups(network)
    assert sorted(name for names in layers.values() for name in names) == sorted(dict(network.named_parameters()))
    assert all(name.startswith("model.2.") for name in layers["head"])


def test_what_only_repeats_other_modules_does_not_hide_the_head():
    network = nets.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16])
    names = ["input_block", "downsamples.0", "bottleneck", "upsamples.0", "upsamples.1", "head"]
    assert list(layer_groups(network)) == names
    assert layer_groups(network)["head"] == ["output_block.conv.conv.weight", "output_block.conv.conv.bias"]


def test_the_head_of_a_transformer_for_volumes():
    layers = list(layer_groups(nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12)))
    assert layers[0] == "stem"
    assert layers[-1] == "head"
    assert {"layers1.0", "encoder1", "decoder1"} <= set(layers)
