"""pip's settings, as uv is given them."""

import pytest

from qa_dist.machine.installation import pip_settings, uv_options


def test_what_decides_what_pip_installs_is_given_to_uv() -> None:
    listed = (
        ":env:.find-links='/wheels /more'\n:env:.disable-pip-version-check='1'\nglobal.cert='/certificates.pem'\n"
        "global.extra-index-url='\\nfile:///a\\nfile:///b'\nglobal.index-url='https://mirror/simple'\n"
    )
    assert uv_options(pip_settings(listed)) == (
        "--index-strategy unsafe-best-match --extra-index-url file:///a --extra-index-url file:///b "
        "--index-url https://mirror/simple --find-links /wheels --find-links /more".split(),
        {"SSL_CERT_FILE": "/certificates.pem"},
    )


def test_the_environment_comes_before_files_and_the_command_before_all_commands() -> None:
    listed = "install.index-url='b'\nglobal.index-url='a'\n:env:.index-url='c'\ndownload.no-index='1'\n"
    assert pip_settings(listed) == {"index-url": "c"}
    assert pip_settings(listed.replace(":env:.index-url='c'\n", "")) == {"index-url": "b"}


@pytest.mark.parametrize("setting", ["no-binary", "require-hashes", "proxy", "no-index", "target"])
def test_pip_installs_where_it_is_set_up_as_uv_cannot_be(setting: str) -> None:
    assert uv_options({"index-url": "a", setting: "1"}) is None
