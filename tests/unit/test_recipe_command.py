"""`qa-dist recipes`: what it lists, copies and finds wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qa_dist.cli import main as qa_dist
from qa_dist.common.shipped import shipped_files
from qa_dist.recipe_command import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says that must end with 2."""
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def changed(source: str, **values: object) -> str:
    """A shipped YAML or JSON file with some values changed, as the name of a new file."""
    path = shipped_files()[source]
    target = Path(path.name)
    if path.suffix == ".json":
        target.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")
    else:
        whole = {**yaml.safe_load(path.read_text(encoding="utf-8")), **values}
        target.write_text(yaml.safe_dump(whole), encoding="utf-8")
    return target.name


def test_every_file_is_listed_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert qa_dist(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in shipped_files():
        if not name.endswith(".md"):
            short = Path(name).stem if name.startswith("recipes/") else Path(name).name
            (line,) = [line for line in lines if line.split()[:1] == [short]]
            assert len(line.split()) > 2, f"{name} does not say what it is for"


def test_show_prints_the_file_and_path_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "zero2.json"]) == 0
    assert capsys.readouterr().out == (ROOT / "ds_configs" / "zero2.json").read_text(encoding="utf-8")
    assert main(["path", "ddp"]) == 0
    assert capsys.readouterr().out == f"{ROOT}/accelerate_configs/ddp.yaml\n"


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["tutorial"], "tutorial.yaml"),
        (["tutorial", "mine.yaml"], "mine.yaml"),
        (["tutorial", "new/"], "new/tutorial.yaml"),
        (["ddp"], "accelerate_configs/ddp.yaml"),
        (["ddp", "."], "ddp.yaml"),
        (["launch"], "launch/slurm.sh"),
        (["launch", "there/"], "there/launch/slurm.sh"),
        (["ds_configs", "mine"], "mine/zero3_offload.json"),
    ],
)
def test_cp_copies_a_file_or_a_folder(words: list[str], written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cp", *words]) == 0
    copies = capsys.readouterr().out.splitlines()
    assert written in copies
    assert sorted(copies) == sorted(str(path) for path in Path().rglob("*") if path.is_file())
    sources = {path.name: path for path in shipped_files().values()}
    for copy in map(Path, copies):
        source = sources.get(copy.name, sources["tutorial.yaml"])
        assert copy.read_bytes() == source.read_bytes()
        assert copy.stat().st_mode == source.stat().st_mode


def test_cp_overwrites_nothing_and_then_copies_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "launch").mkdir()
    (folder / "launch" / "slurm.sh").write_text("mine", encoding="utf-8")
    assert "launch/slurm.sh is there already; give another name behind launch" in refused(capsys, "cp", "launch")
    assert [path.name for path in (folder / "launch").iterdir()] == ["slurm.sh"]
    assert (folder / "launch" / "slurm.sh").read_text(encoding="utf-8") == "mine"
    (folder / "file").touch()
    assert "file/x.yaml cannot be written: File exists" in refused(capsys, "cp", "tutorial", "file/x.yaml")


