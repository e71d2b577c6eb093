"""Recipes, configurations and scripts that travel with the package: where they lie, and what a name means.

In a repository three of the folders lie beside the package, where people look for them; setup.py copies them into what
is installed. A name is `launch/local.sh`, the file's own name (`local.sh`), or that without its ending (`local`).
"""

import difflib
from pathlib import Path

from qa_dist.common.errors import ConfigError

FOLDERS = ("recipes", "accelerate_configs", "ds_configs", "launch")

_PACKAGE = Path(__file__).resolve().parents[1]


class SeveralShippedError(ConfigError):
    """A name that several shipped files have."""


def shipped_folder(name: str, package: Path = _PACKAGE) -> Path:
    """The folder of that name among FOLDERS: the repository's if the package lies in one, else the package's copy."""
    if name == "recipes":
        return package / name
    checkout = package.parent
    # Among installed packages there may be one called `launch`.
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return package / "shipped" / name


def shipped_files() -> dict[str, Path]:
    """Every shipped file by its whole name, such as `accelerate_configs/ddp.yaml`."""
    files: dict[str, Path] = {}
    for folder in FOLDERS:
        paths = shipped_folder(folder).glob("*")
        files |= {f"{folder}/{path.name}": path for path in sorted(paths) if path.is_file()}
    return files


def find_shipped(name: str) -> tuple[str, Path]:
    """The whole name and the path of the shipped file that `name` means.

    Raises:
        SeveralShippedError: It means several.
        ConfigError: It means none.
    """
    files = shipped_files()
    short = name.removeprefix("./")
    for matches in (
        [whole for whole in files if whole == short],
        [whole for whole in files if whole.partition("/")[2] == short],
        [whole for whole in files if Path(whole).stem == short],
    ):
        if len(matches) == 1:
            return matches[0], files[matches[0]]
        if matches:
            raise SeveralShippedError([f"{short} is {' and '.join(matches)}; name one of them"])
    names = [*files, *(whole.partition("/")[2] for whole in files), *(Path(whole).stem for whole in files)]
    close = difflib.get_close_matches(short, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "see qa-dist recipes ls"
    raise ConfigError([f"nothing shipped is called {name}; {hint}"])


def file_or_shipped(name: str) -> Path:
    """The file at the path `name`; where there is none and the package ships one of that whole name, that one.

    So `ds_configs/zero2.json` in a launcher's configuration is found from any folder, and a file of the user's own that
    lies there comes first.
    """
    path = Path(name)
    return path if path.exists() else shipped_files().get(name.removeprefix("./"), path)
