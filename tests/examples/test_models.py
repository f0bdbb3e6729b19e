"""Models made on the spot."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.cluster.models import SHAPES, make_model


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_makes_the_same_bytes_and_another_seed_other_weights(tmp_path: Path):
    first, again = make_model(tmp_path / "a"), make_model(tmp_path / "b")
    other = make_model(tmp_path / "a", seed=1)

    assert _contents(first) == _contents(again)
    assert _contents(first)["tokenizer.json"] == _contents(other)["tokenizer.json"]
    assert _contents(first)["model.safetensors"] != _contents(other)["model.safetensors"]


def test_a_model_is_made_once_and_by_one_of_several_at_a_time(tmp_path: Path):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: make_model(tmp_path), range(4)))

    (folder,) = folders
    made_at = (folder / "config.json").stat().st_mtime_ns
    assert made_at == (make_model(tmp_path) / "config.json").stat().st_mtime_ns
    assert {".lock", folder.name} == {path.name for path in tmp_path.iterdir()}


def test_what_an_interrupted_call_leaves_is_not_taken_for_a_model(tmp_path: Path):
    (tmp_path / ".tiny-seed0.abc").mkdir()

    assert "model.safetensors" in _contents(make_model(tmp_path))


def test_two_ranks_can_share_every_size():
    for shape in SHAPES.values():
        assert 0 == shape.num_heads % 2 == shape.num_kv_heads % 2
        assert shape.num_heads * shape.head_size == shape.hidden


def test_the_vocabulary_is_as_large_as_the_tokenizers(tmp_path: Path):
    """A token that the tokenizer lacks could be generated, but not asked for again as text."""
    from tokenizers import Tokenizer

    folder = make_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert "caf\u00e9 \U0001f600" == tokenizer.decode(tokenizer.encode("caf\u00e9 \U0001f600").ids)
