import json

import datasets
import pytest
import timm
import torch
from small_runs import trainer
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
)

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
from metalr_hf.models.demo import demo_model
from metalr_hf.models.timm import is_timm_model, make_portable, wrap_timm_model

NAMES = {0: "benign", 1: "malignant", 2: 'dünn | "quer"'}


def images(size, n=4, channels=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def network(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_efficientnet", {}),
        ("test_resnet", {}),
        ("test_vit", {}),
        ("test_convnext", {}),
        ("test_vit", {"img_size": 96}),
        ("test_vit", {"depth": 2}),
        ("test_vit", {"global_pool": "avg"}),
        ("test_resnet", {"global_pool": "max"}),
        ("test_resnet", {"act_layer": "silu"}),
        ("test_resnet", {"drop_rate": 0.3}),
        ("test_resnet", {"in_chans": 1}),
    ],
)
def test_a_wrapped_network_reloads_with_equal_logits_in_both_libraries(tmp_path, name, kwargs):
    bare = network(name, **kwargs)
    wrapped = wrap_timm_model(bare, NAMES).eval()
    pixels = images(kwargs.get("img_size", bare.pretrained_cfg["input_size"][-1]), channels=kwargs.get("in_chans", 3))
    with torch.no_grad():
        expected = wrapped(pixel_values=pixels).logits
        assert torch.equal(expected, bare.eval()(pixels))
        wrapped.save_pretrained(tmp_path)
        make_portable(tmp_path)
        again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(again(pixel_values=pixels).logits, expected)
        in_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(in_timm(pixels), expected)
    assert again.config.id2label == NAMES
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert list(processor.data_config["input_size"]) == list(pixels.shape[1:])
    assert len(processor.data_config["mean"]) == pixels.shape[1]


def test_the_demo_model_reloads_with_equal_logits_in_both_libraries(tmp_path):
    model = demo_model(NAMES).eval()
    model.save_pretrained(tmp_path)
    make_portable(tmp_path)
    with torch.no_grad():
        expected = model(pixel_values=images(64)).logits
        assert torch.equal(
            AutoModelForImageClassification.from_pretrained(tmp_path).eval()(pixel_values=images(64)).logits, expected
        )
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images(64)), expected)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == list(NAMES.values())
    assert "num_classes" not in config["model_args"]


def test_the_network_itself_is_wrapped_and_an_optimizer_over_it_stays_valid(tmp_path):
    bare = network("test_efficientnet")
    optimizer = torch.optim.SGD(bare.parameters(), lr=1e-2)
    rows = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images(64, 8))]
    args = MetaLRTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True
    )
    before = bare.conv_stem.weight.clone()
    run = MetaLRTrainer(model=bare, args=args, train_dataset=rows, optimizers=(optimizer, None))
    run.train()
    assert not torch.equal(before, bare.conv_stem.weight)
    assert run.lr_history.layers[0] == "stem"
    assert run.lr_history.layers[-1] == "head"
    run.save_model(str(tmp_path / "saved"))
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert torch.equal(reloaded.conv_stem.weight, bare.conv_stem.weight)


def test_own_layers_of_a_bare_network_keep_their_names(tmp_path):
    bare = network("test_vit")
    groups = {"all": [name for name, _ in bare.named_parameters()]}
    data = datasets.Dataset.from_dict({"pixel_values": [[[[0.0]]]], "labels": [0]})
    args = MetaLRTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    run = MetaLRTrainer(model=bare, args=args, train_dataset=data, layer_groups=groups)
    assert run.create_optimizer().param_groups[0]["layer"] == "all"


def test_what_is_no_timm_classifier_is_told_apart_or_refused():
    assert is_timm_model(network("test_vit"))
    assert not is_timm_model(torch.nn.Linear(2, 2))
    assert not is_timm_model(wrap_timm_model(network("test_vit")))
    with pytest.raises(ValueError, match=r"no classifier \(num_classes=0\)"):
        wrap_timm_model(timm.create_model("test_vit", num_classes=0))
    with pytest.raises(ValueError, match="id2label names 2 classes, but the timm model has 3"):
        wrap_timm_model(network("test_vit"), {0: "a", 1: "b"})


def test_a_folder_that_holds_no_timm_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no architecture"):
        make_portable(tmp_path)


def test_class_names_in_any_order_stay_with_their_numbers(tmp_path):
    shuffled = wrap_timm_model(network("test_resnet"), {2: "c", 0: "a", 1: "b"})
    shuffled.save_pretrained(tmp_path)
    make_portable(tmp_path)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.id2label == {0: "a", 1: "b", 2: "c"}
    with pytest.raises(ValueError, match=r"class numbers \[1, 2, 3\]. They have to be 0 to 2"):
        wrap_timm_model(network("test_resnet"), {1: "a", 2: "b", 3: "c"})


def test_drop_rates_come_back_for_further_training(tmp_path):
    wrap_timm_model(network("test_resnet", drop_rate=0.3)).save_pretrained(tmp_path)
    make_portable(tmp_path)
    assert AutoModelForImageClassification.from_pretrained(tmp_path).timm_model.drop_rate == 0.3
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).drop_rate == 0.3


def test_what_cannot_be_saved_is_said_when_wrapped():
    with pytest.warns(UserWarning, match="act_layer=.*cannot be written to config.json"):
        wrap_timm_model(network("test_resnet", act_layer=torch.nn.SiLU))
    changed = network("test_resnet")
    changed.fc = torch.nn.Sequential(torch.nn.Dropout(0.1), changed.fc)
    with pytest.warns(UserWarning, match=r"4 tensors of this network .* \(first: fc.1.bias\)"):
        wrap_timm_model(changed)


def test_a_wrapped_network_trains_in_the_stock_trainer(tmp_path):
    bare = network("test_efficientnet")
    before = bare.conv_stem.weight.clone()
    rows = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images(64, 8))]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True
    )
    stock = Trainer(model=wrap_timm_model(bare, NAMES), args=args, train_dataset=rows)
    stock.train()
    assert stock.state.global_step == 2
    assert not torch.equal(before, bare.conv_stem.weight)


def test_a_model_saved_in_several_files_is_refused_before_anything_is_written(tmp_path):
    wrap_timm_model(network("test_resnet")).save_pretrained(tmp_path, max_shard_size="200KB")
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"no model.safetensors, .* max_shard_size"):
        make_portable(tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_checkpoints_load_in_timm_and_a_run_goes_on_from_them_bitwise(tmp_path):
    def train(folder, resume=None, **options):
        torch.manual_seed(0)
        # What this configuration leaves out is what timm cannot do without.
        config = TimmWrapperConfig(architecture="test_resnet", num_labels=3)
        run = trainer(tmp_path / folder, TimmWrapperForImageClassification(config), max_steps=3, **options)
        run.train(resume_from_checkpoint=resume)
        return run.model.timm_model.state_dict()

    through = train("through", save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "through" / "checkpoint-2"
    in_timm = timm.create_model(f"local-dir:{checkpoint}", pretrained=True).state_dict()
    assert in_timm.keys() == through.keys()
    resumed = train("resumed", resume=str(checkpoint))
    for name, value in through.items():
        assert torch.equal(value, resumed[name])
    assert not torch.equal(through["fc.weight"], in_timm["fc.weight"])
