"""Imported by the server that ranks are forked from: what libraries make when they are first used is made once for all.

A model is built and saved, without a backward pass: torch's threads for those do not outlive a fork.
"""

import gc
import tempfile
import threading
from functools import cache
from pathlib import Path

import jinja2
from tqdm import tqdm

from qa_dist.config.options import ModelConfig
from qa_dist.machine.environment import versions
from qa_dist.model.building import build_model
from qa_dist.model.saved import save_trained
from tests.tiny import tiny_model, tiny_tokenizer

# The template of a model's card, which each save would compile anew.
jinja2.Environment.compile = cache(jinja2.Environment.compile)  # type: ignore[method-assign]
versions()

# No thread that watches bars: it would not outlive a fork either.
interval, tqdm.monitor_interval = tqdm.monitor_interval, 0
with tempfile.TemporaryDirectory() as folder:
    config = ModelConfig(model_name_or_path=str(tiny_model("bert", Path(folder) / "bert", num_layers=1)))
    model, _ = build_model(config, seed=1, max_seq_length=64)
    (Path(folder) / "out").mkdir()
    save_trained(
        model, {name: weight.detach() for name, weight in model.trainable()}, tiny_tokenizer(), Path(folder) / "out"
    )
del model
tqdm.monitor_interval = interval
assert threading.active_count() == 1, threading.enumerate()

# What is there does not change any more: ranks need not look through it, and share its memory.
gc.collect()
gc.freeze()
