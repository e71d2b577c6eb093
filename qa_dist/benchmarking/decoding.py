"""Time decoding and scoring of a data set of SQuAD's size, beside the nested loops of the usual recipe.

    python benchmarks/decoding.py

Synthetic logits (normal, with one raised answer per feature) for features with the lengths of SQuAD v1.1 dev at
384/128: 10,784 features of 10,570 examples. Prints JSON: seconds of each stage, the best of several repeats. The loops
of `qa_dist.benchmarking.nested_loops` run on part of the features, and their time is scaled up.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qa_dist.benchmarking.nested_loops import nested_loop_answers, nested_loop_scores
from qa_dist.evaluation.answers import Answers, decode
from qa_dist.evaluation.candidates import MODES, CandidateTable, pad_rows, top_spans
from qa_dist.evaluation.scoring import score_v1
from qa_dist.features.store import FeatureMap

NUM_EXAMPLES, NUM_EXTRA_WINDOWS = 10_570, 214
QUESTION_TOKENS = 12


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

    def candidates(self, mode: Any, num_candidates: int, max_answer_length: int, chunk: int) -> CandidateTable:
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
            top = top_spans(
                pad_rows(self.start_logits_T[flat_T], lengths_B),
                pad_rows(self.end_logits_T[flat_T], lengths_B),
                torch.from_numpy(self.context_start_N[rows]),
                torch.from_numpy(self.context_end_N[rows]),
                torch.zeros(len(rows), dtype=torch.int64),
                num_candidates=num_candidates,
                max_answer_length=max_answer_length,
                mode=mode,
                lengths_B=lengths_B,
            )
            tables.append(top.to_table(rows))
        return CandidateTable.concatenate(tables).ordered(len(order))


def looped_texts(data: Data, num_features: int, n_best_size: int, max_answer_length: int) -> dict[str, str]:
    """The answers by loops over examples, windows, starts and ends."""
    offsets: list[Any] = []
    for i in range(num_features):
        own = slice(data.features.first_offset_N1[i], data.features.first_offset_N1[i + 1])
        offsets.append([None] * int(data.context_start_N[i]) + data.features.context_offsets_T2[own].tolist() + [None])
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


def best_seconds(repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Shortest wall time of several runs, and the result of the last."""
    seconds, result = [], None
    for _ in range(repeats):
        begin = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds), result


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its JSON."""
    parser = argparse.ArgumentParser(description="Time decoding and scoring against the usual nested loops.")
    parser.add_argument("--n_best_size", type=int, default=20)
    parser.add_argument("--max_answer_length", type=int, default=30)
    parser.add_argument("--max_length", type=int, default=384)
    parser.add_argument("--chunk", type=int, default=256, help="features per call of top_spans")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; more help only on cores with nothing else to do"
    )
    parser.add_argument("--baseline_features", type=int, default=2000, help="features that the loops run on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    data = Data(args.seed, args.max_length)
    num_features = len(data.length_N)
    report: dict[str, Any] = {
        "num_features": num_features,
        "num_examples": NUM_EXAMPLES,
        "mean_tokens": round(float(data.length_N.mean()), 1),
        **vars(args),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    total = 0.0
    answers: dict[str, Answers] = {}
    for mode in MODES:
        candidate_seconds, table = best_seconds(
            args.repeats,
            lambda mode=mode: data.candidates(mode, args.n_best_size, args.max_answer_length, args.chunk),
        )
        decode_seconds, answers[mode] = best_seconds(
            args.repeats,
            lambda table=table: decode(
                table, data.features, data.contexts, data.ids, n_best_size=args.n_best_size, version_2=True
            ),
        )
        report[mode] = {"top_spans_seconds": round(candidate_seconds, 4), "decode_seconds": round(decode_seconds, 4)}
        total += candidate_seconds + decode_seconds
    report["both_modes_seconds"] = round(total, 4)

    # Three reference answers per question, two of them the same, as in SQuAD dev.
    references = {
        key: [words := " ".join(context.split()[5:8]), words, " ".join(context.split()[5:9])]
        for key, context in zip(data.ids, data.contexts, strict=True)
    }
    predictions = answers["n_best"].predictions()
    score_seconds, _ = best_seconds(args.repeats, lambda: score_v1(references, predictions))
    report["score_seconds"] = round(score_seconds, 4)

    count = min(args.baseline_features, num_features)
    loop_seconds, texts = best_seconds(1, lambda: looped_texts(data, count, args.n_best_size, args.max_answer_length))
    loop_score_seconds, _ = best_seconds(1, lambda: nested_loop_scores(references, texts))
    loops = (loop_seconds + loop_score_seconds) * num_features / count
    ours = sum(report["n_best"].values()) + score_seconds
    report["loops"] = {
        "decode_seconds": round(loop_seconds * num_features / count, 3),
        "score_seconds": round(loop_score_seconds * num_features / count, 3),
    }
    report["speedup_n_best_with_scoring"] = round(loops / ours, 1)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
