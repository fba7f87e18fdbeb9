from pathlib import Path

import pytest

from kellm_features.cli.init import settings_toml
from kellm_features.errors import ConfigError
from kellm_features.settings import Settings, load_settings


def test_file_then_overrides(tmp_path: Path) -> None:
    config = tmp_path / "kellm.toml"
    config.write_text('[train]\ndim = 32\n[data]\nformat = "table"\ninteractions = "events.csv"\n')
    settings = load_settings(config, ["train.hidden=128", "swing.preset=yang"])
    assert (settings.train.dim, settings.train.hidden, settings.swing.preset) == (32, 128, "yang")
    assert settings.data.interactions == tmp_path / "events.csv"  # relative to the file, not to the shell


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.dimm=32", "unknown key 'train.dimm'; known there: backbone"),
        ("trian.dim=32", "unknown key 'trian'; known there: run, data"),
        ("data.columns.item=x", "unknown key 'data.columns.item'; known there: user_id"),
        ("train.dim=0", "'train.dim' is 0: input should be greater than 0"),
        ("train.dim=wide", "'train.dim' is 'wide'"),
        ("data.split=random", "'data.split' is 'random'"),
        ("data.valid_fraction=0.3", "'data': train_fraction + valid_fraction = 1.1; it must stay below 1"),
        ("spark.driver_memory=lots", "'spark.driver_memory' is 'lots'"),
        ("dim=3", "expected section.key=value"),
        ("train.dim", "expected section.key=value"),
    ],
)
def test_bad_settings_are_named(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings(None, [override])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml does not exist"):
        load_settings(tmp_path / "nowhere.toml")
    broken = tmp_path / "kellm.toml"
    broken.write_text("[train\n")
    with pytest.raises(ConfigError, match="not readable TOML"):
        load_settings(broken)


def test_hash_knows_what_shapes_rows() -> None:
    base = load_settings().hash_of(["generate"])
    assert load_settings(None, ["generate.batch_size=3"]).hash_of(["generate"]) == base  # speed only
    assert load_settings(None, ["generate.limit=3"]).hash_of(["generate"]) != base
    assert load_settings(None, ["train.dim=3"]).hash_of(["generate"]) == base  # another stage's


def test_written_toml_is_the_defaults(tmp_path: Path) -> None:
    config = tmp_path / "kellm.toml"
    config.write_text(settings_toml())
    loaded = load_settings(config)
    expected = Settings.model_validate({"data": {"format": "table"}, "store": {"repo": tmp_path / "feature_repo"}})
    assert loaded == expected
