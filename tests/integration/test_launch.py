"""Every accelerate configuration is read by accelerate, and every one that a CPU can run is run."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tests.distributed.forking import run_main
from tests.distributed.launching import ROOT, free_port, of_accelerate, run, succeed, together
from tests.support import forked_python
from tests.tiny import tiny_run

pytestmark = pytest.mark.integration

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_run(tmp_path_factory.mktemp("launch"))


def test_there_are_configurations() -> None:
    assert {"single", "ddp", "ddp_cpu", "multinode_ddp", "zero1", "zero2", "zero3", "fsdp2"} <= {
        path.stem for path in CONFIGS
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_it_and_it_opens_with_purpose_hardware_and_command(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "# Hardware:" in text
    assert f"# Command:  accelerate launch --config_file accelerate_configs/{path.name}" in text
    # Precision belongs to the recipe: no value is set twice.
    assert "mixed_precision" not in yaml.safe_load(text)


def launched(config: str, words: list[str], output: Path, *more: str) -> dict[str, object]:
    num_processes, environment = of_accelerate(config, *more)
    arguments, log = [*words, "--output_dir", str(output)], output.with_suffix(".log")
    run_main("qa_dist.train", arguments, log, num_processes=num_processes, environment=environment)
    found: dict[str, object] = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return found


def test_every_configuration_for_one_machine_runs_and_gives_the_same_answers(words: list[str], tmp_path: Path) -> None:
    """Accelerate reads them; that it starts processes is shown below."""
    assert launched("single", words, tmp_path / "single")["world_size"] == 1
    assert launched("ddp", words, tmp_path / "ddp")["world_size"] == 2
    assert launched("ddp_cpu", words, tmp_path / "ddp_cpu", "--num_processes", "3")["world_size"] == 3
    single = (tmp_path / "single" / "predictions.json").read_bytes()
    assert (tmp_path / "ddp" / "predictions.json").read_bytes() == single
    assert (tmp_path / "ddp_cpu" / "predictions.json").read_bytes() == single


@pytest.mark.timeout(600)
def test_two_machines_rendezvous_and_train(words: list[str], tmp_path: Path) -> None:
    """Two launchers on this machine stand for two machines."""
    port = free_port()
    launcher = [forked_python.program("python"), "-m", "accelerate.commands.launch", "--config_file"]
    launcher += [str(ROOT / "accelerate_configs" / "multinode_ddp.yaml"), "--num_processes", "2"]
    launcher += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    run = ["-m", "qa_dist.train", *words, "--output_dir", str(tmp_path / "out")]
    together([[*launcher, "--machine_rank", rank, *run] for rank in ("0", "1")], [forked_python.variables()] * 2)
    assert json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["world_size"] == 2


def test_the_local_launcher_starts_two_processes_without_a_gpu(words: list[str], tmp_path: Path) -> None:
    """A shell, accelerate's launcher, which is a fork, and two real ranks: they start anew with jemalloc."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = ["bash", str(ROOT / "launch" / "local.sh"), *words, "--output_dir", str(tmp_path)]
    variables = forked_python.variables()
    del variables["LD_PRELOAD"]
    succeed(command, **variables)
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["world_size"] == 2


def launched_by(script: str, folder: Path, **changes: str) -> tuple[list[str], dict[str, str]]:
    """Words and environment of the Python that a script of launch/ starts with two processes of 5 cores."""
    python = folder / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\necho =====\nexec env\n', encoding="utf-8")
    python.chmod(0o755)
    changes = {
        "PYTHON": str(python),
        "NPROC_PER_NODE": "2",
        "SLURM_CPUS_ON_NODE": "5",
        "OMP_NUM_THREADS": "",
        **changes,
    }
    command = ["bash", str(ROOT / "launch" / script), "--seed", "two words"]
    words, _, variables = succeed(command, **changes).stdout.partition("=====\n")
    return words.splitlines(), dict(line.partition("=")[::2] for line in variables.splitlines())


