"""Permissions of the machines of `aws.yaml`, compared with Ray's calls to a simulated AWS (moto)."""

from __future__ import annotations

import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

from pipeline.config import run
from tests.support.cluster_files import FOLDER, load, text

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
REGION = load("aws.yaml")["provider"]["region"]


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """AWS account with the roles of `aws-roles.yaml`."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    with mock_aws():
        boto3.client("cloudformation", REGION).create_stack(
            StackName="odedit-roles", TemplateBody=text("aws-roles.yaml"), Capabilities=["CAPABILITY_NAMED_IAM"]
        )
        yield


def document(value: Any) -> list[dict[str, Any]]:
    # moto returns an inline policy as a printed Python dict, which is valid YAML.
    policy = yaml.safe_load(urllib.parse.unquote(value)) if isinstance(value, str) else value
    return policy["Statement"]


def statements(role: str) -> list[dict[str, Any]]:
    """All statements of a role's policies."""
    iam = boto3.client("iam")
    result: list[dict[str, Any]] = []
    for name in iam.list_role_policies(RoleName=role)["PolicyNames"]:
        result += document(iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"])
    for policy in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]:
        version = iam.get_policy(PolicyArn=policy["PolicyArn"])["Policy"]["DefaultVersionId"]
        got = iam.get_policy_version(PolicyArn=policy["PolicyArn"], VersionId=version)
        result += document(got["PolicyVersion"]["Document"])
    return result


def actions(statement: dict[str, Any]) -> set[str]:
    named = statement["Action"]
    return {named} if isinstance(named, str) else set(named)


def allowed(role: str) -> set[str]:
    return set().union(*map(actions, statements(role)))


def profile(node_type: str) -> str:
    arn = load("aws.yaml")["available_node_types"][node_type]["node_config"]["IamInstanceProfile"]["Arn"]
    return str(arn).split("/")[-1]


@pytest.mark.usefixtures("stack")
def test_every_machine_has_a_profile_of_its_own_with_its_role() -> None:
    for node_type, role in (("head", "odedit-head"), ("gpu", "odedit-worker")):
        got = boto3.client("iam").get_instance_profile(InstanceProfileName=profile(node_type))["InstanceProfile"]
        assert [item["RoleName"] for item in got["Roles"]] == [role]
        for statement in statements(role):
            if any(action.startswith("s3:") for action in actions(statement)):
                bucket = statement["Resource"].split(":::")[1].split("/")[0]
                assert run.read_yaml(FOLDER / "run.yaml")["out"].startswith(f"s3://{bucket}/")
    assert {action.split(":")[0] for action in allowed("odedit-worker")} == {"s3"}


@pytest.mark.usefixtures("stack")
def test_the_head_may_do_what_ray_does_there_and_nothing_that_it_does_not() -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.aws.utils import resource_cache
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

    values = load("aws.yaml")
    resource_cache.cache_clear()
    provider = AWSNodeProvider(values["provider"], values["cluster_name"])
    done: set[str] = set()
    for ec2 in (provider.ec2, provider.ec2_fail_fast):
        ec2.meta.client.meta.events.register("before-call.ec2.*", lambda model, **_: done.add(f"ec2:{model.name}"))
    client = boto3.client("ec2", REGION)
    node_config = values["available_node_types"]["gpu"]["node_config"] | {
        "ImageId": client.describe_images()["Images"][0]["ImageId"],
        "SubnetIds": [client.describe_subnets()["Subnets"][0]["SubnetId"]],
    }
    del node_config["IamInstanceProfile"]  # the example account's, which moto does not have
    (node,) = provider.create_node(node_config, {"ray-node-type": "worker"}, 1)
    assert provider.non_terminated_nodes({"ray-node-type": "worker"}) == [node]
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    assert provider.node_tags(node)[TAG_RAY_CLUSTER_NAME] == values["cluster_name"]
    provider.terminate_nodes([node])
    resource_cache.cache_clear()
    assert {"ec2:RunInstances", "ec2:CreateTags", "ec2:DescribeInstances", "ec2:TerminateInstances"} == done
    assert {action for action in allowed("odedit-head") if action.startswith("ec2:")} == done
    assert allowed("odedit-head") - done == allowed("odedit-worker") | {"iam:PassRole"}


@pytest.mark.usefixtures("stack")
def test_the_head_changes_and_ends_machines_of_its_cluster_alone_and_hands_on_the_workers_role_alone() -> None:
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

    cluster = load("aws.yaml")["cluster_name"]
    bound = {
        "ec2:TerminateInstances": {f"aws:ResourceTag/{TAG_RAY_CLUSTER_NAME}": cluster},
        "ec2:CreateTags": {f"aws:ResourceTag/{TAG_RAY_CLUSTER_NAME}": cluster},
        "iam:PassRole": {"iam:PassedToService": "ec2.amazonaws.com"},
    }
    started = {f"aws:RequestTag/{TAG_RAY_CLUSTER_NAME}": cluster}
    for statement in statements("odedit-head"):
        condition = statement.get("Condition", {}).get("StringEquals")
        resources = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        for action in actions(statement):
            assert "*" not in action
            if action == "ec2:RunInstances" and any(":instance/" in resource for resource in resources):
                assert condition == started
            elif action in bound:
                assert condition in (bound[action], {"ec2:CreateAction": "RunInstances"} if "Tags" in action else None)
            if action == "iam:PassRole":
                assert [resource.split("/")[-1] for resource in resources] == ["odedit-worker"]


@pytest.mark.parametrize(("owner", "done"), [("0", "chown 1000:1000 /shared\n"), ("1000", ""), ("1234", "")])
def test_a_fresh_file_system_is_given_to_the_images_user_and_no_other(tmp_path: Path, owner: str, done: str) -> None:
    (uid,) = [line.split("=")[1] for line in text("Dockerfile").splitlines() if line.startswith("ARG UID=")]
    assert uid == "1000"
    (command,) = [line for line in load("aws.yaml")["initialization_commands"] if "chown" in line]
    for name, script in (("stat", f'[[ "$*" == "-c %u /shared" ]] && echo {owner}'), ("sudo", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    given = subprocess.run(
        ["bash", "-c", command], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, timeout=20
    )
    assert (given.returncode, given.stdout) == (0, done)
