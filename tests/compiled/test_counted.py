"""The table of what a step asks of a GPU: what is written is what is counted, and is less than it was."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qa_dist.benchmarking.counted import counts_part, read_counts
from qa_dist.common.errors import UserError
from tests.support.count_steps import SCENARIOS
from tests.support.fake_cuda import needs_compiler, run

FILE = Path(__file__).parents[2] / "docs" / "benchmarks" / "counted.json"


@pytest.fixture
def counts() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


@needs_compiler
def test_the_table_is_not_older_than_the_step(counts: Any) -> None:
    for module in (torch, transformers):
        name, found = module.__name__, module.__version__.partition("+")[0]
        if (wanted := counts["trainer"][name].partition("+")[0]) != found:
            pytest.skip(f"counted with {name} {wanted}, which may ask for other operators than {found}")
    written = counts["after"]["steps"][next(iter(SCENARIOS))]
    assert run("tests.support.count_steps:first_step") == written, (
        "run: python -m tests.support.count_steps --output docs/benchmarks/counted.json, and make docs"
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_step_asks_for_less_than_it_did(counts: Any, scenario: str) -> None:
    before, after = (counts[name]["steps"][scenario] for name in ("before", "after"))
    assert 400 < after["launches"] < before["launches"]
    assert after["syncs"] <= 1 < before["syncs"]
    assert after["elementwise_bytes"] < before["elementwise_bytes"]


def test_the_table_has_a_row_for_every_scenario(counts: Any) -> None:
    rows = [line.split(" | ") for line in counts_part(counts) if line.startswith("| ")]
    assert len({len(row) for row in rows}) == 1
    assert [row[0].removeprefix("| ") for row in rows[2:]] == list(SCENARIOS)
    step = counts["after"]["steps"]["full"]
    assert rows[-1][2] == f"{step['launches']:,}"


def test_a_file_that_lacks_a_part_is_refused(counts: Any, tmp_path: Path) -> None:
    path = tmp_path / "counted.json"
    path.write_text('{"format": 1, "sections": {}}', encoding="utf-8")
    assert read_counts(path) is None, "another benchmark's"
    for change, said in (({"format": 2}, "format"), ({"before": {}}, "lacks a part")):
        path.write_text(json.dumps(copy.deepcopy(counts) | change), encoding="utf-8")
        with pytest.raises(UserError, match=said):
            read_counts(path)
