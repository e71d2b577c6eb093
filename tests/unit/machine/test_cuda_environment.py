"""What CUDA finds in the environment when it starts."""

import pytest

from qa_dist.common.errors import ConfigError
from qa_dist.machine.cuda_environment import prepare_cuda


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "roundup_power2_divisions:4"}, None),
    ],
)
def test_segments_may_grow_unless_the_user_says_otherwise(found: dict[str, str], wanted: dict[str, str] | None) -> None:
    environment = dict(found)
    prepare_cuda(environment, deterministic=False)
    assert environment == (found if wanted is None else wanted)


def test_determinism_sets_a_workspace_of_cublas_or_refuses_the_users() -> None:
    environment: dict[str, str] = {}
    prepare_cuda(environment, deterministic=True)
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    prepare_cuda(environment, deterministic=True)
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"
    with pytest.raises(ConfigError, match=r"needs CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8 and .* has :0:0"):
        prepare_cuda(environment, deterministic=True)
