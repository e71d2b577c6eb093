"""The usual way: transformers' `Trainer`, as the tutorials set it up and with the best options it has.

It gets the same model, adapters, features and batch size as qa_dist, and the clock favours it: it starts with the first
step, after data-loader workers have started and the first batch has been fetched.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from qa_dist.benchmarking.job import Job, Result
from qa_dist.benchmarking.measuring import rates, synchronize, synthetic_store
from qa_dist.benchmarking.nested_loops import nested_loop_answers, nested_loop_scores
from qa_dist.benchmarking.synthetic import SyntheticStore
from qa_dist.config.options import RunConfig
from qa_dist.data.sources import load_examples
from qa_dist.machine.usage import peak_memory_bytes
from qa_dist.model.adapters import target_modules
from qa_dist.model.pretrained import load_tokenizer, model_configuration, weights_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How `Trainer` is set up. The defaults are what the tutorials do.

    Attributes:
        dynamic_padding: pad a batch to its longest feature (`DataCollatorWithPadding`), not all to --max_seq_length.
        group_by_length: batches of features of about the same length (`train_sampling_strategy="group_by_length"`).
        num_workers: data-loader processes.
        torch_compile: compile the model.
    """

    dynamic_padding: bool = False
    group_by_length: bool = False
    num_workers: int = 0
    torch_compile: bool = False


def load_model(config: RunConfig) -> Any:
    """The model with its adapters as transformers and peft make them, with attention and dropout as they come.

    `--model_dropout` and `--lora_dropout` hold here too.
    """
    from transformers import AutoModelForQuestionAnswering

    torch.manual_seed(config.training.seed)
    options = config.model
    model_config = model_configuration(options)
    if options.model_dropout is not None:
        for name, value in model_config.to_dict().items():
            if "dropout" in name and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(model_config, name, options.model_dropout)
    if options.model_config is not None:
        model = AutoModelForQuestionAnswering.from_config(model_config, trust_remote_code=False)
    else:
        model = AutoModelForQuestionAnswering.from_pretrained(
            weights_folder(options.model_name_or_path, options),
            config=model_config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
        )
    if options.tuning == "full":
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(
        task_type=TaskType.QUESTION_ANS,
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=target_modules(model, options.lora_target_modules),
    )
    return get_peft_model(model, lora)


def feature_dataset(store: SyntheticStore, *, pad_to: int | None, pad_token_id: int) -> Any:
    """The features as `Dataset.map` with the tutorials' function leaves them, padded or not."""
    from datasets import Dataset

    columns: dict[str, list[Any]] = {name: [] for name in ("input_ids", "token_type_ids", "attention_mask")}
    for index in range(store.num_features):
        ids = store.input_ids(index).tolist()
        padding = [0] * (0 if pad_to is None else pad_to - len(ids))
        columns["input_ids"].append(ids + [pad_token_id] * len(padding))
        columns["token_type_ids"].append(store.token_type_ids(index).tolist() + padding)
        columns["attention_mask"].append([1] * len(ids) + padding)
    columns["start_positions"] = store.start_token.tolist()
    columns["end_positions"] = store.end_token.tolist()
    if pad_to is None:
        columns["length"] = store.lengths.tolist()
    return Dataset.from_dict(columns)


