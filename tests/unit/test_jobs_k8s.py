"""The job files for Kubernetes: valid against the published schemas, and in line with what the entrypoint does.

Core kinds are held against Kubernetes' own OpenAPI schemas, JobSet and PyTorchJob against the models that their
projects generate from theirs. What only a cluster knows (admission webhooks, storage classes) is not tested.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from configs.load import load_config
from docker.placement import placement
from docker.torchrun import SAVE_S, torchrun_arguments

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker/k8s").glob("*.yaml"))
VERSIONS = ["1.29", "1.37"]
Manifest = dict[str, Any]


def _documents(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((ROOT / "docker/k8s" / name).read_text(encoding="utf-8")))


def _jobset() -> Manifest:
    return _documents("jobset.yaml")[0]


def _job_template(jobset: Manifest) -> Manifest:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return dict(replicated["template"])


def _pod_templates() -> list[Manifest]:
    pytorchjob, deployment = _documents("pytorchjob.yaml")[0], _documents("tensorboard.yaml")[0]
    return [
        _job_template(_jobset())["spec"]["template"],
        *(replica["template"] for replica in pytorchjob["spec"]["pytorchReplicaSpecs"].values()),
        deployment["spec"]["template"],
    ]


def _core_kinds() -> list[Manifest]:
    """Everything that Kubernetes itself has a schema for, also inside of what it has none for."""
    documents = [document for path in FILES for document in _documents(path.name)]
    own = [document for document in documents if document["kind"] not in {"JobSet", "PyTorchJob"}]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **_job_template(_jobset())}
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in _pod_templates()]
    return [*own, job, *pods]


def test_there_is_a_file_for_each_part() -> None:
    kinds = {document["kind"] for path in FILES for document in _documents(path.name)}
    assert kinds >= {"JobSet", "PyTorchJob", "PersistentVolumeClaim", "Deployment", "Service", "NetworkPolicy"}


@pytest.mark.parametrize("version", VERSIONS)
def test_core_kinds_hold_against_the_schemas_of_kubernetes(version: str) -> None:
    for document in _core_kinds():
        kubernetes_validate.validate(document, version, strict=True)


def _jobset_back(document: Manifest) -> Manifest:
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    back = JobsetV1alpha2JobSet.from_dict(document)
    return dict(back.to_dict())


def _pytorchjob_back(document: Manifest) -> Manifest:
    from kubeflow.training import ApiClient

    class Response:
        data = json.dumps(document)

    client = ApiClient()
    return dict(client.sanitize_for_serialization(client.deserialize(Response, "KubeflowOrgV1PyTorchJob")))


@pytest.mark.parametrize(("name", "back"), [("jobset.yaml", _jobset_back), ("pytorchjob.yaml", _pytorchjob_back)])
def test_custom_kinds_come_back_whole_from_their_models(name: str, back: Callable[[Manifest], Manifest]) -> None:
    """A model drops what it does not know."""
    (document,) = _documents(name)
    assert back(document) == document


@pytest.mark.parametrize(("name", "back"), [("jobset.yaml", _jobset_back), ("pytorchjob.yaml", _pytorchjob_back)])
def test_a_custom_kind_with_a_misspelt_field_does_not(name: str, back: Callable[[Manifest], Manifest]) -> None:
    (document,) = _documents(name)
    wrong = copy.deepcopy(document)
    wrong["spec"]["falurePolicy"] = {}
    assert back(wrong) == document


def test_a_misspelt_field_deep_in_a_pod_is_found() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(_pod_templates()[0])}
    pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="'readOnlyRootFileSystem' was unexpected"):
        kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("template", _pod_templates(), ids=["jobset", "master", "worker", "tensorboard"])
def test_pods_may_do_no_more_than_they_need(template: Manifest) -> None:
    """The `restricted` level of Kubernetes' pod security standards, and a root file system that is read-only."""
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "/tmp" in mounts
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("template", _pod_templates()[:3], ids=["jobset", "master", "worker"])
def test_pods_that_train_have_time_for_a_save_and_room_for_nccl(template: Manifest) -> None:
    spec = template["spec"]
    assert spec["terminationGracePeriodSeconds"] > SAVE_S
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    assert mounts["/data"]["readOnly"] is True
    assert not mounts["/runs"].get("readOnly")
    claims = {document["metadata"]["name"] for document in _documents("storage.yaml")}
    assert {
        volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume
    } == claims


