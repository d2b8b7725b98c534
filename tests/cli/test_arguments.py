import json

import pytest

from metalr_hf.cli.arguments import parse_train_arguments
from metalr_hf.tasks.base import DEMO_ARGUMENTS


def test_the_demo_needs_only_an_output_folder(tmp_path):
    arguments = parse_train_arguments(["--output_dir", str(tmp_path)])
    assert arguments.model.model_name_or_path is None
    assert arguments.data.is_demo
    # A mirrored digit is no digit.
    assert arguments.data.augment == "crop"
    for name, value in DEMO_ARGUMENTS.items():
        assert getattr(arguments.data if hasattr(arguments.data, name) else arguments.training, name) == value
    assert not arguments.training.remove_unused_columns


def test_what_the_user_says_goes_before_the_demo(tmp_path):
    arguments = parse_train_arguments(
        ["--output_dir", str(tmp_path), "--learning_rate", "5e-5", "--augment", "none", "--hyper-lr", "0.2"]
    )
    # 5e-5 is also transformers' default.
    assert arguments.training.learning_rate == 5e-5
    assert arguments.training.hyper_lr == 0.2
    assert arguments.data.augment == "none"
    assert arguments.training.per_device_train_batch_size == DEMO_ARGUMENTS["per_device_train_batch_size"]


def test_a_preset_goes_before_the_demo(tmp_path):
    arguments = parse_train_arguments(["--output_dir", str(tmp_path), "--preset", "paper"])
    assert arguments.training.lr_scheduler_type == "constant"
    assert arguments.training.lookahead == "sgd"
    assert arguments.training.learning_rate == DEMO_ARGUMENTS["learning_rate"]


def test_a_demo_that_stops_by_itself_has_no_number_of_epochs(tmp_path):
    arguments = parse_train_arguments(["--output_dir", str(tmp_path), "--stop_when_converged"])
    assert arguments.training.num_train_epochs > 1e5
    assert arguments.training.save_strategy == "best"
    assert arguments.training.learning_rate == DEMO_ARGUMENTS["learning_rate"]
    more = ["--num_train_epochs", "10", "--max_minutes", "5"]
    limited = parse_train_arguments(["--output_dir", str(tmp_path), "--stop_when_converged", *more])
    assert (limited.training.num_train_epochs, limited.training.max_minutes) == (10, 5)


def test_with_own_images_or_model_there_are_no_demo_settings(tmp_path):
    output = ["--output_dir", str(tmp_path)]
    own_images = parse_train_arguments([*output, "--dataset_name", "beans"])
    assert own_images.training.learning_rate == 5e-5
    assert own_images.data.max_train_samples is None
    assert own_images.data.augment == "crop_flip"
    assert own_images.data.image_size == 224
    assert own_images.training.per_device_train_batch_size == own_images.training.per_device_eval_batch_size == 32
    assert own_images.training.logging_steps == 10
    own_model = parse_train_arguments([*output, "--model_name_or_path", "timm/resnet18.a1_in1k"])
    assert own_model.training.learning_rate == 5e-5
    assert own_model.data.augment == "crop"
    assert own_model.data.image_size is None


def test_the_default_batch_is_as_large_as_the_task_allows(tmp_path):
    def batch_size(*more):
        return parse_train_arguments([f"--output_dir={tmp_path}", *more]).training.per_device_train_batch_size

    assert batch_size("--data_dir", "photos", "--task", "segmentation") == 8
    assert batch_size("--data_dir", "photos", "--task", "regression", "--target_column_names", "age") == 32
    assert batch_size("--data_dir", "photos", "--per_device_train_batch_size", "4") == 4