def padding_tokenizer(pad_token_id: int) -> Any:
    """A tokenizer that can do nothing but pad, for `DataCollatorWithPadding`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"[unused{number}]": number for number in range(pad_token_id)} | {"[PAD]": pad_token_id}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[PAD]")),
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def train(job: Job, config: RunConfig) -> Result:
    """Rates and memory of `Trainer`, over every feature once."""
    from transformers import DataCollatorWithPadding, Trainer, default_data_collator

    setup = Setup(**job.trainer)
    model = load_model(config)
    pad_token_id = model.config.pad_token_id or 0
    store = synthetic_store(job, config, model.config.vocab_size)
    dataset = feature_dataset(
        store, pad_to=None if setup.dynamic_padding else config.data.max_seq_length, pad_token_id=pad_token_id
    )
    collator: Any = default_data_collator
    if setup.dynamic_padding:
        collator = DataCollatorWithPadding(_silent(padding_tokenizer(pad_token_id)))
    clock = _step_clock()
    with tempfile.TemporaryDirectory() as directory:

        def trained(features: Any, max_steps: int, callbacks: list[Any]) -> Any:
            trainer = Trainer(
                model=model,
                args=_arguments(config, setup, directory, max_steps=max_steps),
                train_dataset=features,
                data_collator=collator,
                callbacks=callbacks,
            )
            trainer.train()
            return trainer.args.device

        if job.warmup_steps:
            # Of the same lengths: what has to be made once for a shape is made here.
            trained(dataset, job.warmup_steps, [])
        device = trained(dataset, -1, [clock])
    result = rates(store.num_features, int(store.lengths.sum()), clock.seconds)
    result["peak_memory_bytes"] = peak_memory_bytes(device)
    result["peak_memory_bytes_per_rank"] = [result["peak_memory_bytes"]]
    return result


def evaluate(job: Job, config: RunConfig) -> Result:
    """Seconds of each phase of an evaluation: `Dataset.map`, `Trainer.predict`, nested loops, scores text by text."""
    import datasets
    from transformers import DataCollatorWithPadding, Trainer, default_data_collator

    datasets.disable_progress_bars()
    setup = Setup(**job.trainer)
    tokenizer = load_tokenizer(config.model)
    examples, _, _ = load_examples(config.data, "validation")
    rows = datasets.Dataset.from_list(
        [{"id": example.id, "question": example.question, "context": example.context} for example in examples]
    )
    model = load_model(config)
    collator: Any = DataCollatorWithPadding(_silent(tokenizer)) if setup.dynamic_padding else default_data_collator
    seconds: dict[str, float] = {}
    begin = time.perf_counter()
    features = rows.map(
        tokenising_function(tokenizer, config, pad=not setup.dynamic_padding),
        batched=True,
        remove_columns=rows.column_names,
    )
    seconds["tokenise"] = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(model=model, args=_arguments(config, setup, directory, max_steps=-1), data_collator=collator)
        inputs = features.remove_columns(["example_id", "offset_mapping"])
        trainer.predict(inputs.select(range(min(16, len(inputs)))))
        begin = time.perf_counter()
        start_logits, end_logits = trainer.predict(inputs).predictions
        seconds["forward"] = time.perf_counter() - begin
    begin = time.perf_counter()
    index_of = {example.id: index for index, example in enumerate(examples)}
    predictions = nested_loop_answers(
        [example.id for example in examples],
        [example.context for example in examples],
        [index_of[example_id] for example_id in features["example_id"]],
        features["offset_mapping"],
        start_logits,
        end_logits,
        n_best_size=config.evaluation.n_best_size,
        max_answer_length=config.evaluation.max_answer_length,
    )
    seconds["decode"] = time.perf_counter() - begin
    begin = time.perf_counter()
    references = {example.id: [answer.text for answer in example.answers] for example in examples}
    scores = nested_loop_scores(references, predictions)
    seconds["score"] = time.perf_counter() - begin
    return {
        "phase_seconds": seconds,
        "seconds": sum(seconds.values()),
        "num_examples": len(examples),
        "num_features": len(features),
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
        **scores,
    }


def tokenising_function(tokenizer: Any, config: RunConfig, *, pad: bool) -> Callable[[Any], Any]:
    """What the tutorials give to `Dataset.map` before an evaluation."""

    def tokenise(batch: Any) -> Any:
        tokenised = tokenizer(
            [question.lstrip() for question in batch["question"]],
            batch["context"],
            truncation="only_second",
            max_length=config.data.max_seq_length,
            stride=config.data.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length" if pad else False,
        )
        of_example = tokenised.pop("overflow_to_sample_mapping")
        tokenised["example_id"] = []
        for index, offsets in enumerate(tokenised["offset_mapping"]):
            sequence_ids = tokenised.sequence_ids(index)
            tokenised["example_id"].append(batch["id"][of_example[index]])
            tokenised["offset_mapping"][index] = [
                pair if sequence_ids[place] == 1 else None for place, pair in enumerate(offsets)
            ]
        return tokenised

    return tokenise


def _arguments(config: RunConfig, setup: Setup, directory: str, *, max_steps: int) -> Any:
    from transformers import TrainingArguments

    training = config.training
    return TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=training.global_batch_size,
        per_device_eval_batch_size=training.global_batch_size,
        num_train_epochs=1,
        max_steps=max_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        seed=training.seed,
        bf16=training.mixed_precision == "bf16",
        gradient_checkpointing=training.gradient_checkpointing,
        train_sampling_strategy="group_by_length" if setup.group_by_length else "random",
        dataloader_num_workers=setup.num_workers,
        dataloader_persistent_workers=setup.num_workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        torch_compile=setup.torch_compile,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def _step_clock() -> Any:
    """A callback whose `seconds` are those of each step, the fetching of its batch included but for the first."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self._ends: list[float] = []

        @property
        def seconds(self) -> list[float]:
            return [end - start for start, end in pairwise(self._ends)]

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not self._ends:
                synchronize(args.device)
                self._ends.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._ends.append(time.perf_counter())

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize(args.device)
            self._ends[-1] = time.perf_counter()

    return StepClock()


def _silent(tokenizer: Any) -> Any:
    """Without its advice to pad while tokenising, which the tutorials' collators are made for."""
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    return tokenizer
