"""Every combination that the rules allow trains, is saved and evaluated on two ranks; every other one is refused."""

import json
from pathlib import Path

import pytest

from qa_dist.compatibility import Combination, combinations
from tests.distributed.forking import start
from tests.distributed.test_strategies import launched
from tests.tiny import tiny_run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*tiny_run(tmp_path_factory.mktemp("compatibility")), "--disable_tqdm"]


def label(combination: Combination) -> str:
    return "-".join([combination.strategy, *(str(value) for value in combination.options.values())])


@pytest.mark.parametrize("combination", list(combinations()), ids=label)
def test_a_combination_trains_or_is_refused(combination: Combination, words: list[str], tmp_path: Path) -> None:
    if combination.strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    if combination.options["quantization"] != "no":
        pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")
    output = tmp_path / "out"
    options = [word for name, value in combination.options.items() for word in (f"--{name}", str(value).lower())]
    environment = {} if combination.strategy == "ddp" else launched(combination.strategy)
    # What is refused is refused by every rank; one is enough to see it.
    num_processes = 2 if combination.problem is None else 1
    arguments = [*words, *options, "--output_dir", str(output)]
    group = start(arguments, tmp_path / "log", num_processes=num_processes, environment=environment)
    codes = group.wait()
    if combination.problem is not None:
        assert codes == [2]
        assert combination.problem in group.text()
        assert not (output / "run.json").exists()
        return
    assert codes == [0, 0], group.text()[-4000:]
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (record["strategy"], record["world_size"], record["num_steps"]) == (combination.strategy, 2, 2)
    assert {"adapter_model.safetensors", "predictions.json"} <= {path.name for path in output.iterdir()}
