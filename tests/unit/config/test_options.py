"""One configuration from recipes and flags; every problem reported, all of them at once."""

import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from qa_dist.cli import COMMANDS
from qa_dist.common.errors import ConfigError
from qa_dist.config.given import peek
from qa_dist.config.options import GROUPS, RunConfig, defaults, option
from qa_dist.config.parsing import parse
from qa_dist.config.recipe_files import read_recipe, recipe_path, write_config
from qa_dist.documentation import option_tables

RECIPES = sorted((Path(__file__).parents[3] / "qa_dist" / "recipes").glob("*.yaml"))


def read(*words: str) -> RunConfig:
    return parse(["--output_dir", "out", *words], prog="test", description="")[0]


def problems(*words: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(words, prog="test", description="")
    return caught.value.problems


def test_flags_override_the_recipe_which_overrides_the_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 2e-5\nseed: 7\nlora_target_modules: [query, key]\n", encoding="utf-8")
    config = read("--config", str(recipe), "--seed", "8")
    assert config.training.learning_rate == 2e-5, "YAML 1.1 reads 2e-5 as text"
    assert config.training.seed == 8
    assert config.model.lora_target_modules == ("query", "key")
    assert config.data.max_seq_length == defaults(GROUPS["data"])["max_seq_length"]


@pytest.mark.parametrize("words", [["--use_dora"], ["--use_dora", "true"], ["--use_dora=yes"]])
def test_switches_need_no_value(words: list[str]) -> None:
    assert read(*words).model.use_dora is True
    assert read(*words, "--use_dora", "false").model.use_dora is False


@pytest.mark.parametrize(
    ("line", "meaning"), [("false", "no"), ("true", "model"), ("no", "no"), ("layers", "layers"), ("auto", "auto")]
)
def test_recipes_from_a_time_when_an_option_was_true_or_false_still_read(
    line: str, meaning: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"torch_compile: {line}\n", encoding="utf-8")
    assert read("--config", str(recipe)).training.torch_compile == meaning
    assert read("--torch_compile", line).training.torch_compile == meaning
    assert read("--torch_compile").training.torch_compile == "model"
    with pytest.raises(ConfigError, match="--torch_compile maybe is not one of auto, no, layers, model"):
        read("--torch_compile", "maybe")


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    config = read("--train_file", "a.json", "--report_to", "tensorboard,wandb", "--max_grad_norm", "none", "--use_dora")
    write_config(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")], prog="test", description="")[0] == config


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rat: 1\nseed: -1\n", encoding="utf-8")
    found = problems("--config", str(recipe), "--max_seq_length", "many", "--tuning", "none", "--lora_dropout", "1")
    assert len(found) == 6
    text = "\n".join(found)
    assert "--learning_rat is no option here; did you mean --learning_rate?" in text
    assert "--seed -1 is out of range; it must be at least 0" in text
    assert "--max_seq_length many is not an integer" in text
    assert "--tuning none is not one of lora, full" in text
    assert "--lora_dropout 1 is out of range; it must be at least 0 and below 1" in text
    assert "--output_dir is missing" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--doc_stride 380", "a window must advance, so the stride may be at most 378"),
        ("--max_question_length 300", "at most 251 fits"),
        ("--dataset_name squad --train_file a.json", "two sources"),
        ("--dataset_config_name x", "needs --dataset_name"),
        ("--dataset_name sample --dataset_config_name x", "--dataset_config_name is for data sets of the hub"),
        ("--dataset_name synthetic:9 --dataset_config_name x", "--dataset_config_name is for data sets of the hub"),
        ("--dataset_name synthetic:none", "synthetic:N"),
        ("--dataset_name synthetic:10000001", "synthetic:N"),
        ("--subset_seed 1", "asks for one"),
        ("--tuning full --lora_r 4", "--lora_r sets up LoRA"),
        ("--tuning full --lora_implementation peft", "--lora_implementation sets up LoRA"),
        ("--lora_implementation grouped --use_dora", "grouped does not work with --use_dora"),
        ("--lora_target_modules attention,query", "mixes a keyword with names"),
        ("--lora_target_modules ,", "is empty"),
        ("--eval_steps sometimes", "is not a number of 1 or more"),
        ("--eval_steps no --early_stopping_patience 2", "needs evaluations"),
        ("--logging_steps 5", "is about trackers and --report_to names none"),
        ("--null_score_diff_threshold nan", "finite"),
        ("--answer_length_penalty -0.1", "must be at least 0"),
        ("--answer_length_penalty 0.1 --decoding n_best", "goes with --decoding span"),
        ("--learning_rate inf", "above 0"),
        ("--learning_rate", "has no value"),
        ("--seed 1.5", "is not an integer"),
        ("--seed true", "is not an integer"),
        ("--use_dora perhaps", "is not true or false"),
        ("stray", "is not an option"),
        ("--train_fil x", "did you mean --train_file?"),
        ("--utterly_unknown 3", "see --help"),
        ("--config nowhere", "recipes are: quickstart"),
    ],
)
def test_impossible_values_say_what_is_allowed(words: str, message: str) -> None:
    found = problems("--output_dir", "out", *words.split())
    assert len(found) == 1, found
    assert message in found[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "holds a list"),
        ("a: [", "cannot be used as YAML"),
        ("1: 2", "--1 is no option here"),
        ("seed: [1]", "--seed [1]"),
    ],
)
def test_a_broken_recipe_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    found = problems("--output_dir", "out", "--config", str(recipe))
    assert len(found) == 1
    assert message in found[0]


