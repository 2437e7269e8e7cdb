"""deploy/kubernetes, as kustomize puts it together: schemas, rights, probes, who reaches whom.

No cluster is asked. The Prometheus Operator's kinds have no schema here; what they say is checked
against what they point to.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import Settings
from server.serve import LAST_BYTES_S
from tests.deploy.test_dockerfile import FINAL, instruction
from tests.deploy.validators import ROOT, compose_config, validator

KUBERNETES = ROOT / "deploy" / "kubernetes"
# Of the Prometheus Operator; everything else must have a schema.
WITHOUT_SCHEMA = ["monitoring.coreos.com/v1/ServiceMonitor"]


@pytest.fixture(scope="module")
def built() -> str:
    """What `kubectl apply -k` of the example would apply."""
    return subprocess.run(
        [validator("kubectl"), "kustomize", str(KUBERNETES / "overlays/example")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


@pytest.fixture(scope="module")
def resources(built: str) -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    documents = list(yaml.safe_load_all(built))
    found = {(each["kind"], each["metadata"]["name"]): each for each in documents}
    assert len(found) == len(documents)
    return found


Resources = dict[tuple[str, str], dict[str, Any]]


def pod(resources: Resources, kind: str = "Deployment", name: str = "deshift") -> dict[str, Any]:
    """A workload's pod: `spec` and `metadata`."""
    return dict(resources[kind, name]["spec"]["template"])


def container(resources: Resources) -> dict[str, Any]:
    (found,) = pod(resources)["spec"]["containers"]
    return dict(found)


