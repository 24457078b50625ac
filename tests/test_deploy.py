"""The container's and the cluster's files are valid, and agree with the command that they start."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helpers.paths import ROOT

from minigpt4_jax.cli import serve
from minigpt4_jax.serving.gate import OPEN_PATHS

KUBERNETES = "1.30"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text()))
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())


def _json_list(instruction):
    """The words of an instruction in JSON form, such as ENTRYPOINT."""
    return yaml.safe_load(re.search(rf"^{instruction} (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])


def _options(arguments):
    """What the server makes of arguments after those of the image's entry point."""
    program, command, *fixed = _json_list("ENTRYPOINT")
    assert (program, command) == ("minigpt4", "serve")
    return serve.parse([*fixed, *arguments])


def test_the_dockerfile_has_no_lint():
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "--no-color", ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_image_has_what_it_installs():
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE)
    for source in " ".join(copied).split():
        assert (ROOT / source).exists() and f"!{source}" in ignored
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = setup["options.packages.find"]["include"].split()
    assert {name for name in packages if not name.endswith("*")} <= {*" ".join(copied).split()}
    extras = setup["options.extras_require"]
    names = re.findall(
        r"EXTRAS[=:] *([\w,]+)", DOCKERFILE + (ROOT / "deploy/compose.yaml").read_text()
    )
    assert len(names) >= 3 and all(name in extras for n in names for name in n.split(","))
    options = _options(_json_list("CMD"))
    assert options.host == "0.0.0.0" and f"EXPOSE {options.port}" in DOCKERFILE


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda m: m["kind"])
def test_manifests_have_the_schema_of_kubernetes(manifest):
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_the_deployment_runs_the_server():
    deployment, service = MANIFESTS
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    options = _options(container["args"])
    assert container["ports"][0]["containerPort"] == options.port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN_PATHS
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == {*mounts}
    assert options.model == mounts["model"] and str(options.api_key_file.parent) == mounts["keys"]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert sleep + options.shutdown_timeout < pod["spec"]["terminationGracePeriodSeconds"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_the_compose_file_runs_the_server(name):
    service = COMPOSE["services"][name]
    options = _options(service["command"])
    assert options.api_key_file.name in service["secrets"]
    assert options.shutdown_timeout < int(service["stop_grace_period"].removesuffix("s"))
    assert any(f":{options.port}" in port for port in service["ports"])
    volumes = [re.sub(r"\$\{.*?\}", "variable", volume) for volume in service["volumes"]]
    targets = [volume.split(":")[1] for volume in volumes]
    assert options.model in targets
