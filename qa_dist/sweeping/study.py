"""A study of optuna's: which points a search has tried, what came of them, and which one is next.

Sampler, pruner and storage are optuna's. What is added is that a search that was killed goes on as if it had not been:
each point is drawn with random numbers of its own number, which need no state, and a point that was not told its end is
taken up again.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qa_dist.common.errors import ConfigError, UserError
from qa_dist.common.hosts import host_name
from qa_dist.common.secrets import masked
from qa_dist.machine.requirements import require_package
from qa_dist.sweeping.space import PRUNERS, SAMPLERS, Choice, Parameter, Search

FILE = "study.db"
"""The study's file in the output folder, where no other storage is named."""

_ABOUT = "qa_dist"
_FOLDER = "qa_dist_output_dir"
_SEEDS = 2**32


@contextmanager
def _storage_asked() -> Iterator[None]:
    """Context, or decorator of what runs in it, in which the study's storage is asked or told something.

    Raises:
        UserError: It does not answer.
    """
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OptunaError, SQLAlchemyError, OSError) as error:
        reason = masked(str(error)).partition("\n")[0]
        raise UserError(
            f"the study's storage does not answer ({reason}); when it does again, the same command goes on"
        ) from error


class Proposal:
    """A point that the study proposes, and what it is told of it.

    Its methods raise a UserError where the storage does not answer.
    """

    def __init__(self, study: Any, trial: Any, parameters: Mapping[str, Parameter], reported: Iterable[int]) -> None:
        self._study = study
        self._trial = trial
        self.number: int = trial.number
        # One that was cut off while it was drawn is drawn to its end.
        self.point: dict[str, Any] = {name: _suggested(trial, name, each) for name, each in parameters.items()}
        self._reported = set(reported)

    def is_reported(self, step: int) -> bool:
        """Whether the study knows the score after so many steps."""
        return step in self._reported

    @_storage_asked()
    def report(self, step: int, score: float) -> None:
        """Tell the score after so many steps."""
        if step not in self._reported:
            self._trial.report(score, step)
            self._reported.add(step)

    @_storage_asked()
    def is_to_stop(self) -> bool:
        """Whether the pruner, after the last report, wants no more of it."""
        return bool(self._trial.should_prune())

    @_storage_asked()
    def complete(self, score: float) -> None:
        """Tell the score of its end."""
        self._study.tell(self._trial, score)

    def prune(self) -> None:
        """Tell that it goes no further."""
        self._tell("PRUNED")

    def fail(self) -> None:
        """Tell that it has no score."""
        self._tell("FAIL")

    @_storage_asked()
    def _tell(self, state: str) -> None:
        import optuna

        self._study.tell(self._trial, state=optuna.trial.TrialState[state])