def test_every_shipped_file_is_valid_with_every_recipe_that_any_strategy_honours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [name for name in shipped_files() if not name.endswith(".md")]
    assert main(["validate", *names]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(names)
    assert all(line.endswith(" without problems") for line in lines)


def test_every_problem_of_every_file_is_said_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.yaml").write_text("lora_rank: 8\nlearning_rate: fast\ndoc_stride: 400\n", encoding="utf-8")
    (folder / "broken.sh").write_text("if true; then\n", encoding="utf-8")
    (folder / "-latin.sh").write_bytes(b"echo \xe9t\xe9 ((\nif then\n")
    (folder / "bad.json").write_text("{", encoding="utf-8")
    launcher = changed("accelerate_configs/zero2.yaml", deepspeed_config={"zero_stage": 2})
    assert "-latin.sh: line 1: syntax error" in refused(capsys, "validate", "./-latin.sh")
    said = refused(capsys, "validate", "mine.yaml", "broken.sh", "bad.json", launcher, "none.yaml", "ddp.yaml")
    for sentence in (
        "mine.yaml: --lora_rank is no option here; did you mean --lora_r?",
        "mine.yaml: --learning_rate fast is not a number",
        "mine.yaml: --doc_stride 400 leaves no room",
        "broken.sh: line 2: syntax error",
        "bad.json: the launcher's deepspeed_config_file bad.json is not JSON",
        "zero2.yaml: the launcher asks for DeepSpeed without a deepspeed_config_file",
        "none.yaml: there is no such file, and none of that name is shipped",
    ):
        assert sentence in said
    assert "ddp.yaml" not in said.replace("accelerate_configs/ddp.yaml", "")


def test_a_launcher_configuration_is_read_as_accelerate_reads_it(capsys: pytest.CaptureFixture[str]) -> None:
    for values, sentence in (
        ({"distributed_type": "NO"}, "distributed_type NO starts one process and not num_processes: 2; set"),
        ({"colour": "red"}, "accelerate launch does not take it: The config file at ddp.yaml had unknown keys"),
        ({"distributed_type": "MANY"}, "accelerate launch does not take it: 'MANY' is not a valid DistributedType"),
        ({"mixed_precision": "bf16"}, "the launcher's mixed_precision (bf16) is not the run's (no)"),
        ({"num_processes": "two"}, "num_processes is two and not a number of 1 or more"),
        ({"num_machines": 0}, "num_machines is 0 and not a number of 1 or more"),
    ):
        assert f"ddp.yaml: {sentence}" in refused(capsys, "validate", changed("accelerate_configs/ddp.yaml", **values))
    fsdp = {"fsdp_config": {"fsdp_version": 1, "fsdp_offload_params": True}, "num_processes": 1}
    said = refused(capsys, "validate", changed("accelerate_configs/fsdp2.yaml", **fsdp))
    assert "version 1 is not supported" in said
    assert "only ZeRO offloads" in said
    Path("twice.yaml").write_text("num_machines: 1\nnum_machines: 2\n", encoding="utf-8")
    assert "num_machines' is there more than once" in refused(capsys, "validate", "twice.yaml")


WRONG_TYPES: list[Any] = [[1], [], ["a"], 3, 0, 2.5, None, False, {"a": 1}, {"a": [1]}, "text", 10**30]


def test_no_value_of_a_launcher_configuration_ends_in_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("distributed_type", "mixed_precision", "gpu_ids", "use_cpu", "compute_environment", "main_process_port")
    names += ("deepspeed_config", "fsdp_config", "dynamo_config", "parallelism_config", "num_processes", "rdzv_backend")
    for name in names:
        for value in WRONG_TYPES:
            file = changed("accelerate_configs/zero2.yaml", **{name: value})
            # Anything but a mistake that it tells would be raised.
            assert main(["validate", file]) in (0, 2), (name, value)
            said = capsys.readouterr().err
            assert "object has no attribute" not in said or value == 10**30, said
    for values, sentence in (
        ({"distributed_type": [1]}, "distributed_type is [1] and takes one value; mend it or remove it"),
        ({"distributed_type": False}, "distributed_type is false and no text; write one, in quotes"),
        ({"dynamo_config": {"dynamo_backend": 3}}, "dynamo_config.dynamo_backend is 3 and no text"),
        ({"fsdp_config": 3}, "fsdp_config is 3 and no section of `name: value` lines"),
        ({"mixed_precision": "fp8"}, "accelerate launch does not take it: FP8 is not available on this machine"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "the launcher's parallelism_config has no effect"),
    ):
        assert f"ddp.yaml: {sentence}" in refused(capsys, "validate", changed("accelerate_configs/ddp.yaml", **values))


def test_what_accelerate_config_writes_by_itself_is_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    written = config_args.ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type="DEEPSPEED",
        mixed_precision="no",
        use_cpu=False,
        debug=False,
        num_processes=2,
        deepspeed_config={"deepspeed_config_file": "ds_configs/zero3.json", "zero3_init_flag": False},
    )
    written.to_yaml_file("mine.yaml")
    assert main(["validate", "mine.yaml"]) == 0
    assert "without problems" in capsys.readouterr().out


def test_what_is_no_file_is_told_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, sentence in (
        ("zero3", "zero3: is accelerate_configs/zero3.yaml and ds_configs/zero3.json; name one of them"),
        ("ds_configs", "ds_configs: is a folder; name a file in it"),
        ("./launch/", "./launch/: is a folder; name a file in it"),
        (".", ".: is a folder; name a file in it"),
        ("/dev/null", "/dev/null: is a device or a pipe and no file; name a file"),
        ("x" * 300, "there is no such file, and none of that name is shipped"),
    ):
        assert sentence in refused(capsys, "validate", name)
    for words in (["tutorial", "x" * 300], ["launch", "x" * 300], ["tutorial", f"{'x' * 300}/"]):
        assert "cannot be written: File name too long; choose another place" in refused(capsys, "cp", *words)
    assert "nothing shipped is called xxx" in refused(capsys, "cp", "x" * 300)
    assert list(folder.iterdir()) == []


def test_files_named_together_are_checked_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "plain.yaml").write_text("max_grad_norm: 2.0\n", encoding="utf-8")
    (folder / "small.yaml").write_text("quantization: 4bit\n", encoding="utf-8")
    clipped = changed("ds_configs/zero3.json", gradient_clipping=2.0, steps=3)
    assert "gradient_clipping is 2.0, but the recipe's max_grad_norm is 1.0" in refused(capsys, "validate", clipped)
    said = refused(capsys, "validate", clipped, "plain.yaml", "small.yaml")
    assert "zero3.json with small.yaml: gradient_clipping is 2.0" in said
    assert "zero3.json with small.yaml: --quantization 4bit does not work with zero3" in said
    assert "with plain.yaml" not in said
    # What is wrong beside any recipe is said once, of the file.
    assert said.count("zero3.json: steps would have no effect") == 1


def test_a_recipe_that_no_strategy_honours_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.yaml").write_text("mixed_precision: fp16\ncpu_offload: true\n", encoding="utf-8")
    said = refused(capsys, "validate", "mine.yaml")
    assert "--cpu_offload does not work with ddp" in said
    assert "--mixed_precision fp16 does not work with zero2" in said
    (folder / "mine.yaml").write_text("cpu_offload: true\n", encoding="utf-8")
    assert main(["validate", "mine.yaml"]) == 0
