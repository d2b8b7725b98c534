import pytest
from rich.console import Console

from metalr_hf.cli.progress import RunsProgress, best_so_far
from metalr_hf.compare.runs import Run


def row(accuracy, seed=0, cell="vit → cells", **more):
    run = {"cell": cell, "strategy": "cosine", "learning_rate": 1e-3, "seed": seed, "fold": None}
    return {**run, "status": "done", "metric": "accuracy", "accuracy": accuracy, **more}


def test_how_far_it_is_which_run_is_where_and_the_best_so_far():
    console = Console(record=True, width=120, force_terminal=True)
    with RunsProgress(console) as shown:
        first, second = (Run("vit → cells", name, 1e-3, seed=0, fold=2) for name in ("cosine", "constant"))
        shown.watch({"worker 2": second, "worker 1": first}, [row(0.5)])
        shown.ended(1, 3, 61.2)
    text = console.export_text()
    last = text[text.rindex("runs") :].splitlines()
    assert "1/3 0:01:01 left" in last[0]
    assert [line.strip() for line in last[1:4]] == [
        "worker 1: vit → cells, cosine, 0.001, seed 0, fold 2",
        "worker 2: vit → cells, constant, 0.001, seed 0, fold 2",
        "best so far: accuracy 0.500, vit → cells, cosine, 0.001, seed 0",
    ]


def test_the_best_is_of_the_last_cell_and_has_the_score():
    rows = [row(0.9, cell="vit → digits"), row(0.4), row(0.6, seed=1), row(None, seed=2, status="diverged")]
    assert best_so_far(rows) == "best so far: accuracy 0.600, vit → cells, cosine, 0.001, seed 1"
    # A class that does not occur, and a run from before there was this score.
    rows += [row(0.7, seed=3, auroc=None), row(0.5, seed=4, auroc=0.8)]
    assert best_so_far(rows, "auroc") == "best so far: auroc 0.800, vit → cells, cosine, 0.001, seed 4"
    assert best_so_far([row(0.7, auroc=None)], "auroc") == ""


@pytest.mark.parametrize("rows", [[], [row(None, status="failed")]])
def test_before_a_run_has_ended_there_is_no_best(rows):
    assert best_so_far(rows) == ""
