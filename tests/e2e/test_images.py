"""Images through the proxy. To the tokens all images are alike: only the keys, and what a page
holds, tell one from another."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples.cluster.client import Client, Counters
from examples.cluster.models import SPECIAL_TOKENS
from examples.cluster.multimodal import IMAGE_SIZE, IMAGE_TOKENS, SERVER_ARGS, make_image_model
from examples.cluster.processes import MIB, HttpServer
from tests.e2e.checks import counted
from tests.e2e.deployment import MAX_TOKENS, Deployment, Engine, Fleets
from tests.e2e.node import Node
from tests.e2e.proxies import ONE_TO_ONE, proxy
from tests.e2e.store import BLOCK_TOKENS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

# More than a block of text on either side of the image.
SENTENCE = "What does this picture show, and why was it taken at all? "
NUM_SENTENCES = 12

# How pictures are opened. With any such setting vLLM hashes also the names that clients give.
OPENED = ("--media-io-kwargs", '{"image": {"rgba_background_color": [255, 255, 255]}}')

# The tokenizer counts its special tokens from 0, and the image's is the last of them.
IMAGE_ID = len(SPECIAL_TOKENS)


@dataclass(frozen=True)
class Seen:
    """An answer, and the prompt that the engine made of the parts."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]

    @property
    def before_image(self) -> int:
        """Tokens of the full blocks in which there is nothing of the image."""
        return self.prompt.index(IMAGE_ID) // BLOCK_TOKENS * BLOCK_TOKENS


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_model(tmp_path_factory.mktemp("image-model"))


