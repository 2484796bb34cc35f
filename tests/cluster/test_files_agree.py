"""The files that start a cluster agree with each other and with the project, and hold no secret."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
from cluster_files import (
    CREDENTIALS,
    FILES,
    FOLDER,
    KUBERAY,
    LAUNCHED,
    PINS,
    PROJECT,
    ROOT,
    cluster_of,
    load,
    pods,
    slurm,
    text,
)

from pipeline import config


def test_all_name_one_image_of_this_version() -> None:
    images = {
        *(load(name)["docker"]["image"] for name in LAUNCHED),
        *(container["image"] for name in KUBERAY for pod in pods(name) for container in pod["spec"]["containers"]),
        *re.findall(r"docker build .*-t (\S+) \.", text("Dockerfile")),
    }
    assert images == {f"registry.example.com/odedit:{PROJECT['project']['version']}"}


def test_versions_are_those_of_the_project() -> None:
    from packaging.specifiers import SpecifierSet

    (python,) = re.findall(r"^FROM python:(\S+?)-slim", text("Dockerfile"), flags=re.MULTILINE)
    assert python in SpecifierSet(PROJECT["project"]["requires-python"])
    assert python == PROJECT["tool"]["mypy"]["python_version"]
    assert {cluster_of(name)["rayVersion"] for name in KUBERAY} == {PINS["ray"]}
    installs = re.findall(r"^RUN pip install (.*)$", text("Dockerfile"), flags=re.MULTILINE)
    assert len(installs) == 2 and all("-c constraints.txt" in line for line in installs)
    # Without a pin, the newest version on the day of the build.
    assert {"torch", "boto3"} <= set(installs[0].split()) & set(PINS)


def test_the_image_gets_everything_that_its_build_needs_and_nothing_else() -> None:
    copied = {
        name
        for line in re.findall(r"^COPY (.*)$", text("Dockerfile"), flags=re.MULTILINE)
        for name in line.split()[:-1]
    }
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert copied == packages | files and all((ROOT / name).exists() for name in copied)
    lines = [line for line in text("Dockerfile.dockerignore").splitlines() if not line.startswith("#")]
    assert lines[0] == "*" and {line[1:] for line in lines if line.startswith("!")} == copied


def environment(name: str) -> dict[str, str | None]:
    """Variables that a container gets, by value; None: from a Secret."""
    if name in LAUNCHED:
        options = [option.removeprefix("--env=") for option in load(name)["docker"]["run_options"] if "--env" in option]
        return dict(option.split("=", 1) for option in options)
    first, *others = [pod["spec"]["containers"][0]["env"] for pod in pods(name)]
    assert all(env == first for env in others)
    return {item["name"]: item.get("value") for item in first}


def test_every_node_demands_the_token_and_has_the_same_storage() -> None:
    for name in (*LAUNCHED, *KUBERAY):
        env = environment(name)
        assert env["RAY_AUTH_MODE"] == "token", name
        assert env["HF_HOME"] == "/shared/huggingface", name
    for name in LAUNCHED:
        assert "--volume=/shared:/shared" in load(name)["docker"]["run_options"]
    for name in KUBERAY:
        for pod in pods(name):
            claims = {item["name"]: item.get("persistentVolumeClaim") for item in pod["spec"]["volumes"]}
            mounts = {item["mountPath"]: item["name"] for item in pod["spec"]["containers"][0]["volumeMounts"]}
            assert claims[mounts["/shared"]] == {"claimName": load("storage.yaml")["metadata"]["name"]}
        assert cluster_of(name)["authOptions"] == {"mode": "token"}
    assert "RAY_AUTH_MODE=token" in text("slurm.sh")


def test_kubernetes_gives_every_credential_that_is_documented_and_only_from_the_secret() -> None:
    from mlflow.environment_variables import MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_USERNAME

    assert CREDENTIALS[:2] == (MLFLOW_TRACKING_USERNAME.name, MLFLOW_TRACKING_PASSWORD.name)
    for name in KUBERAY:
        assert {key for key, value in environment(name).items() if value is None} == {*CREDENTIALS, "AWS_ENDPOINT_URL"}
        for pod in pods(name):
            for item in pod["spec"]["containers"][0]["env"]:
                assert ("value" in item) or item["valueFrom"]["secretKeyRef"]["key"] == item["name"]
    for key in CREDENTIALS:
        assert key in text("run.yaml"), key


def test_the_run_takes_as_many_gpu_workers_as_each_file_starts() -> None:
    gpus = {
        "onprem.yaml": len(load("onprem.yaml")["provider"]["worker_ips"]),
        "aws.yaml": load("aws.yaml")["available_node_types"]["gpu"]["min_workers"],
        "slurm.sh": int(slurm("nodes")) * int(slurm("gpus-per-node")),
    }
    for name in KUBERAY:
        (group,) = cluster_of(name)["workerGroupSpecs"]
        assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        gpus[name] = group["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
    run = config.load(FOLDER / "run.yaml", [])
    assert set(gpus.values()) == {run.pipeline.actors}, gpus


def test_containers_run_as_the_images_user_whose_home_holds_the_token() -> None:
    dockerfile = text("Dockerfile")
    (uid,) = re.findall(r"^ARG UID=(\d+)$", dockerfile, flags=re.MULTILINE)
    (home,) = re.findall(r"^ENV HOME=(\S+)", dockerfile, flags=re.MULTILINE)
    assert re.findall(r"^USER (.*)$", dockerfile, flags=re.MULTILINE) == ["$UID"] and int(uid) > 0
    for name in KUBERAY:
        for pod in pods(name):
            context = pod["spec"]["securityContext"]
            assert (context["runAsNonRoot"], context["runAsUser"], context["fsGroup"]) == (True, int(uid), int(uid))
            assert pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False
    for name in LAUNCHED:
        assert load(name)["file_mounts"] == {f"{home}/.ray/auth_token": "~/.ray/auth_token"}


def test_nothing_is_open_to_the_world() -> None:
    for path in FILES:
        assert not re.search(r"0\.0\.0\.0|LoadBalancer|NodePort|Ingress", path.read_text()), path.name
    assert {cluster_of(name)["headGroupSpec"]["serviceType"] for name in KUBERAY} == {"ClusterIP"}
    assert "--include-dashboard=false" in text("slurm.sh")


# A name that ends like a secret's, with a value that is neither taken from somewhere else nor empty.
SECRET = re.compile(
    r"""[\w-]*(?:password|secret|token|access_key|access_key_id|api_key|credential)s?["']?\s*[=:]\s*["']?(?![$({"'\s])[^\s"'#]{4,}"""
    r"|AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|-----BEGIN|://[^/\s:@]+:[^/\s@]+@|\b[0-9a-f]{32,}\b",
    re.IGNORECASE,
)


