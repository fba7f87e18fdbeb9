from datetime import UTC, datetime
from pathlib import Path

import pytest

from kellm_features.artifacts import (
    MANIFEST,
    Manifest,
    digest,
    hash_outputs,
    load_artifact,
    recover,
    replace_stage,
    stamp_file,
    write_manifest,
)
from kellm_features.errors import ArtifactError, DataError


def manifest_of(content: str) -> Manifest:
    return Manifest(
        stage="swing",
        run_id=content,
        version="0",
        created=datetime.now(UTC),
        config_hash="",
        output_hash="",
    )


def write_stage(run_dir: Path, content: str) -> None:
    with replace_stage(run_dir, "swing") as out:
        (out / "pairs.txt").write_text(content)
        write_manifest(out, manifest_of(content))


def seen(run_dir: Path) -> str | None:
    artifact = load_artifact(run_dir, "swing")
    if artifact is None:
        return None
    assert artifact.file("pairs.txt").read_text() == artifact.manifest.run_id  # table and manifest belong together
    return artifact.manifest.run_id


def test_replaces_whole(tmp_path: Path) -> None:
    write_stage(tmp_path, "one")
    write_stage(tmp_path, "two")
    assert seen(tmp_path) == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["swing"]


def test_failure_keeps_the_old_one(tmp_path: Path) -> None:
    write_stage(tmp_path, "one")

    def fail() -> None:
        with replace_stage(tmp_path, "swing") as out:
            (out / "pairs.txt").write_text("half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert seen(tmp_path) == "one"


def test_no_manifest_no_switch(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="wrote no manifest"), replace_stage(tmp_path, "swing"):
        pass
    assert seen(tmp_path) is None


@pytest.mark.parametrize("killed_after", ["writing half", "writing all", "first rename", "second rename"])
def test_a_kill_leaves_old_or_new(tmp_path: Path, killed_after: str) -> None:
    """Lay out by hand what a kill at each point leaves on disk, then look and write again."""
    write_stage(tmp_path, "old")
    new, old, final = (tmp_path / name for name in (".swing.new", ".swing.old", "swing"))
    new.mkdir()
    (new / "pairs.txt").write_text("new")
    if killed_after != "writing half":
        write_manifest(new, manifest_of("new"))
    if killed_after in ("first rename", "second rename"):
        final.rename(old)
    if killed_after == "second rename":
        new.rename(final)
    expected = {"writing half": "old", "writing all": "old", "first rename": "new", "second rename": "new"}
    assert seen(tmp_path) == expected[killed_after]
    write_stage(tmp_path, "next")
    assert seen(tmp_path) == "next"


def test_recover_restores_when_the_new_one_is_unfinished(tmp_path: Path) -> None:
    write_stage(tmp_path, "old")
    (tmp_path / "swing").rename(tmp_path / ".swing.old")
    (tmp_path / ".swing.new").mkdir()
    recover(tmp_path, "swing")
    assert seen(tmp_path) == "old"


def test_unreadable_manifest_is_named(tmp_path: Path) -> None:
    write_stage(tmp_path, "one")
    (tmp_path / "swing" / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest.json is not a manifest"):
        load_artifact(tmp_path, "swing")


def test_missing_output_names_the_remedy(tmp_path: Path) -> None:
    write_stage(tmp_path, "one")
    artifact = load_artifact(tmp_path, "swing")
    assert artifact is not None
    with pytest.raises(ArtifactError, match="kellm run --from swing"):
        artifact.file("other.parquet")


def test_stamp_rehashes_only_what_changed(tmp_path: Path) -> None:
    file = tmp_path / "dump.xml"
    file.write_text("a")
    first = stamp_file(file)
    assert stamp_file(file, first) is first
    file.write_text("bb")
    assert stamp_file(file, first).sha256 != first.sha256
    with pytest.raises(DataError, match="cannot be read"):
        stamp_file(tmp_path / "none")


def test_outputs_leave_markers_out(tmp_path: Path) -> None:
    (tmp_path / "pairs.parquet").mkdir()
    for name in ("part-0.parquet", "_SUCCESS", ".part-0.parquet.crc"):
        (tmp_path / "pairs.parquet" / name).write_text(name)
    assert list(hash_outputs(tmp_path)) == ["pairs.parquet/part-0.parquet"]


def test_digest_ignores_the_attempt_and_nothing_else() -> None:
    def part(uuid: str, sha256: str = "aa", number: int = 0) -> dict[str, str]:
        return {f"pairs.parquet/part-{number:05d}-{uuid}-c000.zstd.parquet": sha256}

    one, two = "bf259005-7fb9-4868-b7dd-fd06eb0cceab", "00000000-7fb9-4868-b7dd-fd06eb0cceab"
    assert digest(part(one)) == digest(part(two))
    assert digest(part(one)) != digest(part(one, "bb"))
    assert digest(part(one)) != digest(part(one, number=1))
