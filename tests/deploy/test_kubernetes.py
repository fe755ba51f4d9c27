"""The manifests are valid for Kubernetes, and fit this server."""

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.files import DEPLOY, configured, document, documents, entrypoint, instructions, size
from weft.api.access.exposure import require_safe
from weft.config import WeftConfig
from weft.metrics import Metrics

BASE = DEPLOY / "kubernetes"
CUDA = DEPLOY / "kubernetes-cuda"
VERSIONS = ("1.30", "1.37")  # the oldest that has preStop.sleep, and the newest there are schemas for
ENGINE_STOP_S = 31  # api/serve.py: 30 s for the engine, 1 s for the calls that are left


def resources() -> list[Any]:
    return [found for name in document(BASE / "kustomization.yaml")["resources"] for found in documents(BASE / name)]


def one(kind: str) -> Any:
    [found] = [resource for resource in resources() if resource["kind"] == kind]
    return found


def pod() -> Any:
    return one("Deployment")["spec"]["template"]["spec"]


def container() -> Any:
    [only] = pod()["containers"]
    return only


def cuda_container() -> Any:
    [only] = document(CUDA / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
    return only


def config(args: list[str], monkeypatch: pytest.MonkeyPatch) -> WeftConfig:
    found, words = configured([*entrypoint(), *args], {}, monkeypatch)
    assert found is not None, words
    return found


def image(instruction: str) -> list[str]:
    return [argument for name, argument in instructions(DEPLOY / "Dockerfile") if name == instruction]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(version: str) -> None:
    for resource in resources():
        kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize(
    ("probe", "field"),
    [("startupProbe", "failureTreshold"), ("readinessProbe", "httpPort"), ("livenessProbe", "period")],
)
def test_a_misspelt_probe_field_would_be_seen(probe: str, field: str) -> None:
    broken = copy.deepcopy(one("Deployment"))
    broken["spec"]["template"]["spec"]["containers"][0][probe][field] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match=field):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_no_manifest_is_forgotten_by_the_kustomization() -> None:
    listed = set(document(BASE / "kustomization.yaml")["resources"])
    apart = {"kustomization.yaml", "adapter-rules.yaml"}  # the latter is for another chart
    assert {path.name for path in BASE.glob("*.yaml")} == listed | apart


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("directory", [BASE, CUDA], ids=lambda path: path.name)
def test_kustomize_renders_what_kubernetes_accepts(directory: Path) -> None:
    done = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    for resource in rendered:
        kubernetes_validate.validate(resource, VERSIONS[-1], strict=True)
        assert resource["kind"] == "Namespace" or resource["metadata"]["namespace"] == "weft"
    [deployment] = [resource for resource in rendered if resource["kind"] == "Deployment"]
    [rendered_container] = deployment["spec"]["template"]["spec"]["containers"]
    tag, limits = rendered_container["image"].partition(":")[2], rendered_container["resources"]["limits"]
    assert (tag, limits.get("nvidia.com/gpu")) == (("cuda", "1") if directory == CUDA else ("local", None))
    assert rendered_container["securityContext"] == container()["securityContext"]


