"""Examples of deployments against the schemas of those who read them."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.examples.deploy.files import (
    COMPOSE,
    DEPLOY,
    KUBERNETES,
    SYSTEMD,
    UNITS,
    read_compose,
    read_manifests,
    read_unit,
)

# The oldest that its makers still mend, and the newest that the schemas are there for.
KUBERNETES_VERSIONS = ("1.34", "1.37")
OVERLAYS = ("base", "s3")


def compose_schema() -> jsonschema.Draft202012Validator:
    # Its package's own modules need more than is installed.
    file = distribution("check-jsonschema").locate_file(
        "check_jsonschema/builtin_schemas/vendor/compose-spec.json"
    )
    return jsonschema.Draft202012Validator(json.loads(Path(str(file)).read_text()))


def test_the_compose_file_is_as_the_compose_specification_says() -> None:
    schema = compose_schema()
    tree = read_compose()
    assert [] == [error.message for error in schema.iter_errors(tree)]

    tree["services"]["proxy"]["stop_grace_perod"] = "1s"
    assert any("stop_grace_perod" in error.message for error in schema.iter_errors(tree))


def test_what_a_compose_service_names_is_defined() -> None:
    tree = read_compose()
    for name, service in tree["services"].items():
        volumes = {mount.split(":")[0] for mount in service.get("volumes", ())}
        assert {each for each in volumes if "/" not in each} <= set(tree["volumes"]), name
        assert set(service.get("secrets", ())) <= set(tree["secrets"]), name
        assert {each["source"] for each in service.get("configs", ())} <= set(tree["configs"]), name
        assert set(service.get("depends_on", ())) <= set(tree["services"]), name
    for each in (*tree["configs"].values(), *tree["secrets"].values()):
        is_secret = each["file"].startswith("./secrets/")
        assert is_secret or (COMPOSE.parent / each["file"]).is_file()


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_takes_every_manifest_and_knows_every_field(version: str) -> None:
    manifests = read_manifests(KUBERNETES / "base")
    assert len(manifests) > 8
    for _, manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)

    wrong = copy.deepcopy(next(each for _, each in manifests if each["kind"] == "DaemonSet"))
    wrong["spec"]["template"]["spec"]["nodeSelectr"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelectr"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_a_kustomization_names_every_file_beside_it() -> None:
    for overlay in OVERLAYS:
        folder = KUBERNETES / overlay
        text = (folder / "kustomization.yaml").read_text()
        others = {file.name for file in folder.iterdir()} - {"kustomization.yaml"}
        assert {name for name in others if name not in text} == set()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_kubectl_makes_of_a_kustomization_is_taken_too(overlay: str) -> None:
    command = ["kubectl", "kustomize", str(KUBERNETES / overlay)]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    manifests = list(yaml.safe_load_all(made))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSIONS[-1], strict=True)

    kinds = [manifest["kind"] for manifest in manifests]
    assert {"DaemonSet": 1, "Deployment": 3} == {
        kind: kinds.count(kind) for kind in ("DaemonSet", "Deployment")
    }
    node_cache = next(each for each in manifests if each["kind"] == "DaemonSet")
    pod = node_cache["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {"settings", "socket", "pages" if overlay == "base" else "credentials"} == volumes
    assert volumes == {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}


def test_what_a_pod_mounts_is_a_volume_of_it() -> None:
    for file, manifest in read_manifests(KUBERNETES / "base"):
        if "template" not in manifest.get("spec", {}):
            continue
        pod = manifest["spec"]["template"]["spec"]
        mounted = {
            mount["name"]
            for container in (*pod.get("initContainers", ()), *pod["containers"])
            for mount in container["volumeMounts"]
        }
        assert mounted == {volume["name"] for volume in pod["volumes"]}, file.name


def test_a_unit_is_of_settings_that_systemd_knows(tmp_path: Path) -> None:
    """By systemd's own word where it is installed; what it starts is put in its place."""
    analyze = shutil.which("systemd-analyze")
    for unit in UNITS:
        assert {"Description", "ExecStart", "User", "Restart", "WantedBy"} <= set(read_unit(unit))
        text = unit.read_text().replace("/opt/ucm/bin/", "/bin/true /opt/ucm/bin/")
        name = unit.name.replace("@.", "@prefill.")
        (tmp_path / name).write_text(text)
    if analyze is None:
        pytest.skip("there is no systemd-analyze: units were only read")
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run(
        [analyze, "verify", "--man=no", *files], capture_output=True, text=True, timeout=60
    )
    ours = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "ucm-" in line]
    assert [] == ours, done.stderr

    (tmp_path / name).write_text(text.replace("RestartSec=", "RestrtSec="))
    done = subprocess.run(
        [analyze, "verify", "--man=no", *files], capture_output=True, text=True, timeout=60
    )
    assert "RestrtSec" in done.stderr


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="there is no systemd-sysusers")
def test_systemd_makes_the_users_of_the_units(tmp_path: Path) -> None:
    done = subprocess.run(
        ["systemd-sysusers", "--dry-run", f"--root={tmp_path}", str(SYSTEMD / "ucm.sysusers")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert 0 == done.returncode, done.stderr
    users = {user for unit in UNITS for user in read_unit(unit)["User"]}
    assert users == {
        line.split()[1]
        for line in (SYSTEMD / "ucm.sysusers").read_text().splitlines()
        if line.startswith("u ")
    }


def test_no_credential_stands_in_an_example() -> None:
    words = ("AWS_SECRET", "aws_secret_access_key", "stringData", "kind: Secret", "--api-key=")
    for file in DEPLOY.rglob("*.y*ml"):
        text = file.read_text()
        assert not [word for word in words if word in text], file
