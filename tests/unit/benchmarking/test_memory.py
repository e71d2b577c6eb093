"""Measured memory, estimates beside it, and their page."""

import json
import sys
from pathlib import Path

import pytest

from qa_dist import bench
from qa_dist.benchmarking import memory
from tests.tiny import tiny_model


def test_the_page_of_memory_is_what_its_measurements_generate(tmp_path: Path) -> None:
    docs = Path(__file__).parents[3] / "docs"
    measured = sorted((docs / "memory").glob("*.json"))
    assert measured
    page = tmp_path / "memory.md"
    assert bench.main(["memory", "report", *map(str, measured), "--output", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == (docs / "memory.md").read_text(encoding="utf-8"), "run: make docs"


def test_the_table_of_a_gpu_is_what_the_estimate_says_now() -> None:
    """Within 2 %, as versions of torch and transformers differ in what their operators make."""
    docs = Path(__file__).parents[3] / "docs"
    table = json.loads((docs / "memory" / "cpu.json").read_text(encoding="utf-8"))["table"]
    (noted,) = [each for each in table["lora, bf16"] if each["strategy"] == "ddp"]
    words = (*memory.LORA, "--mixed_precision", "bf16", "--max_tokens_per_device", str(memory.TABLE_TOKENS))
    options = memory.EstimateConfig(strategy="ddp", num_processes=8, device="cuda", device_memory="24GiB")
    (found,) = memory.estimates(words, options)
    for name in ("device_bytes", "largest_max_tokens_per_device"):
        assert found[name] == pytest.approx(noted[name], rel=0.02), "run: bench memory estimate docs/memory/cpu.json"


def test_what_was_measured_is_replaced_by_a_whole_file(tmp_path: Path) -> None:
    """A kill in the middle of writing leaves the measurements before."""
    path, before = tmp_path / "memory.json", tmp_path / "before.json"
    path.write_text("measured", encoding="utf-8")
    before.hardlink_to(path)
    memory._write({"compared": {}, "table": {}}, path)
    assert before.read_text(encoding="utf-8") == "measured"
    assert memory.read(path) == {"compared": {}, "table": {}}


def test_memory_without_estimates_makes_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory.json"
    path.write_text('{"compared": {"lora": {"measured_bytes": 1}}, "table": {}}', encoding="utf-8")
    assert bench.main(["memory", "report", str(path), "--output", str(tmp_path / "memory.md")]) == 2
    assert f"{path} has no estimates of lora; run" in capsys.readouterr().err
    assert bench.main(["memory", "estimate", str(path), "full"]) == 2
    assert f"'full' was not measured in {path}; name some of: lora; table" in capsys.readouterr().err


def test_estimates_are_put_beside_measured_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qa_dist.memory.estimate.process_bytes", lambda modules: 300 * 2**20)
    model = str(tiny_model("bert", tmp_path / "model"))
    capsys.readouterr()
    words = ("--model_config", model, "--max_seq_length", "64", "--doc_stride", "16")
    monkeypatch.setitem(memory.TO_COMPARE, "lora", ("fsdp2", 2, 128, 4, words))
    measured = {"strategy": "fsdp2", "num_processes": 2, "num_tokens": 128, "measured_bytes": 2**20}
    path = tmp_path / "memory.json"
    path.write_text(json.dumps({"compared": {"lora": measured}, "table": {}}), encoding="utf-8")
    assert bench.main(["memory", "estimate", str(path), "lora"]) == 0
    run = json.loads(path.read_text(encoding="utf-8"))["compared"]["lora"]
    assert measured.items() <= run.items()
    assert run["estimated_bytes"] == sum(run["parts"].values()) > 300 * 2**20
    assert run["parts"]["process"] == 300 * 2**20
    assert run["parts"]["sharing"] > 0, "of FSDP2"
    assert capsys.readouterr().out == f"lora {2**20} {run['estimated_bytes']}\n"


def test_the_largest_micro_batch_is_that_of_a_balanced_step() -> None:
    step = {"num_features": 11, "num_tokens": 1900}
    assert memory.micro_batch(step, 1, 1024, is_padded=False) == 950
    assert memory.micro_batch(step, 2, 512, is_padded=False) == 475
    assert memory.micro_batch(step, 1, 1152, is_padded=True) == 3 * 384
    assert memory.micro_batch(step, 8, 1152, is_padded=True) == 384


def test_a_memory_run_is_launched_as_its_strategy_asks() -> None:
    assert memory.launcher("ddp", 1) == [sys.executable]
    for strategy, ranks, *_ in memory.TO_COMPARE.values():
        words = memory.launcher(strategy, ranks)
        if ranks > 1:
            config = Path(words[words.index("--config_file") + 1])
            assert config.stem == strategy
            assert config.is_file()
            assert words[-2:] == ["--num_processes", str(ranks)]


def test_rows_of_other_versions_are_not_put_into_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "memory.json"
    monkeypatch.setattr(memory, "versions", lambda: {"torch": "2"})
    monkeypatch.setattr(memory, "measured", lambda name, folder: {"measured_bytes": len(name)})
    before = {"compared": {"full": {"measured_bytes": 9}}, "table": {}, "versions": {"torch": "1"}, "notes": ["Old."]}
    path.write_text(json.dumps(before), encoding="utf-8")
    assert bench.main(["memory", "measure", str(path), "lora"]) == 2
    assert f"{path} was measured with other versions; measure all anew, or name another file" in capsys.readouterr().err
    assert json.loads(path.read_text(encoding="utf-8")) == before
    assert bench.main(["memory", "measure", str(path)]) == 0
    after = json.loads(path.read_text(encoding="utf-8"))
    assert after["versions"] == {"torch": "2"}
    assert after["compared"] == {name: {"measured_bytes": len(name)} for name in memory.TO_COMPARE}
    assert "notes" not in after
    assert bench.main(["memory", "measure", str(path), "lora"]) == 0