def test_the_torchrun_script_shares_the_cores_and_hands_everything_on(tmp_path: Path) -> None:
    words, variables = launched_by("torchrun.sh", tmp_path, HF_DATASETS_OFFLINE="1", CUDA_VISIBLE_DEVICES="3,5")
    assert words == [
        *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "0", "--standalone"),
        *("-m", "qa_dist.train", "--seed", "two words"),
    ]
    assert variables["OMP_NUM_THREADS"] == "2"
    assert (variables["HF_DATASETS_OFFLINE"], variables["CUDA_VISIBLE_DEVICES"]) == ("1", "3,5")
    assert variables["PYTHONPATH"].split(":")[0] == str(ROOT)
    assert "ACCELERATE_USE_DEEPSPEED" not in variables
    words, variables = launched_by(
        "torchrun.sh", tmp_path, LOG_DIR=str(tmp_path / "logs"), MAX_RESTARTS="3", OMP_NUM_THREADS="7"
    )
    assert words[4:10] == ["--max-restarts", "3", "--standalone", "--log-dir", str(tmp_path / "logs"), "--tee"]
    assert variables["OMP_NUM_THREADS"] == "7"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in variables


def slurm_job(folder: Path, **variables: str) -> dict[str, str]:
    """Environment of job 7, start 2, on one node; Slurm's commands write down how they are called, and 85 is noted."""
    noted = 'printf "%s %s\n" "$(basename "$0")" "$*" >> "$(dirname "$0")/calls"\n'
    for name, text in {
        "scontrol": "[ $2 != hostnames ] || echo n1",
        "squeue": "echo RUNNING",
        "srun": 'printf "%s\\n" "$@"; echo 85 > "$QA_DIST_EXIT_FILE"; exit 1',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{noted}{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "1", "LOG_DIR": str(folder)}
    return {**job, "PATH": f"{folder}:{os.environ['PATH']}", **variables}


def test_the_scripts_start_the_module_that_is_named(tmp_path: Path) -> None:
    """Predictions go on by themselves, so a job that starts again gets no other arguments; training does."""
    words, _ = launched_by("torchrun.sh", tmp_path, MODULE="qa_dist.predict")
    assert words[-4:] == ["-m", "qa_dist.predict", "--seed", "two words"]
    words, _ = launched_by("local.sh", tmp_path, MODULE="qa_dist.predict", NUM_PROCESSES="2", OMP_NUM_THREADS="2")
    assert words[-4:] == ["-m", "qa_dist.predict", "--seed", "two words"]
    job = slurm_job(tmp_path)
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), "--seed", "two words"]
    done = run(command, MODULE="qa_dist.predict", **job)
    assert done.returncode == 85, done.stderr
    assert done.stdout.splitlines()[-3:-1] == ["--seed", "two words"]
    assert done.stdout.endswith("all answers so far are written; the job is in the queue again\n")
    assert run(command, **job).stdout.splitlines()[-3:-1] == ["--resume_from_checkpoint", "auto"]
    for script in ("torchrun.sh", "local.sh", "slurm.sh"):
        done = run(["bash", str(ROOT / "launch" / script)], MODULE="qa_dist.score", **job)
        assert done.returncode == 2
        assert "MODULE is qa_dist.score; use qa_dist.train" in done.stderr


