"""The files that start a cluster agree with each other and with the project, and contain no secret."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.config import run as config
from tests.support.cluster_files import (
    CREDENTIALS,
    FILES,
    FOLDER,
    KUBERAY,
    LAUNCHED,
    MAKE_TOKEN,
    NO_METRICS,
    PINS,
    PROJECT,
    ROOT,
    all_pods,
    cluster_of,
    commands,
    load,
    page,
    pods,
    slurm,
    text,
)


def test_all_name_one_image_of_this_version() -> None:
    images = {
        *(load(name)["docker"]["image"] for name in LAUNCHED),
        *(container["image"] for name in KUBERAY for pod in all_pods(name) for container in pod["spec"]["containers"]),
        *re.findall(r"docker build .*-t (\S+) \.", text("Dockerfile")),
    }
    assert images == {f"registry.example.com/odedit:{PROJECT['project']['version']}"}


def test_versions_are_those_of_the_project() -> None:
    from packaging.specifiers import SpecifierSet

    base = r"^FROM python:([\d.]+)-slim-\w+@sha256:[0-9a-f]{64}$"
    (python,) = re.findall(base, text("Dockerfile"), flags=re.MULTILINE)
    assert python in SpecifierSet(PROJECT["project"]["requires-python"])
    assert python.startswith(PROJECT["tool"]["mypy"]["python_version"] + ".")
    assert {cluster_of(name)["rayVersion"] for name in KUBERAY} == {PINS["ray"]}
    installs = re.findall(r"^RUN pip install (.*)$", text("Dockerfile"), flags=re.MULTILINE)
    assert len(installs) == 2 and all("-c constraints.txt" in line for line in installs)
    # Without a pin, the image would get the newest version on the day of its build.
    assert {"torch", "boto3"} <= set(installs[0].split()) & set(PINS)
    # The database driver of a search's storage at postgresql+psycopg://.
    assert installs[1].endswith(" .") and [
        line for line in PROJECT["project"]["dependencies"] if line.startswith("psycopg[binary]")
    ]


def test_everything_that_the_project_needs_in_turn_is_pinned() -> None:
    needed = {*PROJECT["project"]["dependencies"]}
    for lines in PROJECT["project"]["optional-dependencies"].values():
        needed |= {*lines}
    names = installed_for(needed)
    assert len(names) > 100 and names - {"pip"} <= PINS.keys(), sorted(names - PINS.keys())
    # Dependencies that only the CUDA build of torch has.
    assert {"cuda-bindings", "cuda-pathfinder", "nvidia-nvjitlink", "triton"} <= PINS.keys()


def installed_for(requirements: Iterable[str]) -> set[str]:
    """Installed distributions that requirements bring, with their own dependencies."""
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            try:
                lines = requires(name) or []
            except PackageNotFoundError:  # not on this platform
                continue
            seen.add((name, extra))
            more = [Requirement(line) for line in lines]
            waiting += [item for item in more if item.marker is None or item.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


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


def environment(name: str) -> dict[str, str]:
    """Environment variables of a container, without those of a Secret."""
    if name in LAUNCHED:
        options = [option.removeprefix("--env=") for option in load(name)["docker"]["run_options"] if "--env" in option]
        return dict(option.split("=", 1) for option in options)
    first, *others = [pod["spec"]["containers"][0]["env"] for pod in pods(name)]
    assert all(env == first for env in others)
    return {item["name"]: item["value"] for item in first}


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


def test_every_node_on_kubernetes_gets_all_of_the_secret_if_there_is_one() -> None:
    from mlflow import environment_variables as mlflow

    names = [getattr(mlflow, name).name for name in CREDENTIALS if name.startswith("MLFLOW_")]
    assert tuple(names) == CREDENTIALS[:3]
    for name in KUBERAY:
        for pod in pods(name):
            (container,) = pod["spec"]["containers"]
            assert container["envFrom"] == [{"secretRef": {"name": "odedit-secrets", "optional": True}}]
        assert not environment(name).keys() & {*CREDENTIALS}
    for key in (*CREDENTIALS, "AWS_ENDPOINT_URL"):
        assert key in text("raycluster.yaml"), key


def test_no_node_opens_a_metrics_port() -> None:
    """The image sets the variables, and no file overrides them."""
    image = dict(re.findall(r"^(?:ENV| {3}) (\w+)=(\S+)", text("Dockerfile"), flags=re.MULTILINE))
    assert NO_METRICS.items() <= image.items()
    for name in (*LAUNCHED, *KUBERAY):
        assert not environment(name).keys() & NO_METRICS.keys()
    line = " ".join(f"{key}={value}" for key, value in NO_METRICS.items())
    assert f"\nexport {line}\n" in text("slurm.sh")
    assert f" {line}\n" in page()


def test_the_token_is_made_alike_everywhere() -> None:
    for name in LAUNCHED:
        assert MAKE_TOKEN in commands(name)
    assert f"\n    {MAKE_TOKEN}\n" in page()
    for content in (*map(text, (path.name for path in FILES)), page()):
        assert content.count("get-auth-token") == content.count(MAKE_TOKEN)


def test_only_pods_of_the_clusters_reach_each_other_and_kuberay_the_dashboard() -> None:
    policy = load("network.yaml")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    for name in KUBERAY:
        for pod in all_pods(name):
            assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    among, kuberay = policy["ingress"]
    assert among == {"from": [{"podSelector": policy["podSelector"]}]}
    assert [port["port"] for port in kuberay["ports"]] == [8265]
    assert kuberay["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}


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
    run = config.from_dict(config.read_yaml(FOLDER / "run.yaml"))
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
            assert context["fsGroupChangePolicy"] == "OnRootMismatch"
        for pod in all_pods(name):
            assert pod["spec"]["securityContext"]["runAsUser"] == int(uid)
    parameters = load("efs.yaml")["parameters"]
    assert (parameters["uid"], parameters["gid"], parameters["provisioningMode"]) == (uid, uid, "efs-ap")
    for name in LAUNCHED:
        assert load(name)["file_mounts"] == {f"{home}/.ray/auth_token": "~/.ray/auth_token"}


def test_nothing_is_open_to_the_world() -> None:
    for path in FILES:
        assert not re.search(r"0\.0\.0\.0|LoadBalancer|NodePort|kind: Ingress|enableIngress", path.read_text()), (
            path.name
        )
    assert {cluster_of(name)["headGroupSpec"]["serviceType"] for name in KUBERAY} == {"ClusterIP"}
    assert "--include-dashboard=false" in text("slurm.sh")


# A name with the ending of a secret, and a literal value.
SECRET = re.compile(
    r"""[\w-]*(?:password|secret|token|access_key|access_key_id|api_key|credential)s?["']?\s*[=:]\s*["']?(?![$({*&"'\s])[^\s"'#]{4,}"""
    r"|AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|-----BEGIN|://[^/\s:@]+:[^/\s@]+@|(?<!@sha256:)\b[0-9a-f]{32,}\b",
    re.IGNORECASE,
)


def secrets_in(content: str) -> list[str]:
    matches = (match[0] for match in SECRET.finditer(content))
    return [text for text in matches if text not in ("auth_token: ~/.ray/auth_token", "HttpTokens: required}")]


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


def test_the_page_says_what_each_file_is_for() -> None:
    named = {
        name for cell in re.findall(r"^\| (`[^|]*) \|", page(), flags=re.M) for name in re.findall(r"`([^`]+)`", cell)
    }
    assert named == {path.name for path in FILES} - {"Dockerfile.dockerignore"}
    for variable in ("RAY_AUTH_MODE=token", *CREDENTIALS):
        assert variable in page(), variable


def test_an_installed_package_has_every_file_that_is_no_code() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for package in ("odedit", "pipeline", "tune", "cluster"):
        folder = ROOT / package
        installed = {path for pattern in patterns[package] for path in folder.glob(pattern)}
        files = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert {path.relative_to(ROOT) for path in files - installed} <= {Path("pipeline/config/VERSION")}
