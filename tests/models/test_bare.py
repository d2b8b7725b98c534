"""Bare modules in the Trainer: what they may take and return, and that what is saved loads into the module itself."""

import pytest
import timm
import torch
from networks import Network
from safetensors.torch import load_file
from small_runs import arguments, images, losses
from torch import nn
from transformers import AutoModelForImageClassification, Trainer

from metalr_hf import MetaLRTrainer
from metalr_hf.models.bare import Classifier, label_loss, needs_loss, wrap_bare_module


class WithLabels(Network):
    """Takes labels, and returns its loss in one of the ways that Trainer's users return it."""

    def __init__(self, returns):
        super().__init__()
        self.returns = returns

    def forward(self, pixel_values, labels=None):
        logits = super().forward(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "tuple": (loss, logits), "dict": {"loss": loss, "logits": logits}}[self.returns]


def train(folder, model, **kwargs):
    own = {key: kwargs.pop(key) for key in ("compute_metrics", "layer_groups", "compute_loss_func") if key in kwargs}
    run = MetaLRTrainer(
        model=model, args=arguments(folder, **kwargs), train_dataset=images(), eval_dataset=images(12, seed=1), **own
    )
    run.train()
    return run


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_timm_network_trains_and_reloads_with_equal_logits_in_both_libraries(tmp_path, name):
    torch.manual_seed(0)
    bare = timm.create_model(name, num_classes=3, **({"img_size": 16} if "vit" in name else {}))
    run = train(tmp_path / "run", bare, max_steps=3)
    assert (run.lr_history.learning_rates[-1] != run.lr_history.learning_rates[0]).any()
    run.save_model(tmp_path / "saved")
    pixels = images(4)[:]["pixel_values"]
    with torch.no_grad():
        expected = bare.eval()(pixels)
        in_timm = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
        for reloaded in (in_timm, again.timm_model):
            pairs = zip(reloaded.state_dict().values(), bare.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            # Where a file's tensors lie in memory changes the last bit.
            torch.testing.assert_close(reloaded(pixels), expected)


@pytest.mark.parametrize("calibrate", [False, True])
def test_a_module_from_images_to_logits_learns_and_its_saved_weights_are_its_own(tmp_path, calibrate):
    network = Network()
    run = train(
        tmp_path / "run",
        network,
        max_steps=40,
        learning_rate=1e-2,
        calibrate=calibrate,
        compute_metrics=lambda outputs: {
            "accuracy": float((outputs.predictions.argmax(-1) == outputs.label_ids).mean())
        },
    )
    assert run.lr_history.layers == ["stem", "block", "head"]
    assert run.evaluate()["eval_accuracy"] == 1.0
    assert run.predict(images(6).remove_columns("labels")).predictions.shape == (6, 3)
    run.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert sorted(saved) == sorted(network.state_dict())
    again = Network()
    again.load_state_dict(saved)
    with torch.no_grad():
        assert torch.equal(again.eval()(images(4)[:]["pixel_values"]), network.eval()(images(4)[:]["pixel_values"]))


def test_resuming_a_module_is_bitwise(tmp_path):
    whole = train(tmp_path / "a", Network(), max_steps=6, save_strategy="steps", save_steps=3)
    resumed = MetaLRTrainer(
        model=Network(), args=arguments(tmp_path / "b", max_steps=6), train_dataset=images(), eval_dataset=images(12)
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    pairs = zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("returns", ["loss", "tuple", "dict"])
def test_a_module_that_takes_labels_is_taken_as_it_is(tmp_path, returns):
    run = train(tmp_path, WithLabels(returns), learning_rate=1e-2, hyper_lr=0.1)
    assert type(run.model) is WithLabels
    assert (run.lr_history.learning_rates[-1] != run.lr_history.learning_rates[0]).all()
    assert losses(run) == losses(train(tmp_path, Network(), learning_rate=1e-2))
    assert run.evaluate()["eval_loss"] > 0


@pytest.mark.usefixtures("keep")
@pytest.mark.parametrize("untuned", [{"hyper_lr": 0.0}, {"lr_rule": "keep", "meta_source": "stream"}], ids=str)
@pytest.mark.parametrize("returns", ["tuple", "dict"])
def test_without_tuning_such_a_module_trains_as_in_the_stock_trainer(tmp_path, returns, untuned):
    tuned = train(tmp_path / "a", WithLabels(returns), **untuned)
    stock = Trainer(model=WithLabels(returns), args=arguments(tmp_path / "b"), train_dataset=images())
    stock.train()
    assert losses(tuned) == losses(stock)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, images):
        return nn.functional.mse_loss(self.decoder(self.encoder(images)), images)


def test_a_module_with_a_loss_of_its_own_needs_no_labels(tmp_path):
    data = images().remove_columns("labels").rename_column("pixel_values", "images")
    run = MetaLRTrainer(model=Autoencoder(), args=arguments(tmp_path, learning_rate=1e-2), train_dataset=data)
    run.train()
    assert type(run.model) is Autoencoder
    assert losses(run)[-1] < losses(run)[0]


class Pictures(torch.utils.data.Dataset):
    """Rows without a `column_names`, each with noise of its own."""

    def __len__(self):
        return 48

    def __getitem__(self, i):
        return {"images": images()[i]["pixel_values"] + 0.1 * torch.randn(3, 16, 16)}


def test_the_columns_of_a_torch_dataset_are_those_of_its_rows(tmp_path):
    module = Autoencoder()
    state = torch.get_rng_state()
    assert wrap_bare_module(module, None, Pictures()) == (module, None)
    assert torch.equal(torch.get_rng_state(), state)
    run = MetaLRTrainer(model=module, args=arguments(tmp_path, learning_rate=1e-2), train_dataset=Pictures())
    run.train()
    assert losses(run)[-1] < losses(run)[0]


def test_own_layers_of_a_module_and_a_loss_of_the_users_own(tmp_path):
    network = Network()
    groups = {"all": [name for name, _ in network.named_parameters()]}
    assert train(tmp_path, network, layer_groups=groups).lr_history.layers == ["all"]

    class TakesPixels(Network):
        def forward(self, pixel_values):
            return super().forward(pixel_values)

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs, labels)

    run = train(tmp_path, TakesPixels(), compute_loss_func=loss, remove_unused_columns=False)
    assert type(run.model) is TakesPixels
    assert losses(run) == losses(train(tmp_path, Network()))


