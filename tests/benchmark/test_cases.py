import json

import pytest
import torch
from PIL import Image
from small_runs import images, vit
from torch.func import functional_call
from transformers import TrainingArguments

from metalr_hf import layer_groups
from metalr_hf.benchmark.cases import (
    BenchmarkArguments,
    all_cases,
    chosen_cases,
    make_model,
)
from metalr_hf.benchmark.report import run_ratio, seconds_a_step, summarise
from metalr_hf.benchmark.second_order import SecondOrderTrainer
from metalr_hf.cli import main

pytestmark = pytest.mark.slow


def test_the_papers_way_gives_the_hypergradients_of_its_equations(tmp_path):
    model, seen = vit(dropout=0.0), []
    args = TrainingArguments(
        str(tmp_path), max_steps=1, learning_rate=0.05, per_device_train_batch_size=8, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip

    def collate(rows):
        seen.append({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
        return seen[-1]

    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = SecondOrderTrainer(model, args, collate, images(), meta_dataset=images(seed=1))
    trainer.train()
    training, _read_ahead, validation = seen
    theta = {name: p.clone().requires_grad_() for name, p in start.items()}

    def gradient(point, batch):
        loss = functional_call(model, point, (), batch).loss
        return dict(zip(point, torch.autograd.grad(loss, list(point.values())), strict=True))

    # Step 2 of the algorithm: h_j = -<grad L_val(θ - α g), g_j>, with first derivatives only.
    g = gradient(theta, training)
    after = gradient({name: (p - 0.05 * g[name]).detach().requires_grad_() for name, p in theta.items()}, validation)
    layers = layer_groups(model)
    expected = torch.stack([-sum((after[name] * g[name]).sum() for name in names) for names in layers.values()])
    torch.testing.assert_close(trainer.hypergradients, expected, rtol=1e-3, atol=1e-5)
    rates = 0.05 * (1 - 0.1 * expected).clamp(0.5, 2.0)
    torch.testing.assert_close(trainer.learning_rates, rates, rtol=1e-4, atol=0)
    # The step for real, with the new rates: Adam's first moves every weight by its rate.
    for layer, rate in zip(layers.values(), rates, strict=True):
        moved = torch.cat([(model.get_parameter(name) - start[name]).detach().abs().reshape(-1) for name in layer])
        assert moved.median() == pytest.approx(float(rate), rel=0.02)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    command = ["benchmark", "--output_dir", str(folder), "--model", "test_resnet", "--image_size", "32", "--device"]
    command += ["cpu", "--batch_size", "8", "--steps", "4", "--repeats", "2", "--meta_every", "2", "--run_steps", "60"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        assert main(command) == 0
    return folder


def test_it_leaves_a_table_a_file_and_a_picture(run, capsys):
    found = json.loads((run / "benchmark.json").read_text())
    keys = ["plain", "next_batch", "tensors", "settled", "stream_2", "second_order"]
    assert [row["case"] for row in found["cases"]] == keys
    assert found["settings"]["model"] == "test_resnet"
    assert found["machine"]["device"] == "cpu"
    # Every second time in reverse order.
    assert [row["case"] for row in found["measurements"]] == keys + keys[::-1]
    with Image.open(run / "benchmark.png") as picture:
        assert picture.width > 300


def test_it_measures_what_it_says(run):
    found = json.loads((run / "benchmark.json").read_text())
    by_case = {row["case"]: row for row in found["measurements"]}
    assert {key: len(row["steps"]) for key, row in by_case.items()} == {
        "plain": 5, "next_batch": 5, "tensors": 5, "settled": 5, "stream_2": 5, "second_order": 2,
    }  # fmt: skip
    tensors = len(list(make_model(BenchmarkArguments("x", model="test_resnet", image_size=32), {0: "a"}).parameters()))
    assert by_case["tensors"]["layers"] == tensors
    assert by_case["plain"]["layers"] == 0
    assert 2 < by_case["next_batch"]["layers"] == by_case["second_order"]["layers"] < tensors
    assert [step["passes"] for step in by_case["stream_2"]["steps"]] == [1, 0, 1, 0, 1]
    assert not any(step["passes"] for key in ("plain", "tensors", "settled") for step in by_case[key]["steps"])
    calibration = by_case["next_batch"]["calibration"]
    passes = [step["passes"] for step in by_case["next_batch"]["steps"]]
    assert passes[0] == 0
    assert passes[1] > 0
    assert sum(passes) == pytest.approx(calibration["forwards"] / 3)
    assert all(row["peak"] > 100 * 2**20 for row in by_case.values())
    for row in found["measurements"]:
        assert len(row["beside"]["steps"]) == len(row["steps"])
        assert row["beside"]["layers"] == 0
        assert all(step["wall"] > 0 and 0 <= step["tuning"]["cpu"] <= step["cpu"] for step in row["steps"])
    plain = found["cases"][0]
    assert plain["peak_ratio"] == pytest.approx([1, 1], rel=0.05)
    assert not plain["wall"]["run"]
    assert len(found["cases"][1]["cpu"]["run"]) == 2


def test_a_run_is_put_together_from_its_steps():
    def row(first, others, passes=(0, 0), beside=None):
        steps = [{"wall": first, "passes": 7.0, "tuning": {"wall": first / 2}}]
        steps += [
            {"wall": wall, "passes": own, "tuning": {"wall": 0.0}} for wall, own in zip(others, passes, strict=True)
        ]
        return {"steps": steps, "beside": beside}

    arguments = BenchmarkArguments("x", meta_every=[2])
    cases = {case.key: case for case in all_cases(arguments)}
    plain = row(3.0, [1.0, 1.0])
    measured = {
        # A calibration made up for at its second step took 4 more.
        "next_batch": row(9.0, [5.2, 1.2], passes=(4 / 3, 0), beside=plain),
        # Measured while the machine was half as fast.
        "settled": row(8.0, [2.02, 2.02], beside=row(6.0, [2.0, 2.0])),
        "stream_2": row(5.0, [2.0, 1.0], passes=(1, 0), beside=plain),
    }
    assert seconds_a_step(measured["next_batch"], cases["next_batch"], "wall") == 1.2
    assert seconds_a_step(measured["stream_2"], cases["stream_2"], "wall") == 1.5
    start = (9.0 - 3.0) + (5.2 - 1.2)
    assert run_ratio(measured, cases["next_batch"], "wall", 500) == pytest.approx(
        1 + (start + 39 * 0.2 + 460 * 0.01) / 500
    )
    assert run_ratio(measured, cases["stream_2"], "wall", 500) == pytest.approx(
        1 + (start + 39 * 0.5 + 460 * 0.01) / 500
    )
    assert run_ratio(measured, cases["next_batch"], "wall", 20) == pytest.approx(1 + (start + 19 * 0.2) / 20)
    assert run_ratio(measured, cases["settled"], "wall", 500) is None
    assert run_ratio({"next_batch": measured["next_batch"]}, cases["next_batch"], "wall", 500) is None


def test_ratios_are_to_the_steps_beside():
    arguments = BenchmarkArguments("x", only=["settled"])
    assert [case.key for case in chosen_cases(arguments)] == ["plain", "settled"]

    def row(case, repeat, seconds, peak, beside=None):
        step = {"wall": seconds, "cpu": seconds, "passes": 0, "tuning": {"wall": 0, "cpu": 0}}
        steps = [step, step, step]
        return {"case": case, "repeat": repeat, "layers": 2, "peak": peak, "steps": steps, "beside": beside}

    rows = [
        row("plain", 0, 7.0, 100, row("plain", 0, 7.0, 100)),
        row("settled", 0, 1.5, 110, row("plain", 0, 1.0, 100)),
        row("settled", 1, 9.0, 120, row("plain", 1, 6.0, 80)),
        row("plain", 1, 5.0, 100, row("plain", 1, 4.0, 100)),
    ]
    summary = summarise(rows, arguments)
    assert summary[0]["wall"]["ratio"] == [1, 1.25]
    assert summary[1]["wall"]["ratio"] == [1.5, 1.5]
    assert summary[1]["peak_ratio"] == [1.1, 1.5]
    assert summary[1]["cpu"]["milliseconds"] == [1500, 9000]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dtype", "float8"], "dtype='float8' must be one of 'float32'"),
        (["--repeats", "0"], "repeats=0 must be 1 or more"),
        (["--meta_every", "0"], "meta_every=0 must be 1 or more"),
        (["--steps", "5"], "meta_every=10 needs as many steps, but steps=5"),
        (["--only", "fast"], "only='fast' must be one of 'plain', 'next_batch'"),
        (["--model", "/no/such/model"], "benchmark: --model='/no/such/model': no model there"),
        (
            ["--model", "timm/test_resne"],
            "--model='timm/test_resne': timm has no such architecture. Did you mean 'test",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(tmp_path, capsys, given, message):
    assert main(["benchmark", "--output_dir", str(tmp_path / "out"), *given]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_a_timm_architecture_may_be_named_as_on_the_hub():
    names = ("test_resnet", "timm/test_resnet", "timm/test_resnet.r160_in1k")
    models = [make_model(BenchmarkArguments("x", model=name, image_size=32), {0: "a", 1: "b"}) for name in names]
    assert {model.config.architecture for model in models} == {"test_resnet"}


def test_the_help_names_the_cases(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for case in all_cases(BenchmarkArguments("x", meta_every=[])):
        assert f"`{case.key}`" in told