def validate(path: Path) -> tuple[int, list[str]]:
    """Exit status, and what has no schema."""
    done = subprocess.run(
        [validator("kubernetes-validate"), "--strict", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    output = done.stdout + done.stderr
    without = re.findall(r"schema for kind (\w+) with api version (\S+)", output)
    return done.returncode, [f"{version}/{kind}" for kind, version in without]


def test_every_resource_fits_its_schema(built: str, tmp_path: Path) -> None:
    path = tmp_path / "built.yaml"
    path.write_text(built)
    assert validate(path) == (0, WITHOUT_SCHEMA)
    path.write_text(built.replace("terminationGracePeriodSeconds", "terminationGraceSeconds"))
    assert validate(path)[0] != 0  # --strict does see a misspelt field


def test_every_pod_meets_the_restricted_standard_with_a_read_only_root(
    resources: Resources,
) -> None:
    labels = resources["Namespace", "deshift"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for kind, name in (("Deployment", "deshift"), ("StatefulSet", "deshift-redis")):
        spec = pod(resources, kind, name)["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume]
        for each in spec["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(each["resources"]["requests"])
            assert {"cpu", "memory"} <= set(each["resources"]["limits"])


def test_the_pods_user_and_volume_are_the_images(resources: Resources) -> None:
    security = pod(resources)["spec"]["securityContext"]
    assert instruction("USER", FINAL) == [f"{security['runAsUser']}:{security['runAsGroup']}"]
    assert security["fsGroup"] == security["runAsGroup"]
    mounts = {mount["mountPath"] for mount in container(resources)["volumeMounts"]}
    assert mounts == {*instruction("VOLUME", FINAL), "/tmp"}


def test_service_links_are_off(resources: Resources) -> None:
    """The Service named deshift would become DESHIFT_PORT=tcp://..., which ends the start."""
    assert ("Service", "deshift") in resources
    assert pod(resources)["spec"]["enableServiceLinks"] is False


def test_no_secret_stands_in_a_file(resources: Resources) -> None:
    assert not [kind for kind, _ in resources if kind == "Secret"]
    sources = {each["name"]: each for each in container(resources)["env"]}
    wanted = ("DESHIFT_API_KEY", "DESHIFT_ADMIN_KEYS", "REDIS_SERVER_PASSWORD")
    for name in (*wanted, "REDIS_OPERATOR_PASSWORD", "HF_TOKEN"):
        assert set(sources[name]) == {"name", "valueFrom"}
        assert sources[name]["valueFrom"]["secretKeyRef"]["name"] == "deshift"
    # Kubernetes puts in only what stands above in the list.
    order = list(sources)
    for store, password in (
        ("DESHIFT_STORE", "REDIS_SERVER_PASSWORD"),
        ("DESHIFT_ADMIN_STORE", "REDIS_OPERATOR_PASSWORD"),
    ):
        assert f":$({password})@deshift-redis:6379" in sources[store]["value"]
        assert order.index(password) < order.index(store)


def test_the_command_that_makes_the_secret_makes_every_key_that_is_asked_for(
    built: str,
) -> None:
    comment = (KUBERNETES / "overlays/example/kustomization.yaml").read_text()
    made = set(re.findall(r"--from-literal=([\w-]+)=", comment))
    asked: set[str] = set()
    for document in yaml.safe_load_all(built):
        text = json.dumps(document)
        asked |= set(re.findall(r'"secretKeyRef": \{"key": "([\w-]+)"', text))
    assert asked - made == {"hf-token"}  # optional
    assert made <= asked


def test_the_containers_environment_is_one_that_the_server_takes(resources: Resources) -> None:
    given = {
        "api-key": "client-key-77aa01",
        "admin-keys": "alice:operator-key-53c1f0",
        "redis-server-password": "one",
        "redis-operator-password": "two",
        "hf-token": "three",
    }
    environment: dict[str, str] = {}
    for each in container(resources)["env"]:
        source = each.get("valueFrom", {})
        key = source.get("secretKeyRef", {}).get("key")
        value = given[key] if key else each.get("value", "from-the-pod")
        environment[each["name"]] = re.sub(
            r"\$\((\w+)\)", lambda match: environment[match[1]], value
        )
    (reference,) = container(resources)["envFrom"]
    config_map = resources["ConfigMap", reference["configMapRef"]["name"]]
    settings = Settings.from_env(environment | config_map["data"])
    assert settings.store == "redis://deshift-server:one@deshift-redis:6379/0"
    assert settings.admin_store == "redis://deshift-operator:two@deshift-redis:6379/0"
    assert settings.model == "llava-hf/llava-1.5-7b-hf"
    assert (settings.steering_mode, settings.client_override_in_force) == ("sample", "none")
    ports = {port["name"]: port["containerPort"] for port in container(resources)["ports"]}
    assert ports == {"http": settings.port, "admin": settings.admin_port}


def test_a_pod_that_ends_has_the_time_to_drain(resources: Resources) -> None:
    pause = container(resources)["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = pod(resources)["spec"]["terminationGracePeriodSeconds"]
    probe = container(resources)["readinessProbe"]
    assert pause >= probe["periodSeconds"] * probe["failureThreshold"]
    assert grace > pause + Settings().drain_timeout_s + LAST_BYTES_S


def test_traffic_asks_for_ready_and_restarts_ask_for_health(resources: Resources) -> None:
    found = container(resources)
    asked = {
        name: found[f"{name}Probe"]["httpGet"]["path"]
        for name in ("startup", "readiness", "liveness")
    }
    assert asked == {"startup": "/health", "readiness": "/ready", "liveness": "/health"}
    startup = found["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 30 * 60


def _selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def test_every_selector_selects_the_pods_that_it_means(resources: Resources) -> None:
    server = pod(resources)["metadata"]["labels"]
    redis = pod(resources, "StatefulSet", "deshift-redis")["metadata"]["labels"]
    selectors = {
        (kind, name): each["spec"].get("selector") or each["spec"].get("podSelector")
        for (kind, name), each in resources.items()
        if kind in ("Deployment", "StatefulSet", "Service", "NetworkPolicy", "PodDisruptionBudget")
    }
    assert len(selectors) == 8
    for (kind, name), selector in selectors.items():
        labels = selector.get("matchLabels", selector)
        is_redis = name == "deshift-redis"
        assert _selects(labels, redis) is is_redis, (kind, name)
        assert _selects(labels, server) is not is_redis, (kind, name)
    for each in pod(resources)["spec"]["topologySpreadConstraints"]:
        assert _selects(each["labelSelector"]["matchLabels"], server)


def _peers(rules: list[dict[str, Any]], side: str) -> dict[Any, list[dict[str, Any]]]:
    return {port["port"]: rule[side] for rule in rules for port in rule["ports"]}


def test_clients_reach_the_api_alone_and_operators_their_listener_alone(
    resources: Resources,
) -> None:
    policy = resources["NetworkPolicy", "deshift"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    peers = _peers(policy["ingress"], "from")
    assert set(peers) == {"http", "admin"}
    (client,) = peers["http"]
    assert client["podSelector"]["matchLabels"] == {"deshift.io/access": "client"}
    operators = [selector["matchLabels"] for peer in peers["admin"] for selector in peer.values()]
    assert operators == [{"deshift.io/access": "operator"}] * 2


def test_the_server_reaches_redis_and_names_and_by_a_patch_the_hub(resources: Resources) -> None:
    policy = resources["NetworkPolicy", "deshift"]["spec"]
    peers = _peers(policy["egress"], "to")
    assert set(peers) == {53, 6379, 443}
    redis = pod(resources, "StatefulSet", "deshift-redis")["metadata"]["labels"]
    (peer,) = peers[6379]
    assert _selects(peer["podSelector"]["matchLabels"], redis)
    (names,) = peers[53]
    assert names["podSelector"]["matchLabels"] == {"k8s-app": "kube-dns"}
    base = yaml.safe_load((KUBERNETES / "base/networkpolicy.yaml").read_text())
    assert set(_peers(base["spec"]["egress"], "to")) == {53, 6379}


def test_redis_is_reached_by_replicas_alone_and_reaches_nothing(resources: Resources) -> None:
    policy = resources["NetworkPolicy", "deshift-redis"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"} and "egress" not in policy
    ((peer,),) = [rule["from"] for rule in policy["ingress"]]
    assert _selects(peer["podSelector"]["matchLabels"], pod(resources)["metadata"]["labels"])


def test_redis_runs_on_the_files_and_the_image_of_compose(resources: Resources) -> None:
    (redis,) = pod(resources, "StatefulSet", "deshift-redis")["spec"]["containers"]
    composed = compose_config()["services"]["redis"]
    assert (redis["image"], redis["command"]) == (composed["image"], composed["command"])
    (volume,) = [
        each
        for each in pod(resources, "StatefulSet", "deshift-redis")["spec"]["volumes"]
        if each["name"] == "config"
    ]
    files = resources["ConfigMap", volume["configMap"]["name"]]["data"]
    assert files == {
        name: (ROOT / "deploy/redis" / name).read_text()
        for name in ("redis.conf", "users.acl", "start.sh")
    }


def test_the_metrics_that_are_scraped_and_scaled_by_are_there(resources: Resources) -> None:
    monitor = resources["ServiceMonitor", "deshift"]["spec"]
    service = resources["Service", "deshift-admin"]
    assert _selects(monitor["selector"]["matchLabels"], service["metadata"]["labels"])
    clients = resources["Service", "deshift"]["metadata"]["labels"]
    assert not _selects(monitor["selector"]["matchLabels"], clients)
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert endpoint["path"] == job["metrics_path"]
    assert monitor["sampleLimit"] == job["sample_limit"]
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": job["job_name"]}]
    scaler = resources["HorizontalPodAutoscaler", "deshift"]["spec"]
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] == "deshift_num_requests_waiting"
    families = "".join(path.read_text() for path in (ROOT / "server/metrics").glob("*.py"))
    assert "num_requests_waiting" in families
    assert scaler["minReplicas"] >= 2  # a disruption that takes one leaves one
    assert "replicas" not in resources["Deployment", "deshift"]["spec"]
