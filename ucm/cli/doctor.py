"""`ucm doctor`: is this mount fit for a store, and what should be changed?"""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from ucm.cli.ending import one_line_for_errors
from ucm.cli.printing import ASKING_VLLM, STATUS_WRONG, AsJson, count, print_json, progress, say

if TYPE_CHECKING:
    from ucm.store.inspect.examine import Examined, ExaminedPlace
    from ucm.store.inspect.verdicts import Finding

_MARKS = {"fine": " ", "note": "i", "warning": "!", "wrong": "X"}


def doctor(
    store: Annotated[
        str,
        typer.Argument(metavar="CONFIG|DIR", help="a settings file, or a directory for a store"),
    ],
    peer_mounts: Annotated[
        list[str] | None,
        typer.Option("--peer-mount", help="the same directory by a second mount, as a peer has it"),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="has the store pages of it? Starts vLLM")
    ] = "",
    page_kib: Annotated[
        int,
        typer.Option(
            "--page-kib", min=0, max=1 << 18, help="page size, if not the store's largest"
        ),
    ] = 0,
    prefill: Annotated[
        float,
        typer.Option("--prefill-tokens-per-s", min=0, max=1e9, help="what the engine computes"),
    ] = 0.0,
    slow: Annotated[
        bool, typer.Option("--slow", help="measure longer, and wait for what mounts remember")
    ] = False,
    vllm_args: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="the engine's flags, with --model"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try out what a store needs of its storage, and say what to change.

    Works in a folder of its own in each storage backend, and removes it. Ends with 3 if something
    is wrong.
    """
    from ucm.store.inspect.child import in_a_child
    from ucm.store.inspect.examine import Diagnosis, Examination, ExaminedPlace
    from ucm.store.inspect.given import check_no_url

    # So that its folder goes, however it is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_line_for_errors("ucm doctor"):
        examination = Examination(
            is_slow=slow, page_bytes=page_kib << 10, prefill_tokens_per_s=prefill
        )
        for peer in peer_mounts or []:
            check_no_url(peer)
        peers = [*map(os.path.abspath, peer_mounts or [])]
        # All that looks at storage does so there.
        place = in_a_child(partial(examination.of, store, peers), ExaminedPlace)
        found = place.backends
        of_model = _of_model(place, store, model, vllm_args or []) if model else []
    findings = [finding for each in found for finding in each.findings] + of_model
    if as_json:
        print_json(Diagnosis(backends=found, model=of_model))
    else:
        _print(found, of_model)
        say(_sentence(found, findings))
    if any(finding.verdict == "wrong" for finding in findings):
        raise typer.Exit(STATUS_WRONG)


def _of_model(place: ExaminedPlace, store: str, model: str, vllm_args: list[str]) -> list[Finding]:
    from ucm.store.blocks.namespace import from_json
    from ucm.store.inspect.child import in_a_child
    from ucm.store.inspect.engine_identity import EngineQuestion, ask_vllm
    from ucm.store.inspect.examine import examine_model
    from ucm.store.inspect.verdicts import Finding

    question = EngineQuestion(
        model=model,
        vllm_args=vllm_args,
        config_file=store if place.is_settings else "",
        adapters=[],
    )
    with progress(ASKING_VLLM):
        identity = ask_vllm(question)
    manifest = from_json(identity.manifest_json.encode())
    return in_a_child(partial(examine_model, store, model, manifest), list[Finding])


def _print(found: list[Examined], of_model: list[Finding]) -> None:
    for examined in found:
        say(f"{examined.backend}:")
        for finding in examined.findings:
            _print_finding(finding)
        if examined.facts is not None:
            for name, label in examined.facts.namespaces.items():
                say(f"    {'namespace':<13} {name[:12]}  {label}")
    for finding in of_model:
        _print_finding(finding)


def _print_finding(finding: Finding) -> None:
    say(f"  {_MARKS[finding.verdict]} {finding.check:<13} {finding.found}")
    if finding.fix:
        say(f"  {'':<15} -> {finding.fix}")


def _sentence(found: list[Examined], findings: list[Finding]) -> str:
    from ucm.store.inspect.bucket_probe import WRITE_RIGHT

    wrong = sum(finding.verdict == "wrong" for finding in findings)
    warnings = sum(finding.verdict == "warning" for finding in findings)
    if wrong:
        return f"Not fit for a store: {count(wrong, 'thing is', 'things are')} wrong (X)."
    is_read_only = any(each.facts is not None and each.facts.is_read_only for each in found)
    is_read_only |= any(finding.check == WRITE_RIGHT for finding in findings)
    fit = "Fit to read a store, not to write one" if is_read_only else "Fit for a store"
    return f"{fit}, with {count(warnings, 'warning')} (!)." if warnings else f"{fit}."
