"""Estimates beside the peaks of runs, in processes of their own."""

import json
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from qa_dist import estimate
from qa_dist.memory import estimate as parts
from tests.distributed.launching import succeed
from tests.tiny import tiny_squad, tiny_tokenizer

pytestmark = pytest.mark.integration

BATCH = 64
TOKENS = BATCH * 160


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose passes take more than the process does: few layers, and many tokens, which take seconds."""
    from transformers import BertConfig

    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    BertConfig(vocab_size=len(tokenizer), max_position_embeddings=160, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    """What a process holds without a model is the same for both, and is measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "process_bytes", cache(parts.process_bytes))
        yield


# Tensors of both are counted in test_traced_passes.py; of a process, one is enough.
MORE = {"full": ["--tuning", "full"]}
if os.environ.get("QA_DIST_THOROUGH") == "1":
    MORE["lora"] = ["--lora_target_modules", "all-linear"]


@pytest.mark.parametrize("more", MORE.values(), ids=MORE.keys())
def test_the_estimate_is_within_15_percent_of_the_measured_peak(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    options = ["--model_config", str(model), "--model_name_or_path", str(model), *more, "--padding", "max_length"]
    options += ["--max_seq_length", "160", "--doc_stride", "16", "--max_tokens_per_device", str(TOKENS)]
    options += ["--checkpointing_steps", "no"]
    data = ["--train_file", str(tiny_squad(tmp_path / "train.json", 2 * BATCH, seed=1, longest=100))]
    data += ["--store_dir", str(tmp_path / "store"), "--output_dir", str(tmp_path / "out"), "--disable_tqdm"]
    # A pass a step; the second step has the moments.
    steps = ["--global_batch_size", str(BATCH), "--max_train_steps", "2", "--eval_steps", "no"]
    # Otherwise glibc's heap keeps holes, and the resident set tells more about it than about tensors.
    command = [sys.executable, "-m", "qa_dist.train", *options, *data, *steps]
    succeed(command, MALLOC_MMAP_THRESHOLD_="131072", LD_PRELOAD="")
    (measured,) = json.loads((tmp_path / "out" / "run.json").read_text())["peak_memory_bytes_per_rank"]
    assert estimate.main([*options, "--strategy", "ddp", "--device", "cpu", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["estimates"]
    process = found["device_parts"]["process"]
    assert found["device_bytes"] > 2 * process, "the passes are what is looked at"
    assert found["device_bytes"] == pytest.approx(measured, rel=0.15)
