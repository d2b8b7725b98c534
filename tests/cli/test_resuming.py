"""A run goes on with the images and classes that it had, or not at all."""

import pytest
from digits import NAMES, save_image_folder, save_images_and_vit, train_vit

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images, a model, and a run of two steps with a checkpoint."""
    root = save_images_and_vit(tmp_path_factory.mktemp("root"))
    assert train(root, root / "run", "--max_steps", "2") == 0
    return root


def train(root, output, *more, **options):
    return train_vit(root, output, "--save_steps", "2", "--disable_tqdm", "true", *more, **options)


def resume(root, output, *more, **options):
    checkpoint = str(root / "run" / "checkpoint-2")
    return train(root, output, "--max_steps", "4", "--resume_from_checkpoint", checkpoint, *more, **options)


def test_a_run_goes_on_with_what_it_had(root, tmp_path):
    assert resume(root, tmp_path) == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--seed", "7"], "is of a run with seed=42; here there are seed=7"),
        (["--max_train_samples", "30"], "is of a run with max_train_samples=None; here there are max_train_samples=30"),
        (["--meta_split", "0.2"], "is of a run with meta_split=0.0; here there are meta_split=0.2"),
        (["--hyper_lr", "0.5"], "hyper_lr=0.1; here there are hyper_lr=0.5. It would have a model card that is wrong"),
    ],
)
def test_other_images_and_other_tuning_are_refused(root, tmp_path, capsys, more, told):
    assert resume(root, tmp_path, *more) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_other_classes_are_refused(root, tmp_path, capsys):
    others = save_image_folder(root / "others")
    for split in ("train", "test"):
        (others / split / NAMES[0]).rename(others / split / "another")
    assert resume(root, tmp_path, images="others") == 2
    assert f"is of a run with the classes {', '.join(sorted(NAMES))}; here" in capsys.readouterr().err.splitlines()[-1]


def test_the_folder_of_a_run_is_no_checkpoint(root, tmp_path, capsys):
    assert train(root, tmp_path, "--resume_from_checkpoint", str(root / "run")) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "is the folder of a run, not a checkpoint: its last checkpoint is" in told
    assert told.endswith("checkpoint-2.")
