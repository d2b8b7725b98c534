import json

import pytest
from digits import save_image_folder, save_vit

from metalr_hf.cli import main
from metalr_hf.cli.compare import parse_compare_arguments
from metalr_hf.compare.results import only_process

pytestmark = pytest.mark.usefixtures("offline")


def test_arguments_come_from_the_command_line_a_file_or_both(tmp_path):
    arguments, tuning, _ = parse_compare_arguments(
        ["--output_dir", "x", "--learning_rates", "1e-4", "1e-2", "--hyper_lr", "0.2", "--meta_every", "3"]
    )
    assert arguments.learning_rates == [1e-4, 1e-2]
    assert arguments.model == arguments.dataset == ["demo"]
    assert tuning == {"hyper_lr": 0.2, "meta_every": 3}
    file = tmp_path / "comparison.yaml"
    file.write_text("output_dir: x\nstrategies: [cosine, metalr]\nlearning_rates: [1e-4]\nsteps: 5\nlr_rule: adam\n")
    arguments, tuning, _ = parse_compare_arguments([str(file), "--steps", "7"])
    assert (arguments.strategies, arguments.steps, tuning) == (["cosine", "metalr"], 7, {"lr_rule": "adam"})
    file.write_text("output_dir: x\ntest_split: null\ntrain_size: null\n")
    arguments, _, _ = parse_compare_arguments([str(file)])
    assert (arguments.test_split, arguments.train_size) == (None, None)


def test_a_comparison_from_the_command_line_leaves_its_report(tmp_path, capsys):
    images, model = save_image_folder(tmp_path / "images"), save_vit(tmp_path / "vit")
    command = ["compare", "--output_dir", str(tmp_path / "out"), "--model", str(model), "--dataset", str(images)]
    command += ["--strategies", "cosine", "metalr", "--learning_rates", "1e-3", "--seeds", "0", "--steps", "3"]
    assert main([*command, "--batch_size", "8", "--image_size", "16"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["cell"], row["strategy"], row["status"]) for row in rows] == [
        ("vit → images", "cosine", "done"),
        ("vit → images", "metalr", "done"),
    ]
    assert (tmp_path / "out" / "report.png").exists()
    assert "cosine" in capsys.readouterr().out
    # What has run is not run again, and has all scores.
    command += ["--batch_size", "8", "--image_size", "16"]
    results = (tmp_path / "out" / "results.jsonl").read_text()
    assert main([*command, "--metric", "auroc"]) == 0
    assert "entries are test auroc" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "results.jsonl").read_text() == results
    assert main([*command, "--seeds", "0", "1"]) == 0
    printed = capsys.readouterr().out
    assert "best so far: accuracy" in printed
    assert "4/4" in printed
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["strategy"]) for row in rows] == [(s, n) for s in (0, 1) for n in ("cosine", "metalr")]
    assert main([*command, "--batch_size", "9"]) == 2
    assert "holds a comparison with other settings" in capsys.readouterr().err


def test_a_comparison_of_which_every_run_fails_ends_with_an_error_code(tmp_path):
    command = ["compare", "--output_dir", str(tmp_path / "out"), "--model", str(save_vit(tmp_path / "vit"))]
    command += ["--dataset", str(save_image_folder(tmp_path / "images")), "--strategies", "cosine", "--seeds", "0"]
    command += ["--learning_rates", "1e-3", "--steps", "2", "--image_size", "16", "--train_size", "2"]
    assert main(command) == 1
    assert json.loads((tmp_path / "out" / "results.jsonl").read_text())["status"] == "failed"


