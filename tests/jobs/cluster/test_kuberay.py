"""The Kubernetes objects in jobs/cluster: their fields, what Ray's autoscaler reads in them, and the recipe's needs.

KUBERAY_SCHEMAS may name a folder with KubeRay's schemas (`raycluster.v1.schema.json`, `rayjob.v1.schema.json`, the
OpenAPI schemas of its resource definitions): then the objects are checked against these too.
"""

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from jobs.cli.recipe import load_recipe
from jobs.train import parse_arguments
from trainer.engine.deepspeed_engine import accumulation_steps
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import LatentsConfig, TrainConfig

REPOSITORY = Path(__file__).resolve().parents[3]
WORKDIR = next(
    line.split()[1]
    for line in (REPOSITORY / "jobs/cluster/Dockerfile").read_text().splitlines()
    if line.startswith("WORKDIR")
)
Schema = dict[str, Any]


def mounted(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The volumes of the only container of a pod, by their paths in it."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    return {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}


def fields(needed: str = "", **properties: Schema) -> Schema:
    """An object with no other fields than these."""
    kind: Schema = {"type": "object", "additionalProperties": False}
    return kind | {"properties": properties, "required": needed.split()}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": items}


TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITIES: Schema = {"type": "object", "additionalProperties": {"type": "string", "pattern": "^[0-9]+(Gi)?$"}}
CONTAINER = fields(
    "name image",
    name=TEXT,
    image=TEXT,
    envFrom=list_of(fields(secretRef=fields("name", name=TEXT))),
    env=list_of(fields("name value", name=TEXT, value=TEXT)),
    resources=fields(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=list_of(fields("name mountPath", name=TEXT, mountPath=TEXT, readOnly={"type": "boolean"})),
)
VOLUME = fields(
    "name",
    name=TEXT,
    persistentVolumeClaim=fields("claimName", claimName=TEXT, readOnly={"type": "boolean"}),
    emptyDir=fields(medium={"const": "Memory"}, sizeLimit=TEXT),
)
TOLERATION = fields(key=TEXT, operator={"enum": ["Exists", "Equal"]}, effect={"enum": ["NoSchedule", "NoExecute"]})
POD = fields(
    "containers",
    containers=list_of(CONTAINER),
    volumes=list_of(VOLUME),
    nodeSelector=TEXTS,
    tolerations=list_of(TOLERATION),
    dnsConfig=fields(options=list_of(fields("name", name=TEXT, value=TEXT))),
)
HEAD = {"rayStartParams": TEXTS, "template": fields("spec", spec=POD)}
COUNTS = {"groupName": TEXT, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT}
CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=fields(idleTimeoutSeconds=COUNT),
    headGroupSpec=fields("template", **HEAD),
    workerGroupSpecs=list_of(fields("groupName minReplicas maxReplicas template", **HEAD, **COUNTS)),
)
JOB = fields(
    "entrypoint",
    entrypoint=TEXT,
    clusterSelector=TEXTS,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes={"type": "boolean"},
    rayClusterSpec=CLUSTER,
)
KINDS = {"kuberay.yaml": ("RayCluster", CLUSTER), "rayjob.yaml": ("RayJob", JOB), "rayjob_train.yaml": ("RayJob", JOB)}
"""By file, the kind of its object, and the fields of its `spec` that we use, with KubeRay's names and types."""


def read(file: str) -> dict[str, Any]:
    [content] = yaml.safe_load_all((REPOSITORY / "jobs/cluster" / file).read_text())
    return dict(content)


def closed(schema: Any) -> Any:
    """A schema that permits no fields but those it names, as `kubectl apply --validate=strict`."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {key: closed(part) for key, part in schema.items()}
    names = isinstance(parts.get("properties"), dict) and parts.get("type") == "object"
    return parts | {"additionalProperties": False} if names else parts


@pytest.mark.parametrize("file", KINDS)
def test_an_object_has_only_fields_that_kuberay_knows(file: str) -> None:
    kind, spec = KINDS[file]
    content = read(file)
    metadata = fields(name=TEXT, generateName=TEXT)
    schema = fields(apiVersion={"const": "ray.io/v1"}, kind={"const": kind}, metadata=metadata, spec=spec)
    jsonschema.validate(content, schema)
    content["spec"]["headGroupSpecs"] = {}
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpecs"):
        jsonschema.validate(content, schema)


@pytest.mark.parametrize("file", KINDS)
def test_an_object_is_valid_by_the_definition_of_its_kind(file: str) -> None:
    folder = os.environ.get("KUBERAY_SCHEMAS")
    if not folder:
        pytest.skip("need KUBERAY_SCHEMAS, a folder with KubeRay's schemas")
    schema = closed(json.loads((Path(folder) / f"{KINDS[file][0].lower()}.v1.schema.json").read_text()))
    content = read(file)
    jsonschema.validate(content, schema)
    content["spec"]["headGroupSpecs"] = {}
    with pytest.raises(jsonschema.ValidationError, match="headGroupSpecs"):
        jsonschema.validate(content, schema)


def test_the_nodes_that_the_autoscaler_adds_fit_every_worker_of_the_recipe() -> None:
    cluster = read("kuberay.yaml")
    cluster["metadata"]["namespace"] = "default"  # Kubernetes sets it
    scaling = _derive_autoscaling_config_from_ray_cr(cluster)
    nodes = scaling["available_node_types"]
    assert nodes[scaling["head_node_type"]]["resources"]["CPU"] == 0
    assert cluster["spec"]["enableInTreeAutoscaling"]
    recipe = tomllib.loads((REPOSITORY / "jobs/configs/laion2b.toml").read_text())
    sections = [recipe[stage] for stage in ("filter", "download", "embed", "index", "neighbors", "optout")]
    trainings = [REPOSITORY / f"jobs/configs/train_laion_{size}.toml" for size in (256, 512, 768)]
    sections += [tomllib.loads(training.read_text())["latents"] for training in trainings]
    for section in (*sections, recipe["embed"]["near_copies"]):
        name = section["nodes"]
        group, resources = nodes[name], nodes[name]["resources"]
        assert resources[name] == 1, "the resource by which a recipe selects the node"
        assert (group["min_workers"], group["max_workers"] > 0) == (0, True)
        gpus = resources.get("GPU", 0)
        assert section["memory_gb"] * 1e9 * max(1, gpus) <= resources["memory"]
        assert section.get("gpus_per_worker", 0) <= gpus
        assert section["workers"]  # a cluster without nodes adds them for workers that wait


def test_nodes_on_spot_machines_take_the_workers_of_the_other_nodes() -> None:
    cluster = read("kuberay.yaml")
    cluster["metadata"]["namespace"] = "default"
    nodes = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert nodes["download-spot"]["resources"] == nodes["download"]["resources"]
    assert (nodes["download-spot"]["min_workers"], nodes["download-spot"]["max_workers"]) == (0, 0)
    pods = {group["groupName"]: group["template"]["spec"] for group in cluster["spec"]["workerGroupSpecs"]}
    pod = pods["download-spot"]
    assert [pod[name] for name in ("containers", "dnsConfig")] == [
        pods["download"][name] for name in ("containers", "dnsConfig")
    ]
    assert pod["nodeSelector"].keys() <= {toleration["key"] for toleration in pod["tolerations"]}


def test_a_job_selects_the_cluster_and_is_not_retried() -> None:
    spec = read("rayjob.yaml")["spec"]
    assert spec["clusterSelector"]["ray.io/cluster"] == read("kuberay.yaml")["metadata"]["name"]
    # KubeRay refuses a job with a selector and retries, or deletes the cluster when it retries.
    assert spec["backoffLimit"] == 0
    assert spec["entrypoint"] == "python -m jobs.download jobs/configs/laion2b.toml"


@pytest.mark.parametrize("size", [256, 512, 768])
def test_the_nodes_of_latents_and_the_job_have_the_autoencoder(size: int) -> None:
    recipe = load_recipe(REPOSITORY / f"jobs/configs/train_laion_{size}.toml")
    spec = read("kuberay.yaml")["spec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for group in (spec["headGroupSpec"], groups[recipe[LatentsConfig].nodes]):
        folders = mounted(group["template"]["spec"])
        assert folders[f"{WORKDIR}/{Path(recipe[AutoencoderConfig].path).parent}"]["persistentVolumeClaim"]


def test_the_training_job_has_the_ranks_the_batch_and_the_files_that_its_recipe_needs() -> None:
    spec = read("rayjob_train.yaml")["spec"]
    [group], head = spec["rayClusterSpec"]["workerGroupSpecs"], spec["rayClusterSpec"]["headGroupSpec"]
    pod = group["template"]["spec"]
    gpus = int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    arguments = parse_arguments(spec["entrypoint"].split()[3:])
    recipe = load_recipe(REPOSITORY / arguments.recipe, arguments.overrides)
    train = recipe[TrainConfig]
    assert arguments.ray
    assert train.ranks == group["replicas"] * gpus
    assert accumulation_steps(train, train.ranks) == 1
    assert not recipe.root.is_local  # pods share no folder
    for node in (head["template"]["spec"], pod):
        [container], folders = node["containers"], mounted(node)
        assert folders[f"{WORKDIR}/{Path(recipe[AutoencoderConfig].path).parent}"]["persistentVolumeClaim"]
        assert container["envFrom"] == [{"secretRef": {"name": "object-store"}}]
    assert folders["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert int(container["resources"]["requests"]["cpu"]) >= gpus * train.workers
