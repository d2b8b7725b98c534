import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from metalr_hf.compare.report import plot_comparison, summarise, write_report


def result(strategy, rate, seed, accuracy, cell="net → digits", **kwargs):
    row = {"cell": cell, "strategy": strategy, "learning_rate": rate, "seed": seed, "fold": None, "status": "done"}
    row |= {"accuracy": accuracy, "macro_f1": accuracy, "test_loss": 1 - accuracy, "cost": 1.0, "steps": 60}
    return {**row, "class_accuracy": {"a": accuracy, "b": accuracy}, **kwargs}


def results():
    rows = []
    for seed in (0, 1, 2):
        for rate in (1e-4, 1e-3):
            rows.append(result("cosine", rate, seed, 0.5 + 0.1 * seed + (0.2 if rate == 1e-3 else 0)))
            rows.append(result("metalr", rate, seed, 0.9 + 0.01 * seed, cost=2.0))
        rows.append(result("prodigy", None, seed, 0.6))
    rows[-1] |= {"status": "diverged", "reason": "training loss nan", "accuracy": None, "test_loss": None}
    return rows


def folder(tmp_path, rows):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 60}))
    return tmp_path


def test_means_deviations_and_failures():
    summary = summarise(pd.DataFrame(results()))
    assert summary.loc[("cosine", 1e-4), "mean"] == pytest.approx(0.6)
    assert summary.loc[("cosine", 1e-4), "std"] == pytest.approx(np.std([0.5, 0.6, 0.7], ddof=1))
    assert summary.loc[("cosine", 1e-4), "error"] == pytest.approx(0.1 / np.sqrt(3))
    free = summary[summary.index.get_level_values("strategy") == "prodigy"].iloc[0]
    assert (free["diverged"], free["failed"], free["runs"]) == (1, 0, 3)
    assert free["mean"] == pytest.approx(0.4), "a run that diverged counts as zero"


def test_a_run_that_diverged_is_no_better_than_those_that_did_not():
    same = {"metric": "r2", "strategy": "cosine", "test_loss": None, "cost": 1.0}
    rows = [
        {**same, "learning_rate": 1e-4, "status": "done", "r2": -0.2},
        {**same, "learning_rate": 1e-1, "status": "diverged", "r2": None},
    ]
    assert summarise(pd.DataFrame(rows))["mean"].tolist() == [-0.2, -0.2]


SCORES = ("accuracy", "macro_f1", "test_loss", "class_accuracy", "cost", "steps")
FAILED = {"status": "failed", "reason": "OutOfMemoryError: too big"}


def test_a_run_that_an_error_ended_is_named_and_left_out_of_the_means(tmp_path):
    # As compare writes it: without any score.
    broken = {key: value for key, value in result("metalr", 1e-4, 0, 0.9).items() if key not in SCORES}
    rows = results()[1:]
    rows[0] = {**broken, **FAILED}
    rows += [{**broken, **FAILED, "strategy": "broken"}]
    summary = summarise(pd.DataFrame(rows))
    assert summary.loc[("metalr", 1e-4), "mean"] == pytest.approx(0.915)
    assert summary.loc[("metalr", 1e-4), ["runs", "failed"]].tolist() == [2, 1]
    text = write_report(folder(tmp_path, rows)).read_text(encoding="utf-8")
    assert "| metalr | **0.915 ± 0.005 (n=2, 1 failed)** | 0.910 ± 0.006 |" in text
    assert "| broken | (n=0, 1 failed) |  |  |  | (n=0, 1 failed) |  |  |" in text
    again = text.split("Runs that an error ended, left out of the means")[1]
    assert "- 1 × net → digits, broken: OutOfMemoryError: too big" in again
    assert "OutOfMemoryError: too big" in write_report(folder(tmp_path, rows[-1:])).read_text(encoding="utf-8")