def test_a_job_that_finds_no_launcher_says_so(tmp_path: Path) -> None:
    alone = tmp_path / "copied" / "slurm.sh"
    alone.parent.mkdir()
    alone.write_bytes((ROOT / "launch" / "slurm.sh").read_bytes())
    (tmp_path / "python").write_text("#!/bin/bash\nexit 1\n", encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    done = run(["bash", str(alone)], **slurm_job(tmp_path, PYTHON="python"))
    assert done.returncode == 2
    assert "there is no torchrun.sh beside" in done.stderr
    assert done.stderr.endswith("and python has no qa_dist to take it from\n")


def test_a_task_of_an_array_is_requeued_alone_and_has_an_exit_file_of_its_own(tmp_path: Path) -> None:
    """The first task's number is also that of the whole array."""
    job = slurm_job(tmp_path, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    done = run(["bash", str(ROOT / "launch" / "slurm.sh")], **job)
    assert done.returncode == 85, done.stderr
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert calls[-2:] == ["squeue --noheader --jobs 7_1 --format %T", "scontrol requeue 7_1"]
    assert (tmp_path / "exit_code.7").read_text(encoding="utf-8") == "85\n"


def test_a_stopped_job_keeps_its_exit_status_while_squeue_does_not_answer(tmp_path: Path) -> None:
    job = slurm_job(tmp_path)
    (tmp_path / "squeue").write_text("#!/bin/bash\necho error >&2\nexit 1\n", encoding="utf-8")
    done = run(["bash", str(ROOT / "launch" / "slurm.sh")], **job)
    assert done.returncode == 85, done.stderr
    assert done.stdout.endswith(
        "the job is in a state that squeue does not tell; unless it starts again by itself, submit it with "
        "--resume_from_checkpoint auto to go on\n"
    )


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("torchrun.sh", "NPROC_PER_NODE", "gpu"),
        ("torchrun.sh", "NPROC_PER_NODE", "0"),
        ("torchrun.sh", "NPROC_PER_NODE", "10000"),
        ("torchrun.sh", "OMP_NUM_THREADS", "abc"),
        ("torchrun.sh", "OMP_NUM_THREADS", "0"),
        ("torchrun.sh", "MAX_RESTARTS", "-1"),
        *(("torchrun.sh", "NNODES", value) for value in ("abc", "0", "2:1", "1:", ":2", "1:2:3")),
        ("local.sh", "OMP_NUM_THREADS", "x"),
        ("local.sh", "NUM_PROCESSES", "2x"),
        ("local.sh", "NUM_PROCESSES", "0"),
        ("slurm.sh", "MAX_REQUEUES", "often"),
    ],
)
def test_numbers_in_the_environment_are_checked(tmp_path: Path, script: str, name: str, value: str) -> None:
    job = slurm_job(tmp_path, **{"NPROC_PER_NODE": "1", "NUM_PROCESSES": "1", name: value})
    done = run(["bash", str(ROOT / "launch" / script)], **job)
    assert done.returncode == 2
    assert f"{name} is {value}; give it a number" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_for_logs_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    for folder in ("/dev/null", "/dev/null/logs"):
        done = run(["bash", str(ROOT / "launch" / "torchrun.sh")], NPROC_PER_NODE="1", LOG_DIR=folder)
        assert done.returncode == 2
        assert f"LOG_DIR is {folder}, where no folder can be made or written to" in done.stderr
        assert done.stderr.count("\n") == 1
    words, _ = launched_by("torchrun.sh", tmp_path, LOG_DIR=str(tmp_path / "logs" / "today"))
    assert words[-7:-5] == [str(tmp_path / "logs" / "today"), "--tee"]
    assert (tmp_path / "logs" / "today").is_dir()


def test_a_range_of_machines_may_restart_and_meets_in_a_new_store_each_time(tmp_path: Path) -> None:
    meeting = {"NNODES": "1:4", "RDZV_ENDPOINT": "10.0.0.1:29500", "PET_LOCAL_ADDR": "10.0.0.1"}
    words, variables = launched_by("torchrun.sh", tmp_path, **meeting)
    assert words[4:8] == ["--max-restarts", "10", "--nnodes", "1:4"]
    assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert launched_by("torchrun.sh", tmp_path, **meeting, MAX_RESTARTS="3")[0][4:6] == ["--max-restarts", "3"]


def test_both_libraries_get_the_interface_of_the_route_unless_one_is_named(tmp_path: Path) -> None:
    ip = tmp_path / "ip"
    ip.write_text(
        '#!/bin/bash\ncase "$*" in\n  *route*) echo "10.0.0.1 dev eth7 src 10.0.0.2 uid 0" ;;\n'
        '  *address*) echo "3: eth7    inet 10.0.0.2/24 brd 10.0.0.255 scope global eth7" ;;\nesac\n',
        encoding="utf-8",
    )
    ip.chmod(0o755)
    meeting = {"NNODES": "2", "RDZV_ENDPOINT": "10.0.0.1:29500", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    variables = launched_by("torchrun.sh", tmp_path, **meeting)[1]
    assert (variables["GLOO_SOCKET_IFNAME"], variables["NCCL_SOCKET_IFNAME"]) == ("eth7", "eth7")
    assert variables["PET_LOCAL_ADDR"] == "10.0.0.2"
    variables = launched_by("torchrun.sh", tmp_path, **meeting, NCCL_SOCKET_IFNAME="ib0")[1]
    assert (variables["GLOO_SOCKET_IFNAME"], variables["NCCL_SOCKET_IFNAME"]) == ("eth7", "ib0")


def test_the_deepspeed_script_is_the_torchrun_script_with_a_strategy(tmp_path: Path) -> None:
    config = tmp_path / "zero.json"
    config.write_text("{}", encoding="utf-8")
    words, variables = launched_by("deepspeed.sh", tmp_path, DS_CONFIG=str(config))
    assert words == launched_by("torchrun.sh", tmp_path)[0]
    assert variables["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert variables["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(config)
    done = run(["bash", str(ROOT / "launch" / "deepspeed.sh")], DS_CONFIG="none.json", NPROC_PER_NODE="2")
    assert done.returncode == 2
    assert "there is no file DS_CONFIG=none.json" in done.stderr
