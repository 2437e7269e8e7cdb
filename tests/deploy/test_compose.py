"""docker-compose.yml, as compose itself reads it: secrets, rights, networks, limits, mounts."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import Settings
from server.serve import LAST_BYTES_S
from tests.deploy.validators import ROOT, SECRETS, compose_config, run_compose

# Built here; every other image comes from a registry.
OWN = "deshift"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return compose_config()


@pytest.fixture(scope="module")
def services(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(config["services"])


@pytest.mark.parametrize("missing", SECRETS)
def test_each_secret_has_no_default_and_is_named_when_it_is_missing(missing: str) -> None:
    for given in ({}, {missing: ""}):
        others = {name: value for name, value in SECRETS.items() if name != missing}
        done = run_compose("config", **others, **given)
        assert done.returncode != 0
        assert f"required variable {missing} is missing a value" in done.stderr
        assert not any(value in done.stdout for value in SECRETS.values())


def test_the_example_environment_names_every_secret_and_holds_none() -> None:
    lines = (ROOT / "deploy/env.example").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [
        f"{name}=" for name in SECRETS
    ]


def test_every_variable_of_the_file_is_in_the_example_environment() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text)) | set(re.findall(r"^      ([A-Z_]+):$", text, re.M))
    example = set(re.findall(r"^#?(\w+)=", (ROOT / "deploy/env.example").read_text(), re.M))
    assert {"MODEL", "DESHIFT_SCHEDULE"} <= used  # the expressions do find names
    assert used <= example


def test_no_service_runs_as_root_or_may_become_it(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == {"deshift", "redis", "prometheus", "grafana"}
    for name, service in services.items():
        user = int(service["user"].split(":")[0])
        assert user > 0, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "devices", "pid", "network_mode"} & set(service), name


def test_every_service_is_limited_restarted_and_its_log_rotated(
    services: dict[str, dict[str, Any]],
) -> None:
    for name, service in services.items():
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) > 0 and int(limits["memory"]) > 0, name
        assert 0 < limits["pids"] <= 512, name
        assert service["restart"] == "unless-stopped", name
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}, name


def test_images_are_pinned_to_an_exact_version(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert re.search(r":v?\d+\.\d+\.\d+(-[\w.]+)?$", service["image"]), service["image"]
        assert ("build" in service) == (name == OWN)


def test_redis_and_prometheus_are_published_nowhere_and_the_rest_on_this_machine_only(
    services: dict[str, dict[str, Any]],
) -> None:
    published = {
        (name, port["target"], port.get("host_ip"))
        for name, service in services.items()
        for port in service.get("ports", [])
    }
    assert published == {
        ("deshift", 8000, "127.0.0.1"),
        ("deshift", 8001, "127.0.0.1"),
        ("grafana", 3000, "127.0.0.1"),
    }


def test_only_the_clients_port_can_be_opened_to_other_machines() -> None:
    ports = compose_config(CLIENT_ADDRESS="0.0.0.0", OPERATOR_PORT="9001")["services"]["deshift"][
        "ports"
    ]
    assert [(port["host_ip"], port["published"]) for port in ports] == [
        ("0.0.0.0", "8000"),
        ("127.0.0.1", "9001"),
    ]


def test_redis_shares_a_network_with_the_server_alone_and_it_leads_nowhere(
    config: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    members = {
        network: {name for name, service in services.items() if network in service["networks"]}
        for network in config["networks"]
    }
    assert members == {
        "clients": {"deshift"},
        "operators": {"deshift", "prometheus", "grafana"},
        "data": {"deshift", "redis"},
    }
    assert config["networks"]["data"]["internal"] is True


def test_each_service_has_a_health_check_and_waits_for_what_it_needs(
    services: dict[str, dict[str, Any]],
) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name, service in services.items():
        assert "healthcheck" in service or (name == OWN and "HEALTHCHECK" in dockerfile), name
    waits = {name: service.get("depends_on", {}) for name, service in services.items()}
    assert {
        (name, other, how["condition"]) for name, w in waits.items() for other, how in w.items()
    } == {
        ("deshift", "redis", "service_healthy"),
        ("grafana", "prometheus", "service_healthy"),
    }


def test_what_is_mounted_exists_and_cannot_be_written(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        for mount in service.get("volumes", []):
            if mount["type"] == "bind":
                assert mount["read_only"] is True, (name, mount)
                assert Path(mount["source"]).is_dir(), (name, mount)


def test_what_must_survive_lies_in_a_named_volume(
    config: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    kept = {
        (name, mount["source"], mount["target"])
        for name, service in services.items()
        for mount in service.get("volumes", [])
        if mount["type"] == "volume"
    }
    assert kept == {
        ("deshift", "models", "/var/lib/deshift"),
        ("redis", "redis", "/data"),
        ("prometheus", "prometheus", "/prometheus"),
        ("grafana", "grafana", "/var/lib/grafana"),
    }
    assert set(config["volumes"]) == {source for _, source, _ in kept}


def environment(**given: str) -> dict[str, str]:
    service = compose_config(**given)["services"][OWN]
    return {name: value for name, value in service["environment"].items() if value is not None}


def test_the_servers_environment_is_one_that_the_server_takes() -> None:
    settings = Settings.from_env(environment())
    assert not settings.model  # the image's command then serves the demonstration
    assert (settings.admin_host, settings.log_format) == ("0.0.0.0", "json")
    assert settings.client_override_in_force == "none"
    other = environment(MODEL="some/model", DESHIFT_STEERING_MODE="sample", DESHIFT_ALPHA="0.5")
    settings = Settings.from_env(other)
    assert (settings.model, settings.steering_mode, settings.alpha) == ("some/model", "sample", 0.5)


def test_each_store_url_has_its_own_users_password() -> None:
    found = environment()
    password = SECRETS["REDIS_SERVER_PASSWORD"]
    assert found["DESHIFT_STORE"] == f"redis://deshift-server:{password}@redis:6379/0"
    password = SECRETS["REDIS_OPERATOR_PASSWORD"]
    assert found["DESHIFT_ADMIN_STORE"] == f"redis://deshift-operator:{password}@redis:6379/0"


def test_a_server_that_is_stopped_has_the_time_to_drain(
    services: dict[str, dict[str, Any]],
) -> None:
    grace = services[OWN]["stop_grace_period"]
    assert re.fullmatch(r"\d+s", grace)
    assert int(grace[:-1]) > Settings().drain_timeout_s + LAST_BYTES_S


def test_threads_are_as_many_as_processors() -> None:
    service = compose_config(SERVER_CPUS="3")["services"][OWN]
    assert service["environment"]["OMP_NUM_THREADS"] == "3"
    assert float(service["deploy"]["resources"]["limits"]["cpus"]) == 3


def test_grafana_lets_nobody_in_without_a_password(services: dict[str, dict[str, Any]]) -> None:
    found = services["grafana"]["environment"]
    assert found["GF_SECURITY_ADMIN_PASSWORD"] == SECRETS["GRAFANA_ADMIN_PASSWORD"]
    assert found["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert found["GF_USERS_ALLOW_SIGN_UP"] == "false"


def test_grafana_finds_its_dashboards_and_prometheus(services: dict[str, dict[str, Any]]) -> None:
    mounts = {mount["target"]: mount["source"] for mount in services["grafana"]["volumes"]}
    provisioning = Path(mounts["/etc/grafana/provisioning"])
    (provider,) = yaml.safe_load((provisioning / "dashboards/deshift.yml").read_text())["providers"]
    assert list(Path(mounts[provider["options"]["path"]]).glob("*.json"))
    sources = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())
    (source,) = sources["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert set(services["grafana"]["networks"]) <= set(services["prometheus"]["networks"])


def test_a_secret_reaches_only_the_services_that_use_it(
    services: dict[str, dict[str, Any]],
) -> None:
    holders = {
        secret: {name for name, service in services.items() if value in str(service)}
        for secret, value in SECRETS.items()
    }
    assert holders == {
        "DESHIFT_API_KEY": {"deshift"},
        "DESHIFT_ADMIN_KEYS": {"deshift"},
        "REDIS_SERVER_PASSWORD": {"deshift", "redis"},
        "REDIS_OPERATOR_PASSWORD": {"deshift", "redis"},
        "GRAFANA_ADMIN_PASSWORD": {"grafana"},
    }


def test_on_a_gpu_the_same_server_has_torchs_cuda_build_and_the_devices() -> None:
    files = ("docker-compose.yml", "deploy/compose.cuda.yml")
    plain, cuda = (compose_config(files=which)["services"][OWN] for which in (files[:1], files))
    assert re.fullmatch(r"https://\S+/cu\d+", cuda["build"]["args"]["TORCH_INDEX"])
    (device,) = cuda["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert cuda["build"]["context"] == plain["build"]["context"] == str(ROOT)
    changed = {"image", "build", "deploy"}
    assert {k: v for k, v in cuda.items() if k not in changed} == {
        k: v for k, v in plain.items() if k not in changed
    }
