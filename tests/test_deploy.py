"""The container's and the cluster's files are valid, and agree with the command that they start."""

import configparser
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from helpers.paths import ROOT

from minigpt4_jax.cli import serve_options, serve_ray
from minigpt4_jax.serving.gate import OPEN_PATHS

KUBERNETES = "1.30"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
MANIFESTS = list(yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text()))
RAY = yaml.safe_load((ROOT / "deploy/rayservice.yaml").read_text())["spec"]
COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())


def _json_list(instruction):
    """The words of an instruction in JSON form, such as ENTRYPOINT."""
    return yaml.safe_load(re.search(rf"^{instruction} (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])


def _options(arguments):
    """What the server makes of arguments after those of the image's entry point."""
    program, command, *fixed = _json_list("ENTRYPOINT")
    assert (program, command) == ("minigpt4", "serve")
    return serve_options.parse([*fixed, *arguments])


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
    files = ("Dockerfile", "deploy/compose.yaml", "deploy/rayservice.yaml")
    names = re.findall(
        r"EXTRAS[=:] *([\w,]+)", "".join((ROOT / file).read_text() for file in files)
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


# --- Ray on Kubernetes: KubeRay's RayService ----------------------------------------------------------

RAY_PODS = {
    "head": RAY["rayClusterConfig"]["headGroupSpec"],
    **{group["groupName"]: group for group in RAY["rayClusterConfig"]["workerGroupSpecs"]},
}


@pytest.mark.parametrize("name", RAY_PODS)
def test_pods_of_the_rayservice_have_the_schema_of_kubernetes(name):
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}
    pod |= {"spec": RAY_PODS[name]["template"]["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    (container,) = pod["spec"]["containers"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == mounts


def test_the_rayservice_runs_the_server():
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema(**yaml.safe_load(RAY["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert (module, name) == (serve_ray.__name__, serve_ray.build.__name__)
    options = serve_ray.parse(application.args)
    assert application.name == "minigpt4" and options.ray_models == "1:4" and options.ray_gpus == 1
    head, worker = (RAY_PODS[name]["template"]["spec"] for name in ("head", "gpu"))
    keys = {mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert {options.model, str(options.api_key_file.parent)} <= keys
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == options.ray_gpus
    for pod in (head, worker):
        assert options.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert worker["containers"][0]["readinessProbe"]["httpGet"]["port"] == config.http_options.port
    version = importlib.metadata.version("ray")
    assert RAY["rayClusterConfig"]["rayVersion"] <= version


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
