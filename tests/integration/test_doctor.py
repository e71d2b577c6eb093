"""The doctor on the machine that runs the tests."""

import json
from importlib.util import find_spec

import pytest

from tests.distributed.launching import run
from tests.support import forked_python

pytestmark = [pytest.mark.integration, pytest.mark.distributed]


def test_a_whole_examination() -> None:
    words = ["--launch", "--num_processes", "2", "--seconds", "0.1", "--json"]
    done = run(["python", "-m", "qa_dist.doctor", *words], **forked_python.variables())
    whole = json.loads(done.stdout)
    checks = {check["name"]: check for check in whole["checks"]}
    failures = [check for check in checks.values() if check["status"] == "failure"]
    assert done.returncode == bool(failures)
    assert all(check["remedy"] for check in checks.values() if check["status"] != "ok")
    expected = "python, CPU threads, gloo, address, bitsandbytes, deepspeed, output, feature store, temporary files"
    assert {*expected.split(", "), "shared memory", "open files", "locked memory", "hub"} <= checks.keys()
    assert checks["hub"]["status"] == "warning", "tests are offline"
    for name in ("bitsandbytes", "deepspeed"):
        assert checks[name]["status"] == ("ok" if find_spec(name) else "warning"), checks[name]
    if find_spec("bitsandbytes"):
        assert "an 8-bit layer and an 8-bit optimiser compute on" in checks["bitsandbytes"]["found"]
    assert (checks["gloo"]["status"], checks["gloo"]["found"]) == ("ok", "starts")
    assert whole["all_reduce"]["world_size"] == 2
    rates = whole["all_reduce"]["rates"]
    assert [rate["num_bytes"] for rate in rates] == [1 << 20, 1 << 24, 1 << 27]
    for rate in rates:
        assert rate["bus_bytes_per_second"] == pytest.approx(rate["num_bytes"] / rate["seconds"])
        assert checks[f"all-reduce {rate['num_bytes'] >> 20} MiB"]["status"] == "ok"
