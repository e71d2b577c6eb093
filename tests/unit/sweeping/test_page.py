"""Files of results as a page."""

import json
from pathlib import Path
from typing import Any

import pytest

from qa_dist.common.errors import UserError
from qa_dist.sweeping.page import NOTHING, results_page
from qa_dist.sweeping.table import rows

SWEEP: dict[str, Any] = {
    "format": 1,
    "sweep": "budget_x",
    "started": "2026-01-02T03:04:05+00:00",
    "command": ["qa-dist", "sweep", "budget_x.yaml", "--output_dir", "x", "--sbatch_options", "--time 60"],
    "seconds": 90.0,
    "hardware": {"devices": [], "processor": "Some CPU"},
    "versions": {"torch": "2.1", "transformers": "5.1", "peft": None},
    "git_commit": "0123456789abcdef",
    "data": {"train": {"num_examples": 2000}, "validation": {"num_examples": 1000}},
    "shared_options": {"num_train_epochs": 3.0, "max_train_steps": None},
    "num_trials": 3,
    "trials": [
        {"method": "a", "seed": 1, "status": "done", "final": {"exact_match": 50.0, "f1": 60.0}, "rungs": []},
        {"method": "b", "seed": 1, "status": "diverged", "final": None, "rungs": []},
    ],
}


def test_a_file_is_a_section_with_its_facts_and_its_table(tmp_path: Path) -> None:
    (tmp_path / "budget_x.json").write_text(json.dumps(SWEEP), encoding="utf-8")
    assert results_page(tmp_path).splitlines() == [
        "### Budget x",
        "",
        "- 2026-01-02, Some CPU, torch 2.1, transformers 5.1, commit 0123456789ab",
        "- 2,000 questions to train on, 1,000 to score; 3 epochs",
        "- `qa-dist sweep budget_x.yaml --output_dir x --sbatch_options '--time 60'`",
        "- 1 of 3 trials ended, in 1.5 minutes",
        "",
        "| method | trainable parameters | seeds | EM | F1 | minutes of training | peak memory, MiB | saved, MiB |",
        "|---|---|---|---|---|---|---|---|",
        "| a | - | 1 | 50.00 | 60.00 | - | - | - |",
        "| b (1 diverged) | - | 0 | - | - | - | - | - |",
    ]


def test_a_row_has_the_mean_of_scores_and_sizes_and_the_most_memory_of_the_seeds() -> None:
    seeds = [
        {"method": "a", "status": "done", "final": {"exact_match": 50.0, "f1": f1}, "rungs": [], **sizes}
        for f1, sizes in (
            (60.0, {"trainable_parameters": 10, "peak_memory_bytes": 3 * 2**20, "saved_bytes": 2**20}),
            (62.0, {"trainable_parameters": 10, "peak_memory_bytes": 9 * 2**20, "saved_bytes": 2 * 2**20}),
        )
    ]
    assert rows({"trials": seeds}) == [["a", "10", "2", "50.00 ± 0.00", "61.00 ± 1.41", "-", "9", "1.50"]]


def test_of_several_rungs_the_last_that_all_seeds_have_is_shown() -> None:
    seeds = [
        {"method": "a", "status": "stopped", "rungs": [{"step": step, "exact_match": 1.0, "f1": f1} for step, f1 in at]}
        for at in ([(20, 5.0), (40, 7.0)], [(20, 6.0)], [])
    ]
    assert rows({"trials": seeds})[0][:5] == ["a (after 20 steps; 3 stopped)", "-", "2", "1.00 ± 0.00", "5.50 ± 0.71"]
    # Rungs that were changed in between: there is no step at which both can be shown.
    seeds[1]["rungs"][0]["step"] = 30  # type: ignore[index]
    assert rows({"trials": seeds})[0][:3] == ["a (3 stopped)", "-", "0"]


def test_results_without_scored_questions_are_shown(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({**SWEEP, "data": {"train": {"num_examples": 5}}}), encoding="utf-8")
    assert "- 5 questions to train on, none to score; 3 epochs" in results_page(tmp_path)


def test_without_files_it_says_so_and_foreign_ones_are_refused(tmp_path: Path) -> None:
    assert results_page(tmp_path) == NOTHING
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is no file of results of this version"):
        results_page(tmp_path)
    (tmp_path / "a.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        results_page(tmp_path)
