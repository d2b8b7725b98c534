"""Layers of modules that neither timm nor transformers made, of wrapped ones, and of those with adapters."""

import warnings

import peft
import pytest
import timm
import torch
from architectures import layers_by_first_use
from layered import assert_is_a_partition, resnet, vit
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from metalr_hf import layer_groups


def double_conv(conv, norm, channels_in, channels_out):
    return nn.Sequential(
        conv(channels_in, channels_out, 3, padding=1),
        norm(channels_out),
        nn.ReLU(),
        conv(channels_out, channels_out, 3, padding=1),
        norm(channels_out),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """As people write it, with the decoder made before the bottleneck and the names of a well-known tutorial."""

    def __init__(self, dimensions=2):
        super().__init__()
        conv, norm, up = (
            (nn.Conv2d, nn.BatchNorm2d, nn.ConvTranspose2d)
            if dimensions == 2
            else (nn.Conv3d, nn.BatchNorm3d, nn.ConvTranspose3d)
        )
        widths = [4, 8, 8]
        self.ups, self.downs = nn.ModuleList(), nn.ModuleList()
        self.pool = nn.MaxPool2d(2) if dimensions == 2 else nn.MaxPool3d(2)
        for before, width in zip([1, *widths], widths, strict=False):
            self.downs.append(double_conv(conv, norm, before, width))
        for width in reversed(widths):
            self.ups.append(up(width if width == 4 else 8, width, 2, 2))
            self.ups.append(double_conv(conv, norm, 2 * width, 4 if width == 4 else 8))
        self.ups[4] = up(8, 4, 2, 2)
        self.bottleneck = double_conv(conv, norm, 8, 8)
        self.final_conv = conv(4, 2, 1)

    def forward(self, images):
        skips = []
        for down in self.downs:
            images = down(images)
            skips.append(images)
            images = self.pool(images)
        images = self.bottleneck(images)
        for up, conv in zip(self.ups[::2], self.ups[1::2], strict=True):
            images = conv(torch.cat([skips.pop(), up(images)], dim=1))
        return self.final_conv(images)


class NumberedUNet(nn.Module):
    """With a child a block: inc, down1, down2, up1, up2, outc."""

    def __init__(self):
        super().__init__()
        self.inc = double_conv(nn.Conv2d, nn.BatchNorm2d, 1, 4)
        self.down1 = double_conv(nn.Conv2d, nn.BatchNorm2d, 4, 8)
        self.down2 = double_conv(nn.Conv2d, nn.BatchNorm2d, 8, 8)
        self.up1 = double_conv(nn.Conv2d, nn.BatchNorm2d, 16, 4)
        self.up2 = double_conv(nn.Conv2d, nn.BatchNorm2d, 8, 4)
        self.outc = nn.Sequential(nn.Conv2d(4, 2, 1))

    def forward(self, images):
        first = self.inc(images)
        second = self.down1(nn.functional.max_pool2d(first, 2))
        deep = self.down2(nn.functional.max_pool2d(second, 2))
        deep = self.up1(torch.cat([second, nn.functional.interpolate(deep, scale_factor=2)], dim=1))
        return self.outc(self.up2(torch.cat([first, nn.functional.interpolate(deep, scale_factor=2)], dim=1)))


class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, images):
        return images + self.bn2(self.conv2(self.bn1(self.conv1(images)).relu()))


class TorchvisionLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        for i in range(1, 5):
            setattr(self, f"layer{i}", nn.Sequential(ResidualBlock(4), ResidualBlock(4)))
        self.fc = nn.Linear(4, 2)

    def forward(self, images):
        images = self.bn1(self.conv1(images))
        for i in range(1, 5):
            images = getattr(self, f"layer{i}")(images)
        return self.fc(images.mean((2, 3)))


NETWORKS = {
    "U-Net": (UNet, (1, 1, 16, 16)),
    "3-D U-Net": (lambda: UNet(3), (1, 1, 16, 16, 16)),
    "U-Net with a child a block": (NumberedUNet, (1, 1, 16, 16)),
    "torchvision-like": (TorchvisionLike, (1, 1, 16, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_hand_written_networks(name):
    make, shape = NETWORKS[name]
    model = make().eval()
    groups = layer_groups(model)
    assert_is_a_partition(model, groups)
    assert list(groups)[-1] == "head"
    assert layers_by_first_use(model, groups, torch.zeros(shape)) == list(groups)
    expected = {
        "torchvision-like": ["stem", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2)), "head"],
        "U-Net with a child a block": ["inc", "down1", "down2", "up1", "up2", "head"],
    }
    unet = [f"downs.{i}" for i in range(3)] + ["bottleneck"] + [f"ups.{i}" for i in range(6)] + ["head"]
    assert list(groups) == expected.get(name, unet)


def test_a_network_on_a_timm_encoder():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = timm.create_model("test_resnet", features_only=True)
            self.decoder = nn.ModuleList([double_conv(nn.Conv2d, nn.BatchNorm2d, 8, 8) for _ in range(3)])
            self.head = nn.Conv2d(8, 2, 1)

    groups = layer_groups(Segmenter())
    assert_is_a_partition(Segmenter(), groups)
    assert list(groups)[0] == "stem"
    assert [layer for layer in groups if layer.startswith("decoder")] == ["decoder.0", "decoder.1", "decoder.2"]
    assert sum(layer.startswith("encoder.layer") for layer in groups) >= 4
    assert list(groups)[-1] == "head"


def test_one_layer_and_no_head():
    single = nn.Linear(2, 2)
    assert_is_a_partition(single, layer_groups(single))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(layer_groups(nn.Sequential(nn.Linear(2, 2)))) == 1
    headless = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), ResidualBlock(2), ResidualBlock(2))
    with pytest.warns(
        UserWarning, match=r"No head recognised in Sequential: its last layer, '3', .*head_module=\.\.\."
    ):
        groups = layer_groups(headless)
    assert_is_a_partition(headless, groups)
    named = layer_groups(headless, head="3.conv2")
    assert named["head"] == ["3.conv2.weight", "3.conv2.bias"]
    assert_is_a_partition(headless, named)
    assert list(layer_groups(headless, head=["3.conv2", "3.bn2"]))[-1] == "head"
    with pytest.raises(ValueError, match=r"'3.conv3', named as the head, .* Did you mean '3.conv2' or '3.conv1'"):
        layer_groups(headless, head="3.conv3")


