"""Which layers a trainer tunes: their granularity, a head that is named, adapters."""

import peft
import pytest
from small_runs import arguments, images, resnet, trainer, vit
from transformers import set_seed

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments, layer_groups


@pytest.mark.parametrize("granularity", ["block", "stage", "tensor"])
def test_the_layers_of_a_granularity_are_those_of_the_history(tmp_path, granularity):
    run = trainer(tmp_path, resnet(), layer_granularity=granularity, max_steps=3, meta_source="stream")
    run.train()
    assert run.lr_history.layers == list(layer_groups(resnet(), granularity))
    assert (run.lr_history.learning_rates[-1] != run.lr_history.learning_rates[0]).all()
    run.lr_history.save(tmp_path / "lr_history.csv")
    header = (tmp_path / "lr_history.csv").read_text().splitlines()[0].split(",")
    assert set(run.lr_history.layers) <= set(header)


def test_the_head_of_a_tensor_granularity_is_all_its_tensors(tmp_path):
    options = {"layer_granularity": "tensor", "head_lr_multiplier": 10.0, "head_hold_epochs": 100.0}
    run = trainer(tmp_path, max_steps=3, **options)
    run.train()
    first, last = run.lr_history.learning_rates[0], run.lr_history.learning_rates[-1]
    head = [layer.startswith("head.") for layer in run.lr_history.layers]
    assert sum(head) == 2
    for is_head, start, end in zip(head, first, last, strict=True):
        assert start == pytest.approx(1e-2 if is_head else 1e-3)
        assert (start == end) == is_head


def test_calibration_gives_all_tensors_of_the_head_one_start_rate(tmp_path):
    run = trainer(tmp_path, resnet(), max_steps=2, layer_granularity="tensor", calibrate=True)
    run.train()
    scheduler = run.lr_scheduler
    found = scheduler.calibration
    expected = [found.head_lr if layer.startswith("head.") else found.backbone_lr for layer in scheduler.layers]
    assert scheduler.start_learning_rates.tolist() == expected
    assert found.head_lr != found.backbone_lr


def test_a_head_can_be_named(tmp_path):
    run = trainer(tmp_path, head_module=["vit.layernorm", "classifier"], max_steps=1, head_lr_multiplier=10.0)
    names = run._layer_groups(run.model)["head"]
    assert sorted({name.rpartition(".")[0] for name in names}) == ["classifier", "vit.layernorm"]
    run.train()
    assert run.lr_history.learning_rates[0][-1] == pytest.approx(1e-2)
    with pytest.raises(ValueError, match="'classifer', named as the head, is no module .* Did you mean 'classifier'"):
        trainer(tmp_path, head_module=["classifer"])


def test_an_unknown_granularity_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layer_granularity='layer' must be one of 'block', 'stage', 'tensor'"):
        MetaLRTrainingArguments(str(tmp_path), layer_granularity="layer")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_are_tuned_a_block_at_a_time(tmp_path):
    set_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = peft.get_peft_model(vit(), config)
    args = arguments(tmp_path, meta_source="stream", label_names=["labels"])
    run = MetaLRTrainer(model=model, args=args, train_dataset=images())
    run.train()
    assert run.lr_history.layers == ["layers.0", "layers.1", "layers.2", "head"]
    assert (run.lr_history.learning_rates[-1] != run.lr_history.learning_rates[0]).all()


@pytest.mark.parametrize("source", ["stream", "next_batch"])
@pytest.mark.parametrize("calibrate", [True, False])
def test_a_model_with_one_layer_is_tuned(tmp_path, source, calibrate):
    model = vit()
    model.vit.requires_grad_(False)
    run = trainer(tmp_path, model, meta_source=source, calibrate=calibrate)
    run.train()
    assert run.lr_history.layers == ["head"]
    assert run.lr_history.learning_rates[-1] != run.lr_history.learning_rates[0]
