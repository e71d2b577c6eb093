"""Nothing in the program can run what it reads: its own source is searched for what could, under any name."""

import ast
import builtins
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import qa_dist

PACKAGE = Path(qa_dist.__file__).parent


def below(module: str, names: str) -> list[str]:
    return [f"{module}.{name}" for name in names.split()]


STARTS_PROCESSES = ("exec", "fork", "popen", "posix_spawn", "spawn", "startfile", "system")
NOWHERE: tuple[str, ...] = ()
ONLY_IN: dict[str, tuple[str, ...]] = {
    # What unpickles, or runs a text.
    **dict.fromkeys(
        [
            *below("builtins", "__builtins__ __import__ compile eval exec"),
            *("_pickle", "cloudpickle", "code", "codeop", "dill", "imp", "joblib", "marshal", "pty", "pydoc", "runpy"),
            *("posix", "shelve", "sys.modules", "zipimport"),
            *below("importlib", "__import__ machinery reload"),
            *below("importlib.util", "LazyLoader module_from_spec spec_from_file_location spec_from_loader"),
            *below("pkgutil", "get_loader resolve_name"),
            *below("numpy", "load lib.format.read_array lib.npyio"),
            *below("pandas", "eval read_hdf read_pickle"),
            *below("torch", "classes.load_library hub jit.load load multiprocessing ops.load_library package"),
            *below("torch", "serialization utils.cpp_extension"),
            *below("yaml", "CFullLoader CLoader CUnsafeLoader FullLoader Loader UnsafeLoader"),
            *below("yaml", "full_load full_load_all load load_all unsafe_load unsafe_load_all"),
        ],
        NOWHERE,
    ),
    # Tokenising processes talk to the process that started them, through pipes that nobody else has.
    "pickle": ("features/workers.py",),
    # So do the trials of a sweep.
    "multiprocessing": ("sweeping/workers.py",),
    # Modules of this package, and optimizers, by tables of this package.
    "importlib.import_module": ("__init__.py", "bench.py", "cli.py", "documentation.py", "training/optimizer.py"),
    # Functions of the system and of the driver that Python has no name for.
    "ctypes": ("benchmarking/gpu/steps.py", "machine/allocator.py", "sweeping/workers.py"),
    # Commands of the system, and this package's own in processes of their own.
    "subprocess": (
        *(f"benchmarking/{name}.py" for name in ("answering", "job", "long_run", "memory")),
        *(f"benchmarking/gpu/{name}.py" for name in ("command", "packing", "processes")),
        *("doctor.py", "features/workers.py", "machine/checks.py", "machine/environment.py", "machine/installation.py"),
        *("memory/estimate.py", "recipe_command.py", "sweeping/jobs.py"),
    ),
    **{f"os.{name}": NOWHERE for name in dir(os) if name.startswith(STARTS_PROCESSES)},
    "os.execve": ("machine/allocator.py",),
    **dict.fromkeys(below("asyncio", "create_subprocess_exec create_subprocess_shell"), NOWHERE),
    "concurrent.futures.ProcessPoolExecutor": NOWHERE,
    # The base of a class of which transformers makes models, as whoever calls its `pipeline` asks.
    "transformers.AutoModelForQuestionAnswering as a value": ("answering/pipeline.py",),
}
"""Names that can run what they are given, as they are called where they are defined, and the modules that may use them.

A name stands for everything below it. A module has its place for what it needs today.
"""
TOP = {name.partition(".")[0] for name in ONLY_IN}
HOLDERS = {name.rpartition(".")[0] for name in ONLY_IN} - {""}
"""Modules with such names in them: who passes one on, or gives it another name, might mean any of these."""
REFUSED_OPTIONS = ("allow_pickle", "shell", "trust_remote_code")


def imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """What an import binds: the name in this module, and what that is called where it is defined."""
    for alias in node.names:
        top = alias.name.partition(".")[0]
        if isinstance(node, ast.Import):
            yield (alias.asname, alias.name) if alias.asname else (top, top)
            continue
        yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        if alias.name in TOP:
            # From a module that imports it itself.
            yield alias.asname or alias.name, alias.name


