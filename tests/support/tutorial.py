"""The tutorial run from its text, docs/tutorial.py: `python -m tests.support.tutorial` writes docs/tutorial.ipynb.

It runs in a folder of its own, so that what cells print names no place of this machine.
"""

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "docs" / "tutorial.py"
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
NOT_RUN = "skip-execution"


def from_text() -> Any:
    """The notebook of docs/tutorial.py, without outputs."""
    import jupytext

    return jupytext.read(TEXT)


def tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", ()))


def set_parameters(notebook: Any, values: Mapping[str, Any]) -> None:
    """Give the names that the cell with the tag `parameters` sets other values."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in tags(cell))
    for name, value in values.items():
        cell.source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r}  ", cell.source, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"the tutorial sets {name} {count} times")


def execute(notebook: Any, folder: Path, *, seconds: int, **variables: str) -> None:
    """Run the cells in `folder`, without a network; `seconds` is the limit of a cell, `variables` are set for it.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
    """
    from nbclient import NotebookClient

    own = {"IPYTHONDIR": str(folder / "ipython"), "QA_DIST_STORE": str(folder / "store"), "TQDM_DISABLE": "1"}
    # Of libraries that would like to draw bars, where a notebook has no widgets.
    own["PYTHONWARNINGS"] = "ignore:IProgress not found"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment |= variables
    NotebookClient(
        notebook,
        timeout=seconds,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        skip_cells_with_tag=NOT_RUN,
        record_timing=False,
        coalesce_streams=True,
    ).execute(env=environment)


def tidy(notebook: Any) -> None:
    """Leave what is worth reading and the same in every run: no identifiers, no HTML beside the same as text."""
    notebook.metadata.pop("language_info", None)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02}"
        for output in cell.get("outputs", ()):
            if "data" in output:
                output.data.pop("text/html", None)


def main() -> int:
    import nbformat

    notebook = from_text()
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder), seconds=1800)
    tidy(notebook)
    nbformat.write(notebook, NOTEBOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
