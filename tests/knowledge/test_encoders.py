"""Encoders other than the embedded one: a tiny BERT of random weights, in plain transformers layout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kellm_features.artifacts import Artifact, Manifest
from kellm_features.errors import EngineError
from kellm_features.knowledge import encode, vectors
from kellm_features.knowledge.encoder import Encoder
from kellm_features.schemas import ITEM_DESCRIPTIONS, ITEM_ENCODINGS, ITEMS, USER_DESCRIPTIONS, read_table, write_table
from kellm_features.settings import EncodeSettings, Settings
from kellm_features.stages import StageContext

WORDS = "the a film about detective thieves horror comedy space rain city love war lost found night day".split()
WINDOW = 512


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BertModel folder without sentence-transformers' modules, as bert-base-uncased is one."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{c}" for c in letters), ".", ","]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=WINDOW).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=WINDOW,
        initializer_range=0.2,  # else a random BERT tells texts hardly apart
    )
    transformers.BertModel(config).eval().save_pretrained(folder)
    return folder


def texts_of(count: int, words: int = 12) -> list[str]:
    rng = np.random.default_rng(3)
    return [" ".join(rng.choice(WORDS, int(n))) + f" {i}." for i, n in enumerate(rng.integers(1, words, count))]


def masked_mean(folder: Path, texts: list[str]) -> npt.NDArray[np.float64]:
    """The paper's encoding by transformers alone, one text at a time: nothing is padded, nothing batched."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=WINDOW, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**inputs).last_hidden_state[0].double().mean(dim=0).numpy())
    return np.stack(rows)


def test_plain_bert_gives_the_masked_mean_of_its_last_hidden_state(bert: Path) -> None:
    texts = texts_of(20, words=60)
    found = Encoder(EncodeSettings(model=str(bert), batch_size=7)).encode(texts)
    expected = masked_mean(bert, texts)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.abs(expected[0] - expected[1]).max() > 0.05  # two texts are further apart than the tolerance


def test_long_texts_are_cut_as_the_paper_does_or_pooled_from_chunks(bert: Path) -> None:
    words = np.random.default_rng(5).choice(WORDS, 1200).tolist()
    long = " ".join(words)
    cut = Encoder(EncodeSettings(model=str(bert), long_texts="cut"))
    np.testing.assert_allclose(cut.encode([long, "the film"]), masked_mean(bert, [long, "the film"]), atol=2e-6)
    # Every word is one token, and two of the window's are [CLS] and [SEP].
    chunks = [" ".join(words[start : start + 510]) for start in (0, 510, 1020)]
    pooled = np.average(masked_mean(bert, chunks), axis=0, weights=[510, 510, 180])
    chunk = Encoder(EncodeSettings(model=str(bert)))
    found = chunk.encode([long])[0]
    np.testing.assert_allclose(found, pooled, atol=2e-6)
    assert np.abs(found - cut.encode([long])[0]).max() > 1e-3
    assert cut.encoder_id == f"{chunk.encoder_id}/cut"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_is_near_float32_and_has_its_own_id(bert: Path, dtype: Any, tolerance: float) -> None:
    texts = texts_of(20, words=60)
    full = Encoder(EncodeSettings(model=str(bert)))
    half = Encoder(EncodeSettings(model=str(bert), dtype=dtype))
    expected, found = full.encode(texts), half.encode(texts)
    assert found.dtype == np.float32
    relative = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0 < relative.max() < tolerance
    assert half.encoder_id == f"{full.encoder_id}/{dtype}"
    assert half.revision == full.revision


