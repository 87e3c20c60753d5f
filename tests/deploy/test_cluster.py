"""The files for Ray's cluster launcher: Ray takes them, AWS's own model takes the nodes, and they are of this code."""

import re
import shlex
import subprocess
from pathlib import Path

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from actors.shard_actor import RESOURCE as SHARD_RESOURCE
from gateway.gateway_actor import RESOURCE as GATEWAY_RESOURCE
from gavel.cluster import _ENVIRONMENT, _OBJECT_STORE_BYTES
from gavel.settings import PREFIX, Settings
from tests.deploy.manifests import (
    AWS,
    KUBERNETES,
    ON_PREMISES,
    given_settings,
    load,
    node_environment,
    resources_of,
)

TRANSCODE_RESOURCE = "gavel_transcode"
"""Of media/, which is still to come."""
OURS = {SHARD_RESOURCE, GATEWAY_RESOURCE, TRANSCODE_RESOURCE}

launched = pytest.mark.parametrize("path", [AWS, ON_PREMISES], ids=["aws", "on-premises"])
everywhere = pytest.mark.parametrize("path", [AWS, ON_PREMISES, KUBERNETES], ids=["aws", "on-premises", "kubernetes"])


def commands_of(path: Path) -> list[str]:
    """Every shell command of a file."""
    document = load(path)
    kinds = [document, *document.get("available_node_types", {}).values()]
    return [one for kind in kinds for key, value in kind.items() if key.endswith("_commands") for one in value]


@launched
def test_ray_takes_it(path: Path) -> None:
    validate_config(prepare_config(load(path)))


def test_ray_refuses_a_wrong_one() -> None:
    config = load(AWS)
    config["available_node_types"]["shard"]["resorces"] = {}
    with pytest.raises(jsonschema.ValidationError, match="resorces"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("kind", load(AWS)["available_node_types"])
def test_aws_knows_what_is_asked_of_it(kind: str) -> None:
    node = dict(load(AWS)["available_node_types"][kind]["node_config"])
    # Ray's own word; it asks for one of these.
    node["SubnetId"] = node.pop("SubnetIds")[0]
    request = {**node, "MinCount": 1, "MaxCount": 1}
    run_instances = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances")
    assert not ParamValidator().validate(request, run_instances.input_shape).generate_report()


@everywhere
def test_the_resources_are_those_of_the_code(path: Path) -> None:
    kinds = resources_of(path)
    named = set().union(*kinds.values())
    assert {SHARD_RESOURCE, GATEWAY_RESOURCE} <= named <= {"CPU", *OURS}
    assert kinds["head"] == {"CPU"}, "nothing of ours runs on the head"


@everywhere
def test_all_that_is_asked_for_finds_room(path: Path) -> None:
    document, settings = load(path), given_settings(path)
    if path == AWS:
        kinds = document["available_node_types"].values()
        rooms = [(kind["resources"], kind.get("min_workers", 0)) for kind in kinds]
    elif path == KUBERNETES:
        rooms = [(group["resources"], group["minReplicas"]) for group in document["spec"]["workerGroupSpecs"]]
    else:
        (worker,) = re.findall(r"--resources='([^']+)'", " ".join(document["worker_start_ray_commands"]))
        # One host may be gone.
        rooms = [(yaml.safe_load(worker), len(document["provider"]["worker_ips"]) - 1)]
    for resource, setting in ((SHARD_RESOURCE, "GAVEL_SHARDS"), (GATEWAY_RESOURCE, "GAVEL_GATEWAYS")):
        assert sum(int(room.get(resource, 0)) * count for room, count in rooms) >= int(settings[setting])


@everywhere
def test_the_settings_are_settings(path: Path) -> None:
    given = given_settings(path)
    fields = {name.removeprefix(PREFIX).lower(): value for name, value in given.items() if value}
    assert fields.keys() <= Settings.model_fields.keys()
    assert Settings.model_validate(fields).ray_address == "auto"


def test_the_kinds_of_nodes_are_what_they_are_for() -> None:
    kinds = load(AWS)["available_node_types"]
    spot = {name for name, kind in kinds.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {"transcode"}
    assert {name for name, kind in kinds.items() if kind["labels"].get("ray.io/market-type") == "spot"} == spot
    assert kinds["transcode"]["min_workers"] == 0
    assert min(kinds["gateway"]["min_workers"], kinds["shard"]["min_workers"]) > 1, "one node may be lost"
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert load(AWS)["max_workers"] == sum(kind.get("max_workers", 0) for kind in kinds.values())


def test_ray_is_told_what_it_is_told_on_one_machine() -> None:
    environment = node_environment()
    assert environment.items() >= _ENVIRONMENT.items()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_USE_TLS"] == "1"
    assert "RAY_AUTH_TOKEN" not in environment


@launched
def test_every_ray_is_started_with_that(path: Path) -> None:
    starts = [one for one in commands_of(path) if "/ray start" in one]
    assert len(starts) == 2
    for command in starts:
        assert "set -a; . ~/gavel/deploy/node.env; . /etc/gavel/cluster.env; set +a;" in command
        assert f"--object-store-memory={_OBJECT_STORE_BYTES}" in command


@launched
def test_the_options_of_ray_are_those_that_it_has(path: Path) -> None:
    known = {option for parameter in ray_start.params for option in parameter.opts}
    for command in commands_of(path):
        if "/ray start" in command:
            words = shlex.split(command.split("/ray start", 1)[1])
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= known


@launched
def test_each_command_is_one_for_the_shell(path: Path) -> None:
    for command in commands_of(path):
        subprocess.run(["bash", "-n", "-c", command], check=True)


@everywhere
def test_there_is_no_secret_in_it(path: Path) -> None:
    # A secret is named, never written; what looks like one of these would be one.
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"AKIA[0-9A-Z]{16}|PRIVATE KEY|postgres(ql)?://|\b\d{12}\b", text)
    for name in ("GAVEL_SECRET", "RAY_AUTH_TOKEN", "GAVEL_DATABASE_URL"):
        assert not re.search(rf"{name}=['\"\w]", text)