@pytest.mark.parametrize("make", [Network, lambda: timm.create_model("test_resnet", num_classes=3)])
def test_a_module_made_anew_for_every_run_trains_as_one_that_is_given(tmp_path, make):
    def seeded():
        torch.manual_seed(0)
        return make()

    layers = {"all": [name for name, _ in make().named_parameters()]}
    # Making a module moves the generator that the order of the images would be drawn from.
    given = train(tmp_path, seeded(), layer_groups=layers, data_seed=1)
    run = MetaLRTrainer(
        args=arguments(tmp_path, data_seed=1),
        train_dataset=images(),
        model_init=lambda trial: seeded(),
        layer_groups=layers,
    )
    for _ in range(2):
        run.train()
        assert losses(run) == losses(given)
        assert run.lr_history.layers == ["all"]


def test_positional_arguments_are_looked_at_as_named_ones_are(tmp_path):
    class TakesPixels(Network):
        def forward(self, pixel_values):
            return super().forward(pixel_values)

    def loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs, labels)

    run = MetaLRTrainer(TakesPixels(), arguments(tmp_path), None, images(), None, None, None, loss)
    assert type(run.model) is TakesPixels
    data = images().remove_columns("labels").rename_column("pixel_values", "images")
    assert type(MetaLRTrainer(Autoencoder(), arguments(tmp_path), None, data).model) is Autoencoder
    sgd = torch.optim.SGD(run.model.parameters(), lr=0.1)
    given = (sgd, torch.optim.lr_scheduler.ConstantLR(sgd))
    rest = [images(), None, None, None, None, None, None, given]
    with pytest.raises(ValueError, match=r"Pass optimizers=\(optimizer, None\)"):
        MetaLRTrainer(run.model, arguments(tmp_path), None, *rest)


