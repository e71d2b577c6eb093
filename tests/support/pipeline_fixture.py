"""What the question-answering pipeline of transformers 4.57 answers, kept in tests/fixtures/pipeline_4_57.json.

It was made once, in an environment with transformers 4.57 and torch alone, from the folder that `make_model` writes:

    python tests/support/pipeline_fixture.py MODEL dev-v1.1.json.gz pipeline_4_57.json

Questions of SQuAD stand in it by their ids, with the places and scores of the answers, and without any text.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

EVERY = 35
"""Every so manieth question of SQuAD's dev set: 302 of them."""

LENGTHS = {"max_seq_len": 128, "doc_stride": 32}
CONTEXT = (
    "The amber basin, north of the cedar delta (1987), staged 3.50 harbour-side ember\n\tfairs; the fjord's grove and "
    "haven -- \u201cinlet\u201d -- lie at na\u00efve knoll ledge. Amber marsh, amber plain and the oasis of quarry "
    "ridge staging shoal thorn upland."
)
QUESTIONS = ("what follows amber ?", "Where is the grove?", "the the the")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 5},
    {"top_k": 3, "align_to_words": False},
    {"top_k": 80, "handle_impossible_answer": True},
    {"top_k": 4, "handle_impossible_answer": True, "max_answer_len": 1},
    {"top_k": 6, "max_answer_len": 40},
    {"top_k": 2, "max_seq_len": 48, "doc_stride": 8},
    {"top_k": 2, "max_seq_len": 64, "doc_stride": 0, "handle_impossible_answer": True},
)


def make_model(folder: Path) -> Path:
    """A random two-layer BERT whose weights depend on numpy's generator alone, with its tokenizer."""
    import numpy as np
    import torch
    from transformers import AutoModelForQuestionAnswering

    from tests.tiny import tiny_config, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    config = tiny_config("bert", len(tokenizer))
    # It reads letters, of which SQuAD's questions have many.
    config.max_position_embeddings = 384
    model = AutoModelForQuestionAnswering.from_config(config)
    rng = np.random.default_rng(12)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            drawn = torch.from_numpy(rng.normal(0, 0.3, tuple(weight.shape)).astype(np.float32))
            weight.copy_(drawn + 1 if "LayerNorm.weight" in name else drawn)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def squad_questions(path: Path) -> list[dict[str, str]]:
    """Id, question and context of some questions of a SQuAD file."""
    articles = json.loads(gzip.decompress(path.read_bytes()))["data"]
    questions = [
        {"id": entry["id"], "question": entry["question"], "context": paragraph["context"]}
        for article in articles
        for paragraph in article["paragraphs"]
        for entry in paragraph["qas"]
    ]
    return questions[::EVERY]


def own_answers(pipe: Any) -> list[list[list[Any]]]:
    """The answers to our own questions, for each set of options and each question."""
    return [
        [places(pipe(question=question, context=CONTEXT, **{**LENGTHS, **options})) for question in QUESTIONS]
        for options in OPTIONS
    ]


def squad_answers(pipe: Any, questions: list[dict[str, str]], **options: Any) -> dict[str, list[Any]]:
    """The answer to each question of SQuAD, by its id."""
    asked = {name: [entry[name] for entry in questions] for name in ("question", "context")}
    answers = pipe(**asked, **options)
    return {entry["id"]: places(answer)[0] for entry, answer in zip(questions, answers, strict=True)}


def places(answers: Any) -> list[Any]:
    """Start, end and score of each answer."""
    listed = answers if isinstance(answers, list) else [answers]
    return [[answer["start"], answer["end"], round(answer["score"], 7)] for answer in listed]


def main(model: str, squad: str, output: str) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    loaded = transformers.AutoModelForQuestionAnswering.from_pretrained(model)
    pipe = transformers.pipeline("question-answering", model=loaded, tokenizer=tokenizer, device="cpu")
    result = {
        "provenance": {
            "made by": "tests/support/pipeline_fixture.py",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "model": "make_model of that file: a random two-layer BERT, seed 12",
            "data": "SQuAD v1.1 dev, every 35th question (ids, places and scores only); our own text",
        },
        "own": own_answers(pipe),
        "squad": squad_answers(pipe, squad_questions(Path(squad))),
    }
    Path(output).write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
