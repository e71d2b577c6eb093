"""What a token costs at different budgets."""

import json
from pathlib import Path

import pytest
import torch

from qa_dist import bench
from tests.tiny import tiny_model


def test_a_token_is_timed_at_every_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    model = str(tiny_model("bert", tmp_path))
    capsys.readouterr()
    words = ["--model_name_or_path", model, "--max_length", "64", "--num_batches", "2"]
    assert bench.main(["budgets", *words]) == 0
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert found["training_ms_per_token"].keys() == {"4096", "2048", "1024", "512"}
    assert found["forward_ms_per_token"].keys() == {"8192", "4096", "2048", "1024", "512"}
    assert min(*found["training_ms_per_token"].values(), *found["forward_ms_per_token"].values()) > 0
