"""A model on the hub: all its files in one commit, or none."""

from collections.abc import Iterator, Sequence
from typing import Any

from qa_dist import __version__
from qa_dist.common.errors import UserError
from qa_dist.common.libraries import hub_bars_at_terminals, logs_held_back, reason
from qa_dist.reporting.publication import File


def upload(files: Sequence[File], repo_id: str, *, private: bool) -> str:
    """Publish files; returns the address of the commit.

    The repository is made if there is none; files of these names are replaced and others stay. Weights are sent first,
    and one commit then makes everything visible: a repository without it is as it was. A second try sends what the hub
    has not got.

    Args:
        files: What is published.
        repo_id: Where.
        private: Whether the repository is to be private.

    Raises:
        UserError: There is no token, the hub refuses it, cannot be reached or takes no files, or the repository is
            there and not private.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    token = get_token()
    if token is None:
        raise UserError("there is no access token for the hub; set HF_TOKEN, or log in with: hf auth login")
    api = HfApi(token=token, library_name="qa-dist", library_version=__version__)
    may_be_done = False
    try:
        with logs_held_back("huggingface_hub"), hub_bars_at_terminals():
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.repo_info(repo_id).private:
                raise UserError(
                    f"{repo_id} is there already and is not private; make it so in its settings, or leave --private out"
                )
            operations = [
                CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
                for file in files
            ]
            api.preupload_lfs_files(repo_id, operations, free_memory=False)
            may_be_done = True
            commit = api.create_commit(repo_id, operations, commit_message="Published with qa-dist")
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen unrelated types, some of them around others
        sentence = _refusal(error, repo_id, api.endpoint, may_be_done=may_be_done)
        raise UserError(sentence.replace(token, "***")) from error
    return str(commit.commit_url)


def _refusal(error: Exception, repo_id: str, endpoint: str, *, may_be_done: bool) -> str:
    """The sentence to show for what the hub or the way to it refused.

    Args:
        error: What the library raised.
        repo_id: Where files were to go.
        endpoint: The hub.
        may_be_done: Whether the commit was asked for: where its answer is lost, it may have been made.
    """
    status = _status(error)
    undone = "nothing was published"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return f"HF_HUB_OFFLINE keeps this from the hub, so {undone}; unset it"
    if status == 401:
        return (
            f"{endpoint} refused the access token, so {undone}; make a new one with the right to write, and set "
            "HF_TOKEN or log in with: hf auth login"
        )
    if status in (403, 404):
        return (
            f"the access token has no right to write to {repo_id} ({status}), so {undone}; give it that right, or "
            "choose another --repo_id"
        )
    what = f"publishing to {endpoint} failed" if status is None else f"{endpoint} answered {status}"
    if may_be_done and (status is None or status >= 500):
        undone = f"either all files were published or none: look at {endpoint}/{repo_id}"
    return f"{what} ({reason(_origin(error))}), so {undone}; try again: what has arrived is not sent twice"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: Exception) -> int | None:
    """The HTTP status that an error is about; None if nothing answered."""
    for each in _chain(error):
        response: Any = getattr(each, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _origin(error: Exception) -> BaseException:
    return list(_chain(error))[-1]