class Study:
    """The study of a search, made or resumed."""

    def __init__(self, search: Search, folder: Path, about: Mapping[str, Any], *, first_rung: int | None) -> None:
        """Open it.

        Args:
            search: What is searched, and how.
            folder: The output folder, for a study that has no other storage.
            about: What must be the same whenever the study is resumed; `metric` among it.
            first_rung: Steps of the first rung, where hyperband starts to look; None: there are no rungs.

        Raises:
            ConfigError: optuna is missing, or cannot be used as the sweep file says.
            UserError: The storage cannot be used, or holds a study of another search under this name.
        """
        require_package("optuna", "a sweep file with a search")
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._search = search
        folder.mkdir(parents=True, exist_ok=True)
        arguments = dict(search.pruner.arguments)
        if search.pruner.name in ("halving", "hyperband") and first_rung is not None:
            arguments.setdefault("min_resource", first_rung)
        pruner = _made(optuna.pruners, PRUNERS, "pruner", search.pruner.name, arguments)
        self._sampler(0)
        storage = search.storage or f"sqlite:///{folder.resolve() / FILE}"
        try:
            self._study = optuna.create_study(
                storage=storage,
                study_name=search.study,
                pruner=pruner,
                direction="minimize" if about["metric"] == "loss" else "maximize",
                load_if_exists=True,
            )
            # As JSON gives it back.
            wanted = json.loads(json.dumps({**about, "parameters": search.described()["parameters"]}))
            found = self._study.user_attrs.get(_ABOUT)
            if found is None and not self._study.trials:
                self._study.set_user_attr(_ABOUT, wanted)
                found = wanted
        except (optuna.exceptions.OptunaError, SQLAlchemyError, ImportError, ValueError, OSError) as error:
            reason = masked(str(error)).partition("\n")[0]
            raise UserError(
                f"the study in {masked(storage)} cannot be used ({reason}); name another storage"
            ) from error
        if found != wanted:
            names = [name for name, value in wanted.items() if (found or {}).get(name) != value]
            raise UserError(
                f"the study {search.study} in {masked(storage)} is of a search with another {', '.join(names)}; choose "
                "another --output_dir, or another study, or change the sweep file back"
            )
        if search.storage:
            self._take_over(folder.resolve(), masked(storage))

    def _take_over(self, folder: Path, storage: str) -> None:
        """Note in a storage of its own which folder the study's trials are in.

        Machines may share the folder. One that was moved, and is gone where it was, is known on the machine that it was
        used on.

        Raises:
            UserError: They are in another one, where a command may be running them.
        """
        here = {"folder": str(folder), "host": host_name()}
        with _storage_asked():
            held = self._study.user_attrs.get(_FOLDER) or here
            is_elsewhere = held["host"] != here["host"] or Path(held["folder"]).is_dir()
            if held["folder"] != here["folder"] and is_elsewhere:
                raise UserError(
                    f"the study {self._search.study} in {storage} is that of the sweep in {held['folder']} on "
                    f"{held['host']}; go on with that --output_dir, or name another study"
                )
            self._study.set_user_attr(_FOLDER, here)

    def _sampler(self, number: int) -> Any:
        arguments = dict(self._search.sampler.arguments)
        seed = arguments.pop("seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < _SEEDS:
            raise ConfigError([f"the sampler's seed is {seed!r} and must be a whole number from 0 to {_SEEDS - 1:,}"])
        arguments["seed"] = (seed + 1_000_003 * number) % _SEEDS
        return _made(self._optuna.samplers, SAMPLERS, "sampler", self._search.sampler.name, arguments)

    @_storage_asked()
    def points(self) -> list[tuple[int, dict[str, Any], Proposal | None]]:
        """All points so far, in their order: number, values, and what is to be told of it if its end has not been.

        Raises:
            UserError: The storage does not answer.
        """
        found: list[tuple[int, dict[str, Any], Proposal | None]] = []
        for frozen in self._study.trials:
            if frozen.state.is_finished():
                point = {
                    name: each.values[frozen.params[name]] if isinstance(each, Choice) else frozen.params[name]
                    for name, each in self._search.parameters.items()
                    if name in frozen.params
                }
                found.append((frozen.number, point, None))
            else:
                self._study.sampler = self._sampler(frozen.number)
                # What `ask` returns; there is no other way to take up a trial that another process asked for.
                trial = self._optuna.trial.Trial(self._study, frozen._trial_id)
                proposal = Proposal(self._study, trial, self._search.parameters, frozen.intermediate_values)
                found.append((proposal.number, proposal.point, proposal))
        return found

    @_storage_asked()
    def ask(self) -> Proposal:
        """The next point.

        Raises:
            UserError: The storage does not answer.
        """
        self._study.sampler = self._sampler(len(self._study.trials))
        return Proposal(self._study, self._study.ask(), self._search.parameters, ())


def _suggested(trial: Any, name: str, parameter: Parameter) -> Any:
    if isinstance(parameter, Choice):
        return parameter.values[trial.suggest_categorical(name, list(parameter.values))]
    suggest = trial.suggest_int if parameter.is_whole else trial.suggest_float
    step = {} if parameter.step is None else {"step": parameter.step}
    return suggest(name, parameter.low, parameter.high, log=parameter.log, **step)


def _made(module: Any, names: Mapping[str, str], key: str, name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        return getattr(module, names[name])(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"the {key} {name} cannot be used with what the sweep file gives it: {error}"]) from error
