"""The template and the committed repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from kellm_features.errors import StoreError
from kellm_features.store.scaffold import write_feature_repo

COMMITTED = Path(__file__).parents[2] / "feature_repo"


def test_the_committed_repository_is_the_templates_output(tmp_path):
    written = write_feature_repo(tmp_path / "repo")
    assert sorted(path.name for path in written) == [".gitignore", "README.md", "definitions.py", "feature_store.yaml"]
    for path in written:
        assert path.read_bytes() == (COMMITTED / path.name).read_bytes(), path.name
    assert not (COMMITTED / "__init__.py").exists()


def test_project_and_id_type_are_filled_in(tmp_path):
    write_feature_repo(tmp_path / "repo", project="films", id_type="string")
    assert "project: films\n" in (tmp_path / "repo" / "feature_store.yaml").read_text()
    assert 'id_type="string"' in (tmp_path / "repo" / "definitions.py").read_text()
    assert not any("$" in path.read_text().replace("$(date", "") for path in (tmp_path / "repo").iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(StoreError, match=r"holds README.md already and is not overwritten"):
        write_feature_repo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("project", ["", "my project", "-x", "a:b", "9films"])
def test_bad_project_names(tmp_path, project):
    with pytest.raises(StoreError, match="beginning with a letter"):
        write_feature_repo(tmp_path / "repo", project=project)
    assert not (tmp_path / "repo").exists()


def test_bad_id_type_and_unwritable_folder(tmp_path):
    with pytest.raises(StoreError, match="accepted: 'int64' or 'string'"):
        write_feature_repo(tmp_path / "repo", id_type="uuid")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        write_feature_repo(tmp_path / "file" / "repo")