def secrets_in(content: str) -> list[str]:
    return [
        found
        for found in (match[0] for match in SECRET.finditer(content))
        if found not in ("auth_token: ~/.ray/auth_token", "HttpTokens: required}")
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_stands_in_a_file(path: Path) -> None:
    assert secrets_in(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "MLFLOW_TRACKING_PASSWORD: hunter22",
        "  - --env=MLFLOW_TRACKING_PASSWORD=hunter22",
        "ENV AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI",
        "aws_access_key_id = AKIAIOSFODNN7EXAMPLE",
        "auth_token: 'super-secret'",
        "uri: https://me:word@mlflow.example.com",
        "RAY_AUTH_TOKEN=0123456789abcdef",
    ],
)
def test_a_secret_in_a_file_would_be_noticed(line: str) -> None:
    assert secrets_in(line)


def test_every_file_ships_with_the_package() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["cluster"]
    left = [path.name for path in FILES if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)]
    assert left == [] and len(FILES) >= 9


def test_the_readme_says_what_each_file_is_for() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("### On a cluster")[1].split("\n## ")[0]
    named = {
        name for cell in re.findall(r"^\| (`[^|]*) \|", section, flags=re.M) for name in re.findall(r"`([^`]+)`", cell)
    }
    assert named == {path.name for path in FILES} - {"Dockerfile.dockerignore"}
    for variable in ("RAY_AUTH_MODE=token", *CREDENTIALS):
        assert variable in section, variable
