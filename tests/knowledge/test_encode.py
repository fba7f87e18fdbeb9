from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from kellm_features.errors import ConfigError
from kellm_features.knowledge import encode, encoder, generate
from kellm_features.knowledge.encode import encoded_text
from kellm_features.knowledge.encoder import Encoder, encoder_folder
from kellm_features.schemas import ITEM_ENCODINGS, read_table
from kellm_features.settings import EncodeSettings, load_settings

TEXTS = [
    "Heat (1995). Action, Crime. A detective hunts thieves.",
    "Alien",
    "A viewer who likes horror films of the 1970s. " * 3,
    "Toy Story (1995) is an animation film.",
]


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return Encoder(EncodeSettings(batch_size=2))


@pytest.fixture(scope="module")
def peer() -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(encoder_folder(EncodeSettings())), local_files_only=True, device="cpu")


def test_short_texts_get_the_librarys_own_vectors(minilm: Encoder, peer: Any) -> None:
    vectors = minilm.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (4, 384)
    np.testing.assert_allclose(vectors, peer.encode(TEXTS), atol=1e-5)


def test_long_text_is_the_token_weighted_mean_of_its_chunks(minilm: Encoder, peer: Any) -> None:
    long = "The quick detective follows the unlucky thieves through rainy Los Angeles. " * 40
    (pieces,) = minilm._cut([long])
    tokens = [len(peer.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece, _ in pieces]
    assert [count for _, count in pieces] == tokens
    assert max(tokens) <= 254
    assert len(pieces) == 3
    assert " ".join(piece for piece, _ in pieces) == long.strip()
    by_hand = np.average(peer.encode([piece for piece, _ in pieces]).astype(np.float64), axis=0, weights=tokens)
    by_hand /= np.linalg.norm(by_hand)
    both = minilm.encode([TEXTS[0], long])
    np.testing.assert_allclose(both[1], by_hand, atol=1e-5)
    np.testing.assert_allclose(both[0], peer.encode(TEXTS[0]), atol=1e-5)


def test_progress_counts_texts_whatever_their_chunks(minilm: Encoder) -> None:
    seen: list[float] = []
    minilm.encode([*TEXTS, "rainy Los Angeles " * 200], seen.append)
    assert len(seen) > 1
    assert sum(seen) == pytest.approx(5)


def test_nothing_to_encode(minilm: Encoder) -> None:
    assert minilm.encode([]).shape == (0, 384)


@pytest.mark.parametrize(
    ("description", "text"),
    [
        ("Heat (1995) is an action and crime film.", "Heat (1995) is an action and crime film."),
        ("Heat (1995) is a film.", "Heat (1995). Action, Crime. Heat (1995) is a film."),
        ("The film is dark.", "Heat (1995). Action, Crime. The film is dark."),
    ],
)
def test_title_year_and_genres_come_first(description: str, text: str) -> None:
    assert encoded_text("Heat", 1995, ["Action", "Crime"], description) == text


def test_text_of_an_item_without_year_and_genres() -> None:
    assert encoded_text("Untold, The", None, ["unknown"], "It is dark.") == "The Untold. It is dark."


def test_stage_writes_checked_tables_and_takes_over_what_is_unchanged(world, fake, minilm, monkeypatch) -> None:
    generate.run(world.context("generate"))
    first = world.context("encode")
    report = encode.run(first)
    assert (report.notes["encoded"], report.notes["unchanged"], report.notes["dim"]) == (10, 0, 384)
    items = read_table(first.out / "item_encodings.parquet", ITEM_ENCODINGS)
    assert items.schema.field("encoding").type.list_size == 384
    described = pq.read_table(world.root / "generate" / "item_descriptions.parquet").to_pylist()[3]
    assert described["description"].startswith("Alien (1979) is a science fiction horror film (sci-fi)")
    alien = items.to_pylist()[3]  # its description opens with the title and names the genres: encoded as it is
    assert alien["text_hash"] == hashlib.sha256(described["description"].encode()).hexdigest()
    np.testing.assert_allclose(alien["encoding"], minilm.encode([described["description"]])[0], atol=1e-5)

    asked: list[str] = []
    real = encoder.Encoder.encode
    monkeypatch.setattr(
        encoder.Encoder, "encode", lambda self, texts, advance=None: asked.extend(texts) or real(self, texts, advance)
    )
    same = world.context("encode", previous="encode")
    assert encode.run(same).notes["unchanged"] == 10
    assert asked == []
    for side in ("item", "user"):
        assert (same.out / f"{side}_encodings.parquet").read_bytes() == (
            first.out / f"{side}_encodings.parquet"
        ).read_bytes()

    path = world.root / "generate" / "item_descriptions.parquet"
    table = pq.read_table(path)
    texts = table["description"].to_pylist()
    texts[5] = "Scream (1996) is a horror film about a mask."
    pq.write_table(table.set_column(1, table.schema.field("description"), [texts]), path)
    changed = world.context("encode", previous="encode")
    assert encode.run(changed).notes["encoded"] == 1
    assert asked == ["Scream (1996) is a horror film about a mask."]

    # Another encoder's vectors are of no use, even for the same text.
    monkeypatch.setattr(encoder, "ENCODER_VERSION", encoder.ENCODER_VERSION + 1)
    assert encode.run(world.context("encode", previous="encode")).notes["encoded"] == 10


def test_another_encoder_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'encode.model' is .*: accepted are all-MiniLM-L6-v2, a folder .* hub model"
    ):
        Encoder(EncodeSettings(model=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"'encode.revision' is 'main', and .* has no revisions"):
        Encoder(EncodeSettings(revision="main"))


def test_the_encoders_files_are_inputs_of_the_stage() -> None:
    files = encode.input_files(load_settings())
    assert all(path.is_file() for path in files.values())
    assert {"model/config.json", "model/modules.json"} <= files.keys()
    assert any(path.stat().st_size > 50_000_000 for path in files.values())  # the weights are among them
