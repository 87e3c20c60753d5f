"""The files that are tested, as data."""

import json
import re
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
AWS: Final = ROOT / "cluster.yaml"
ON_PREMISES: Final = ROOT / "cluster-onprem.yaml"
KUBERNETES: Final = ROOT / "deploy" / "raycluster.yaml"
NODE_ENVIRONMENT: Final = ROOT / "deploy" / "node.env"
DOCKERFILE: Final = ROOT / "Dockerfile"


def load(path: Path) -> Any:
    """The first document of a YAML file."""
    return load_all(path)[0]


def load_all(path: Path) -> list[Any]:
    """All documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def node_environment() -> dict[str, str]:
    """What `deploy/node.env` sets."""
    lines = NODE_ENVIRONMENT.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def groups(cluster: Any) -> dict[str, Any]:
    """The kinds of pods of a RayCluster, by name."""
    spec = cluster["spec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def resources_of(path: Path) -> dict[str, set[str]]:
    """The resources of each kind of node: which of ours, and Ray's CPU."""
    document = load(path)
    if path == AWS:
        return {name: set(kind["resources"]) for name, kind in document["available_node_types"].items()}
    if path == KUBERNETES:
        return {name: set(group["resources"]) for name, group in groups(document).items()}
    (worker,) = re.findall(r"--resources='([^']+)'", " ".join(document["worker_start_ray_commands"]))
    return {"head": {"CPU"}, "worker": {"CPU", *json.loads(worker)}}


def given_settings(path: Path) -> dict[str, str]:
    """The settings of Gavel that a file gives to `gavel up`, and their values (empty where a secret is named)."""
    document = load(path)
    if path == KUBERNETES:
        (container,) = groups(document)["head"]["template"]["spec"]["containers"]
        variables = {one["name"]: one.get("value", "") for one in container["env"]}
        return {name: value for name, value in variables.items() if name.startswith("GAVEL_")}
    return dict(re.findall(r"--setenv=(GAVEL_\w+)=(\S+)", " ".join(document["head_start_ray_commands"])))
