"""MONAI's networks as models of transformers."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from metalr_hf import layer_groups
from metalr_hf.models.monai_networks import MonaiConfig, MonaiForSemanticSegmentation, kernels_and_strides

SMALL = {
    "DynUNet": ({"filters": [4, 8, 16]}, (16, 16, 8)),
    "UNet": ({"channels": [4, 8, 16]}, (16, 16, 8)),
    "SegResNet": ({"init_filters": 8}, (16, 16, 8)),
    "SwinUNETR": ({"feature_size": 12}, (64, 32, 32)),
}
NETWORKS = [*list(SMALL)[:3], pytest.param("SwinUNETR", marks=pytest.mark.slow)]


def build(name="DynUNet", classes=3, **kwargs):
    torch.manual_seed(0)
    args, patch = SMALL[name]
    config = MonaiConfig(network=name, network_args=args, patch_size=patch, num_labels=classes, **kwargs)
    return MonaiForSemanticSegmentation(config)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_a_saved_network_reloads_with_equal_logits(name, trust_remote_code, tmp_path):
    model = build(name).eval()
    patch = torch.randn(1, 1, *model.config.patch_size)
    model.save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, trust_remote_code=trust_remote_code).eval()
    with torch.no_grad():
        assert torch.equal(again(patch).logits, model(patch).logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_other_classes_get_a_fresh_head_and_keep_the_rest(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.id2label = {i: str(i) for i in range(5)}
    options = {"config": config, "ignore_mismatched_sizes": True}
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, **options)
    before, after = build(name).state_dict(), again.state_dict()
    fresh = {
        key
        for key, value in before.items()
        if not torch.equal(value, after[key].reshape(-1)[: value.numel()].reshape(value.shape))
    }
    assert fresh <= set(layer_groups(again)["head"])
    assert fresh
    assert all(torch.isfinite(value).all() for value in after.values())
    assert again(torch.randn(1, 1, *again.config.patch_size)).logits.shape[1] == 5


def test_volumes_of_any_size_are_seen_through_windows_of_a_patch():
    model = build().eval()
    seen = []
    model.network.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[2:])))
    with torch.no_grad():
        for size in ((21, 30, 9), (10, 16, 5)):
            assert model(torch.randn(1, 1, *size)).logits.shape == (1, 3, *size)
    assert set(seen) == {(16, 16, 8)}


def test_a_patch_goes_through_the_network_as_it_is():
    model = build().eval()
    patch = torch.randn(2, 1, 16, 16, 8)
    with torch.no_grad():
        assert torch.equal(model(patch).logits, model.network(patch))
        model.train()
        assert model(torch.randn(1, 1, 8, 8, 8)).logits.shape == (1, 3, 8, 8, 8)


def test_loss_and_tuples():
    model = build()
    patch, labels = torch.randn(2, 1, 16, 16, 8), torch.randint(0, 3, (2, 16, 16, 8))
    output = model(patch, labels, spacing=torch.ones(2, 3))
    loss, logits = model(patch, labels, return_dict=False)
    assert torch.equal(output.loss, loss)
    assert torch.equal(output.logits, logits)
    assert len(model(patch, return_dict=False)) == 1
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_layers_have_names_that_say_something():
    model = build("UNet")
    assert list(layer_groups(model)) == ["encoder.0", "encoder.1", "bottleneck", "decoder.0", "head"]
    assert list(layer_groups(build()))[-1] == "head"


@pytest.mark.parametrize(
    ("network", "args", "match"),
    [("NoNet", {}, "'NoNet' is no network of MONAI"), ("DynUNet", {"depth": 3}, "does not take network_args=.*depth")],
)
def test_a_network_that_there_is_not(network, args, match):
    with pytest.raises(ValueError, match=match):
        MonaiForSemanticSegmentation(MonaiConfig(network=network, network_args=args, patch_size=(16, 16, 16)))


def test_an_axis_of_thick_slices_is_halved_later():
    kernels, strides = kernels_and_strides((64, 64, 16), (1.0, 1.0, 5.0))
    assert strides[:4] == [[1, 1, 1], [2, 2, 1], [2, 2, 1], [2, 2, 2]]
    assert kernels[:3] == [[3, 3, 1], [3, 3, 1], [3, 3, 3]]
    _, even = kernels_and_strides((512, 512, 512), (1.0, 1.0, 1.0))
    assert len(even) == 6