@pytest.fixture
def pair(fleets: Fleets, image_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """A prefill and a decode server of one node, without prefix caches of their own. They call
    pictures by unlike names: by a hash of the bytes, and, as decode has no picture cache either, by
    a hash of a number that its process has counted."""

    def start() -> Deployment:
        made = Deployment(tmp_path_factory.mktemp("images"), image_model)
        node = Node("images")
        args = [*SERVER_ARGS, *OPENED, "--trust-request-mm-kwargs"]
        made.start("prefill", node, kv_cache_bytes=64 * MIB, args=args)
        args += ["--mm-processor-cache-gb", "0"]
        made.start("decode", node, layerwise=True, kv_cache_bytes=64 * MIB, args=args)
        return made

    return fleets.use("images", start)


@pytest.fixture
def front(pair: Deployment) -> Iterator[HttpServer]:
    with proxy(pair, ONE_TO_ONE, {"p1": "prefill", "d1": "decode"}) as server:
        yield server


def picture(color: str) -> str:
    """A data URL."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), color).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(
    client: Client,
    topic: str,
    color: str,
    *,
    cache_salt: str | None = None,
    name: str | None = None,
    opened: dict[str, Any] | None = None,
) -> Seen:
    """`topic` is the beginning of the text, so that topics share nothing. `name` is what the client
    calls the picture, `opened` how it has it prepared."""
    around = SENTENCE * NUM_SENTENCES
    named = {} if name is None else {"uuid": name}
    content = [
        {"type": "text", "text": f"{topic}: {around}"},
        {"type": "image_url", "image_url": {"url": picture(color)}, **named},
        {"type": "text", "text": around},
    ]
    fields: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    salt = {} if cache_salt is None else {"cache_salt": cache_salt}
    if opened is not None:
        fields["mm_processor_kwargs"] = opened
    body = {"messages": [{"role": "user", "content": content}], "return_token_ids": True}
    status, text = client.post("/v1/chat/completions", {**body, **fields, **salt})
    assert status == 200, text
    answer = json.loads(text)
    seen = Seen(tuple(answer["prompt_token_ids"]), tuple(answer["choices"][0]["token_ids"]))
    assert seen.prompt.count(IMAGE_ID) == IMAGE_TOKENS
    return seen


def cold(engine: Engine, topic: str, color: str) -> Seen:
    """What it answers when it computes all of it: nothing else is asked with this salt."""
    before = engine.client.counters()
    seen = ask(engine.client, topic, color, cache_salt=f"{topic} {color}")
    gained = counted(engine.client, before, len(seen.prompt))
    assert gained.computed == len(seen.prompt), gained
    return seen


def through(front: HttpServer, pair: Deployment, topic: str, color: str) -> tuple[Seen, int, int]:
    """Asks the proxy: the answer, and how many tokens prefill and decode have loaded."""
    clients = [pair[name].client for name in ("prefill", "decode")]
    before: list[Counters] = [client.counters() for client in clients]
    seen = ask(front.client, topic, color)
    prefill, decode = (
        counted(client, earlier, len(seen.prompt)).external_hits
        for client, earlier in zip(clients, before, strict=True)
    )
    return seen, prefill, decode


def test_decode_loads_what_prefill_made_of_an_image_and_of_the_text_around_it(
    pair: Deployment, front: HttpServer
) -> None:
    right = cold(pair["decode"], "one", "red")
    here, there = (pair[name].handed_over_tokens(right.prompt) for name in ("prefill", "decode"))
    assert through(front, pair, "one", "red") == (right, 0, there)
    # The image's blocks are among those that are found again.
    assert through(front, pair, "one", "red") == (right, here, there)


def test_another_image_in_the_same_text_shares_only_what_stands_before_it(
    pair: Deployment, front: HttpServer
) -> None:
    red, blue = (cold(pair["decode"], "two", color) for color in ("red", "blue"))
    # What would be found if the image were not in the keys, and what it would lead to.
    assert red.prompt == blue.prompt and red.token_ids != blue.token_ids
    here, there = (pair[name].handed_over_tokens(red.prompt) for name in ("prefill", "decode"))
    assert 0 < red.before_image < here - IMAGE_TOKENS
    assert through(front, pair, "two", "red") == (red, 0, there)
    assert through(front, pair, "two", "blue") == (blue, red.before_image, there)
    assert through(front, pair, "two", "red") == (red, here, there)


# Hashes of names are no hashes of contents, and neither is a name that looks like one.
@pytest.mark.parametrize("name", ["my picture", "0123456789abcdef" * 4])
def test_two_clients_pictures_of_one_name_are_two_pictures(pair: Deployment, name: str) -> None:
    topic = f"named {name[:2]}"
    red, blue = (cold(pair["decode"], topic, color) for color in ("red", "blue"))
    assert red.token_ids != blue.token_ids
    assert ask(pair["prefill"].client, topic, "red", name=name) == red
    pair["prefill"].node.wait_quiet()
    # Each server has seen the name for one picture only.
    client = pair["decode"].client
    before = client.counters()
    assert ask(client, topic, "blue", name=name) == blue
    assert counted(client, before, len(blue.prompt)).external_hits == blue.before_image
    # And red is red, whatever it is called.
    before = client.counters()
    assert ask(client, topic, "red", name=f"{name}, the red one") == red
    loaded = counted(client, before, len(red.prompt)).external_hits
    assert loaded == pair["decode"].full_hit_tokens(red.prompt)


def test_a_picture_that_a_request_has_prepared_otherwise_is_another_one(pair: Deployment) -> None:
    client = pair["decode"].client
    plain = cold(pair["decode"], "prepared", "red")
    dark = {"image_mean": [2.0, 2.0, 2.0]}
    expected = ask(client, "prepared", "red", opened=dark, cache_salt="dark")
    assert expected.token_ids != plain.token_ids
    assert ask(pair["prefill"].client, "prepared", "red") == plain
    pair["prefill"].node.wait_quiet()

    before = client.counters()
    assert ask(client, "prepared", "red", opened=dark) == expected
    assert counted(client, before, len(plain.prompt)).external_hits == plain.before_image
    pair["decode"].node.wait_quiet()
    before = client.counters()
    assert ask(client, "prepared", "red", opened=dark, name="dark") == expected
    loaded = counted(client, before, len(plain.prompt)).external_hits
    assert loaded == pair["decode"].full_hit_tokens(plain.prompt)


@pytest.mark.long
def test_a_picture_is_the_same_one_to_a_server_that_has_been_started_again(
    pair: Deployment,
) -> None:
    right = cold(pair["decode"], "restarted", "red")
    assert ask(pair["decode"].client, "restarted", "red") == right
    pair["decode"].node.wait_quiet()
    pair["decode"].server.kill()
    pair.start_again("decode")
    pair.wait_ready()

    full = pair["decode"].full_hit_tokens(right.prompt)
    for color, loaded in {"blue": right.before_image, "red": full}.items():
        client = pair["decode"].client
        before = client.counters()
        seen = ask(client, "restarted", color)
        assert (seen == right) == (color == "red")
        assert counted(client, before, len(seen.prompt)).external_hits == loaded
