"""Which hosts a run has, and which of them this one is, read from the environment that a scheduler sets.

torchrun's own variables (PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, …) come first: Kubeflow sets them, and on plain
hosts a person does. What they leave open comes from Slurm, from a JobSet or indexed Job, or from the older variables of
a PyTorchJob. Nothing of all that: one host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from docker.hostlist import expand

Environment = Mapping[str, str]
PORT = 29500
"""torchrun's own."""


class LaunchError(Exception):
    """The environment does not describe a run. One line: what was expected, what was got, what to do."""


class Placement(NamedTuple):
    """The hosts of a run, as seen from one of them."""

    min_nodes: int
    max_nodes: int
    """More than `min_nodes`: the run goes on with fewer hosts, and takes others in as they come."""
    node_rank: int | None
    """None where torchrun has to find out which host is the head, as in an elastic PyTorchJob."""
    head: str
    """Host that the others ask where the run is, that of node rank 0; "" with one host."""
    port: int
    run_id: str


def placement(environment: Environment) -> Placement:
    """Raises LaunchError."""
    found = _scheduler(environment)
    get = {**found, **{key: environment[name] for name, key in _EXPLICIT.items() if environment.get(name)}}.get
    least, most = _nodes(get("nodes", "1"))
    rank = get("rank")
    node_rank = None if rank is None else _whole("node rank (PET_NODE_RANK)", rank, 0, most - 1)
    head, port = get("head", ""), get("port", str(PORT))
    if endpoint := environment.get("PET_RDZV_ENDPOINT"):
        head, colon, number = endpoint.rpartition(":")
        head, port = (head, number) if colon else (endpoint, port)
    if most > 1 and not head:
        raise LaunchError(
            f"MASTER_ADDR: expected the host of node 0, as the run has {get('nodes')} hosts, got nothing: set it to "
            "the same name or address on all of them"
        )
    return Placement(
        min_nodes=least,
        max_nodes=most,
        node_rank=node_rank,
        head=head if most > 1 else "",
        port=_whole("MASTER_PORT", port, 1, 65535),
        run_id=get("id", "clusterface"),
    )


_EXPLICIT = {
    "MASTER_ADDR": "head",
    "MASTER_PORT": "port",
    "PET_NNODES": "nodes",
    "PET_NODE_RANK": "rank",
    "PET_MASTER_ADDR": "head",
    "PET_MASTER_PORT": "port",
    "PET_RDZV_ID": "id",
}
"""Later ones win."""


def _scheduler(environment: Environment) -> dict[str, str]:
    if "SLURM_JOB_ID" in environment and "SLURM_NODEID" in environment:
        return _slurm(environment)
    if "JOB_COMPLETION_INDEX" in environment:
        return _indexed_job(environment)
    if environment.keys() >= {"MASTER_ADDR", "WORLD_SIZE", "RANK"}:
        return {"nodes": environment["WORLD_SIZE"], "rank": environment["RANK"]}  # a PyTorchJob counts pods here
    return {}


def _slurm(environment: Environment) -> dict[str, str]:
    """The step counts, where there is one: `srun --nodes=2` in a job of four hosts."""
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1")
    if nodes != "1" and "SLURM_STEP_ID" not in environment:
        raise LaunchError(f"Slurm: expected a start by srun, as the job has {nodes} hosts, got one without: use srun")
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", nodes)
    if tasks != nodes:
        raise LaunchError(
            f"Slurm: expected one task a host, got {tasks} tasks on {nodes}: use srun --ntasks-per-node=1, as torchrun "
            "starts the ranks"
        )
    name = "SLURM_STEP_NODELIST" if environment.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
    try:
        hosts = expand(environment.get(name, ""))
    except ValueError as error:
        raise LaunchError(f"{name}: {error}: start it by srun, or set MASTER_ADDR and PET_NNODES") from None
    job = environment["SLURM_JOB_ID"]
    # Jobs that share a host get different ports; 20000 to 29999 is below those that Linux hands out by itself.
    port = 20000 + _whole("SLURM_JOB_ID", job, 0, 2**63) % 10000
    return {"nodes": nodes, "rank": environment["SLURM_NODEID"], "head": hosts[0], "port": str(port), "id": job}


def _indexed_job(environment: Environment) -> dict[str, str]:
    """Kubernetes gives a pod its index, and by the headless service of a JobSet names that can be foretold."""
    found = {"rank": environment["JOB_COMPLETION_INDEX"]}
    if jobset := environment.get("JOBSET_NAME"):
        job = environment.get("REPLICATED_JOB_NAME")
        if not job:
            raise LaunchError(
                "REPLICATED_JOB_NAME: expected the name of the JobSet's replicated job, got nothing: take it from the "
                "pod's annotation jobset.sigs.k8s.io/replicatedjob-name, as docker/k8s/jobset.yaml does"
            )
        service = environment.get("JOBSET_SUBDOMAIN") or jobset
        found |= {"head": f"{jobset}-{job}-0-0.{service}", "id": jobset}
    if not environment.get("PET_NNODES"):
        raise LaunchError(
            "PET_NNODES: expected the number of pods, which Kubernetes does not tell them, got nothing: set it to the "
            "Job's completions"
        )
    return found


def _nodes(text: str) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    if not (least.isdecimal() and (most.isdecimal() or not colon) and 0 < int(least) <= int(most or least)):
        raise LaunchError(f"PET_NNODES: expected a number of hosts, or MIN:MAX such as 1:4, got {text!r}: correct it")
    return int(least), int(most or least)


def _whole(name: str, text: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise LaunchError(f"{name}: expected a whole number from {least} to {most}, got {text!r}: correct it")
    return int(text)
