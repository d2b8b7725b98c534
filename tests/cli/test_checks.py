import importlib.util

import pytest
from digits import save_images_and_vit, train_vit

from metalr_hf.cli import main
from metalr_hf.cli.train import RUN_FILES

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return save_images_and_vit(tmp_path_factory.mktemp("root"))


def train(root, output, *more):
    return train_vit(root, output, "--max_steps", "1", *more)


BEST = ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--save_strategy", "steps"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metrics", "acuracy"], "metrics='acuracy' could not be loaded"),
        (["--metrics", "acuracy"], "Did you mean 'accuracy'"),
        (["--metrics", "dice_of_mine"], "Those that come along: accuracy, "),
        (
            ["--metrics", "sensitivity"],
            "macro_f1, balanced_accuracy, auroc. The model card of the run has precision, recall",
        ),
        (
            [*BEST, "--metric_for_best_model", "aucroc"],
            "'aucroc' is not measured; --metrics says what is. Did you mean",
        ),
        ([*BEST, "--metric_for_best_model", "eval_kappa", "--metrics", "accuracy"], "There are: loss, accuracy."),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 must be 1 or more"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0 must be 1 or more"),
        (["--learning_rate", "-1"], "learning_rate=-1.0 must be 0 or more. It has no effect while"),
        (["--max_steps", "0"], "max_steps=0 trains nothing."),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "num_train_epochs=0.0 trains nothing."),
        (["--group_column", "label"], "group_column='label' is the column of the labels."),
        (["--report_to", "wanb"], "report_to='wanb' is no tracker that transformers knows. Did you mean 'wandb'"),
        (
            ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "64"],
            "60 training images make no batch of 64",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(root, tmp_path, capsys, more, message):
    assert train(root, tmp_path, *more) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("metalr-hf train: ")
    assert message in said
    assert not any((tmp_path / name).exists() for name in RUN_FILES)


def test_a_tracker_that_is_not_installed(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("metalr_hf.cli.checks.get_available_reporting_integrations", lambda: [])
    assert train(root, tmp_path, "--report_to", "wandb") == 2
    assert "report_to='wandb': its package is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "grokadamw"])
def test_an_optimizer_that_is_not_installed(root, tmp_path, capsys, optim):
    if importlib.util.find_spec("torchao" if optim == "adamw_torch_8bit" else optim):
        pytest.skip("it is installed")
    assert train(root, tmp_path, "--optim", optim) == 2
    assert f"optim={optim!r} needs a package more:" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(root, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert train(root, tmp_path / "file" / "run") == 2
    assert "file is no folder" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("metric", ["loss", "eval_macro_f1", "auroc"])
def test_the_best_weights_may_be_told_by_what_is_measured(root, tmp_path, metric):
    # Untrained and without an image of each class among them, but measured.
    assert (
        train(root, tmp_path, *BEST, "--metric_for_best_model", metric, "--eval_steps", "1", "--save_steps", "1") == 0
    )


def test_results_say_which_images_they_are_of(root, tmp_path, capsys):
    for split, name in (("train", "train"), ("test", "val")):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).symlink_to(root / "images" / split)
    (tmp_path / "one").symlink_to(root / "images" / "train")
    told = {"images": "the test split", "two": "the validation split", "one": "images held out of the training split"}
    for images, where in told.items():
        folder = root if images == "images" else tmp_path
        names = ["--dataset_name", str(folder / images), "--model_name_or_path", str(root / "vit"), "--use_cpu", "true"]
        more = ["--report_to", "none", "--max_steps", "1", "--save_strategy", "no"]
        assert main(["train", "--output_dir", str(tmp_path / f"run-{images}"), *names, *more]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"On {where}" in shown
        assert f"On {where}:" in (tmp_path / f"run-{images}" / "README.md").read_text()