def test_a_source_named_by_a_flag_replaces_the_source_of_the_recipe() -> None:
    config = read("--config", "squad_bert_base", "--train_file", "mine.json")
    assert (config.data.dataset_name, config.data.train_file) == (None, "mine.json")
    assert read("--config", "squad_bert_base").data.dataset_name == "squad"


@pytest.mark.parametrize(("precision", "residual_dtype"), [("no", "float32"), ("fp16", "float32"), ("bf16", "bf16")])
def test_another_precision_by_a_flag_drops_the_residual_type_of_the_recipe(
    tmp_path: Path, precision: str, residual_dtype: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mixed_precision: bf16\nresidual_dtype: bf16\n", encoding="utf-8")
    config = read("--config", str(recipe), "--mixed_precision", precision)
    assert (config.training.mixed_precision, config.training.residual_dtype) == (precision, residual_dtype)


def test_full_tuning_by_a_flag_drops_the_lora_options_of_the_recipe() -> None:
    config = read("--config", "squad_minilm_small", "--tuning", "full")
    assert (config.model.tuning, config.model.lora_r) == ("full", defaults(GROUPS["model"])["lora_r"])


def test_entries_take_their_own_options_and_only_their_groups() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own:
        """Options of a test."""

        adapter: str | None = option(None, "folder", required=True)

    config, own = parse(["--adapter", "x"], prog="test", description="", groups=("data",), entry=Own)
    assert own.adapter == "x"
    assert config.training.output_dir is None
    with pytest.raises(ConfigError, match="--seed is no option here"):
        parse(["--adapter", "x", "--seed", "1"], prog="test", description="", groups=("data",), entry=Own)
    with pytest.raises(ConfigError, match="--adapter is missing"):
        parse([], prog="test", description="", groups=("data",), entry=Own)


def test_peek_finds_a_flag_in_both_spellings() -> None:
    assert peek(["--a", "1", "--adapter", "x"], "adapter") == "x"
    assert peek(["--adapter=y"], "adapter") == "y"
    assert peek(["--adapters", "x"], "adapter") is None


def test_the_last_of_several_flags_counts_for_peek_as_it_does_in_the_end() -> None:
    words = ["--output_dir", "a", "--output_dir=b"]
    assert peek(words, "output_dir") == "b" == parse(words, prog="t", description="")[0].training.output_dir


def test_none_is_an_empty_list_and_no_source() -> None:
    words = ["--output_dir", "out", "--report_to", "none"]
    config, _ = parse(words, prog="t", description="", base={"report_to": ["tensorboard"]})
    assert config.training.report_to == ()
    base = {"train_file": "a.json"}
    words = ["--output_dir", "out", "--dataset_name", "none"]
    assert parse(words, prog="t", description="", base=base)[0].data.train_file == "a.json"
    for flag in ("--train_file", "--validation_file"):
        words = ["--output_dir", "out", flag, "None"]
        config, _ = parse(words, prog="t", description="", base={"dataset_name": "squad"})
        assert (config.data.source, config.data.train_file, config.data.validation_file) == ("squad", None, None)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_opens_with_purpose_hardware_and_command(path: Path) -> None:
    assert read("--config", path.stem)
    assert recipe_path(path.stem) == path
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("Purpose:", "Hardware:", "Command:"):
        assert any(word in line for line in comments), word
    assert set(read_recipe(path.stem)) <= set(RunConfig().flat())


def test_recipes_are_all_there() -> None:
    minilm = {"squad_minilm", "squad_minilm_small", "squad_minilm_rdrop"}
    expected = {"quickstart", *minilm, "squad_bert_base", "squad_v2_bert_base", "tutorial"}
    assert expected <= {path.stem for path in RECIPES}


def test_r_drop_is_all_that_its_recipe_adds() -> None:
    assert read_recipe("squad_minilm_rdrop") == {**read_recipe("squad_minilm_small"), "rdrop_alpha": 2}


def test_all_of_squad_has_larger_batches_and_is_else_the_small_recipe() -> None:
    small = {**read_recipe("squad_minilm_small"), "learning_rate": 2e-3, "num_train_epochs": 2, "global_batch_size": 64}
    whole = read_recipe("squad_minilm")
    assert whole == {name: value for name, value in small.items() if name not in ("max_train_samples", "subset_seed")}


def test_no_option_name_is_in_two_groups() -> None:
    names = [name for group in GROUPS.values() for name in defaults(group)]
    assert len(names) == len(set(names)) > 50


def test_the_table_shows_every_option() -> None:
    table = option_tables(GROUPS)
    assert all(f"| `--{name}` |" in table for name in RunConfig().flat())


@pytest.mark.parametrize(
    "module",
    [
        "qa_dist",
        "qa_dist.cli",
        *(command.module for command in COMMANDS.values()),
        # `prepare` loads a tokenizer by it.
        "qa_dist.model.pretrained",
    ],
)
def test_importing_and_helping_load_no_heavy_library(module: str) -> None:
    script = (
        f"import sys, {module} as module\n"
        "main = getattr(module, 'main', None)\n"
        "try:\n    main and main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'peft', 'datasets', 'evaluate', 'pandas'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_no_doubled_percent_signs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(COMMANDS[name].module).main(["--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    assert "usage: " in text
    assert "%%" not in text


@pytest.mark.parametrize(
    "words", ["export nobody/nothing", "evaluate --adapter nobody/nothing", "serve nobody/nothing"]
)
def test_help_looks_for_no_model(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = words.split()
    with pytest.raises(SystemExit) as end:
        importlib.import_module(COMMANDS[name].module).main([*rest, "--help"])
    assert not end.value.code
    assert "usage: " in capsys.readouterr().out


def test_help_lists_every_option_of_an_entry() -> None:
    done = subprocess.run([sys.executable, "-m", "qa_dist.train", "--help"], capture_output=True, text=True, check=True)
    # An option's own line; the sentences about options name others.
    listed = re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE)
    assert sorted(listed) == sorted([*RunConfig().flat(), "config", "dry_run"])


def test_recipes_hold_nothing_but_yaml_scalars_and_lists() -> None:
    for path in RECIPES:
        for value in yaml.safe_load(path.read_text(encoding="utf-8")).values():
            assert isinstance(value, str | int | float | bool | list)


def test_a_tilde_is_the_home_folder_in_flags_and_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("train_file: ~/train.json\noutput_dir: ~/out\n", encoding="utf-8")
    config, _ = parse(["--config", "~/mine.yaml", "--validation_file=~/dev.json"], prog="p", description="")
    assert config.data.train_file == f"{tmp_path}/train.json"
    assert config.data.validation_file == f"{tmp_path}/dev.json"
    assert config.training.output_dir == f"{tmp_path}/out"
    assert peek(["--adapter", "~/a"], "adapter") == peek(["--adapter=~/a"], "adapter") == f"{tmp_path}/a"


def test_auto_of_an_entrys_own_option_leaves_the_runs_option_of_that_name_as_it_is() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Own:
        doc_stride: int | None = option(None, "as the model was trained, unless given")

    words = {
        "prog": "test",
        "description": "",
        "groups": (),
        "entry": Own,
        "base": {"max_seq_length": 96, "doc_stride": 30},
    }
    config, own = parse(["--doc_stride", "auto"], **words)
    assert (own.doc_stride, config.data.doc_stride) == (None, 30)
    config, own = parse(["--doc_stride", "20"], **words)
    assert (own.doc_stride, config.data.doc_stride, config.data.max_seq_length) == (20, 20, 96)
