"""A model with windows and guesses made from the text: engines that guess share with those that
don't."""

from __future__ import annotations

import json

import pytest

from examples.cluster.client import Client, total
from tests.e2e.checks import counted, handed_over, handed_over_since, make_prompt
from tests.e2e.deployment import Fleets
from tests.e2e.hybrid_fleet import HybridFleet, ask
from tests.e2e.hybrid_models import MODELS
from tests.e2e.node import Node
from tests.e2e.proxies import ONE_TO_ONE, proxy
from ucm.store.tiers.posix import paths

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900)]

# Of the few tokens there are each has been there before: there is a guess at every step, and most
# are wrong.
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 1,
}
MAX_TOKENS = 40
LENGTHS = (127, 256, 1500, 3400)


@pytest.fixture
def fleet(fleets: Fleets, tmp_path_factory: pytest.TempPathFactory) -> HybridFleet:
    """One that does not guess, and one that does and has a prefix cache. Each has a node to
    itself."""

    def start() -> HybridFleet:
        made = HybridFleet(tmp_path_factory.mktemp("drafts"), MODELS["gemma3-w256"])
        guess = ["--speculative-config", json.dumps(NGRAM)]
        made.start("reading", Node("drafts-reading"), chunk=512)
        made.start("guessing", Node("drafts-guessing"), prefix_caching=True, args=guess)
        return made

    made = fleets.use("drafts", start)
    assert isinstance(made, HybridFleet)
    return made


def wrong_guesses(client: Client) -> int:
    samples = client.metrics()
    made, right = (
        int(total(samples, f"vllm:spec_decode_num_{kind}_tokens_total"))
        for kind in ("draft", "accepted")
    )
    return made - right


BOTH_WAYS = pytest.mark.parametrize(
    ("storing", "loading"), [("reading", "guessing"), ("guessing", "reading")]
)


@BOTH_WAYS
def test_engines_share_a_model_with_windows_whether_they_guess_or_not(
    fleet: HybridFleet, storing: str, loading: str
) -> None:
    for length in LENGTHS:
        prompt = make_prompt(length, f"{storing} to {loading}")
        expected = fleet.expected(prompt, max_tokens=MAX_TOKENS)
        assert ask(fleet[storing].client, prompt, max_tokens=MAX_TOKENS).is_like(expected)
        fleet.wait_kept(prompt)
        client = fleet[loading].client
        before = client.counters()
        assert ask(client, prompt, max_tokens=MAX_TOKENS).is_like(expected), f"{length} tokens"
        gained = counted(client, before, length)
        assert gained.external_hits == fleet.hit_tokens(prompt), f"{length} tokens"
    assert wrong_guesses(fleet["guessing"].client) > 0
    assert len(list(fleet.store.folder.glob(f"*/{paths.MANIFEST}"))) == 1
    assert fleet.store.bad_files() == []


@BOTH_WAYS
def test_what_one_that_guesses_or_does_not_has_answered_is_loaded_by_the_other(
    fleet: HybridFleet, storing: str, loading: str
) -> None:
    prompt = make_prompt(1100, f"answered by {storing}")
    expected = fleet.expected(prompt, max_tokens=200)
    assert ask(fleet[storing].client, prompt, max_tokens=200).is_like(expected)
    # The last token was sampled, and no step has computed it.
    kept = (*prompt, *expected.token_ids[:-1])
    fleet.wait_kept(kept)
    fleet[storing].node.wait_quiet()
    said = (*prompt, *expected.token_ids)
    client = fleet[loading].client
    before = client.counters()
    assert ask(client, said).is_like(fleet.expected(said))
    assert counted(client, before, len(said)).external_hits == len(kept) // 128 * 128


@BOTH_WAYS
def test_what_is_handed_over_is_loaded_by_one_that_guesses_and_by_one_that_does_not(
    fleet: HybridFleet, storing: str, loading: str
) -> None:
    decode = fleet[loading].client
    with proxy(fleet, ONE_TO_ONE, {"p1": storing, "d1": loading}) as server:
        for length in (1100, 1500, 3400):
            prompt = make_prompt(length, f"handed over by {storing}")
            expected = fleet.expected(prompt, max_tokens=MAX_TOKENS)
            before = handed_over(decode)
            said = ask(server.client, prompt, max_tokens=MAX_TOKENS)
            assert said.is_like(expected), f"{length} tokens"
            gained = handed_over_since(decode, before, length - 1)
            assert (gained.promised, gained.loaded) == (length - 1, length - 1)
