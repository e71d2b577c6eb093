"""One way of answering questions, timed: what `bench answering` runs in a process, and an environment, of its own.

    python -P answering_sides.py SIDE MODEL QUESTIONS.JSON THREADS

prints JSON: seconds by the clock and of processors, the process's peak memory, and the answers. At the top nothing but
the standard library is imported, so that it runs where this project is not installed.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

WARM_UP = 8
LONGEST, WINDOW, STRIDE = 15, 384, 128
"""Tokens of an answer and of a window, and what windows share: the defaults of the pipeline, for all sides."""

Questions = Sequence[Mapping[str, str]]
Ask = Callable[[Questions], list[str]]


def reader(model: str) -> Ask:
    """`qa_dist.Reader`."""
    return _reader(model)


def exported_float32(model: str) -> Ask:
    """`qa_dist.Reader` on what `qa-dist export` wrote, in float32."""
    return _reader(model, quantized=False)


def exported_int8(model: str) -> Ask:
    """The same with weights of 8 bits."""
    return _reader(model, quantized=True)


def _reader(model: str, *, quantized: bool | None = None) -> Ask:
    import qa_dist

    opened = qa_dist.Reader(
        model,
        device="cpu",
        max_answer_length=LONGEST,
        answer_length_penalty=0.0,
        max_seq_length=WINDOW,
        doc_stride=STRIDE,
        allow_no_answer=False,
        quantized=quantized,
        # An exported model would take all cores; torch has read the variable by itself.
        num_threads=None if quantized is None else int(os.environ["OMP_NUM_THREADS"]),
    )
    return lambda questions: [answer.text for _, answer in opened.answer_many(questions)]  # type: ignore[union-attr]


def registered(model: str) -> Ask:
    """The pipeline that `qa_dist.register_pipeline` makes."""
    import qa_dist

    qa_dist.register_pipeline()
    return pipeline(model)


def pipeline(model: str) -> Ask:
    """The pipeline of transformers 4."""
    import transformers

    pipe: Any = transformers.pipeline(
        "question-answering",
        model=model,
        tokenizer=_tokenizer(model),
        device="cpu",
        trust_remote_code=False,
        model_kwargs={"use_safetensors": True},
    )

    def ask(questions: Questions) -> list[str]:
        found = pipe(question=[each["question"] for each in questions], context=[each["context"] for each in questions])
        return [answer["answer"] for answer in found]

    return ask


def _tokenizer(model: str) -> Any:
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        # It does not know the name that 5 gives to tokenizers.
        return transformers.PreTrainedTokenizerFast.from_pretrained(model)
    return transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def haystack(model: str) -> Ask:
    """Haystack's reader, a question at a time: it takes one query."""
    from haystack import Document
    from haystack.utils import ComponentDevice
    from haystack_integrations.components.readers.transformers import TransformersExtractiveReader

    component = TransformersExtractiveReader(
        model=model,
        device=ComponentDevice.from_str("cpu"),
        top_k=1,
        no_answer=False,
        max_seq_length=WINDOW,
        stride=STRIDE,
    )
    component.warm_up()

    def ask(questions: Questions) -> list[str]:
        return [
            component.run(query=each["question"], documents=[Document(content=each["context"])])["answers"][0].data
            for each in questions
        ]

    return ask


def loop(model: str) -> Ask:
    """A loop as one writes it: each question alone, its windows padded to the longest, the best pair of all windows."""
    import torch
    import transformers

    from qa_dist.config.options import ModelConfig
    from qa_dist.model.pretrained import weights_folder

    tokenizer = _tokenizer(model)
    loaded = transformers.AutoModelForQuestionAnswering.from_pretrained(
        weights_folder(model, ModelConfig(model_name_or_path=model)), trust_remote_code=False, use_safetensors=True
    ).eval()

    def answer(question: str, context: str) -> str:
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=WINDOW,
            stride=STRIDE,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )
        offsets = encoded.pop("offset_mapping")
        encoded.pop("overflow_to_sample_mapping")
        with torch.inference_mode():
            output = loaded(**encoded)
        is_context = torch.tensor(
            [[side == 1 for side in encoded.sequence_ids(row)] for row in range(len(offsets))], dtype=torch.bool
        )
        start, end = (logits.masked_fill(~is_context, -1e4) for logits in (output.start_logits, output.end_logits))
        length = start.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).triu().tril(LONGEST - 1)
        scores = (start[:, :, None] + end[:, None, :]).masked_fill(~allowed, -1e9)
        window, place = divmod(int(scores.argmax()), length * length)
        first, last = divmod(place, length)
        return context[int(offsets[window, first, 0]) : int(offsets[window, last, 1])]

    return lambda questions: [answer(each["question"], each["context"]) for each in questions]


SIDES: Mapping[str, Callable[[str], Ask]] = {
    "reader": reader,
    "registered": registered,
    "pipeline": pipeline,
    "haystack": haystack,
    "loop": loop,
    "exported_float32": exported_float32,
    "exported_int8": exported_int8,
}
_PACKAGES = ("torch", "transformers", "haystack-ai", "transformers-haystack", "onnxruntime")


def main(side: str, model: str, questions_file: str, threads: str) -> None:
    """Answer, and print."""
    if side not in ("reader", "exported_float32", "exported_int8"):
        # A reader has its threads from the environment, and that of an exported model needs no torch.
        import torch

        torch.set_num_threads(int(threads))
    questions = json.loads(Path(questions_file).read_text(encoding="utf-8"))
    ask = SIDES[side](model)
    ask(questions[:WARM_UP])
    begin, processor_begin = time.perf_counter(), time.process_time()
    answers = ask(questions)
    seconds, processor_seconds = time.perf_counter() - begin, time.process_time() - processor_begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"seconds": seconds, "processor_seconds": processor_seconds, "peak_memory_mib": memory}
    sys.stdout.write(json.dumps({**found, "answers": answers, "versions": _versions()}) + "\n")


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except ModuleNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    main(*sys.argv[1:])
