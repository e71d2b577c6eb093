"""From logits to candidate spans, and from candidate spans to answers.

`top_spans` runs where the logits are, on every rank, and keeps K candidates per feature. `CandidateTable` carries them
between ranks. `decode` runs once, on the table of the whole data set, and chooses one answer per example.

Every order in this file is total, so that results depend on the logits alone: not on the batch a feature was in, on
the padding, or on the rank that computed it.

Shapes: B features of a batch, N features of a data set, L tokens of a feature (padded), T tokens of all features,
K candidates of a feature, M longest answer, E examples, W entries of an n-best list.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qa_dist.common.errors import ScoringError
from qa_dist.data.records import Prediction
from qa_dist.evaluation.candidates import CandidateTable, Float32, Float64, Int32, Int64
from qa_dist.features.store import FeatureMap

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class ExampleAnswer:
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
        probability_EW: float64: softmax of the scores of the list; 0 beyond it.
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

    def predictions(self) -> dict[str, str]:
        """The text of each example by id: the official predictions file."""
        return dict(zip(self.example_ids, self.texts, strict=True))

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
) -> Answers:
    """One answer per example, chosen from the candidates of all its windows.

    Candidates are ordered by score, then window, then their order within the feature (see `top_spans`); the best
    `n_best_size` make the n-best list. With candidates of mode "n_best" the texts are those of
    `postprocess_qa_predictions` of the Hugging Face examples, except where that code invents the answer "empty", takes
    a zero-width token at character 0 for the null answer, or (`n_best_size` 1) drops the best span from its list.

    Without unanswerables (`version_2` false) the answer is the best candidate. An example without any, such as one
    whose context has no tokens, gets the null answer: text "", characters -1.

    With unanswerables the null answer of an example scores the minimum over its windows of the summed logits of the
    "no answer" token, since each window has to agree that it holds no answer. It joins the n-best list after
    candidates of equal score, and at the end if it is not among the best. Null odds are its score minus the start
    logit minus the end logit of the best candidate with a text, in float32 from left to right; the null answer is
    chosen if they exceed `null_score_diff_threshold`. Where there is no such candidate it is chosen always, and the
    odds are the largest float32, so that files of them stay valid JSON.

    Args:
        table: candidates; row i is feature i (`CandidateTable.ordered`).
        features: where the features come from.
        contexts: the context of each example.
        example_ids: the id of each example.
        n_best_size: length of the n-best list, at most the K of the table: more could miss a candidate.
        version_2: whether the null answer is a choice.
        null_score_diff_threshold: how much better than the best candidate the null answer must be.

    Raises:
        ScoringError: table, features and examples do not belong together.
    """
    num_examples = len(example_ids)
    _check_parts(table, features, contexts, example_ids, n_best_size)

    # Features in the order (example, window), which data sets usually have already.
    row_N = np.lexsort((features.window_N, features.example_index_N))
    example_N = features.example_index_N[row_N].astype(np.int64)
    _check_windows(example_N, features.window_N[row_N], example_ids)
    first_row_E = np.searchsorted(example_N, np.arange(num_examples))

    null_score_N = _add(table.null_start_logit_N, table.null_end_logit_N)[row_N]
    null_score_E = np.minimum.reduceat(null_score_N, first_row_E) if num_examples else null_score_N

    # All entries flat: candidates in the order (example, window, rank), then null answers.
    start_token_NK = table.start_token_NK[row_N]
    order_C, rank_C = np.nonzero(start_token_NK >= 0)
    feature_C = row_N[order_C]
    start_logit_C, end_logit_C = table.start_logit_NK[feature_C, rank_C], table.end_logit_NK[feature_C, rank_C]
    candidate_example_C = example_N[order_C]
    is_null_choice_E = np.ones(num_examples, bool)
    if not version_2:
        is_null_choice_E[candidate_example_C] = False
    null_example = np.flatnonzero(is_null_choice_E)

    num_candidates = len(order_C)
    example = np.concatenate([candidate_example_C, null_example])
    score = np.concatenate([_add(start_logit_C, end_logit_C), null_score_E[null_example]])
    # Stable: of equal scores, candidates keep their order and the null answer comes last.
    by_rank = np.argsort((example << 32) - _ordered_bits(score), kind="stable")
    example_F = example[by_rank]
    is_null_F = by_rank >= num_candidates
    column_F = np.arange(len(by_rank)) - np.searchsorted(example_F, np.arange(num_examples))[example_F]
    keep_F = (column_F < n_best_size) | is_null_F
    column_F = np.minimum(column_F, n_best_size)

    width = n_best_size + int(version_2)
    start_char_EW = np.full((num_examples, width), -1, np.int32)
    end_char_EW = np.full((num_examples, width), -1, np.int32)
    score_EW = np.full((num_examples, width), -np.inf, np.float32)
    num_entries_E = np.bincount(example_F[keep_F], minlength=num_examples)
    score_EW[example_F[keep_F], column_F[keep_F]] = score[by_rank[keep_F]]

    is_span_F = keep_F & ~is_null_F
    candidate = by_rank[is_span_F]
    place = (example_F[is_span_F], column_F[is_span_F])
    feature, rank = feature_C[candidate], rank_C[candidate]
    start_char_EW[place] = features.start_chars(feature, table.start_token_NK[feature, rank])
    end_char_EW[place] = features.end_chars(feature, table.end_token_NK[feature, rank])

    chosen_E = np.zeros(num_examples, np.int64)
    null_odds_E = None
    if version_2:
        candidate_EW = np.zeros((num_examples, width), np.int64)
        candidate_EW[place] = candidate
        has_text_EW = end_char_EW > start_char_EW
        best_E = has_text_EW.argmax(axis=1)
        has_text_E = has_text_EW.any(axis=1)
        best_candidate = candidate_EW[np.flatnonzero(has_text_E), best_E[has_text_E]]
        with np.errstate(over="ignore", invalid="ignore"):
            odds = null_score_E[has_text_E] - start_logit_C[best_candidate] - end_logit_C[best_candidate]
        null_odds_E = np.full(num_examples, _LARGEST, np.float32)
        null_odds_E[has_text_E] = np.nan_to_num(odds, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
        null_column_E = np.zeros(num_examples, np.int64)
        null_column_E[example_F[is_null_F]] = column_F[is_null_F]
        chosen_E = np.where((null_odds_E > null_score_diff_threshold) | ~has_text_E, null_column_E, best_E)

    each_E = np.arange(num_examples)
    texts = [
        context[start:end] if start >= 0 else ""
        for context, start, end in zip(
            contexts, start_char_EW[each_E, chosen_E].tolist(), end_char_EW[each_E, chosen_E].tolist(), strict=True
        )
    ]
    return Answers(
        example_ids=example_ids,
        contexts=contexts,
        texts=texts,
        chosen_E=chosen_E,
        num_entries_E=num_entries_E,
        start_char_EW=start_char_EW,
        end_char_EW=end_char_EW,
        score_EW=score_EW,
        probability_EW=_softmax(score_EW, num_entries_E),
        null_odds_E=null_odds_E,
    )


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


def _add(start_logit: Float32, end_logit: Float32) -> Float32:
    # Sums beyond float32 become infinite, as in torch, and keep their order: no reason for a warning.
    with np.errstate(over="ignore"):
        return start_logit + end_logit


def _ordered_bits(score: Float32) -> Int64:
    """Integers in the order of the scores; see `searches._sort_keys`."""
    bits = (score + np.float32(0.0)).view(np.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)


def _softmax(score_EW: Float32, num_entries_E: Int64) -> Float64:
    """Softmax over the entries of each row, in float64; 0 beyond them."""
    is_entry_EW = np.arange(score_EW.shape[1]) < num_entries_E[:, None]
    finite_EW = np.clip(score_EW.astype(np.float64), -_LARGEST, _LARGEST)
    largest_E1 = np.where(is_entry_EW, finite_EW, -_LARGEST).max(axis=1, keepdims=True, initial=-_LARGEST)
    power_EW = np.where(is_entry_EW, np.exp(finite_EW - largest_E1), 0.0)
    total_E1 = power_EW.sum(axis=1, keepdims=True)
    return np.asarray(power_EW / total_E1, dtype=np.float64)
