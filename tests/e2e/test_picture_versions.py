"""A picture is the same one in every version of vLLM, under every path of the model, and after a
restart. By vLLM's own names it is not."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from examples.cluster.models import SPECIAL_TOKENS
from examples.cluster.multimodal import IMAGE, IMAGE_SIZE, IMAGE_TOKENS, make_image_model
from tests.e2e.checks import at_once
from tests.e2e.deployment import Deployment
from tests.e2e.engine_fleet import EngineFleet
from tests.e2e.engines import EngineProcess
from tests.e2e.node import Node
from tests.e2e.store import BLOCK_TOKENS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MAX_TOKENS = 8
SENTENCE = "What does this picture show, and why was it taken at all? "
# More than a block on either side of the picture.
AROUND = SENTENCE * 5
IMAGE_ID = len(SPECIAL_TOKENS)


@dataclass(frozen=True)
class Shown:
    """A picture in a text, and how it is prepared. `topic` is the beginning of the text, so that
    topics share nothing."""

    topic: str
    turned: int = 0
    size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
    prepared: str = ""

    def message(self, *, cache_salt: str | None = None) -> dict[str, Any]:
        fields: dict[str, Any] = {} if cache_salt is None else {"cache_salt": cache_salt}
        if self.prepared:
            fields["mm_processor_kwargs"] = PREPARED[self.prepared]
        text = f"{self.topic}: {AROUND}{IMAGE}{AROUND}"
        return {"text": text, "picture": self._file(), "fields": fields}

    def _file(self) -> str:
        from PIL import Image

        image = Image.linear_gradient("L").rotate(self.turned).resize(self.size).convert("RGB")
        file = io.BytesIO()
        image.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()


PREPARED = {
    "darker": {"image_mean": [2.0, 2.0, 2.0]},
    "larger": {"size": {"shortest_edge": 3 * IMAGE_SIZE}},
}


def others(topic: str) -> list[Shown]:
    """Each has the tokens of the plain one."""
    return [
        Shown(topic, turned=90),
        Shown(topic, size=(IMAGE_SIZE, 2 * IMAGE_SIZE)),
        *(Shown(topic, prepared=prepared) for prepared in PREPARED),
    ]


@pytest.fixture
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineFleet]:
    """Each version has the model under a path of its own."""
    model = make_image_model(tmp_path / "made")
    models = {version: tmp_path / f"model-{version or 'own'}" for version in request.param}
    for folder in models.values():
        shutil.copytree(model, folder)
    made = EngineFleet(Deployment(tmp_path, model), models, {"model_impl": "transformers"})
    yield made
    made.end()


@pytest.mark.parametrize(
    ("fleet", "is_restarted"),
    [
        pytest.param(("", "0.28.0"), False, id="border"),
        pytest.param(
            ("", "0.23.0", "0.33.0"),
            True,
            id="ends",
            marks=[pytest.mark.long, pytest.mark.versions],
        ),
    ],
    indirect=["fleet"],
)
def test_a_picture_that_one_version_has_stored_all_load_and_no_other_picture(
    fleet: EngineFleet, is_restarted: bool
) -> None:
    """Restarted, they read files: their node is another one."""
    node = Node("pictures")
    engines = fleet.start("kv_both", node)
    at_once(partial(check_written, engine, fleet.models) for engine in engines.values())
    # Each version has names of its own, and tells the pictures apart as well.
    named = [names(engine) for engine in engines.values()]
    assert len(set().union(*named)) == len(named) * (1 + len(others("")))
    node.wait_quiet()
    if is_restarted:
        fleet.end()
        engines = fleet.start("kv_both", Node("pictures-again"))
    at_once(partial(check_read, engine, fleet.models) for engine in engines.values())


@pytest.mark.long
@pytest.mark.parametrize("fleet", [("",)], ids=["own"], indirect=True)
def test_an_encoder_that_is_configured_otherwise_makes_another_thing_of_the_same_picture(
    fleet: EngineFleet,
) -> None:
    """With the same weights and tensors."""
    topic, node = Shown("Of two towers"), Node("towers")
    (engine,) = fleet.start("kv_both", node).values()
    plain = cold(engine, topic)
    assert engine("see", topic.message(), MAX_TOKENS) == plain
    assert engine("drain") == []
    node.wait_quiet()
    fleet.end()

    fleet.flags = {**fleet.flags, "hf_overrides": {"vision_feature_layer": -2}}
    (engine,) = fleet.start("kv_both", Node("other-towers")).values()
    expected = cold(engine, topic, salt="other tower")
    assert expected["tokens"] != plain["tokens"]
    before_picture = expected["prompt"].index(IMAGE_ID) // BLOCK_TOKENS * BLOCK_TOKENS
    seen = engine("see", topic.message(), MAX_TOKENS)
    assert seen == {**expected, "cached": before_picture}


def names(engine: EngineProcess) -> set[str]:
    return {engine("name_of", each.message()) for each in (Shown("named"), *others("named"))}


def topic_of(writer: str, reader: str) -> str:
    return f"Of {writer or 'own'} for {reader or 'own'}"


def check_written(engine: EngineProcess, readers: Iterable[str]) -> None:
    for topic in (topic_of(engine.version, reader) for reader in readers):
        seen = engine("see", Shown(topic).message(), 1)
        assert seen["cached"] == 0, f"{engine}, {topic}"
        assert seen["prompt"].count(IMAGE_ID) == IMAGE_TOKENS, f"{engine}, {topic}"
        assert engine("drain") == [], f"{engine}, {topic}"


def check_read(engine: EngineProcess, writers: Iterable[str]) -> None:
    for topic in (topic_of(writer, engine.version) for writer in writers):
        plain = cold(engine, Shown(topic))
        seen = engine("see", Shown(topic).message(), MAX_TOKENS)
        full = len(seen["prompt"]) // BLOCK_TOKENS * BLOCK_TOKENS
        assert seen == {**plain, "cached": full}, f"{engine}, {topic}"

        before_picture = seen["prompt"].index(IMAGE_ID) // BLOCK_TOKENS * BLOCK_TOKENS
        assert 0 < before_picture < full - IMAGE_TOKENS
        for other in others(topic):
            expected = cold(engine, other)
            assert expected["prompt"] == plain["prompt"], f"{engine}, {other}"
            # What would come of the plain one's blocks is another answer.
            assert expected["tokens"] != plain["tokens"], f"{engine}, {other}"
            seen = engine("see", other.message(), MAX_TOKENS)
            assert seen == {**expected, "cached": before_picture}, f"{engine}, {other}"


def cold(engine: EngineProcess, shown: Shown, salt: str = "cold") -> dict[str, Any]:
    """What it answers when it computes all of it: nothing else is asked with this salt."""
    message = shown.message(cache_salt=f"{shown} {salt}")
    seen: dict[str, Any] = engine("see", message, MAX_TOKENS)
    assert seen["cached"] == 0, f"{engine}, {shown}"
    return seen
