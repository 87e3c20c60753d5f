"""The manifest for KubeRay, against Kubernetes's own schema; what only KubeRay defines, against its reference.

No package carries the schema of a `RayCluster`, so its fields are listed here, as KubeRay 1.7 documents them.
"""

import importlib.metadata

import kubernetes_validate
import pytest

from gavel.cluster import _ENVIRONMENT, _OBJECT_STORE_BYTES
from gavel.settings import Settings
from tests.deploy.manifests import KUBERNETES, groups, load, load_all

KUBERNETES_VERSION = "1.37"
PORT = Settings.model_fields["port"].default
SPEC_FIELDS = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "rayVersion",
    "tlsOptions",
    "workerGroupSpecs",
}
GROUP_FIELDS = {"labels", "rayStartParams", "resources", "template"}
WORKER_FIELDS = {"groupName", "maxReplicas", "minReplicas", "replicas"}
KINDS = groups(load(KUBERNETES))


def test_the_fields_are_those_of_a_ray_cluster() -> None:
    cluster = load(KUBERNETES)
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert spec.keys() == SPEC_FIELDS
    assert spec["authOptions"].keys() == {"mode", "secretName"}
    assert spec["authOptions"]["mode"] == "token"
    assert spec["tlsOptions"] == {"enabled": True}
    assert spec["gcsFaultToleranceOptions"].keys() == {"redisAddress", "redisPassword"}
    assert spec["headGroupSpec"].keys() == GROUP_FIELDS
    for group in spec["workerGroupSpecs"]:
        assert group.keys() == GROUP_FIELDS | WORKER_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("kind", KINDS)
def test_kubernetes_takes_each_pod(kind: str) -> None:
    template = KINDS[kind]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


def test_kubernetes_takes_the_door() -> None:
    (_, service) = load_all(KUBERNETES)
    kubernetes_validate.validate(service, KUBERNETES_VERSION, strict=True)
    (port,) = service["spec"]["ports"]
    (container,) = KINDS["gateway"]["template"]["spec"]["containers"]
    assert [one["containerPort"] for one in container["ports"] if one["name"] == port["targetPort"]] == [PORT]
    assert service["spec"]["selector"]["ray.io/group"] == "gateway"


def test_kubernetes_refuses_a_wrong_pod() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": {"containers": [{"name": "a", "imag": "b"}]}}
    with pytest.raises(kubernetes_validate.ValidationError, match="imag"):
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_ray_is_told_are_texts(kind: str) -> None:
    # KubeRay refuses numbers here.
    group = KINDS[kind]
    values = [*group["resources"].values(), *group["rayStartParams"].values(), *group["labels"].values()]
    assert all(isinstance(value, str) for value in values)
    assert group["rayStartParams"]["object-store-memory"] == str(_OBJECT_STORE_BYTES)


@pytest.mark.parametrize("kind", KINDS)
def test_every_ray_is_told_what_it_is_told_on_one_machine(kind: str) -> None:
    (container,) = KINDS[kind]["template"]["spec"]["containers"]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert environment.items() >= _ENVIRONMENT.items()
    assert "GAVEL_SECRET" in environment


@pytest.mark.parametrize("kind", KINDS)
def test_secrets_come_from_secrets(kind: str) -> None:
    (container,) = KINDS[kind]["template"]["spec"]["containers"]
    for variable in container["env"]:
        if variable["name"] in ("GAVEL_SECRET", "GAVEL_DATABASE_URL"):
            assert variable.keys() == {"name", "valueFrom"}
            assert variable["valueFrom"].keys() == {"secretKeyRef"}


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_in_a_pod_is_root(kind: str) -> None:
    spec = KINDS[kind]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    (container,) = spec["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_probes_are_our_own(kind: str) -> None:
    # KubeRay's would ask Ray's dashboard, and end every pod without one.
    group = KINDS[kind]
    (container,) = group["template"]["spec"]["containers"]
    alive = container["livenessProbe"]["tcpSocket"]["port"]
    assert alive == int(group["rayStartParams"].get("node-manager-port", "6379"))
    ready = container["readinessProbe"]["tcpSocket"]["port"]
    assert ready == (PORT if kind == "gateway" else alive)


def test_the_ray_is_the_one_of_the_lock() -> None:
    assert load(KUBERNETES)["spec"]["rayVersion"] == importlib.metadata.version("ray")


def test_a_gateway_fits_into_its_pod() -> None:
    (head,) = KINDS["head"]["template"]["spec"]["containers"]
    (settings,) = (one["value"] for one in head["env"] if one["name"] == "GAVEL_GATEWAY_MEMORY_MB")
    (gateway,) = KINDS["gateway"]["template"]["spec"]["containers"]
    assert gateway["resources"]["limits"]["memory"] == "4Gi"
    assert int(settings) < 4 * 1024


def test_only_transcoding_scales_from_zero() -> None:
    assert {name for name, group in KINDS.items() if group.get("minReplicas") == 0} == {"transcode"}
