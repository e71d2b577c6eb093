"""From candidates to answers.

`decode` runs once, on the table of the whole data set, and chooses one answer per example: `gather` collects the
candidates of each example from its windows, `rank` makes n-best lists of them, `choose` picks an entry of each list.

Every order in this file is total, so that results depend on the logits alone: not on the batch a feature was in, on
the padding, or on the rank that computed it.

Shapes: N features of a data set, K candidates of a feature, C candidates of all features, E examples, A entries of all
n-best lists before they are cut (candidates and null answers), W entries of an n-best list.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qa_dist.common.arrays import Float32, Float64, Int32, Int64
from qa_dist.common.columns import aligned
from qa_dist.common.errors import ScoringError
from qa_dist.common.notebook import ShownAsText
from qa_dist.data.records import Prediction
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.features.table import FeatureMap

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class ExampleAnswer(ShownAsText):
    """The answer to one example.

    Attributes:
        id: the example's id.
        prediction: the answer chosen.
        nbest: the n-best list it was chosen from, best first, the null answer included where it was considered.
        null_odds: score of the null answer minus score of the best non-null answer; None without unanswerables.
    """

    id: str
    prediction: Prediction
    nbest: tuple[Prediction, ...]
    null_odds: float | None

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "score", "probability", "characters", "text")]
        for number, entry in enumerate(self.nbest, 1):
            place = "" if entry.start_char < 0 else f"{entry.start_char}-{entry.end_char}"
            text = repr(entry.text) if entry.text else "no answer"
            chosen = f"{text}  <- chosen" if entry is self.prediction else text
            rows.append((f"{number}", f"{entry.score:.3f}", f"{entry.probability:.4f}", place, chosen))
        return "\n".join([self.id, *aligned(rows, left=(4,))])


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """The answers to E examples: texts at once, n-best lists when asked for.

    A list of 20 predictions for each of 10,570 examples costs more to build than all the rest of decoding, and most
    callers want the texts alone.

    Attributes:
        example_ids: the ids, in the order of the examples.
        contexts: their contexts.
        texts: the answer chosen for each example; "" is no answer.
        chosen_E: the entry of the n-best list that was chosen.
        num_entries_E: number of entries of each n-best list.
        start_char_EW: int32; -1 for the null answer.
        end_char_EW: int32, exclusive; -1 for the null answer.
        score_EW: float32, descending, except that a null answer below the list stands at its end.
        probability_EW: float64: softmax of the scores of the list, by the temperature asked for; 0 beyond it.
        null_odds_E: float32, or None without unanswerables.
    """

    example_ids: Sequence[str]
    contexts: Sequence[str]
    texts: list[str]
    chosen_E: Int64
    num_entries_E: Int64
    start_char_EW: Int32
    end_char_EW: Int32
    score_EW: Float32
    probability_EW: Float64
    null_odds_E: Float32 | None

    def __repr__(self) -> str:
        return f"Answers({len(self)} examples)"

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> ExampleAnswer:
        if not 0 <= index < len(self):
            raise IndexError(f"no answer {index} among {len(self)}")
        nbest = tuple(self.nbest(index))
        return ExampleAnswer(
            id=self.example_ids[index],
            prediction=nbest[self.chosen_E[index]],
            nbest=nbest,
            null_odds=None if self.null_odds_E is None else float(self.null_odds_E[index]),
        )

    def __iter__(self) -> Iterator[ExampleAnswer]:
        return (self[index] for index in range(len(self)))

    def nbest(self, index: int) -> list[Prediction]:
        """The n-best list of an example, best first."""
        context = self.contexts[index]
        count = self.num_entries_E[index]
        return [
            Prediction(context[start:end] if start >= 0 else "", score, probability, start, end)
            for start, end, score, probability in zip(
                self.start_char_EW[index, :count].tolist(),
                self.end_char_EW[index, :count].tolist(),
                self.score_EW[index, :count].tolist(),
                self.probability_EW[index, :count].tolist(),
                strict=True,
            )
        ]

    def only(self, rows: Int64) -> "Answers":
        """The answers to some of the examples, by their places."""
        places = rows.tolist()
        return Answers(
            example_ids=[self.example_ids[row] for row in places],
            contexts=[self.contexts[row] for row in places],
            texts=[self.texts[row] for row in places],
            chosen_E=self.chosen_E[rows],
            num_entries_E=self.num_entries_E[rows],
            start_char_EW=self.start_char_EW[rows],
            end_char_EW=self.end_char_EW[rows],
            score_EW=self.score_EW[rows],
            probability_EW=self.probability_EW[rows],
            null_odds_E=None if self.null_odds_E is None else self.null_odds_E[rows],
        )

    def predictions(self) -> dict[str, str]:
        """The text of each example by id: the official predictions file."""
        return dict(zip(self.example_ids, self.texts, strict=True))

    def best_texts(self) -> dict[str, str]:
        """The text of the best entry of each n-best list that has one, whatever was chosen, by id; "" without any.

        What a threshold on the null odds decides about: the odds are those against this entry.
        """
        has_text_EW = self.end_char_EW > self.start_char_EW
        best = (np.arange(len(self)), has_text_EW.argmax(axis=1))
        start_char_E = np.where(has_text_EW[best], self.start_char_EW[best], np.int32(-1))
        return dict(zip(self.example_ids, _texts(self.contexts, start_char_E, self.end_char_EW[best]), strict=True))

    def null_odds(self) -> dict[str, float] | None:
        """The null odds of each example by id: the official scripts' no-answer file; None without unanswerables."""
        if self.null_odds_E is None:
            return None
        return dict(zip(self.example_ids, self.null_odds_E.tolist(), strict=True))