def test_the_head_of_a_head_that_is_named_anew_stays_in_the_network():
    groups = layer_groups(vit(), head="vit.encoder.layer.2" if hasattr(vit().vit, "encoder") else "vit.layers.2")
    assert list(groups)[-2:] == ["backbone.head", "head"]


WRAPPED = {
    "DDP": (lambda model: nn.ModuleDict({"module": model}), "module."),
    "torch.compile": (torch.compile, "_orig_mod."),
    "DDP around torch.compile": (lambda model: nn.ModuleDict({"module": torch.compile(model)}), "module._orig_mod."),
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("make", [lambda: timm.create_model("test_convnext"), vit, resnet, UNet])
def test_wrapped_models_have_the_layers_of_bare_ones(make, wrap):
    bare = make()
    expected = layer_groups(bare)
    wrapper, prefix = WRAPPED[wrap]
    groups = layer_groups(wrapper(bare))
    assert groups == {layer: [prefix + name for name in members] for layer, members in expected.items()}


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile])
@pytest.mark.parametrize("make", [lambda: timm.create_model("test_vit"), vit])
def test_wrapped_blocks_have_the_names_of_bare_ones(make, wrap):
    model = make()
    expected = {layer: len(members) for layer, members in layer_groups(model).items()}
    blocks = model.blocks if hasattr(model, "blocks") else getattr(model.vit, "layers", None)
    for i, block in enumerate(blocks):
        blocks[i] = wrap(block)
    groups = layer_groups(model)
    assert {layer: len(members) for layer, members in groups.items()} == expected
    assert_is_a_partition(model, groups)


def lora(model, target, head):
    config = peft.LoraConfig(r=2, target_modules=target, modules_to_save=[head])
    return peft.get_peft_model(model, config)


# peft asks transformers for what it now calls by another name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (
            lambda: lora(timm.create_model("test_vit", num_classes=3), ["qkv", "fc1"], "head"),
            [f"blocks.{i}" for i in range(6)],
        ),
        (lambda: lora(vit(), ["q_proj", "fc1"], "classifier"), [f"layers.{i}" for i in range(3)]),
        (lambda: lora(timm.create_model("test_resnet", num_classes=3), r"layer\d\.\d\.conv\d", "fc"), None),
    ],
    ids=["timm ViT", "transformers ViT", "timm ResNet"],
)
def test_adapters_are_grouped_by_the_block_they_sit_in(make, blocks):
    model = make()
    groups = layer_groups(model)
    assert_is_a_partition(model, groups)
    assert list(groups)[-1] == "head"
    assert all(".modules_to_save." in name for name in groups["head"])
    if blocks is None:
        blocks = [layer for layer in groups if layer.startswith("layer")]
        assert len(blocks) == 4
    else:
        assert list(groups) == [*blocks, "head"]
    for block in blocks:
        assert all(f".{block}." in name and "lora_" in name for name in groups[block])


def test_modules_that_share_their_parameters_are_one_layer():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.ModuleList([ResidualBlock(2) for _ in range(3)])
            self.decoder = nn.Module()
            self.decoder.layers = nn.ModuleList([ResidualBlock(2) for _ in range(2)])
            self.decoder.refine = nn.Linear(2, 4)
            self.bbox_embed = nn.Linear(2, 4)
            self.decoder.refine.weight = self.bbox_embed.weight

    model = Detector()
    groups = layer_groups(model)
    assert_is_a_partition(model, groups)
    # Under the name that the parameter has in the model, which is that of its first owner.
    assert groups["head"] == ["decoder.refine.weight", "bbox_embed.bias"]

    class LanguageHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 2)
            self.blocks = nn.ModuleList([ResidualBlock(2) for _ in range(3)])
            self.lm_head = nn.Linear(2, 4)
            self.lm_head.weight = self.embed.weight

    groups = layer_groups(LanguageHead())
    assert (groups["stem"], groups["head"]) == (["embed.weight"], ["lm_head.bias"])


def test_every_tensor_its_own_layer():
    model = TorchvisionLike()
    groups = layer_groups(model, "tensor")
    assert_is_a_partition(model, groups)
    assert set(map(len, groups.values())) == {1}
    assert list(groups)[:2] == ["conv1.weight", "conv1.bias"]
    assert list(groups)[-2:] == ["head.weight", "head.bias"]
    assert groups["head.weight"] == ["fc.weight"]


def test_layers_print_as_a_table():
    groups = layer_groups(TorchvisionLike())
    table = str(groups)
    rows = {cells[0]: cells[1:] for line in table.splitlines() if (cells := line.strip("│").replace("│", " ").split())}
    assert rows["layer1.0"] == ["8", "312", "12.2%"]
    assert rows["head"] == ["2", "10", "0.4%"]
    total = sum(p.numel() for p in TorchvisionLike().parameters())
    assert sum(groups.parameters.values()) == total
    assert f"{total:,}" in table