@pytest.mark.parametrize("template", _pod_templates()[:3], ids=["jobset", "master", "worker"])
def test_arguments_are_settings_that_exist(template: Manifest) -> None:
    words = dict.fromkeys(word.split("=", 1)[0] for word in template["spec"]["containers"][0]["args"])
    arguments = [word.split("=", 1) for word in template["spec"]["containers"][0]["args"]]
    assert list(words) == ["--config", "--set"]
    (recipe,) = [value for name, value in arguments if name == "--config"]
    config = load_config(ROOT / recipe, [value for name, value in arguments if name == "--set"])
    assert config.train.output == "/runs/faces"
    port = template["metadata"]["annotations"]["prometheus.io/port"]
    assert port == str(config.monitor.prometheus_port)


def _variables(jobset: Manifest, index: int) -> dict[str, str]:
    """As Kubernetes sets them in the pod with this index, and JobSet its annotations."""
    annotations = {
        "jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"],
        "jobset.sigs.k8s.io/replicatedjob-name": jobset["spec"]["replicatedJobs"][0]["name"],
        "jobset.sigs.k8s.io/restart-attempt": "3",
    }
    variables = {"JOB_COMPLETION_INDEX": str(index)}
    for entry in _job_template(jobset)["spec"]["template"]["spec"]["containers"][0]["env"]:
        text = entry.get("value")
        if text is None:
            (name,) = re.findall(r"^metadata\.annotations\['(.+)'\]$", entry["valueFrom"]["fieldRef"]["fieldPath"])
            text = annotations[name]
        variables[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], text)
    return variables


def test_the_entrypoint_finds_its_place_in_every_pod_of_the_jobset() -> None:
    jobset = _jobset()
    job = _job_template(jobset)["spec"]
    assert job["completions"] == job["parallelism"]
    for index in range(job["completions"]):
        variables = _variables(jobset, index)
        place = placement(variables)
        assert (place.max_nodes, place.node_rank) == (job["completions"], index)
        assert (place.head, place.run_id) == ("faces-hosts-0-0.faces", "faces-3")
        assert "--rdzv-backend=static" in torchrun_arguments(variables, place, gpus=8, address="")


def test_only_what_another_try_would_not_help_ends_a_jobset() -> None:
    """docs/operating.md: 2 is settings, data or a checkpoint; after 75 and 76 the same command goes on."""
    jobset = _jobset()
    job = _job_template(jobset)["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])  # JobSet's own check, in its webhook
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_a_pytorchjob_starts_its_pods_again() -> None:
    """With ExitCode the operator takes all codes below 128 for final, 75 and 76 too."""
    spec = _documents("pytorchjob.yaml")[0]["spec"]
    assert {replica["restartPolicy"] for replica in spec["pytorchReplicaSpecs"].values()} == {"OnFailure"}
    for replica in spec["pytorchReplicaSpecs"].values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert {"name": "pytorchjob-port", "containerPort": 23456, "protocol": "TCP"} in container["ports"]


def test_tensorboard_is_reached_by_its_service() -> None:
    deployment, service, _ = _documents("tensorboard.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]
    assert "type" not in service["spec"]  # ClusterIP: its pages show faces
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] in {port["name"] for port in container["ports"]}
    assert f"--port={port['port']}" in container["command"]


def test_no_pod_reaches_tensorboard() -> None:
    deployment, _, policy = _documents("tensorboard.yaml")
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"] == {
        "podSelector": deployment["spec"]["selector"],
        "policyTypes": ["Ingress"],
    }


def test_the_network_policy_covers_the_pods_that_train() -> None:
    (policy,) = _documents("network-policy.yaml")
    selected = policy["spec"]["podSelector"]["matchLabels"]
    for template in _pod_templates()[:3]:
        assert template["metadata"]["labels"].items() >= selected.items()
    among, monitoring = policy["spec"]["ingress"]
    assert among["from"] == [{"podSelector": {"matchLabels": selected}}]
    assert "ports" not in among  # ranks choose ports
    assert monitoring["ports"] == [{"port": 9400}]
