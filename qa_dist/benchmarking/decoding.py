"""Seconds of decoding and scoring a data set of SQuAD's size, beside the nested loops of the usual recipe.

    python -m qa_dist.bench decoding

Synthetic logits (normal, with one raised answer per feature) for features with the lengths of SQuAD v1.1 dev at
384/128: 10,784 features of 10,570 examples. Prints JSON: seconds of each stage, the best of several repeats. The loops
of `qa_dist.benchmarking.nested_loops` run on part of the features, and their time is scaled up.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from qa_dist.benchmarking import neighbours
from qa_dist.benchmarking.nested_loops import nested_loop_answers, nested_loop_scores
from qa_dist.config.options import option
from qa_dist.config.parsing import parse
from qa_dist.evaluation.answers import Answers, decode
from qa_dist.evaluation.candidates import CandidateTable
from qa_dist.evaluation.scoring import score_v1
from qa_dist.evaluation.searches import SEARCHES
from qa_dist.evaluation.top_spans import pad_rows, top_spans
from qa_dist.features.table import FeatureMap

T = TypeVar("T")

NUM_EXAMPLES, NUM_EXTRA_WINDOWS = 10_570, 214
QUESTION_TOKENS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingConfig:
    """What is decoded, and how often."""

    n_best_size: int = option(20, "candidates kept per feature and answers per example", minimum=1, maximum=1000)
    max_answer_length: int = option(30, "longest answer, in tokens", minimum=1)
    max_length: int = option(384, "longest feature, in tokens", minimum=64, maximum=8192)
    chunk: int = option(256, "features whose candidates are found in one call of top_spans", minimum=1)
    repeats: int = option(5, "how often everything is measured; the shortest time counts", minimum=1)
    threads: int = option(1, "of torch; more help only on cores with nothing else to do", minimum=1)
    baseline_features: int = option(2000, "features that the loops run on", minimum=1)
    seed: int = option(0, "of the logits and lengths", minimum=0)


class Data:
    """Features with logits, flat as the model gives them, and contexts of words of four letters."""

    def __init__(self, seed: int, max_length: int) -> None:
        generator = np.random.default_rng(seed)
        # A log-normal of mean 171 and the spread of SQuAD's features.
        lengths = generator.lognormal(np.log(160), 0.36, NUM_EXAMPLES + NUM_EXTRA_WINDOWS)
        self.length_N = np.clip(lengths, QUESTION_TOKENS + 20, max_length).astype(np.int64)
        self.first_N = np.cumsum(self.length_N) - self.length_N
        extra = np.sort(generator.choice(NUM_EXAMPLES, NUM_EXTRA_WINDOWS, replace=False))
        example_N = np.sort(np.concatenate([np.arange(NUM_EXAMPLES), extra]))
        window_N = np.concatenate([[0], (example_N[1:] == example_N[:-1]).astype(int)])
        self.context_start_N = np.full(len(example_N), QUESTION_TOKENS + 2)
        self.context_end_N = self.length_N - 1
        num_context_N = self.context_end_N - self.context_start_N
        word_offsets = np.stack([np.arange(max_length) * 5, np.arange(max_length) * 5 + 4], axis=1)
        self.features = FeatureMap(
            example_index_N=example_N.astype(np.int32),
            window_N=window_N.astype(np.int32),
            context_start_N=self.context_start_N.astype(np.int32),
            context_offsets_T2=np.concatenate([word_offsets[:count] for count in num_context_N]).astype(np.int32),
            first_offset_N1=np.concatenate([[0], np.cumsum(num_context_N)]),
        )
        words = ["".join(letters) for letters in generator.choice(list("abcdefghij"), (500, 4))]
        self.contexts = [" ".join(row) for row in generator.choice(words, (NUM_EXAMPLES, max_length))]
        self.ids = [f"question-{i}" for i in range(NUM_EXAMPLES)]
        logits = generator.normal(size=(2, int(self.length_N.sum()))).astype(np.float32) * 3
        places = (
            self.first_N + self.context_start_N + (num_context_N * generator.random(len(example_N)) * 0.8).astype(int)
        )
        logits[0, places] += 8
        logits[1, places + generator.integers(0, 4, len(places))] += 8
        self.start_logits_T, self.end_logits_T = torch.from_numpy(logits)

    def references(self) -> dict[str, list[str]]:
        """Three reference answers per question, two of them the same, as in SQuAD dev."""
        return {
            key: [words := " ".join(context.split()[5:8]), words, " ".join(context.split()[5:9])]
            for key, context in zip(self.ids, self.contexts, strict=True)
        }

    def candidates(self, search: str, num_candidates: int, max_answer_length: int, chunk: int) -> CandidateTable:
        """Candidates of all features, features of similar length together."""
        order = np.argsort(self.length_N, kind="stable")
        tables = []
        for begin in range(0, len(order), chunk):
            rows = order[begin : begin + chunk]
            lengths_B = torch.from_numpy(self.length_N[rows])
            # The rows of a batch side by side, as the model gives them.
            flat = np.repeat(
                self.first_N[rows] - np.cumsum(self.length_N[rows]) + self.length_N[rows], self.length_N[rows]
            )
            flat_T = torch.from_numpy(flat + np.arange(len(flat)))
            table = top_spans(
                rows,
                pad_rows(self.start_logits_T[flat_T], lengths_B),
                pad_rows(self.end_logits_T[flat_T], lengths_B),
                torch.from_numpy(self.context_start_N[rows]),
                torch.from_numpy(self.context_end_N[rows]),
                torch.zeros(len(rows), dtype=torch.int64),
                lengths_B,
                num_candidates=num_candidates,
                max_answer_length=max_answer_length,
                search=search,
            )
            tables.append(table)
        return CandidateTable.concatenate(tables).ordered(len(order))


def main(argv: Sequence[str], prog: str) -> int:
    """Measure, and print JSON."""
    _, options = parse(argv, prog=prog, description=__doc__ or "", groups=(), entry=DecodingConfig)
    torch.set_num_threads(options.threads)
    data = Data(options.seed, options.max_length)
    report: dict[str, Any] = {
        "num_features": len(data.length_N),
        "num_examples": NUM_EXAMPLES,
        "mean_tokens": round(float(data.length_N.mean()), 1),
        **asdict(options),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    before = neighbours.read_machine()
    answers = {}
    for search in SEARCHES:
        report[search], answers[search] = time_decoding(data, search, options)
    report["both_modes_seconds"] = round(sum(sum(report[search].values()) for search in SEARCHES), 4)
    references = data.references()
    predictions = answers["n_best"].predictions()
    score_seconds, _ = best_seconds(options.repeats, lambda: score_v1(references, predictions))
    report["score_seconds"] = round(score_seconds, 4)
    report["loops"] = time_loops(data, references, options)
    ours = sum(report["n_best"].values()) + score_seconds
    report["neighbours"] = neighbours.describe(before, neighbours.read_machine())
    neighbours.warn(report["neighbours"])
    report["speedup_n_best_with_scoring"] = round(sum(report["loops"].values()) / ours, 1)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


def time_decoding(data: Data, search: str, options: DecodingConfig) -> tuple[dict[str, float], Answers]:
    """Seconds of finding candidates and of choosing answers, and the answers."""
    candidate_seconds, table = best_seconds(
        options.repeats,
        lambda: data.candidates(search, options.n_best_size, options.max_answer_length, options.chunk),
    )
    decode_seconds, answers = best_seconds(
        options.repeats,
        lambda: decode(table, data.features, data.contexts, data.ids, n_best_size=options.n_best_size, version_2=True),
    )
    return {"top_spans_seconds": round(candidate_seconds, 4), "decode_seconds": round(decode_seconds, 4)}, answers


def time_loops(data: Data, references: Mapping[str, Sequence[str]], options: DecodingConfig) -> dict[str, float]:
    """Seconds that the nested loops would take for all features, from a run over some."""
    num_features = len(data.length_N)
    count = min(options.baseline_features, num_features)
    decode_seconds, texts = best_seconds(
        1, lambda: looped_texts(data, count, options.n_best_size, options.max_answer_length)
    )
    score_seconds, _ = best_seconds(1, lambda: nested_loop_scores(references, texts))
    return {
        "decode_seconds": round(decode_seconds * num_features / count, 3),
        "score_seconds": round(score_seconds * num_features / count, 3),
    }


def looped_texts(data: Data, num_features: int, n_best_size: int, max_answer_length: int) -> dict[str, str]:
    """The answers by loops over examples, windows, starts and ends."""
    offsets: list[Any] = []
    for i in range(num_features):
        tokens = slice(data.features.first_offset_N1[i], data.features.first_offset_N1[i + 1])
        offsets.append(
            [None] * int(data.context_start_N[i]) + data.features.context_offsets_T2[tokens].tolist() + [None]
        )
    parts = [slice(first, first + length) for first, length in zip(data.first_N, data.length_N, strict=True)]
    return nested_loop_answers(
        data.ids,
        data.contexts,
        data.features.example_index_N[:num_features].tolist(),
        offsets,
        [data.start_logits_T[part].numpy() for part in parts[:num_features]],
        [data.end_logits_T[part].numpy() for part in parts[:num_features]],
        n_best_size=n_best_size,
        max_answer_length=max_answer_length,
    )


def best_seconds(repeats: int, act: Callable[[], T]) -> tuple[float, T]:
    """Shortest wall time of several calls, and the result of the last."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = act()
        seconds.append(time.perf_counter() - began)
    return min(seconds), result
