"""What looks like a secret does not get through."""

import pytest

from qa_dist.common.secrets import masked

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (TOKEN, "***"),
        (f"https://hub/x?revision=main&token={TOKEN}", "https://hub/x?revision=main&***"),
        ("https://hub/x?api_key=short", "https://hub/x?***"),
        ("https://someone:secret@hub/x", "https://***@hub/x"),
        (f"https://{TOKEN}@hub/x", "https://***@hub/x"),
        (f"cannot reach {TOKEN}, retrying", "cannot reach ***, retrying"),
        ("api_org_" + "x" * 34, "***"),
    ],
)
def test_secrets_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    ["hf_internal_testing/tiny-bert", "hf-internal-testing/x", "outputs/hf_run", "a@b", "token=5", "https://a/b@c"],
)
def test_other_text_stays(text: str) -> None:
    assert masked(text) == text


def test_the_values_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-odd-form-of-token")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert masked("x an-odd-form-of-token y") == "x *** y"
    assert masked("a key word") == "a key word", "shorter values occur by chance"
