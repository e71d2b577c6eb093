"""Install packages with uv, which takes a quarter of pip's time, as pip is set up; with pip where uv cannot.

    python -m qa_dist.machine.installation '.[quickstart]'

They come into the environment of the interpreter that runs this, at the versions of `constraints.txt`.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Mapping

_PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
_PINNED = ("-c", "constraints.txt")

_OPTIONS = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "constraint": "--constraints",
}
"""Settings of pip that decide what is installed, and uv's names of them. uv does not read them itself."""

_WITHOUT_EFFECT = frozenset(
    "break-system-packages cache-dir default-timeout disable-pip-version-check no-cache-dir no-color no-compile "
    "no-input no-warn-script-location progress-bar quiet require-virtualenv retries root-user-action timeout "
    "verbose".split()
)
"""Settings that change how pip works and not what it installs."""


def uv_options(settings: Mapping[str, str]) -> tuple[list[str], dict[str, str]] | None:
    """What makes uv install what pip would.

    Args:
        settings: pip's, by name; several values of one stand in a text with white space between them.

    Returns:
        Options and variables; None where there is a setting that has no counterpart here.
    """
    # Without this, uv takes the first index that has a package; pip takes the best version of all.
    options = ["--index-strategy", "unsafe-best-match"]
    variables = {}
    for name, value in settings.items():
        if name in _OPTIONS:
            options += [word for item in value.split() for word in (_OPTIONS[name], item)]
        elif name == "cert":
            variables["SSL_CERT_FILE"] = value
        elif name not in _WITHOUT_EFFECT:
            return None
    return options, variables


def pip_settings(listed: str) -> dict[str, str]:
    """Settings that hold for `pip install`, from what `pip config list` prints.

    Those of the environment come before those of files for the command, and these before those for all commands.
    """
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}."):
                found[name.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    return found


def main(wanted: list[str]) -> int:
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    as_pip = uv_options(pip_settings(listed.stdout))
    packages = [word for item in wanted for word in ("-e", item)]
    if as_pip is not None and subprocess.run([*_PIP, *_PINNED, "uv"]).returncode == 0:
        options, variables = as_pip
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
        if subprocess.run([*uv, *options, *_PINNED, *packages], env={**os.environ, **variables}).returncode == 0:
            return 0
        sys.stderr.write("uv could not install them; pip tries now\n")
    return subprocess.run([*_PIP, *_PINNED, *packages]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