def test_one_value_in_a_file_is_a_list_of_one_where_a_list_is_taken(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\ntask: regression\ndata_dir: photos\ntarget_column_names: age\nhead_module: fc\n"
    )
    arguments = parse_train_arguments([str(file)])
    assert arguments.data.target_column_names == ["age"]
    assert arguments.training.head_module == ["fc"]


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_a_file_and_arguments_that_override_it(tmp_path, kind):
    file = tmp_path / f"run.{kind}"
    if kind == "json":
        values = {"output_dir": str(tmp_path), "learning_rate": 0.001, "metrics": ["accuracy"], "eval_strategy": "no"}
        file.write_text(json.dumps(values | {"lr_scheduler_kwargs": {"num_cycles": 2}, "streaming": False}))
    else:
        # YAML takes 1e-3 for text and `no` for false.
        file.write_text(
            f"output_dir: {tmp_path}\nlearning_rate: 1e-3\nmetrics: accuracy\neval_strategy: no\nstreaming: false\n"
            "lr_scheduler_kwargs:\n  num_cycles: 2\n"
        )
    arguments = parse_train_arguments([str(file), "--seed", "7"])
    assert arguments.training.learning_rate == 1e-3
    assert arguments.training.seed == 7
    assert arguments.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert arguments.training.eval_strategy == "no"
    assert arguments.data.metrics == ["accuracy"]
    # The rest is the demo's.
    assert arguments.training.per_device_train_batch_size == 32
    assert parse_train_arguments([str(file), "--learning_rate", "0.1"]).training.learning_rate == 0.1


def test_remote_code_is_off_unless_asked_for(tmp_path):
    output = ["--output_dir", str(tmp_path)]
    assert not parse_train_arguments(output).model.trust_remote_code
    assert parse_train_arguments([*output, "--trust_remote_code"]).model.trust_remote_code


def test_columns_are_kept_whatever_is_asked(tmp_path):
    arguments = parse_train_arguments(["--output_dir", str(tmp_path), "--remove_unused_columns", "true"])
    assert not arguments.training.remove_unused_columns


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seed", "1"], "output_dir is missing"),
        (["--output_dir", "x", "--lerning_rate", "1"], "'lerning_rate' is no argument. Did you mean 'learning_rate'"),
        (["--output_dir", "x", "--dataset", "1"], "'dataset' is no argument. Did you mean 'dataset_name'"),
        (["--output_dir", "x", "--batch_size", "8"], "Did you mean 'per_device_train_batch_size'"),
        (
            ["--output_dir", "x", "--target_column_names", "a", "b"],
            "'target_column_names' is no argument of this task. It belongs to --task multi_label or regression",
        ),
        (["--output_dir", "x", "--lr", "1e-3"], "'lr' is no argument. Did you mean 'learning_rate'"),
        (["--output_dir", "x", "--seed", "one"], "--seed: invalid int value: 'one'.*lists the arguments"),
        (["--output_dir", "x", "--hyper_lr", "-1"], "hyper_lr=-1.0 must be finite and 0 or more"),
        (["--output_dir", "x", "--augment", "mixup"], "augment='mixup' must be one of"),
        (["--output_dir", "x", "--load_best_model_at_end", "true"], "requires the save and eval strategy to match"),
        (["--output_dir", "x", "--streaming"], "how many steps to train with --max_steps"),
        (["--output_dir", "x", "--seed", "-1"], "seed=-1 must be a whole number from 0 to"),
        (["--output_dir", "x", "--lr_scheduler_type", "greedy"], "watches a metric"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        parse_train_arguments(given)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "output_dir: x\nmeta_spilt: 0.2\n", "'meta_spilt' is no argument in .*Did you mean 'meta_split'"),
        ("run.yaml", "- output_dir\n", "must hold arguments and their values, not a list"),
        ("run.yaml", "output_dir: [\n", "is not valid JSON or YAML"),
        ("run.json", "{", "is not valid JSON or YAML"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_train_arguments([str(tmp_path / name)])


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="'run.yaml' does not exist. The first argument is a JSON or YAML file"):
        parse_train_arguments(["run.yaml"])


def test_the_help_begins_with_what_is_not_trainers_and_says_what_has_no_effect(capsys):
    with pytest.raises(SystemExit):
        parse_train_arguments(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert told.startswith("usage: metalr-hf train [FILE] --output_dir FOLDER [--ARGUMENT VALUE ...] ")
    assert told.index("--hyper_lr HYPER_LR") < told.index("--learning_rate LEARNING_RATE")
    assert "While the start rates are calibrated, which is the default, it has no effect." in told
