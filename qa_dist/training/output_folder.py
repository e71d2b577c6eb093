"""The folder of a run: who may write there, and what an earlier run left in it."""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qa_dist.common.errors import ConfigError, LocalTrainingError
from qa_dist.common.files import hold, make_writable, remove, require_writable
from qa_dist.config.options import RunConfig
from qa_dist.config.recipe_files import write_config
from qa_dist.config.removed_options import removals
from qa_dist.model.calibration import FILE as CALIBRATION
from qa_dist.training.checkpoints import CHECKPOINTS, Checkpoint, newest_checkpoint, read_checkpoint

TIMINGS = "timings.jsonl"
"""The file with the time of every step, and the most tokens of a rank in it."""

FILES = (
    "run.json",
    "metrics.json",
    "predictions.json",
    "nbest.json",
    "null_odds.json",
    CALIBRATION,
    "metrics.jsonl",
    TIMINGS,
    "logits.npy",
    "adapter_model.safetensors",
    "adapter_config.json",
    "model.safetensors",
)
"""What marks a folder as holding results, and what an overwriting run removes first."""

_EVALUATED = ("metrics.json", "predictions.json", "nbest.json", "null_odds.json", CALIBRATION, "logits.npy")
"""What says something of the weights that a run ends with."""

FINAL_FILES = ("run.json", "adapter_model.safetensors", "model.safetensors")
"""What only a run that ended well leaves."""

BEST = "best"
"""The folder inside a run's folder with the best model so far."""

LAUNCHERS = ".launchers"
"""The file in a run's folder that names the launchers of its ranks; only those go on with it unasked."""


