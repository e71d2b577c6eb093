"""Notebooks as pages of the site: a hook of mkdocs. Nothing is run, and no page loads anything.

Text cells are Markdown as they are; code cells and what they gave are blocks. Cells that are not run say so.
"""

import json
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


class NotebookPage(File):
    """A notebook, which mkdocs takes for a page of Markdown."""

    def is_documentation_page(self) -> bool:
        return True

    @property
    def content_string(self) -> str:
        with open(str(self.abs_src_path), encoding="utf-8") as file:
            return "\n\n".join(part for cell in json.load(file)["cells"] for part in _blocks(cell)) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put pages into the place of notebooks."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        files.append(NotebookPage(file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls))
    return files


def _blocks(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    if "skip-execution" in cell["metadata"].get("tags", ()):
        yield "*Not run here:*"
    yield _fenced(source, ".python")
    for output in cell["outputs"]:
        text = "".join(output["text"] if "text" in output else output["data"]["text/plain"]).strip("\n")
        yield _fenced(text, ".text .output")


def _fenced(text: str, classes: str) -> str:
    return f"``` {{ {classes} }}\n{text}\n```"
