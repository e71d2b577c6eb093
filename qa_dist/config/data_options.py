"""Options of the data: where examples come from, and how they become features."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qa_dist.config.option import option
from qa_dist.config.texts import shown, whole_number

_MAX_SYNTHETIC = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where examples come from and how they become features."""

    dataset_name: str | None = option(
        None,
        "a hub id (squad, squad_v2, or any data set of that schema), a local folder of files of that schema or saved "
        "with save_to_disk, `sample` (embedded in the package; used when no source is named) or `synthetic:N` (N "
        "generated examples)",
    )
    dataset_config_name: str | None = option(None, "configuration of the hub data set")
    train_file: str | None = option(
        None,
        "training data: SQuAD JSON, or JSONL, CSV, TSV or Parquet as in docs/data.md; .gz allowed; or a folder",
    )
    validation_file: str | None = option(None, "validation data, same formats as --train_file")
    version_2_with_negative: bool | None = option(
        None, "whether questions may have no answer; auto: true if the data has such questions"
    )
    max_seq_length: int = option(384, "tokens per feature, special tokens included", minimum=16)
    doc_stride: int = option(
        128, "tokens that consecutive windows of a context share (an overlap, not a step)", minimum=0
    )
    max_question_length: int | None = option(
        None,
        "questions longer than this many tokens are cut and counted; auto: as long as the window allows",
        minimum=1,
    )
    max_train_samples: int | None = option(None, "use this many training examples", minimum=1)
    max_eval_samples: int | None = option(None, "use this many validation examples", minimum=1)
    max_train_features: int | None = option(None, "use this many training features", minimum=1, fixed=True)
    max_eval_features: int | None = option(
        None,
        "evaluations during training compute only the loss, on this many features; the final evaluation stays whole",
        minimum=1,
    )
    subset_seed: int | None = option(
        None,
        "draw the --max_*_samples and --max_*_features at random with this seed, as `Dataset.shuffle(seed)` does; "
        "auto: take the first ones",
        minimum=0,
    )
    on_invalid: Literal["error", "drop"] = option("error", "what to do with records that fail validation")
    preprocessing_num_workers: int | None = option(
        None, "processes that tokenise; auto: one per core, at most 16", minimum=1
    )
    store_dir: str | None = option(
        None, "folder of prepared feature stores; auto: $QA_DIST_STORE, else qa_dist in the user's cache folder"
    )

    def problems(self) -> Iterable[str]:
        if self.dataset_name and (self.train_file or self.validation_file):
            yield (
                f"--dataset_name {self.dataset_name} and --train_file/--validation_file name two sources; "
                "keep one of them"
            )
        if self.dataset_config_name and not self.dataset_name:
            yield "--dataset_config_name needs --dataset_name; name the data set or leave it out"
        elif self.dataset_config_name and (self.source == "sample" or self.source.startswith("synthetic:")):
            yield f"--dataset_config_name is for data sets of the hub and --dataset_name is {self.source}; leave it out"
        if self.dataset_name and self.dataset_name.startswith("synthetic"):
            count = self.dataset_name.removeprefix("synthetic:")
            if not 1 <= whole_number(count) <= _MAX_SYNTHETIC:
                yield (
                    f"--dataset_name {shown(self.dataset_name)} is not synthetic:N with N from 1 to "
                    f"{_MAX_SYNTHETIC:,}, as synthetic:10000"
                )
        # [CLS] question [SEP] context [SEP]; RoBERTa-like models spend four special tokens.
        longest_question = self.max_seq_length - 4 - self.doc_stride - 1
        if longest_question < 1:
            yield (
                f"--doc_stride {self.doc_stride} leaves no room in --max_seq_length {self.max_seq_length}: a window "
                f"must advance, so the stride may be at most {max(0, self.max_seq_length - 6)} here; lower the stride "
                "or raise the length"
            )
        elif self.max_question_length is not None and self.max_question_length > longest_question:
            yield (
                f"--max_question_length {self.max_question_length} with --max_seq_length {self.max_seq_length} and "
                f"--doc_stride {self.doc_stride} leaves no room for context; at most {longest_question} fits"
            )
        if self.subset_seed is not None and not any(
            (self.max_train_samples, self.max_eval_samples, self.max_train_features, self.max_eval_features)
        ):
            yield (
                "--subset_seed draws a subset but no --max_*_samples or --max_*_features asks for one; add one, or "
                "--subset_seed none"
            )

    @property
    def source(self) -> str:
        """The data set's name: `sample` where the user named none."""
        return self.dataset_name or "sample"