def test_folders_of_one_name_are_told_apart(tmp_path, capsys):
    folders = [str(save_image_folder(tmp_path / place / "images")) for place in ("here", "there")]
    command = ["compare", "--output_dir", str(tmp_path / "out"), "--model", str(save_vit(tmp_path / "vit"))]
    command += ["--strategies", "cosine", "--learning_rates", "1e-3", "--seeds", "0", "--steps", "2"]
    command += ["--batch_size", "8", "--image_size", "16"]
    assert main([*command, "--dataset", *folders]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == [f"vit → {folder}" for folder in folders]
    command[2] = str(tmp_path / "other")
    assert main([*command, "--dataset", folders[0]]) == 0
    assert main([*command, "--dataset", folders[1]]) == 2
    assert f"holds runs of another 'vit → images': they are of {tmp_path / 'vit'} and" in capsys.readouterr().err
    assert main([*command, "--dataset", folders[0], "--label_column_name", "label"]) == 2
    assert "holds a comparison with other settings" in capsys.readouterr().err


def test_a_folder_in_which_another_process_is_at_work_is_left_as_it_is(tmp_path, capsys):
    images, model, out = save_image_folder(tmp_path / "images"), save_vit(tmp_path / "vit"), tmp_path / "out"
    out.mkdir()
    half_written = '{"cell": "vit → images", "strategy": "cosine"}\n{"cell": "vit'
    (out / "results.jsonl").write_text(half_written, encoding="utf-8")
    command = ["compare", "--output_dir", str(out), "--model", str(model), "--dataset", str(images)]
    with only_process(out):
        assert main([*command, "--image_size", "16"]) == 2
    assert "Another process is at work in output_dir" in capsys.readouterr().err
    assert (out / "results.jsonl").read_text(encoding="utf-8") == half_written
    assert not (out / "report.md").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--strategies", "metalrr"], "Did you mean 'metalr'"),
        (["--learning_rates", "0"], "learning_rates=0.0 is not a positive number"),
        (["--hyper_lr", "-1"], "hyper_lr=-1.0"),
        (["--workers", "0"], "workers=0 must be 1 or more"),
        (["--backend", "dask"], "backend='dask' needs scheduler"),
        (["--strategies", "l_dog+average"], "l_dog averages the weights itself"),
        (
            ["--metric", "balanced"],
            "says how good a run of this task is. Did you mean",
        ),
        (["--metric", "mae", "--task", "regression"], "There are: r2, pearson."),
        (["--noise", "0.2", "--task", "multi_label"], "noise=0.2 flips class labels, one an image, and those of"),
        (["--noise", "0.2", "--task", "regression"], "noise=0.2 flips class labels"),
        (["--noise", "0.2", "--task", "segmentation"], "noise=0.2 flips class labels"),
        (["--steps", "few"], "argument --steps: invalid int value: 'few' (`metalr-hf compare --help`"),
        (["--step", "3"], "'step' is no argument. Did you mean 'steps'"),
        (["--steps", "3", "noise"], "'noise' is no argument"),
        # Which would end a run before the others.
        (["--stop_when_converged", "true"], "'stop_when_converged' is no argument"),
        (["--max_minutes", "5"], "'max_minutes' is no argument"),
        (["--model", "/no/such/model"], "model_name_or_path='/no/such/model'"),
        (["--dataset", "/no/such/images"], "dataset_name='/no/such/images'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(tmp_path, capsys, given, message):
    assert main(["compare", "--output_dir", str(tmp_path / "out"), *given]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_file_that_is_none_of_arguments_is_one_line_too(tmp_path, capsys):
    file = tmp_path / "comparison.yaml"
    assert main(["compare", str(file)]) == 2
    assert f"'{file}' does not exist. The first argument is a JSON or YAML file" in capsys.readouterr().err
    file.write_text("output_dir: x\nstrategy: [cosine]")
    assert main(["compare", str(file)]) == 2
    assert f"'strategy' is no argument in '{file}'. Did you mean 'strategies'" in capsys.readouterr().err
    file.write_text("strategies: [cosine")
    assert main(["compare", str(file)]) == 2
    assert f"'{file}' is not valid JSON or YAML: while parsing a flow sequence" in capsys.readouterr().err


def test_the_folder_of_a_training_run_is_left_alone(tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text("{}")
    assert main(["compare", "--output_dir", str(tmp_path), "--strategies", "cosine"]) == 2
    assert "holds a model that `metalr-hf train` has trained" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["trainer_state.json"]