def test_masks_on_logits_of_another_size():
    network = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2, padding=1))
    masks = torch.randint(0, 2, (2, 8, 8))
    masks[:, 0] = 255
    outputs = Classifier(network)(torch.rand(2, 3, 8, 8), masks)
    expected = nn.functional.interpolate(outputs["logits"], size=(8, 8), mode="bilinear")[:, :, 1:]
    assert outputs["loss"].item() == pytest.approx(nn.functional.cross_entropy(expected, masks[:, 1:]).item())


def test_which_modules_need_a_loss():
    assert needs_loss(Network())
    assert needs_loss(nn.Sequential(nn.Linear(2, 2)))
    assert not needs_loss(WithLabels("dict"))
    assert not needs_loss(Classifier(Network()))
    assert not needs_loss(nn.Bilinear(2, 2, 2))
    assert needs_loss(torch.compile(Network()))
    assert not needs_loss(torch.compile(WithLabels("dict")))


class LossOfEach(Network):
    """A loss a part of the batch, as DataParallel gathers them from modules that return their loss alone."""

    parts = 2

    def forward(self, pixel_values, labels):
        each = nn.functional.cross_entropy(super().forward(pixel_values), labels, reduction="none")
        return each.reshape(self.parts, -1).mean(1)


class LossAlone(LossOfEach):
    """The same loss by the same sums, of shape `()`."""

    parts = 1

    def forward(self, pixel_values, labels):
        return super().forward(pixel_values, labels)[0]


def test_the_losses_of_several_devices_are_averaged(tmp_path):
    run = MetaLRTrainer(LossOfEach(), arguments(tmp_path), train_dataset=images())
    batch = images(8)[:]
    run.args._n_gpu = 2
    found = run.compute_loss(run.model, batch)
    assert found.shape == (2,)
    assert found.mean().item() == pytest.approx(
        nn.functional.cross_entropy(Network()(batch["pixel_values"]), batch["labels"]).item()
    )


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 1]])
def test_class_ids_for_a_single_logit_are_refused(labels):
    with pytest.raises(ValueError, match=r"torch.int64 for logits of shape \(3, 1\)"):
        label_loss(torch.zeros(3, 1), torch.tensor(labels))


def test_class_ids_of_any_integer_type_are_class_ids_and_for_a_squeezed_logit_they_are_refused():
    logits, ids = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1])
    for kind in (torch.uint8, torch.int32, torch.bool):
        assert label_loss(logits, ids.to(kind)) == label_loss(logits, ids)
    with pytest.raises(ValueError, match=r"torch.int64 for logits of shape \(2,\)"):
        label_loss(logits[:, 0], ids)
    with pytest.raises(ValueError, match=r"Labels of shape \(2, 1\) .* for logits of shape \(2, 2\)"):
        label_loss(logits, ids[:, None])


def test_on_one_device_a_vector_of_losses_is_refused_and_a_loss_in_one_is_taken(tmp_path):
    with pytest.raises(ValueError, match=r"LossOfEach returns a tensor of shape \(2,\) .* return its \.mean\(\)"):
        train(tmp_path, LossOfEach())
    single = LossOfEach()
    single.parts = 1
    found = losses(train(tmp_path, single))
    assert found == losses(train(tmp_path, LossAlone()))
    # Whose mean is summed in another order.
    assert found == pytest.approx(losses(train(tmp_path, Network())), rel=1e-4)


class Features(Network):
    def forward(self, x):
        return [self.stem(x)]


def test_a_module_that_returns_neither_logits_nor_a_loss_is_told_so(tmp_path):
    with pytest.raises(TypeError, match="Features returns a list that does not begin with a loss"):
        train(tmp_path, Features())
