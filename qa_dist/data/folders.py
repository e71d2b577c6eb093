"""Folders that hold questions: files of one or both splits, and data sets that the `datasets` library saved to disk."""

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from qa_dist.common.errors import DataError
from qa_dist.data.formats import FORMATS

Split = Literal["train", "validation"]

_NAMES: dict[Split, frozenset[str]] = {
    "train": frozenset({"train", "training"}),
    "validation": frozenset({"dev", "val", "valid", "validation", "eval"}),
}
_OTHER_NAMES = frozenset({"test"})
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def is_saved(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` of a `Dataset` or a `DatasetDict` wrote."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_splits(folder: Path) -> dict[str, Any]:
    """The data sets in such a folder by split; one that stands alone and does not say is the training split.

    Raises:
        DataError: They cannot be loaded.
    """
    try:
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
            return {name: _saved(folder / name) for name in names}
        loaded = _saved(folder)
    except Exception as error:  # the library raises a dozen unrelated types
        reason = " ".join(str(error).split())
        raise DataError(f"{folder} is a saved data set that cannot be loaded ({reason}); save it again") from error
    # A part of a split is named as validation[:500].
    split = str(loaded.split).partition("[")[0]
    is_other = split in _NAMES["validation"] | _OTHER_NAMES and "+" not in str(loaded.split)
    return {split if is_other else "train": loaded}


def _saved(folder: Path) -> Any:
    """One saved data set. Without rows it has no files, and the library does not load it."""
    import datasets

    state = json.loads((folder / "state.json").read_bytes())
    if state.get("_data_files") == []:
        return datasets.Dataset.from_dict({}, split=state.get("_split"))
    return datasets.load_from_disk(str(folder))


def name_of_split(names: Iterable[str], split: Split) -> str | None:
    """What a split is called among the names of splits, as "dev" for validation; None if it is not among them.

    Raises:
        DataError: Several of them mean it, and none is its usual name.
    """
    found = [name for name in names if name in _NAMES[split]]
    if split in found or len(found) < 2:
        return split if split in found else next(iter(found), None)
    raise DataError(
        f"the splits {' and '.join(found)} are both for {split} by their names; call one of them {split}, or save its "
        "questions to a file for --train_file or --validation_file"
    )


def files_of_split(folder: Path, split: Split) -> list[Path]:
    """The files in a folder whose names say that they are of a split (`train-v1.1.json`, `my_dev.jsonl.gz`), in order.

    Only the folder itself is looked at, not those in it.

    Raises:
        DataError: The name of one says that it is of both splits.
    """
    files = files_in(folder)
    if both := [path for path in files if _NAMES["train"] & _words(path) and _NAMES["validation"] & _words(path)]:
        raise DataError(
            f"{both[0]} is of both splits by its name; rename it, or name files with --train_file and --validation_file"
        )
    return [path for path in files if _NAMES[split] & _words(path)]


def files_for(folder: Path, split: Split) -> list[Path]:
    """The files that an option for a split means by a folder: those of the split, or all where no name tells splits.

    Raises:
        DataError: There are none.
    """
    files = files_in(folder)
    of_splits = [path for path in files if _words(path) & (_NAMES["train"] | _NAMES["validation"] | _OTHER_NAMES)]
    chosen = files_of_split(folder, split) if of_splits else files
    if chosen:
        return chosen
    if of_splits:
        names = ", ".join(path.name for path in of_splits[:3])
        raise DataError(f"{folder} is a folder with files of other splits ({names}); name one file for {split}")
    raise DataError(
        f"{folder} is a folder; name one file, or a folder that holds files of questions ({', '.join(suffixes())}) or "
        "a data set saved with save_to_disk"
    )


def files_in(folder: Path) -> list[Path]:
    """The files in a folder whose names end as files of questions do, in order; only the folder itself is looked at.

    Raises:
        DataError: It cannot be read, or holds a file twice.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); check the path and its permissions") from error
    files = [path for path in paths if _is_data(path)]
    names = {path.name for path in files}
    if twice := [path for path in files if f"{path.name}.gz" in names]:
        raise DataError(f"{twice[0]} lies there as {twice[0].name}.gz too; keep one of them, or name one file")
    return files


def _is_data(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz")
    is_named = name.endswith(tuple(suffixes())) and not name.startswith(".") and name not in _NOT_DATA
    # A link to a file that is not there is missing data: whoever opens it says so.
    return is_named and (os.path.isfile(path) or (path.is_symlink() and not os.path.exists(path)))


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the folders and the name of a path are those of a pattern, in which ** stands for any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def suffixes() -> Sequence[str]:
    return [suffix for kind in FORMATS.values() for suffix in kind.suffixes]


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.name.lower()))