def decode(
    table: CandidateTable,
    features: FeatureMap,
    contexts: Sequence[str],
    example_ids: Sequence[str],
    *,
    n_best_size: int,
    version_2: bool,
    null_score_diff_threshold: float = 0.0,
    temperature: float = 1.0,
) -> Answers:
    """One answer per example, chosen from the candidates of all its windows.

    The candidates of an example are gathered, ranked into its n-best list, and one entry of the list is chosen. With
    candidates of the search "n_best" the texts are those of `postprocess_qa_predictions` of the Hugging Face examples,
    except where that code invents the answer "empty", takes a zero-width token at character 0 for the null answer,
    keeps white space at an end of a text, or (`n_best_size` 1) drops the best span from its list.

    Args:
        table: candidates; row i is feature i (`CandidateTable.ordered`).
        features: where the features come from.
        contexts: the context of each example.
        example_ids: the id of each example.
        n_best_size: length of the n-best list, at most the K of the table: more could miss a candidate.
        version_2: whether the null answer is a choice.
        null_score_diff_threshold: how much better than the best candidate the null answer must be.
        temperature: scores are divided by it before the softmax that gives probabilities; answers do not depend on it.

    Raises:
        ScoringError: table, features and examples do not belong together.
    """
    _check_parts(table, features, contexts, example_ids, n_best_size)
    entries = gather(table, features, contexts, example_ids, version_2=version_2)
    entry_EW = rank(entries, n_best_size, version_2=version_2)

    is_entry_EW = entry_EW >= 0
    score_EW = np.full(entry_EW.shape, -np.inf, np.float32)
    score_EW[is_entry_EW] = entries.score_A[entry_EW[is_entry_EW]]
    start_char_EW, end_char_EW = _characters(entries, entry_EW)

    chosen_E, null_odds_E = np.zeros(len(example_ids), np.int64), None
    if version_2:
        chosen_E, null_odds_E = choose(entries, entry_EW, end_char_EW > start_char_EW, null_score_diff_threshold)
    chosen = (np.arange(len(example_ids)), chosen_E)
    num_entries_E = is_entry_EW.sum(axis=1, dtype=np.int64)
    return Answers(
        example_ids=example_ids,
        contexts=contexts,
        texts=_texts(contexts, start_char_EW[chosen], end_char_EW[chosen]),
        chosen_E=chosen_E,
        num_entries_E=num_entries_E,
        start_char_EW=start_char_EW,
        end_char_EW=end_char_EW,
        score_EW=score_EW,
        probability_EW=softmax(score_EW, num_entries_E, temperature),
        null_odds_E=null_odds_E,
    )


