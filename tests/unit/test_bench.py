"""The parts of the benchmark that are arithmetic: operations, balance, features, files and refusals."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qa_dist import bench
from qa_dist.benchmarking import report, scaling, trainer
from qa_dist.benchmarking.balance import simulate
from qa_dist.benchmarking.flops import StepFlops, matmul_rates
from qa_dist.benchmarking.job import Job, spread
from qa_dist.benchmarking.nested_loops import nested_loop_answers, nested_loop_scores
from qa_dist.benchmarking.settings import REFERENCE, BenchConfig, Settings
from qa_dist.benchmarking.synthetic import SyntheticStore, squad_windows
from qa_dist.common.errors import UserError
from qa_dist.config.options import ModelConfig
from qa_dist.config.parsing import parse
from qa_dist.evaluation.scoring import score_v1
from qa_dist.model.building import build_model
from qa_dist.model.families import named_configurations
from qa_dist.model.lora_layers import GroupedAdapters, group_layers
from qa_dist.model.pretrained import model_configuration
from qa_dist.model.span_model import span_loss
from tests.tiny import tiny_model

HIDDEN, LAYERS = 32, 2


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("length", [7, 24])
def test_operations_are_those_that_torch_counts(tmp_path: Path, tuning: Any, length: int) -> None:
    options = {} if tuning == "full" else {"lora_dropout": 0.0}
    config = ModelConfig(
        model_name_or_path=str(tiny_model("bert", tmp_path)), tuning=tuning, padding="sorted", **options
    )
    model, _ = build_model(config, seed=0, max_seq_length=64)
    flops = StepFlops.of_training(model)
    tokens = torch.arange(length) + 5
    # Torch counts no operations of the fused CPU kernel, so attention runs as plain products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        start_T, end_T = model(tokens, torch.zeros_like(tokens), (length,))
        span_loss(start_T, end_T, (length,), torch.tensor([[1, 2]])).sum().backward()
    expected = flops.of([length])
    if tuning == "lora":
        # The keys of the first layer need no gradient, which fused kernels compute all the same.
        expected -= 2 * HIDDEN * length * length
    assert counter.get_total_flops() == expected


def test_operations_of_a_set_are_the_sum_over_its_features(tmp_path: Path) -> None:
    config = ModelConfig(model_name_or_path=str(tiny_model("bert", tmp_path)))
    flops = StepFlops.of_training(build_model(config, seed=0, max_seq_length=64)[0])
    assert flops.of([3, 5]) == flops.of([3]) + flops.of([5])
    assert flops.per_token_pair == 12 * HIDDEN * LAYERS
    assert flops.products == {(HIDDEN, HIDDEN): 4 * LAYERS, (HIDDEN, 64): LAYERS, (64, HIDDEN): LAYERS}


def test_adapters_in_groups_need_the_operations_of_peft(tmp_path: Path) -> None:
    config = ModelConfig(model_name_or_path=str(tiny_model("bert", tmp_path)), lora_dropout=0.0)
    model, _ = build_model(config, seed=0, max_seq_length=64)
    expected = StepFlops.of_training(model)
    GroupedAdapters(model, group_layers(model, torch.float32))
    kinds = [type(part) for part in model.modules()]
    assert StepFlops.of_training(model) == expected
    assert [type(part) for part in model.modules()] == kinds


def test_rates_of_products_are_positive_and_at_least_three() -> None:
    rates = matmul_rates({(8, 16): 2}, num_tokens=4, dtype=torch.float32, device=torch.device("cpu"), seconds=0.0)
    assert len(rates) >= 3
    assert min(rates) > 0


def test_balance_is_that_of_the_design() -> None:
    found = {entry["world_size"]: entry for entry in simulate()}
    dealt = {2: 1.003, 8: 1.0045, 64: 1.003, 512: 1.0037}
    plain = {2: 1.05, 8: 1.13, 64: 1.22, 512: 1.30}
    for world_size, expected in dealt.items():
        assert found[world_size]["dealt"] == pytest.approx(expected, abs=0.002)
        assert found[world_size]["plain"] == pytest.approx(plain[world_size], abs=0.03)


def test_windows_have_the_lengths_of_squad() -> None:
    windows = squad_windows(20_000, seed=3)
    assert windows.lengths.mean() == pytest.approx(170.75, rel=0.02)
    assert windows.lengths.max() == 384
    assert len(windows.lengths) == len(windows.question_lengths) == 20_000
    assert (windows.lengths > windows.question_lengths + 3).all()


def test_more_windows_begin_with_the_same_ones() -> None:
    few, many = squad_windows(50, seed=1), squad_windows(500, seed=1)
    assert np.array_equal(few.lengths, many.lengths[:50])


def test_short_windows_fit() -> None:
    windows = squad_windows(500, seed=1, max_seq_length=64, doc_stride=16)
    assert windows.lengths.max() <= 64


def test_parts_of_a_store_make_up_the_whole() -> None:
    def store(part: int, num_parts: int) -> SyntheticStore:
        return SyntheticStore(12, seed=5, vocab_size=100, part=part, num_parts=num_parts)

    whole = store(0, 1)
    parts = [store(part, 3) for part in range(3)]
    assert [part.num_features for part in parts] == [4, 4, 4]
    assert np.array_equal(np.concatenate([part.lengths for part in parts]), whole.lengths)
    for name in ("start_token", "end_token", "context_start"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    ids, types = whole.flat(np.array([6, 1]))
    assert np.array_equal(ids, np.concatenate([parts[1].input_ids(2), parts[0].input_ids(1)]))
    assert len(types) == whole.lengths[6] + whole.lengths[1]
    last = whole.context_start + whole.context_length - 1
    assert (whole.start_token <= whole.end_token).all()
    assert (whole.end_token <= last).all()
    assert (whole.context_start <= whole.start_token).all()


def test_random_weights_have_the_size_of_their_name() -> None:
    assert set(named_configurations()) == {"bert-base", "bert-large", "minilm-l6"}
    large = model_configuration(ModelConfig(model_config="bert-large"))
    assert (large.hidden_size, large.num_hidden_layers, large.intermediate_size) == (1024, 24, 4096)
    with pytest.raises(UserError, match="bert-tiny is neither a folder"):
        model_configuration(ModelConfig(model_config="bert-tiny"))


def test_random_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    config = ModelConfig(model_config=str(tiny_model("bert", tmp_path)))
    first, second, other = (build_model(config, seed=seed, max_seq_length=64)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


# ------------------------------------------------------------------------------------------------ loops to compare with


def test_loops_find_the_best_span_inside_the_context() -> None:
    offsets = [None, None, (0, 3), (4, 7), (8, 11), None]
    start = np.array([9, 9, 1, 2, 0, 9], np.float32)
    end = np.array([9, 9, 0, 1, 2, 9], np.float32)
    # A second row of padding behind the tokens, as a batch padded to another's length has.
    padded = [np.append(start, 99).astype(np.float32)], [np.append(end, 99).astype(np.float32)]
    for starts, ends in (([start], [end]), padded):
        found = nested_loop_answers(["q"], ["one two six"], [0], [offsets], starts, ends)
        assert found == {"q": "two six"}


def test_loops_score_as_the_official_script() -> None:
    references = {"a": ["the red fox", "fox"], "b": ["42"], "c": ["north wind"]}
    predictions = {"a": "red fox!", "b": "41", "c": "cold north wind"}
    ours = score_v1(references, predictions)
    theirs = nested_loop_scores(references, predictions)
    assert theirs["exact_match"] == pytest.approx(ours["exact_match"])
    assert theirs["f1"] == pytest.approx(ours["f1"])


# --------------------------------------------------------------------------------------------------------- settings


def settings(*words: str, device: str = "cpu", num_devices: int = 2) -> Settings:
    config, options = parse(
        ["--output_dir", "x", *words], prog="t", description="", groups=(), entry=BenchConfig, base=REFERENCE
    )
    return Settings(config, options, device, num_devices)


def test_settings_of_a_device() -> None:
    assert (settings().num_features, settings().repeats, settings().precisions) == (96, 3, ("no",))
    quick = settings("--quick", "--global_batch_size", "20")
    assert (quick.num_features, quick.repeats) == (40, 2)
    cuda = settings(device="cuda", num_devices=4)
    assert (cuda.num_features, cuda.best_precision, cuda.single_device) == (6000, "bf16", 0)
    assert scaling.world_sizes(cuda) == [1, 2, 4]
    assert scaling.world_sizes(settings("--num_processes", "3")) == [1, 3]


def test_options_of_full_training_have_no_adapters() -> None:
    chosen = settings("--lora_r", "4")
    assert chosen.run_options(tuning="lora")["lora_r"] == 4
    full = chosen.run_options(tuning="full", lora_dropout=0.0)
    parse([], prog="t", description="", groups=(), base=full)


def test_written_settings_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    folder = tiny_model("bert", tmp_path / "tiny")
    written = settings("--model_name_or_path", str(folder)).to_json()
    assert written["model_name_or_path"] == "tiny"
    assert str(tmp_path) not in json.dumps(written)


def test_a_work_is_the_same_after_a_journey_through_json() -> None:
    job = Job(kind="train", options={"seed": 1}, num_features=4, part=(1, 2), trainer={"num_workers": 2})
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_nothing_of_the_trainer_is_withheld() -> None:
    jobs = trainer.variants(settings("--torch_compile", device="cuda"))
    setups = [job.trainer for job in jobs.values() if job.kind == "train_hugging_face"]
    assert {} in setups
    best = [setup for setup in setups if setup]
    assert all(setup["dynamic_padding"] and setup["group_by_length"] for setup in best)
    assert any(setup.get("num_workers") for setup in best)
    assert any(setup.get("torch_compile") for setup in best)
    assert all(job.options["mixed_precision"] == "bf16" for job in jobs.values() if job.trainer)


def test_the_fastest_trainer_is_the_rival() -> None:
    def rate(*values: float) -> list[dict[str, Any]]:
        return [{"features_per_second": value} for value in values]

    measured = {
        trainer.TUTORIAL: rate(1, 2, 3),
        "Trainer, best options, model's dropout": rate(4, 4, 4),
        "Trainer, best options, 2 workers, model's dropout": rate(5, 5, 5),
        "Trainer, best options, no dropout": rate(6, 6, 6),
        "Trainer, best options, 2 workers, no dropout": [{"out_of_memory": True}] * 3,
        trainer.OURS: rate(10, 10, 10),
        trainer.OURS_NO_DROPOUT: rate(12, 12, 12),
    }
    assert trainer.headline(measured, trainer.OURS_NO_DROPOUT) == {
        "speedup_vs_tutorial_recipe": 6.0,
        "speedup_vs_tutorial_recipe_equal_dropout": 5.0,
        "speedup_vs_best_trainer": 12 / 5,
        "speedup_vs_best_trainer_equal_dropout": 2.0,
        "speedup_vs_best_trainer_no_dropout": 2.0,
    }


def test_scaling_measures_adapters_and_full_fine_tuning() -> None:
    planned = scaling.jobs(settings(), [1, 2])
    cells = ["1 process", "2 independent", "2 ranks, weak", "2 ranks, strong"]
    assert list(planned) == [*cells, *(f"full, {name}" for name in cells)]
    for name, jobs in planned.items():
        for job in jobs if isinstance(jobs, list) else [jobs]:
            assert job.options["tuning"] == ("full" if name.startswith("full") else "lora"), name
            parse([], prog="t", description="", groups=(), base={**job.options, "output_dir": "x"})


def test_efficiency_compares_within_each_repeat() -> None:
    def rate(*values: float) -> list[dict[str, Any]]:
        return [{"features_per_second": value} for value in values]

    measured = {
        "1 process": rate(10, 20),
        "2 independent": rate(16, 32),
        "2 ranks, weak": rate(15, 30),
        "2 ranks, strong": rate(14, 28),
    }
    found = scaling.efficiency(measured, 2)
    assert scaling.efficiency({f"full, {name}": each for name, each in measured.items()}, 2, "full, ") == found
    assert found["weak_over_independent"] == spread([15 / 16, 15 / 16])
    assert found["weak_over_one_process"]["median"] == 0.75
    assert scaling.headline([found]) == {
        "weak_scaling_efficiency": 15 / 16,
        "weak_scaling_vs_one_process": 0.75,
        "strong_scaling_efficiency": 0.7,
    }
    assert scaling.headline([]) == {}


# ------------------------------------------------------------------------------------------------------------ files


def trainer_section() -> dict[str, Any]:
    figure = {"median": 2.0, "min": 1.0, "max": 3.0}
    result = {
        "features_per_second": figure,
        "tokens_per_second": figure,
        "median_step_seconds": figure,
        "peak_memory_bytes": {"median": 2**30, "min": 2**30, "max": 2**30},
    }
    return {
        "headline": {"speedup_vs_tutorial_recipe": 4.25},
        "results": [{"name": "qa_dist, no dropout", **result}, {"name": "Trainer, tutorial", "out_of_memory": True}],
    }


def scaling_section() -> dict[str, Any]:
    values = {"median": 0.98, "min": 0.97, "max": 0.99}
    return {
        "headline": {"weak_scaling_efficiency": 0.98},
        "efficiency": [
            {
                "world_size": 2,
                "weak_over_independent": values,
                "weak_over_one_process": values,
                "strong_over_one_process": None,
            }
        ],
        "balance": [{"world_size": 2, "dealt": 1.003, "plain": 1.05}],
        "results": [
            {
                **trainer_section()["results"][0],
                "name": "2 ranks, weak",
                "phase_shares": {"data": 1.0},
                "exchanged_bytes_per_step": {"median": 9e7, "min": 9e7, "max": 9e7},
                "exchanged_bytes_per_second": {"median": 3.25e7, "min": 3e7, "max": 4e7},
                "exchanged_bytes_per_second_alone": {"median": 5e8, "min": 5e8, "max": 5e8},
            }
        ],
    }


def test_sections_of_several_commands_are_kept_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    asked = settings().to_json()
    report.merge(path, "scaling", scaling_section(), asked)
    report.merge(path, "trainer", {"headline": {"speedup_vs_tutorial_recipe": 1.0}, "results": []}, asked)
    written = report.merge(path, "trainer", trainer_section(), asked)
    assert written == report.read(path)
    assert list(written["sections"]) == ["trainer", "scaling"]
    assert written["headline"] == {"speedup_vs_tutorial_recipe": 4.25, "weak_scaling_efficiency": 0.98}
    assert {"machine", "versions", "commit"} <= set(written)
    assert {"machine", "versions", "commit", "settings", "finished"} <= set(written["sections"]["scaling"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99, "sections": {}}', '{"format": 1, "sections": 3}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"bench\.json"):
        report.read(path)


def test_the_page_shows_what_was_measured_and_says_what_was_not(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    report.merge(path, "trainer", trainer_section(), settings().to_json())
    report.merge(path, "scaling", scaling_section(), settings().to_json())
    page = tmp_path / "benchmarks.md"
    assert bench.main(["report", str(path), "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "4.25" in rows["`speedup_vs_tutorial_recipe`"]
    assert rows["`evaluation_speedup`"].count("not yet measured") == 2, "this machine and a CUDA one"
    assert "2.00 (1.00-3.00)" in rows["qa_dist, no dropout"]
    assert "out of memory" in rows["Trainer, tutorial"]
    assert "0.980 (0.970-0.990)" in text
    assert "| 2 ranks, weak | 90.0 | 32.5 (30.0-40.0) | 500.0 |" in text
    assert "Not yet measured." in text, "paths and evaluation"
    for name in report.HEADLINES:
        assert f"`{name}`" in rows


def test_the_page_marks_what_was_disturbed_and_what_is_unstable(tmp_path: Path) -> None:
    path, page = tmp_path / "bench.json", tmp_path / "benchmarks.md"
    section = trainer_section()
    section["headline"] = {"speedup_vs_tutorial_recipe": "unstable"}
    noted = [{"others_cores": cores, "disturbed": cores > 0.25} for cores in (0.03, 1.02, 0.4)]
    section["results"][0] |= {"num_disturbed": 2, "repeats": [{"neighbours": each} for each in noted]}
    report.merge(path, "trainer", section, settings().to_json())
    assert bench.main(["report", str(path), "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "| unstable |" in rows["`speedup_vs_tutorial_recipe`"]
    assert "2.00 (1.00-3.00)" in rows["qa_dist, no dropout \N{DAGGER}"]
    said = "Others used the machine meanwhile. qa_dist, no dropout: 2 of 3 repeats, up to 1.02 cores."
    assert f"\N{DAGGER} {said}" in text.splitlines()


def test_a_page_of_nothing_says_that_nothing_was_measured(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    assert bench.main(["report", "--output", str(page)]) == 0
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) == len(report.HEADLINES)
    assert all(row.count("not yet measured") == 2 for row in rows)


def test_a_page_replaces_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as the measurement that it is made of."""
    path = tmp_path / "bench.json"
    report.merge(path, "trainer", trainer_section(), settings().to_json())
    before = path.read_bytes()
    assert bench.main(["report", str(path), "--output", str(path)]) == 2
    assert f"--output {path} exists and is no such page; name another file" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_the_page_in_docs_is_what_its_measurements_generate(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    measured = sorted((docs / "benchmarks").glob("*.json"))
    assert measured
    page = tmp_path / "benchmarks.md"
    assert bench.main(["report", *map(str, measured), "--output", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == (docs / "benchmarks.md").read_text(encoding="utf-8"), "run: make docs"


def test_charts_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    charts = pytest.importorskip("qa_dist.benchmarking.charts")
    path = tmp_path / "bench.json"
    report.merge(path, "trainer", trainer_section(), settings().to_json())
    whole = report.merge(path, "scaling", scaling_section(), settings().to_json())
    assert charts.draw(whole, tmp_path) == ["trainer.png", "scaling.png"]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qa_dist.benchmarking.charts.find_spec", lambda name: None)
    assert bench.main(["trainer", "--output_dir", str(tmp_path)]) == 2
    assert "pip install 'qa-dist[bench]'" in capsys.readouterr().err


def test_headlines_are_finite_numbers_by_name() -> None:
    assert all(math.isfinite(value) for value in trainer_section()["headline"].values())
    assert set(trainer_section()["headline"]) <= set(report.HEADLINES)


REFUSED = {
    "nothing to measure": ([], "nothing cannot be measured"),
    "unknown command": (["speed"], "'speed' cannot be measured"),
    "a folder that takes no file": (["paths", "--output_dir", "/proc"], "--output_dir /proc cannot be used"),
    "no folder": (["paths"], "--output_dir is missing"),
    "unknown option": (["paths", "--output_dir", "x", "--repeat", "2"], "did you mean --repeats?"),
    "world size": (["scaling", "--output_dir", "x", "--num_processes", "1", "two"], "two"),
    "no world": (["scaling", "--output_dir", "x", "--num_processes", "0"], "--num_processes 0"),
    "precision": (["paths", "--output_dir", "x", "--precisions", "fp8"], "--precisions fp8"),
    "part of a step": (["paths", "--output_dir", "x", "--num_features", "17"], "no multiple"),
    "no repeats": (["paths", "--output_dir", "x", "--repeats", "0"], "at least 1"),
    "no such data": (["evaluation", "--output_dir", "x", "--validation_file", "nowhere.json"], "is no file"),
    "no such results": (["report", "nowhere.json", "--output", "x.md"], "is no bench.json"),
    "no page": (["report", "--output", "nowhere/x.md"], "--output nowhere/x.md cannot be written"),
    "no part of memory": (["memory"], "see qa_dist.bench memory --help"),
    "no measured memory": (["memory", "report", "nowhere.json", "--output", "x.md"], "holds no measured memory"),
    "no such combination": (["memory", "measure", "x.json", "half"], "'half' is no combination; name some of: lora;"),
    "no decoding": (["decoding", "--repeats", "0"], "at least 1"),
    "unknown option of a tool": (["decoding", "--thread", "2"], "did you mean --threads?"),
    "no steps": (["checkpoints", "--num_steps", "1"], "at least 2"),
    "a word that is no option": (["budgets", "all"], "all is not an option"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_end_with_code_2_and_a_sentence(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, message = REFUSED[case]
    assert bench.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
