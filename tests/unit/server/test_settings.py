"""Settings: flags win over variables, variables over the file, and every mistake is named."""

from pathlib import Path

import pytest

from luthier_server.settings import SettingsError, read


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "luthier.toml"
    config.write_text('slots = 1\nmax_queued = 7\nlog_level = "debug"\nmodel_root = ["/tmp"]\n')
    environment = {"LUTHIER_CONFIG": str(config), "LUTHIER_SLOTS": "2", "LUTHIER_MAX_QUEUED": "8"}
    settings = read(["--slots", "3"], environment)
    assert (settings.slots, settings.max_queued, settings.log_level) == (3, 8, "debug")
    assert settings.model_root == (Path("/tmp"),)


def test_defaults_are_safe() -> None:
    settings = read([], {})
    assert settings.listen == "127.0.0.1:50051"
    assert not settings.insecure_bind


@pytest.mark.parametrize("listen", ["0.0.0.0:50051", "[::]:1", "192.168.0.1:50051", "luthier.example:50051"])
def test_an_address_that_others_reach_needs_to_be_asked_for(listen: str) -> None:
    with pytest.raises(SettingsError, match="--insecure-bind"):
        read(["--listen", listen], {})
    assert read(["--listen", listen, "--insecure-bind"], {}).listen == listen


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        ([], {"LUTHIER_SLOTS": "many"}, "LUTHIER_SLOTS"),
        (["--slots", "-1"], {}, "slots"),
        (["--price-per-device-hour", "-1"], {}, "price-per-device-hour"),
        (["--price-per-device-hour", "nan"], {}, "price-per-device-hour"),
        (["--device-memory-bytes", "-1"], {}, "device-memory-bytes"),
        (["--currency", "euros"], {}, "currency"),
        (["--warm", "perhaps"], {}, "warm"),
        (["--listen", "nowhere"], {}, "HOST:PORT"),
        (["--model-root", "/there/is/none"], {}, "model-root"),
        ([], {"LUTHIER_INSECURE_BIND": "maybe"}, "LUTHIER_INSECURE_BIND"),
        ([], {"LUTHIER_CONFIG": "/there/is/none.toml"}, "none.toml"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(
    arguments: list[str], environment: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SettingsError, SystemExit)) as caught:
        read(arguments, environment)
    assert words in str(caught.value) + capsys.readouterr().err


def test_an_unknown_key_in_the_file_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "luthier.toml"
    config.write_text("slot = 1\n")
    with pytest.raises(SettingsError, match="unknown key slot"):
        read(["--config", str(config)], {})