class Entries(NamedTuple):
    """What n-best lists are made of: C candidates in the order (example, window, rank in the feature), and then nulls.

    Attributes:
        example_A: int64, the example of each entry.
        score_A: float32, start logit + end logit.
        feature_C: int64, the feature that a candidate lies in.
        start_char_C: int32, its first character in its context; no white space, unless it is nothing else.
        end_char_C: int32, one past its last.
        start_logit_C: float32.
        end_logit_C: float32.
        null_score_E: float32, the score of each example's null answer.
    """

    example_A: Int64
    score_A: Float32
    feature_C: Int64
    start_char_C: Int32
    end_char_C: Int32
    start_logit_C: Float32
    end_logit_C: Float32
    null_score_E: Float32

    @property
    def num_candidates(self) -> int:
        """C: entries from here on are null answers."""
        return len(self.feature_C)


def gather(
    table: CandidateTable, features: FeatureMap, contexts: Sequence[str], example_ids: Sequence[str], *, version_2: bool
) -> Entries:
    """The entries of all examples: their candidates, and their null answers where these are a choice.

    The null answer of an example scores the minimum over its windows of the summed logits of the "no answer" token,
    since each window has to agree that it holds no answer. With unanswerables (`version_2`) every example may choose
    it; without them, an example that has no candidate, such as one whose context has no tokens.

    Raises:
        ScoringError: a feature is of no example, an example has no feature, or a window occurs twice.
    """
    num_examples = len(example_ids)
    # Features in the order (example, window), which data sets usually have already.
    row_N = np.lexsort((features.window_N, features.example_index_N))
    example_N = features.example_index_N[row_N].astype(np.int64)
    _check_windows(example_N, features.window_N[row_N], example_ids)
    first_row_E = np.searchsorted(example_N, np.arange(num_examples))
    null_score_N = _add(table.null_start_logit_N, table.null_end_logit_N)[row_N]
    null_score_E = np.minimum.reduceat(null_score_N, first_row_E) if num_examples else null_score_N

    order_C, rank_C = np.nonzero(table.start_token_NK[row_N] >= 0)
    example_C, feature_C = example_N[order_C], row_N[order_C]
    start_logit_C, end_logit_C = table.start_logit_NK[feature_C, rank_C], table.end_logit_NK[feature_C, rank_C]
    start_char_C = features.start_chars(feature_C, table.start_token_NK[feature_C, rank_C])
    end_char_C = features.end_chars(feature_C, table.end_token_NK[feature_C, rank_C])
    _leave_blanks_out(contexts, example_C, start_char_C, end_char_C)
    has_null_choice_E = np.ones(num_examples, bool)
    if not version_2:
        has_null_choice_E[example_C] = False
    null_example = np.flatnonzero(has_null_choice_E)
    return Entries(
        example_A=np.concatenate([example_C, null_example]),
        score_A=np.concatenate([_add(start_logit_C, end_logit_C), null_score_E[null_example]]),
        feature_C=feature_C,
        start_char_C=start_char_C,
        end_char_C=end_char_C,
        start_logit_C=start_logit_C,
        end_logit_C=end_logit_C,
        null_score_E=null_score_E,
    )


def rank(entries: Entries, n_best_size: int, *, version_2: bool) -> Int64:
    """The n-best list of each example as places in `entries`, int64 [E, W], best first; -1 beyond its end.

    Entries are ordered by score, then window, then their order within the feature (see `searches`). A place that
    several windows hold is that of the window whose candidate there comes first; those of the others are left out. The
    null answer comes after candidates of equal score, and at the end if it is not among the best `n_best_size`.
    """
    num_examples = len(entries.null_score_E)
    # Stable: of equal scores, candidates keep their order and the null answer comes last.
    by_rank_A = np.argsort((entries.example_A << 32) - _ordered_bits(entries.score_A), kind="stable")
    by_rank_A = by_rank_A[~_is_repeated(entries, by_rank_A)]
    example_A = entries.example_A[by_rank_A]
    column_A = np.arange(len(by_rank_A)) - np.searchsorted(example_A, np.arange(num_examples))[example_A]
    is_kept_A = (column_A < n_best_size) | (by_rank_A >= entries.num_candidates)
    entry_EW = np.full((num_examples, n_best_size + int(version_2)), -1, np.int64)
    entry_EW[example_A[is_kept_A], np.minimum(column_A, n_best_size)[is_kept_A]] = by_rank_A[is_kept_A]
    return entry_EW