@pytest.mark.parametrize("args", [container()["args"], cuda_container()["args"]], ids=["cpu", "cuda"])
def test_a_pod_has_time_to_drain(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ending_s = config(args, monkeypatch).server.drain_timeout_s + ENGINE_STOP_S
    waiting_s = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod()["terminationGracePeriodSeconds"] > waiting_s + ending_s


def test_ports_are_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    server = config(container()["args"], monkeypatch).server
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"grpc": server.port, "metrics": server.metrics_port}
    probed = [container()[f"{probe}Probe"]["httpGet"] for probe in ("startup", "readiness", "liveness")]
    assert {probe["port"] for probe in probed} == {"metrics"}
    assert [probe["path"] for probe in probed] == ["/readyz", "/readyz", "/livez"]
    for service in (found for found in resources() if found["kind"] == "Service"):
        [port] = service["spec"]["ports"]
        assert (port["port"], port["targetPort"]) == (server.port, "grpc")
    annotations = one("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(server.metrics_port)
    assert (server.host, server.metrics_host) == ("0.0.0.0", "0.0.0.0")  # kubelet and Prometheus come from outside
    policed = {rule["ports"][0]["port"] for rule in one("NetworkPolicy")["spec"]["ingress"]}
    assert policed == set(ports)


@pytest.mark.parametrize("args", [container()["args"], cuda_container()["args"]], ids=["cpu", "cuda"])
def test_the_pod_is_not_open(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS, tokens and the scrape token come from Secrets, which no manifest holds."""
    found = config(args, monkeypatch)
    assert require_safe(found.server, found.access) == []
    assert not found.access.insecure_public
    access = found.access
    files = {access.tls_cert_file, access.tls_key_file, access.token_file, access.metrics_token_file}
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container()["volumeMounts"] if mount.get("readOnly")}
    secrets = {mounts[v["name"]]: v["secret"] for v in pod()["volumes"] if "secret" in v}
    assert {file.parent for file in files if file is not None} == secrets.keys()
    assert {secret["defaultMode"] for secret in secrets.values()} == {0o440}
    assert "Secret" not in {resource["kind"] for resource in resources()}
    page = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for secret in secrets.values():
        assert re.search(rf"kubectl create secret \w+ {secret['secretName']} ", page)


def test_what_is_written_is_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = {mount["mountPath"]: mount for mount in container()["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
    assert writable == set(yaml.safe_load(image("VOLUME")[0]))
    assert str(config(container()["args"], monkeypatch).store) in writable
    claimed = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
    assert claimed == {r["metadata"]["name"] for r in resources() if r["kind"] == "PersistentVolumeClaim"}


def test_memory_holds_what_the_knobs_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = config(container()["args"], monkeypatch)
    assert knobs.engine.kv_cache_bytes
    on_cpu = knobs.residency.device_bytes + knobs.residency.host_bytes + knobs.engine.kv_cache_bytes
    limit = size(container()["resources"]["limits"]["memory"])
    assert on_cpu < limit - (4 << 30), "at least 4 GiB are left for the base and the process"
    cuda = config(cuda_container()["args"], monkeypatch)
    assert cuda.residency.host_bytes < size(cuda_container()["resources"]["limits"]["memory"]) - (8 << 30)


def test_threads_are_the_cores_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts the node's cores, not the container's."""
    cores = int(container()["resources"]["requests"]["cpu"])
    assert config(container()["args"], monkeypatch).model.num_threads == cores


def test_the_pod_may_do_nothing() -> None:
    assert one("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    context = pod()["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert [f"{context['runAsUser']}:{context['runAsGroup']}"] == image("USER")
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod()["automountServiceAccountToken"] is False
    policy = one("NetworkPolicy")["spec"]
    assert "Egress" in policy["policyTypes"]
    assert "egress" not in policy


def test_service_links_would_break_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets WEFT_PORT=tcp://… in pods for a Service called weft, unless that is switched off."""
    [linked] = {r["metadata"]["name"] for r in resources() if r["kind"] == "Service" and "clusterIP" not in r["spec"]}
    environment = {f"{linked.upper()}_PORT": "tcp://10.0.0.1:50051"}
    found, words = configured([*entrypoint(), *container()["args"]], environment, monkeypatch)
    assert found is None
    assert "WEFT_PORT" in words
    assert pod()["enableServiceLinks"] is False


def test_selectors_select_the_pods() -> None:
    labels = one("Deployment")["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        one("Deployment")["spec"]["selector"]["matchLabels"],
        one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(found["spec"]["selector"] for found in resources() if found["kind"] == "Service"),
    ]
    assert all(selector.items() <= labels for selector in selectors)


def test_the_autoscaler_follows_a_gauge_of_ours() -> None:
    spec = one("HorizontalPodAutoscaler")["spec"]
    [metric] = spec["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in {family.name for family in Metrics().registry.collect() if family.type == "gauge"}
    [rule] = document(BASE / "adapter-rules.yaml")["rules"]["custom"]
    assert rule["seriesQuery"].startswith(name + "{")
    assert spec["scaleTargetRef"]["name"] == one("Deployment")["metadata"]["name"]
    assert "replicas" not in one("Deployment")["spec"]
