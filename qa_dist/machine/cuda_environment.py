"""What CUDA reads from the environment when it starts, and never again; torch need not be imported before."""

from collections.abc import MutableMapping

from qa_dist.common.errors import ConfigError

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where torch (2.9 and newer) reads how its caching allocator works; the second is the older name."""

_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS is deterministic (its manual, "Results Reproducibility")."""


def prepare_cuda(environment: MutableMapping[str, str], *, deterministic: bool) -> None:
    """Set what CUDA is to find in the environment, and leave what the user has set there.

    Rows have another length in every step, so that segments of fixed sizes would be left with holes: the allocator is
    asked for segments that grow.

    Args:
        environment: This process's variables.
        deterministic: Whether a product must give the same bits in every run.

    Raises:
        ConfigError: The user asks for both determinism and a workspace that rules it out.
    """
    if not any(name in environment for name in _ALLOCATOR):
        environment[_ALLOCATOR[0]] = "expandable_segments:True"
    if deterministic:
        workspace = environment.setdefault("CUBLAS_WORKSPACE_CONFIG", _DETERMINISTIC_WORKSPACES[0])
        if workspace not in _DETERMINISTIC_WORKSPACES:
            raise ConfigError(
                [
                    f"--deterministic needs CUBLAS_WORKSPACE_CONFIG to be {' or '.join(_DETERMINISTIC_WORKSPACES)} and "
                    f"the environment has {workspace}; unset it"
                ]
            )
