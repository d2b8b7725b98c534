import pytest
import torch
from networks import Network

from metalr_hf.compare import hunt as hunting
from metalr_hf.compare.hunt import Pixels, Trap, balanced_subset, dead_runs, halves, hunt


def pixels():
    generator, labels = torch.Generator().manual_seed(0), torch.arange(90) % 3
    images = torch.randn(90, 3, 16, 16, generator=generator)
    images[torch.arange(90), labels] += 1
    return Pixels(images[:60], labels[:60], images[60:], labels[60:])


def make_model(trap, classes):
    return Network(classes)


def test_a_hunt_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(hunting, "STEPS", 12)
    monkeypatch.setattr(hunting, "RATES", {"adamw": (1e-2,), "sgd": (1e-1,)})
    traps = [Trap("net", "noise", images=30, batch=8), Trap("net", "noise", images=30, batch=8, optim="sgd", head=10)]
    rows = hunt(traps[:1], make_model, lambda trap: pixels(), tmp_path, {"cosine": [0], "metalr": [0, 1]})
    assert [(row["strategy"], row["learning_rate"], row["seed"]) for row in rows] == [
        ("cosine", 1e-2, 0), ("metalr", None, 0), ("metalr", None, 1)
    ]  # fmt: skip
    assert all(row["chance"] <= row["balanced_accuracy"] + 0.2 for row in rows)
    assert [row["backbone_lr"] is not None for row in rows] == [False, True, True]
    assert rows[0]["cost"] == 1.0 < rows[1]["cost"]
    started = []
    monkeypatch.setattr(hunting, "run_trap", lambda trap, *args: started.append(trap.name) or rows[0])
    again = hunt(traps, make_model, lambda trap: pixels(), tmp_path, {"cosine": [0], "metalr": [0, 1]})
    assert started == [traps[1].name] * 3
    assert again[:3] == rows


def test_the_same_run_is_the_same_line(monkeypatch):
    monkeypatch.setattr(hunting, "STEPS", 8)
    trap = Trap("net", "noise", images=30, batch=8, noise=0.2, decay=0.3)
    runs = [hunting.run_trap(trap, "metalr", None, 3, make_model, pixels()) for _ in range(2)]
    assert runs[0] == runs[1]


def test_what_a_trap_does_to_images_labels_and_head():
    data = pixels()
    _, labels = hunting._training_set(Trap("net", "noise", images=10, imbalance=9), data, seed=0)
    assert labels.bincount().tolist() == [9, 1, 1]
    _, clean = hunting._training_set(Trap("net", "noise", images=60), data, seed=0)
    _, noisy = hunting._training_set(Trap("net", "noise", images=60, noise=0.2), data, seed=0)
    assert (clean != noisy).sum() == 12
    network, larger = Network(3), Network(3)
    hunting._scale_head(larger, 10)
    torch.testing.assert_close(larger.head.weight, 10 * network.head.weight)
    assert torch.equal(larger.head.bias, network.head.bias)
    assert torch.equal(larger.stem.weight, network.stem.weight)
    assert balanced_subset(data.test, data.test_labels, 12)[1].bincount().tolist() == [4, 4, 4]


def test_the_halves_are_drawn_and_every_cell_is_in_one():
    traps = [Trap(backbone, "digits", images=n) for backbone in ("vit", "cnn") for n in range(100, 600, 100)]
    develop, held_out = halves(traps, seed=23)
    assert (develop, held_out) == halves(traps, seed=23) != halves(traps, seed=24)
    assert sorted(trap.name for trap in develop + held_out) == sorted(trap.name for trap in traps)
    assert len(develop) == len(held_out) == 5
    assert {trap.backbone for trap in develop} == {trap.backbone for trap in held_out} == {"vit", "cnn"}


@pytest.mark.parametrize(("accuracy", "dead"), [(0.79, 0), (0.76, 0), (0.74, 1), (0.1, 1)])
def test_a_run_is_dead_far_below_its_own_grid(accuracy, dead):
    run = {"cell": "a", "chance": 0.1}
    rows = [{**run, "strategy": "cosine", "balanced_accuracy": best} for best in (0.8, 0.2)]
    rows += [{**run, "strategy": "metalr", "balanced_accuracy": accuracy}]
    rows += [{**run, "cell": "another", "strategy": "cosine", "balanced_accuracy": 0.99}]
    assert len(dead_runs(rows)["metalr"]) == dead


def test_near_chance_a_fifth_of_the_way_counts():
    run = {"cell": "a", "chance": 0.5}
    rows = [{**run, "strategy": "cosine", "balanced_accuracy": 0.6}]
    rows += [{**run, "strategy": "metalr", "balanced_accuracy": accuracy} for accuracy in (0.59, 0.57)]
    assert len(dead_runs(rows)["metalr"]) == 1