def test_vectors_of_unit_length_have_it_in_half_precision(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    model = SentenceTransformer(str(bert), device="cpu", local_files_only=True)
    model.append(Normalize())
    model.save(str(tmp_path), create_model_card=False)
    lengths = np.linalg.norm(Encoder(EncodeSettings(model=str(tmp_path), dtype="bfloat16")).encode(texts_of(5)), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_a_prompt_takes_its_room_in_the_window(bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(bert), device="cpu", local_files_only=True, prompts={"p": "the film about "}, default_prompt_name="p"
    )
    model.save(str(tmp_path), create_model_card=False)
    words = np.random.default_rng(5).choice(WORDS, 600).tolist()
    first, rest = " ".join(words[:507]), " ".join(words[507:])
    expected = np.average(masked_mean(bert, [f"the film about {t}" for t in (first, rest)]), axis=0, weights=[507, 93])
    found = Encoder(EncodeSettings(model=str(tmp_path))).encode([" ".join(words)])
    np.testing.assert_allclose(found[0], expected, atol=2e-6)


def test_an_encoder_without_a_window_reads_whole_texts(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "rain": 1, "war": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")
    model.save(str(tmp_path), create_model_card=False)
    found = Encoder(EncodeSettings(model=str(tmp_path))).encode(["rain " * 3000 + "war " * 1000])
    np.testing.assert_allclose(found, [[0.75, 0.25]], atol=1e-6)


def test_a_hub_model_is_named_by_its_id_and_commit(bert: Path, tmp_path: Path, monkeypatch) -> None:
    commit = "8f14e45fceea167a5a36dedd4bea2543deadbeef"
    repo = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(bert, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = EncodeSettings(model="org/tiny", revision="main")
    encoder = Encoder(settings)
    assert (encoder.model_id, encoder.revision) == ("org/tiny", commit)
    assert encoder.encoder_id == "org/tiny@8f14e45fceea167a/1"
    np.testing.assert_array_equal(
        encoder.encode(["the film"]), Encoder(EncodeSettings(model=str(bert))).encode(["the film"])
    )
    files = encode.input_files(Settings(encode=settings))
    assert files["model/model.safetensors"].read_bytes() == (bert / "model.safetensors").read_bytes()


def test_two_processes_give_the_vectors_of_one_and_end_with_the_block(bert: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    texts = [*texts_of(30), "the lost city of rain and night " * 100]
    one = Encoder(EncodeSettings(model=str(bert), batch_size=4))
    with Encoder(EncodeSettings(model=str(bert), batch_size=4, devices=["cpu", "cpu"])) as two:
        assert two.encoder_id == one.encoder_id
        seen: list[float] = []
        np.testing.assert_allclose(two.encode(texts, seen.append), one.encode(texts), atol=1e-6)
        assert sum(seen) == pytest.approx(31)
        workers = two._pool["processes"]
        assert len(workers) == 2
        pids = {worker.pid for worker in workers}
        np.testing.assert_allclose(two.encode(texts[:3]), one.encode(texts[:3]), atol=1e-6)
        assert {worker.pid for worker in two._pool["processes"]} == pids  # not started again
    assert not any(psutil.pid_exists(pid) for pid in pids - before)


def test_a_device_that_is_not_there_is_told_and_its_process_ended(bert: Path) -> None:
    with pytest.raises(EngineError, match=r"tiny-bert cannot be loaded to cuda:99: .*encode.device"):
        Encoder(EncodeSettings(model=str(bert), device="cuda:99"))
    encoder = Encoder(EncodeSettings(model=str(bert), devices=["cuda:99"]))
    with pytest.raises(EngineError, match=r"a process of encode.devices = \['cuda:99'\] failed: .*name devices"):
        encoder.encode(["the film"])
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


class Films:
    """Inputs of the stage: as many films as a test wants, one user."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.runs = 0

    def write(self, texts: list[str]) -> None:
        ids = list(range(len(texts)))
        described = {"description_source": "template", "prompt_hash": "", "model_id": "", "prompt_tokens": 0}
        described["completion_tokens"] = 0
        items = [{"item_id": i, "title": f"Film {i}", "year": None, "genres": []} for i in ids]
        rows = [{"item_id": i, "description": text, **described} for i, text in enumerate(texts)]
        users = [{"user_id": 1, "description": "a love of horror", **described}]
        for stage, name, schema, table in (
            ("ingest", "items", ITEMS, items),
            ("generate", "item_descriptions", ITEM_DESCRIPTIONS, rows),
            ("generate", "user_descriptions", USER_DESCRIPTIONS, users),
        ):
            path = self.root / stage / f"{name}.parquet"
            write_table(pa.Table.from_pylist(table, schema=schema.arrow()), path, schema)

    def context(self, previous: Path | None = None, **settings: Any) -> StageContext:
        self.runs += 1
        out, work = self.root / f"encode-{self.runs}", self.root / "work"
        out.mkdir()
        work.mkdir(exist_ok=True)
        inputs = {name: _artifact(self.root / name) for name in ("ingest", "generate")}
        return StageContext(
            settings=Settings(encode=EncodeSettings(model=str(self.model), **settings)),
            run_dir=self.root,
            out=out,
            work=work,
            inputs=inputs,
            files={},
            split_hash=None,
            previous=_artifact(previous) if previous else None,
        )


def _artifact(folder: Path) -> Artifact:
    return Artifact(folder, Manifest.model_construct(stage=folder.name))


def test_of_a_catalogue_with_one_percent_changed_one_percent_is_encoded(bert: Path, tmp_path: Path) -> None:
    films = Films(tmp_path, bert)
    texts = texts_of(200)
    films.write(texts)
    first = films.context()
    assert encode.run(first).notes["encoded"] == 201
    texts[17] = texts[111] = "the lost war"  # one text of two films: their titles tell them apart
    films.write(texts)
    second = films.context(previous=first.out)
    report = encode.run(second)
    assert (report.notes["encoded"], report.notes["unchanged"]) == (2, 199)
    old, new = (
        np.stack(read_table(ctx.out / "item_encodings.parquet", ITEM_ENCODINGS)["encoding"].to_numpy())
        for ctx in (first, second)
    )
    assert np.flatnonzero((old != new).any(axis=1)).tolist() == [17, 111]
    np.testing.assert_allclose(new[17], masked_mean(bert, ["Film 17. the lost war"])[0], atol=2e-6)
    # What the first run kept stands in its tables now: the second's two texts alone are still kept apart.
    (kept,) = (tmp_path / "work").rglob("*.parquet")
    assert pq.read_metadata(kept).num_rows == 2


def test_a_killed_stage_goes_on_where_it_was(bert: Path, tmp_path: Path) -> None:
    films = Films(tmp_path, bert)
    texts = texts_of(40)
    films.write(texts)
    script = """
import os, signal, sys
from pathlib import Path
from kellm_features.knowledge import encode, encoder
from {module} import Films

encode.KEEP_EVERY_S = 0.0
encoder.cpu_workers, encoder.SLICE_BATCHES = lambda: 1, 2
real, calls = encoder.Encoder.encode, []

def killed(self, texts, advance=None):
    calls.append(texts)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, texts, advance)

encoder.Encoder.encode = killed
encode.run(Films(Path(sys.argv[1]), Path(sys.argv[2])).context(batch_size=4))
"""
    path = tmp_path / "killed.py"
    path.write_text(script.format(module=Path(__file__).stem))
    command = [sys.executable, str(path), str(tmp_path), str(bert)]
    done = subprocess.run(command, env={"PYTHONPATH": str(Path(__file__).parent)}, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    parts = sorted((tmp_path / "work").rglob("*.parquet"))
    assert len(parts) == 3  # three slices of eight texts
    parts[0].write_bytes(parts[0].read_bytes()[:100])  # as a disk that lies about fsync leaves it
    films.runs = 1
    resumed = films.context(batch_size=4)
    report = encode.run(resumed)
    assert (report.notes["encoded"], report.notes["unchanged"]) == (41 - 16, 16)
    found = read_table(resumed.out / "item_encodings.parquet", ITEM_ENCODINGS)
    expected = masked_mean(bert, [f"Film {i}. {text}" for i, text in enumerate(texts)])
    np.testing.assert_allclose(np.stack(found["encoding"].to_numpy()), expected, atol=2e-6)
    assert [path.suffix for path in parts[0].parent.glob(f"{parts[0].stem}.*")] == [".unreadable"]


def test_vectors_of_another_encoder_are_not_taken(tmp_path: Path) -> None:
    vectors.VectorStore(tmp_path, "one@a/1", 2).append(["h"], np.ones((1, 2), np.float32))
    assert "h" in vectors.VectorStore(tmp_path, "one@a/1", 2)
    assert "h" not in vectors.VectorStore(tmp_path, "one@a/1/float16", 2)