def _is_repeated(entries: Entries, by_rank_A: Int64) -> npt.NDArray[np.bool_]:
    """Whether entries, in their order, are candidates at a place that is another window's; bool [A].

    Those of one window at one place, as of the pieces of a character, all stay: a window has no others in their stead.
    """
    is_candidate_A = by_rank_A < entries.num_candidates
    candidate = by_rank_A[is_candidate_A]
    start_key = (entries.example_A[candidate] << 32) | entries.start_char_C[candidate]
    end_char = entries.end_char_C[candidate]
    # Stable: of one place, the first in the order of the entries comes first.
    by_place = np.lexsort((end_char, start_key))
    is_first = np.ones(len(by_place), bool)
    is_first[1:] = (np.diff(start_key[by_place]) != 0) | (np.diff(end_char[by_place]) != 0)
    feature = entries.feature_C[candidate[by_place]]
    is_of_other = feature != feature[is_first][np.cumsum(is_first) - 1]
    is_repeated_A = np.zeros(len(by_rank_A), bool)
    is_repeated_A[np.flatnonzero(is_candidate_A)[by_place[is_of_other]]] = True
    return is_repeated_A


def choose(
    entries: Entries, entry_EW: Int64, has_text_EW: npt.NDArray[np.bool_], threshold: float
) -> tuple[Int64, Float32]:
    """The entry of each n-best list that is the answer, int64 [E], and the null odds, float32 [E].

    Null odds are the score of the null answer minus the start logit minus the end logit of the best candidate with a
    text, in float32 from left to right; the null answer is chosen if they exceed the threshold. Where there is no such
    candidate it is chosen always, and the odds are the largest float32, so that files of them stay valid JSON.

    Args:
        entries: where the lists point to.
        entry_EW: the lists; the null answer is in each of them.
        has_text_EW: whether an entry is a candidate of one character or more.
        threshold: how much better than the best candidate the null answer must be.
    """
    best_E = has_text_EW.argmax(axis=1)
    has_text_E = has_text_EW.any(axis=1)
    best_candidate = entry_EW[np.flatnonzero(has_text_E), best_E[has_text_E]]
    with np.errstate(over="ignore", invalid="ignore"):
        odds = entries.null_score_E[has_text_E] - entries.start_logit_C[best_candidate]
        odds -= entries.end_logit_C[best_candidate]
    null_odds_E = np.full(len(entry_EW), _LARGEST, np.float32)
    null_odds_E[has_text_E] = np.nan_to_num(odds, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    null_column_E = (entry_EW >= entries.num_candidates).argmax(axis=1)
    return np.where((null_odds_E > threshold) | ~has_text_E, null_column_E, best_E), null_odds_E


def _check_parts(
    table: CandidateTable, features: FeatureMap, contexts: Sequence[str], example_ids: Sequence[str], n_best_size: int
) -> None:
    if not 1 <= n_best_size <= table.num_candidates:
        raise ScoringError(
            f"n_best_size is {n_best_size}, but {table.num_candidates} candidates of each feature were kept; "
            f"choose 1 to {table.num_candidates}, or keep more candidates."
        )
    if len(table) != len(features) or not np.array_equal(table.feature_index_N, np.arange(len(features))):
        raise ScoringError(
            f"the candidates are not those of features 0 .. {len(features) - 1} in this order; "
            "put them in order with CandidateTable.ordered first."
        )
    if len(contexts) != len(example_ids):
        raise ScoringError(f"{len(contexts)} contexts were given for {len(example_ids)} examples.")
    if len(set(example_ids)) != len(example_ids):
        raise ScoringError(f"{len(example_ids) - len(set(example_ids))} example ids occur more than once.")


def _check_windows(example_N: Int64, window_N: Int32, example_ids: Sequence[str]) -> None:
    """Checks features sorted by (example, window)."""
    if len(example_N) and not (example_N[0] >= 0 and example_N[-1] < len(example_ids)):
        raise ScoringError(
            f"features name the examples {example_N[0]} .. {example_N[-1]}, but there are {len(example_ids)} examples."
        )
    without = np.flatnonzero(np.bincount(example_N, minlength=len(example_ids)) == 0)
    if len(without):
        raise ScoringError(
            f"{len(without)} examples have no feature (first: {example_ids[without[0]]!r}); "
            "the features were made from other examples."
        )
    is_repeated = (example_N[1:] == example_N[:-1]) & (window_N[1:] == window_N[:-1])
    if is_repeated.any():
        first = int(np.flatnonzero(is_repeated)[0])
        raise ScoringError(
            f"window {window_N[first]} of example {example_ids[example_N[first]]!r} occurs more than once; "
            "every window has to be its own feature."
        )


def _characters(entries: Entries, entry_EW: Int64) -> tuple[Int32, Int32]:
    """First character of each entry of the n-best lists, and the one behind its last, int32 [E, W]; -1 without text."""
    is_span_EW = (entry_EW >= 0) & (entry_EW < entries.num_candidates)
    candidate = entry_EW[is_span_EW]
    start_char_EW = np.full(entry_EW.shape, -1, np.int32)
    end_char_EW = np.full(entry_EW.shape, -1, np.int32)
    start_char_EW[is_span_EW] = entries.start_char_C[candidate]
    end_char_EW[is_span_EW] = entries.end_char_C[candidate]
    return start_char_EW, end_char_EW


def _leave_blanks_out(contexts: Sequence[str], example_C: Int64, start_char_C: Int32, end_char_C: Int32) -> None:
    """Move the ends of spans, in place, past white space: tokens may cover a line end, or stand at a blank."""
    for number, (example, start, end) in enumerate(
        zip(example_C.tolist(), start_char_C.tolist(), end_char_C.tolist(), strict=True)
    ):
        context = contexts[example]
        if start < end and (context[start].isspace() or context[end - 1].isspace()):
            text = context[start:end]
            start_char_C[number] = start = end - len(text.lstrip())
            end_char_C[number] = start + len(text.strip())


def _texts(contexts: Sequence[str], start_char_E: Int32, end_char_E: Int32) -> list[str]:
    places = zip(contexts, start_char_E.tolist(), end_char_E.tolist(), strict=True)
    return [context[start:end] if start >= 0 else "" for context, start, end in places]


def _add(start_logit: Float32, end_logit: Float32) -> Float32:
    # Sums beyond float32 become infinite, as in torch, and keep their order: no reason for a warning.
    with np.errstate(over="ignore"):
        return start_logit + end_logit


def _ordered_bits(score: Float32) -> Int64:
    """Integers in the order of the scores; see `searches._sort_keys`."""
    bits = (score + np.float32(0.0)).view(np.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)


def softmax(score_EW: Float32, num_entries_E: Int64, temperature: float = 1.0) -> Float64:
    """Softmax over the entries of each row, divided by a temperature, in float64; 0 beyond them."""
    is_entry_EW = np.arange(score_EW.shape[1]) < num_entries_E[:, None]
    finite_EW = np.clip(score_EW.astype(np.float64), -_LARGEST, _LARGEST)
    largest_E1 = np.where(is_entry_EW, finite_EW, -_LARGEST).max(axis=1, keepdims=True, initial=-_LARGEST)
    power_EW = np.where(is_entry_EW, np.exp((finite_EW - largest_E1) / temperature), 0.0)
    total_E1 = power_EW.sum(axis=1, keepdims=True)
    return np.asarray(power_EW / total_E1, dtype=np.float64)
