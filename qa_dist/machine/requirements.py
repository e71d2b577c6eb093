"""The packages that qa_dist stands on: the least versions it takes and the ones it was tested with.

`pyproject.toml` and `constraints.txt` hold both but are not installed; a copy travels beside this file, made by `make
docs` and held equal to them by a test.
"""

import importlib.util
import itertools
import json
import re
import sys
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from qa_dist.common.errors import ConfigError

_EXTRAS = ("quant", "deepspeed", "onnx", "sweep")
# Not named in pyproject.toml, but what a token is, and what a hub id means, depends on them.
_INDIRECT = ("huggingface_hub", "tokenizers")


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package that qa_dist uses.

    Attributes:
        name: of the package.
        at_least: the lowest version that may work; None where another package decides.
        tested: the version that the test suite ran with.
        extra: the optional part of qa_dist that needs it; None: it is always needed.
    """

    name: str
    at_least: str | None
    tested: str | None
    extra: str | None


def requirements() -> list[Requirement]:
    """Every package that this version of qa_dist uses."""
    text = (resources.files("qa_dist") / "machine" / "requirements.json").read_text(encoding="utf-8")
    return [Requirement(**entry) for entry in json.loads(text)]


def require_package(name: str, option: str) -> None:
    """Make sure of the package behind an option, as the user wrote it.

    Raises:
        ConfigError: The package is not installed.
    """
    if importlib.util.find_spec(name) is None:
        known = next((item for item in requirements() if item.name == name), None)
        # What the package itself depends on is missing where that was installed without its dependencies.
        wanted = name if known is None else f"'qa-dist[{known.extra}]'" if known.extra else "qa-dist"
        raise ConfigError([f"{option} needs {name}; install it with: pip install {wanted}"])


def generated(pyproject: str, constraints: str) -> str:
    """The text of `requirements.json` that belongs to the texts of `pyproject.toml` and `constraints.txt`."""
    import tomllib

    project = tomllib.loads(pyproject)["project"]
    pinned = _pinned(constraints)
    wanted: list[tuple[str, str | None]] = [(line, None) for line in project["dependencies"]]
    wanted += [(name, None) for name in _INDIRECT]
    wanted += [(line, extra) for extra in _EXTRAS for line in project["optional-dependencies"][extra]]
    entries = []
    for line, extra in wanted:
        name, _, at_least = line.partition(">=")
        entries.append(asdict(Requirement(name, at_least or None, pinned.get(_normal(name)), extra)))
    return json.dumps(entries, indent=2) + "\n"


def lowest(pyproject: str, constraints: str) -> str:
    """Constraints for pip: every package of `pyproject.toml`, extras included, at the lowest version it allows.

    torch stays at the version of `constraints.txt`: others may bring gigabytes of CUDA libraries to a machine without a
    GPU.
    """
    import tomllib

    project = tomllib.loads(pyproject)["project"]
    wanted = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    pairs = {tuple(re.split(">=|==", line)) for line in wanted if not line.startswith("torch>")}
    return "".join(
        f"{name}=={version}\n" for name, version in sorted({*pairs, ("torch", _pinned(constraints)["torch"])})
    )


def _pinned(constraints: str) -> dict[str, str]:
    """Versions by normal name."""
    return {_normal(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", constraints, re.MULTILINE)}


def _normal(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    make = lowest if sys.argv[1] == "--lowest" else generated
    sys.stdout.write(make(*(Path(word).read_text(encoding="utf-8") for word in sys.argv[-2:])))
