"""The tested set that travels with the package."""

import json
from pathlib import Path

from qa_dist.machine.requirements import Requirement, generated, lowest, requirements

ROOT = Path(__file__).resolve().parents[3]


def test_the_copy_in_the_package_is_that_of_the_project() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]
    copy = (ROOT / "qa_dist" / "machine" / "requirements.json").read_text(encoding="utf-8")
    assert copy == generated(*texts), "run: make docs"


def test_every_package_has_a_tested_version() -> None:
    found = {item.name: item for item in requirements()}
    assert {"torch", "transformers", "tokenizers", "bitsandbytes", "deepspeed"} <= found.keys()
    assert all(item.tested for item in found.values())
    assert found["bitsandbytes"].extra == "quant"
    assert found["torch"].extra is None


def test_names_are_compared_as_registries_do() -> None:
    extras = '[project.optional-dependencies]\nquant = ["bitsandbytes>=0.48"]\ndeepspeed = ["deepspeed"]\n'
    extras += "onnx = []\nsweep = []\n"
    pyproject = f'[project]\ndependencies = ["Py.Yaml_x>=6.0"]\n{extras}'
    entries = json.loads(generated(pyproject, "# pins\nPy-YAML-X==6.0.3\ntokenizers==1.0\nbitsandbytes==0.50.2\n"))
    assert [Requirement(**entry) for entry in entries] == [
        Requirement("Py.Yaml_x", "6.0", "6.0.3", None),
        Requirement("huggingface_hub", None, None, None),
        Requirement("tokenizers", None, "1.0", None),
        Requirement("bitsandbytes", "0.48", "0.50.2", "quant"),
        Requirement("deepspeed", None, None, "deepspeed"),
    ]


def test_the_lowest_versions_are_those_that_the_project_allows() -> None:
    extras = '[project.optional-dependencies]\nquant = ["bitsandbytes>=0.48"]\nbench = ["numpy>=2.0", "model==0.1.0"]\n'
    pyproject = f'[project]\ndependencies = ["numpy>=2.0", "torch>=2.10", "torch-extra>=1"]\n{extras}'
    constraints = lowest(pyproject, "# pins\nnumpy==2.4.6\ntorch==2.13.0\n")
    # torch is the tested one.
    assert constraints.splitlines() == [
        "bitsandbytes==0.48",
        "model==0.1.0",
        "numpy==2.0",
        "torch==2.13.0",
        "torch-extra==1",
    ]


def test_every_package_has_one_lowest_version() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]
    names = [line.partition("==")[0] for line in lowest(*texts).splitlines()]
    assert len(names) > 25
    assert len(set(names)) == len(names)