def meanings(tree: ast.AST) -> dict[str, set[str]]:
    """What each name of a module may be called where it is defined: of those that it imports, and of Python's own."""
    found: dict[str, set[str]] = {name: {f"builtins.{name}"} for name in (*dir(builtins), "__builtins__")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name, meaning in imported(node):
                found.setdefault(name, set()).add(meaning)
    return found


def full_names(node: ast.AST, known: dict[str, set[str]]) -> set[str]:
    """What a name, or attributes of one, may be called where it is defined; nothing for what was not imported."""
    if isinstance(node, ast.Attribute):
        return {f"{name}.{node.attr}" for name in full_names(node.value, known)}
    return known.get(node.id, set()) if isinstance(node, ast.Name) else set()


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a module imports or mentions; "os as a value" where `os` is more than a prefix.

    With a name of its own, what is below it would not be found; the same goes for transformers' classes of any model.
    """
    known = meanings(tree)
    nodes = list(ast.walk(tree))
    parts = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    # Whether there is such a function is asked of a module, and no more.
    parts |= {id(node.args[0]) for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr"}
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, name) for _, name in imported(node))
        elif isinstance(node, ast.Name | ast.Attribute) and id(node) not in parts:
            for name in full_names(node, known):
                is_holder = name in HOLDERS or re.fullmatch(r"transformers\.Auto\w+", name)
                yield node.lineno, f"{name} as a value" if is_holder else name


def listed(name: str) -> set[str]:
    """Which of ONLY_IN a full name is, or is below."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts) + 1)} & ONLY_IN.keys()


def options_set(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, name and value of all that looks like an option: in calls, in dictionaries and in their items."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((node.lineno, each.arg, ast.unparse(each.value)) for each in node.keywords if each.arg)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield node.lineno, str(key.value), ast.unparse(value)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                    yield node.lineno, str(target.slice.value), ast.unparse(node.value)


def may_run(source: str, place: str) -> list[str]:
    """What in a module might run what it reads; `place` says by its path in the package which module it is."""
    tree = ast.parse(source)
    known = meanings(tree)
    found = []
    for line, name in used(tree):
        if name.endswith((".*", " as a value")) and not listed(name):
            found.append(f"line {line}: {name}")
        found += [f"line {line}: {name}" for each in listed(name) if place not in ONLY_IN[each]]
    found += [
        f"line {line}: {name}={value}"
        for line, name, value in options_set(tree)
        if name in REFUSED_OPTIONS and value != "False"
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = full_names(node.func, known) or {ast.unparse(node.func)}
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if any(re.search(r"Auto\w+\.from_(pretrained|config)$", name) for name in called):
            found += [f"line {node.lineno}: trust_remote_code"] * (options.get("trust_remote_code") != "False")
        if any(re.search(r"AutoModel\w*\.from_pretrained$", name) for name in called):
            is_of_folder = any("weights_folder" in ast.unparse(first) for first in node.args[:1])
            is_safe = options.get("use_safetensors") == "True" and is_of_folder
            found += [f"line {node.lineno}: weights"] * (not is_safe)
    return found


MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("place", MODULES)
def test_nothing_in_the_program_can_run_what_it_reads(place: str) -> None:
    assert may_run(MODULES[place].read_text(encoding="utf-8"), place) == []


def test_only_modules_that_need_to_run_something_may() -> None:
    needed: dict[str, set[str]] = {name: set() for name in ONLY_IN}
    for place, path in MODULES.items():
        for _, name in used(ast.parse(path.read_text(encoding="utf-8"))):
            for each in listed(name):
                needed[each].add(place)
    assert needed == {name: {*places} for name, places in ONLY_IN.items()}


@pytest.mark.parametrize(
    "source",
    [
        *("from numpy import load\nload(path)", "import numpy\nnumpy.load(path)", "import numpy as n\nn.load(path)"),
        *("from torch import load as read", "import torch as t\nt.load(path)", "from torch import jit\njit.load(path)"),
        *("import torch.hub", "from torch import hub", "from torch.serialization import load"),
        *("import yaml as y\ny.load(text, Loader)", "from yaml import unsafe_load", "from yaml import Loader as Safe"),
        *("import pickle as p", "from pickle import loads", "from pandas import read_pickle", "import dill, json"),
        *("from os import system", "import os as o\no.system(word)", "import os\nrun = os.system\nrun(word)"),
        *("from os import execv", "import os\nos.spawnlp(mode, word)", "from shutil import os as o\no.popen(word)"),
        *("import os\ngetattr(os, 'system')(word)", "import os\no = os\no.popen(word)", "from os import *"),
        *("import subprocess as s", "from subprocess import run", "from qa_dist.doctor import subprocess as s"),
        "import asyncio as a\na.create_subprocess_shell(word)",
        *("eval(text)", "work = exec", "list(map(eval, texts))", "compile(text, '', 'exec')", "__import__(name)"),
        *("import builtins\nbuiltins.eval(text)", "from builtins import exec as run", "__builtins__['eval'](text)"),
        *("import builtins as b\nvars(b)['eval'](text)", "import sys\nsys.modules[name].main()"),
        *("import importlib\nimportlib.import_module(name)", "from importlib import import_module as load"),
        *("import importlib as i\ni.reload(module)", "from importlib import util\nutil.module_from_spec(spec)"),
        *("import runpy", "from ctypes import CDLL", "import ctypes.util", "import multiprocessing.connection"),
        *("load(path, allow_pickle=True)", "run(words, shell=asked)", "load(**{'trust_remote_code': True})"),
        *("options['trust_remote_code'] = config.trust", "dict(allow_pickle=True)"),
        "from transformers import AutoConfig as C\nC.from_pretrained(name)",
        "import transformers as t\nt.AutoModel.from_config(config, trust_remote_code=asked)",
        "from transformers import AutoModel as M\nM.from_pretrained(name, trust_remote_code=False)",
        "from transformers import AutoModel\nkind = AutoModel\nkind.from_pretrained(name)",
        "def inner():\n    from os import system as f\n    f(word)\nclass f:\n    pass",
    ],
)
def test_what_can_run_what_it_reads_is_found_under_any_name(source: str) -> None:
    assert may_run(source, "data/formats.py") != []


@pytest.mark.parametrize(
    "source",
    [
        *("import re\nre.compile(text)", "import torch\ntorch.compile(f)", "model.eval()", "from json import load"),
        *("import os\nos.replace(a, b)\ndict(os.environ)", "import os\nhasattr(os, 'fork')"),
        *("from importlib import metadata, util\nutil.find_spec(name)", "def compiled(compiling): ..."),
        *("import yaml\nyaml.compose(text, Loader=yaml.SafeLoader)", "from safetensors.torch import load_file, load"),
        *("run(words, shell=False)", "system.load()", "import numpy as np\nnp.loadtxt(path)", "{'shell': False}"),
        "from transformers import AutoConfig\nAutoConfig.from_pretrained(name, trust_remote_code=False)",
    ],
)
def test_what_only_looks_as_if_it_ran_something_is_let_pass(source: str) -> None:
    assert may_run(source, "data/formats.py") == []