class OutputFolder:
    """The folder of a run, as rank 0 uses it: `open`, then `claim`, then `close`. Other ranks only know its name.

    Attributes:
        directory: the folder.
        looks_for_own: whether the run goes on from the newest checkpoint in the folder, if there is one.
        keeps_own: whether it does so: then it keeps what is there.
    """

    def __init__(self, directory: Path, launchers: Collection[str] = ()) -> None:
        """Name the folder; `launchers` are the names of the launchers that started this run's ranks."""
        self.directory = directory
        self.looks_for_own = self.keeps_own = False
        self._launchers = frozenset(launchers)
        self._lock: int | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.directory / CHECKPOINTS

    @property
    def results(self) -> list[str]:
        """Names of what an earlier run left in the folder."""
        return [name for name in (*FILES, CHECKPOINTS) if (self.directory / name).exists()]

    def open(self, config: RunConfig, notice: Callable[[str], object]) -> Checkpoint | None:
        """The checkpoint that the run goes on from, if any; no other run of this machine may have the folder now.

        Args:
            config: The run's options.
            notice: Hears which checkpoints were passed over, and why.

        Raises:
            CheckpointError: The checkpoint cannot be used.
            ConfigError: The folder holds results that may not be replaced, cannot be written to, or is another run's;
                or the checkpoint's run had an option that was taken out.
        """
        # First of all: a run that still has the folder may be about to write its last checkpoint.
        if self.directory.is_dir():
            self._lock = self._hold()
        try:
            checkpoint = self._find_checkpoint(config.training.resume_from_checkpoint, notice)
            make_writable(self.directory, "--output_dir")
            self._require_free(config)
            if self._lock is None:
                self._lock = self._hold()
        except BaseException:
            self.close()
            raise
        return checkpoint

    def look(self, config: RunConfig, notice: Callable[[str], object]) -> Checkpoint | None:
        """As `open`, with the same checks, but nothing is created, written or kept from others."""
        checkpoint = self._find_checkpoint(config.training.resume_from_checkpoint, notice)
        require_writable(self.directory, "--output_dir")
        self._require_free(config)
        if self.directory.exists():
            os.close(self._hold())
        return checkpoint

    def claim(self, config: RunConfig, *, version_2: bool) -> None:
        """Take the folder over: from here on it holds this run, and no longer an earlier one that may be replaced.

        Args:
            config: The run's options, kept in config.yaml as what repeats the run.
            version_2: Whether questions of the run's data may have no answer: what `auto` came to.

        Raises:
            ConfigError: Results of the earlier run cannot be removed, or files cannot be written.
        """
        data = dataclasses.replace(
            config.data, version_2_with_negative=version_2 or config.data.version_2_with_negative
        )
        # Where this process came in is no part of what the run is.
        training = dataclasses.replace(config.training, resume_from_checkpoint="no", overwrite_output_dir=False)
        with _usable(self.directory):
            if not self.keeps_own:
                self._clear()
            write_config(dataclasses.replace(config, data=data, training=training), self.directory / "config.yaml")
            if self._launchers:
                (self.directory / LAUNCHERS).write_text("\n".join(sorted(self._launchers)), encoding="utf-8")

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Turn what the file system refuses inside the block, after so many steps, into one sentence.

        Raises:
            LocalTrainingError: A result cannot be written.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise LocalTrainingError(
                f"what belongs to step {step} cannot be written to {self.directory}: {reason}; free some "
                "space or make the folder writable, and go on with --resume_from_checkpoint auto"
            ) from error

    def _earlier_launchers(self) -> list[str]:
        """Launchers of the ranks that last claimed the folder; none if they had none, or it cannot be read."""
        try:
            return (self.directory / LAUNCHERS).read_text(encoding="utf-8").splitlines()
        except OSError:
            return []

    def _find_checkpoint(self, wanted: str, notice: Callable[[str], object]) -> Checkpoint | None:
        # Ranks that their launcher starts again, after a failure or with other machines, go on by themselves.
        is_restart = not self._launchers.isdisjoint(self._earlier_launchers())
        self.looks_for_own = is_restart or wanted == "auto"
        if self.looks_for_own and (checkpoint := newest_checkpoint(self.checkpoints, notice)):
            self.keeps_own = True
            return _gone_on_with(checkpoint)
        if wanted in ("no", "auto"):
            return None
        # A checkpoint of another folder brings none of that folder's results along.
        self.keeps_own = Path(wanted).resolve().parent == self.checkpoints.resolve()
        return _gone_on_with(read_checkpoint(Path(wanted)))

    def _require_free(self, config: RunConfig) -> None:
        """Make sure that what the folder holds may be replaced or kept.

        A run that goes on from a checkpoint keeps what is there. One that looks for a checkpoint and finds none may
        clear what a run left that ended before its first checkpoint, but not the results of a finished run.
        """
        present = self.results
        is_finished = any((self.directory / name).exists() for name in FINAL_FILES)
        may_clear = self.looks_for_own and not is_finished
        if not self.keeps_own:
            own = {os.path.realpath(self.directory), os.path.realpath(self.directory / BEST)}
            for name in ("init_adapter", "model_name_or_path", "tokenizer_name"):
                value = getattr(config.model, name)
                if value is not None and os.path.isdir(value) and os.path.realpath(value) in own:
                    raise ConfigError(
                        [f"--{name} {value} is in --output_dir, which the run clears first; choose another folder"]
                    )
        if present and not (config.training.overwrite_output_dir or self.keeps_own or may_clear):
            raise ConfigError(
                [
                    f"--output_dir {self.directory} already holds results ({', '.join(present[:3])}); choose another "
                    "folder, pass --overwrite_output_dir, or go on with --resume_from_checkpoint auto"
                ]
            )

    def _hold(self) -> int:
        """A descriptor of the folder that keeps other runs out of it (see `hold`)."""
        held = f"another run is writing to --output_dir {self.directory}"
        return hold(self.directory, f"{held}; wait until it has ended, or choose another folder")

    def _clear(self) -> None:
        for name in (BEST, CHECKPOINTS, *FILES, LAUNCHERS):
            remove(self.directory / name)

    def clear_results(self, *, keeps_logits: bool) -> None:
        """Remove what an evaluation of other weights left: a run that goes on in its folder may not write all of it."""
        for name in _EVALUATED:
            if not (keeps_logits and name == "logits.npy"):
                (self.directory / name).unlink(missing_ok=True)


def _gone_on_with(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, unless its run was trained in a way that is no longer there.

    Raises:
        ConfigError: It was.
    """
    if problems := removals(checkpoint.identity):
        raise ConfigError([f"the checkpoint of step {checkpoint.step}: {problem}" for problem in problems])
    return checkpoint


@contextmanager
def _usable(directory: Path) -> Iterator[None]:
    """Turn what the file system refuses inside the block into one sentence."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            [f"--output_dir {directory} cannot be used: {error.strerror or error}; choose another folder"]
        ) from error
