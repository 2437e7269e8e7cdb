"""The files of deploy/kubernetes themselves: what is listed, and the rules they are made of."""

import subprocess

import yaml

from tests.deploy.validators import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
RULES = ROOT / "deploy" / "prometheus" / "rules"


def test_every_manifest_is_listed_and_every_listed_one_exists() -> None:
    for folder in ("base", "redis", "overlays/example"):
        path = KUBERNETES / folder
        kustomization = yaml.safe_load((path / "kustomization.yaml").read_text())
        listed = kustomization["resources"] + [
            patch["path"] for patch in kustomization.get("patches", [])
        ]
        assert all((path / name).exists() for name in listed)
        assert {name for name in listed if not name.startswith("..")} == {
            file.name for file in path.glob("*.yaml") if file.name != "kustomization.yaml"
        }


def test_the_rules_become_prometheus_rules_without_a_second_copy() -> None:
    done = subprocess.run(
        ["sh", str(KUBERNETES / "prometheus-rules.sh"), "release=kube-prometheus-stack"],
        capture_output=True,
        text=True,
        check=True,
    )
    made = list(yaml.safe_load_all(done.stdout))
    files = sorted(RULES.glob("*.yml"))
    assert [each["metadata"]["name"] for each in made] == [f"deshift-{f.stem}" for f in files]
    for each, file in zip(made, files, strict=True):
        assert (each["apiVersion"], each["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
        assert each["metadata"]["labels"]["release"] == "kube-prometheus-stack"
        assert each["spec"] == yaml.safe_load(file.read_text())
