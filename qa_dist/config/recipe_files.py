"""Files of options: recipes, and the config.yaml of a run, which is one. YAML, flat, named as the flags.

`write_config` writes a configuration as a recipe that gives the same one again.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError
from qa_dist.common.files import staged
from qa_dist.common.parsers import ParseError, read_yaml
from qa_dist.common.shipped import shipped_folder
from qa_dist.config.options import RunConfig
from qa_dist.config.removed_options import without_removed
from qa_dist.config.texts import shown


def recipe_path(name: str) -> Path:
    """The YAML file that `--config NAME` means: a path, or the name of a recipe shipped with the package.

    Raises:
        ConfigError: There is neither.
    """
    path = Path(os.path.expanduser(name))
    # Not Path.is_file, which raises for a name that no file can have.
    if os.path.isfile(path):
        return path
    recipes = shipped_folder("recipes")
    shipped = recipes / f"{name}.yaml"
    if os.path.isfile(shipped):
        return shipped
    names = ", ".join(sorted(recipe.stem for recipe in recipes.glob("*.yaml")))
    raise ConfigError([f"--config {shown(name)} is neither a file nor a recipe; recipes are: {names}"])


def read_recipe(name: str, *, called: str = "--config") -> dict[str, Any]:
    """Options of a recipe under their flag names; `called` is what messages call it.

    Raises:
        ConfigError: The file is missing, is not YAML, holds an option twice, or is not a mapping.
    """
    path = recipe_path(name)
    return _options_in(path, f"{called} {path}", "write a line `name: value` for each option")


def read_run_options(path: str | Path) -> dict[str, Any]:
    """Options in the config.yaml that a run left in its folder, under their flag names; none if there is no such file.

    Those that later versions took out, and that were off, are left out.

    Raises:
        ConfigError: As for `read_recipe`; messages name the file alone.
    """
    if not os.path.isfile(path):
        return {}
    return without_removed(_options_in(Path(path), str(path), "mend or remove it"))


def yaml_file(path: Path, called: str) -> tuple[str, Any]:
    """The text of a YAML file, and the value in it; `called` is what messages call it.

    Raises:
        ConfigError: It cannot be read, is not UTF-8, or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        return text, read_yaml(text)
    except OSError as error:
        raise ConfigError([f"{called} cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{called} is not UTF-8 (byte {error.start:,}); convert the file"]) from error
    except ParseError as error:
        raise ConfigError([f"{called} cannot be used as YAML: {error}"]) from error


def _options_in(path: Path, called: str, advice: str) -> dict[str, Any]:
    """Options of a YAML file; `called` is what messages call it, and `advice` what to do where it holds none."""
    text, loaded = yaml_file(path, called)
    if not text.strip():
        raise ConfigError([f"{called} is empty; {advice}"])
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        content = "a list" if isinstance(loaded, list) else f"only {shown(loaded)}"
        raise ConfigError([f"{called} holds {content}; {advice}"])
    return loaded


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as a recipe that `--config` reads back to the same configuration."""
    write_options(config.flat(), path)


def write_options(options: Mapping[str, Any], path: Path) -> None:
    """Write options, by flag name, as a recipe."""
    import yaml

    with staged(path) as aside:
        aside.write_text(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True), encoding="utf-8")