def test_the_report_has_a_row_a_strategy_with_the_best_entry_in_bold(tmp_path):
    text = write_report(folder(tmp_path, results())).read_text()
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "0.600 ± 0.058 | 0.800 ± 0.058 | 0.600 | 0.700 | 0.800 ± 0.058 | 0.200 | 1.00x" in lines["cosine"]
    assert lines["metalr"].count("**0.910 ± 0.006**") == 3
    assert lines["metalr"].endswith("| 2.00x |")
    assert "(1 diverged)" in lines["prodigy"]
    assert "where that is below zero:\n\n- 1 × net → digits, prodigy: training loss nan" in text
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_the_picture_has_a_panel_a_cell_a_line_a_strategy_and_level_lines():
    rows = results() + [{**row, "cell": "other"} for row in results()]
    figure = plot_comparison(pd.DataFrame(rows))
    assert [ax.get_title() for ax in figure.axes] == ["net → digits", "other"]
    for ax in figure.axes:
        assert ax.get_xscale() == "log"
        assert len(ax.lines) == 3
        cosine, metalr, prodigy = ax.lines
        assert cosine.get_ydata() == pytest.approx([0.6, 0.8])
        assert metalr.get_linewidth() > cosine.get_linewidth()
        assert len(set(prodigy.get_ydata())) == 1
        assert sorted(text.get_text() for text in ax.texts) == ["cosine", "metalr", "prodigy"]


def test_given_axes_take_one_cell():
    rows = pd.DataFrame(results())
    figure = Figure()
    assert plot_comparison(rows, figure.add_subplot()) is figure
    with pytest.raises(ValueError, match="ax holds one cell, but the results are of 2: net → digits, other"):
        plot_comparison(pd.concat([rows, rows.assign(cell="other")]), figure.add_subplot())
    with pytest.raises(ValueError, match="no results to draw"):
        plot_comparison(pd.DataFrame())


def test_folds_bring_a_table_of_classes(tmp_path):
    rows = [result("cosine", 1e-3, 0, 0.5 + 0.2 * fold, fold=fold) for fold in (0, 1)]
    text = write_report(folder(tmp_path, rows)).read_text()
    assert "| cosine | 0.001 | 0.600 | 0.600 | 0.600 | 0.600 |" in text


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_folds_that_came_to_nothing_leave_a_report(tmp_path, status):
    nothing = {"status": status, "reason": "training loss nan", "accuracy": None, "class_accuracy": {}}
    rows = [{**result("cosine", 1e-3, 0, 0.5, fold=0), **nothing}, result("cosine", 1e-3, 0, 0.6, fold=1)]
    assert "| a | b | total |" in write_report(folder(tmp_path, rows)).read_text()
    assert "No run was scored." in write_report(folder(tmp_path, rows[:1])).read_text()


def test_entries_of_fewer_runs_say_so(tmp_path):
    rows = [result("cosine", 1e-3, seed, 0.8) for seed in (0, 1)] + [result("cosine", 1e-2, 0, 0.7)]
    text = write_report(folder(tmp_path, rows)).read_text(encoding="utf-8")
    assert "| **0.800 ± 0.000** | 0.700 (n=1) |" in text


def test_a_single_run_has_no_deviation(tmp_path):
    text = write_report(folder(tmp_path, [result("cosine", 1e-3, 0, 0.5)])).read_text()
    assert "| cosine | **0.500** | 0.500 |" in text


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no results to report"):
        write_report(tmp_path)


def test_names_of_classes_do_not_break_the_table(tmp_path):
    rows = [result("cosine", 1e-3, 0, 0.5, fold=fold, class_accuracy={"a|b": 0.25, "c": 0.75}) for fold in (0, 1)]
    table = write_report(folder(tmp_path, rows)).read_text().split("learning rate:\n\n")[1].splitlines()
    assert table[0] == "| strategy | learning rate | a&#124;b | c | total | macro F1 |"
    assert table[2] == "| cosine | 0.001 | 0.250 | 0.750 | 0.500 | 0.500 |"


def test_over_several_cells_there_is_a_paired_test(tmp_path):
    rows = [{**row, "cell": f"cell {i}"} for i in range(2) for row in results()]
    text = write_report(folder(tmp_path, rows)).read_text(encoding="utf-8")
    # Cosine from its best rate, 1e-3, has .8.
    assert "| metalr | +0.110 ± 0.000 | 2 of 2 | 0.5 |" in text.split("## Over all cells")[1]
    one = write_report(folder(tmp_path, results())).read_text(encoding="utf-8")
    assert "Over all cells" not in one


def test_a_report_by_another_score(tmp_path):
    there = folder(
        tmp_path, [{**row, "fold": row["seed"], "auroc": row["accuracy"] and row["accuracy"] / 2} for row in results()]
    )
    text = write_report(there, "auroc").read_text(encoding="utf-8")
    assert "| metalr | **0.455 ± 0.003** |" in text
    assert "entries are test auroc" in text
    assert "of each class" not in text
    with pytest.raises(ValueError, match=r"metric='dice' is not a score of the results in"):
        write_report(there, "dice")
