"""Schemas of the objects in our KubeRay manifests, written after KubeRay's API reference (ray.io/v1, of 1.6) and the
Kubernetes core API: the fields they have (no others are accepted) and their types. Pods are held to the part we use."""

from __future__ import annotations

from typing import Any


def closed(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def listed(item: dict[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least}


TEXT = {"type": "string"}
NUMBER = {"type": "integer", "minimum": 0}
FLAG = {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}
ANY = {"type": "object"}

METADATA = closed(("name",), name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
RESOURCES = closed(
    requests={"type": "object", "additionalProperties": QUANTITY},
    limits={"type": "object", "additionalProperties": QUANTITY},
)
CONTAINER = closed(
    ("name", "image"),
    name=NAME,
    image=TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    env=listed(closed(("name",), name=TEXT, value=TEXT, valueFrom=ANY)),
    ports=listed(closed(("containerPort",), name={**NAME, "maxLength": 15}, containerPort=NUMBER, protocol=TEXT)),
    resources=RESOURCES,
    volumeMounts=listed(closed(("name", "mountPath"), name=NAME, mountPath=TEXT, readOnly=FLAG, subPath=TEXT)),
    securityContext=closed(
        allowPrivilegeEscalation=FLAG,
        runAsNonRoot=FLAG,
        runAsUser=NUMBER,
        capabilities=closed(add=listed(TEXT), drop=listed(TEXT)),
    ),
)
VOLUME = {
    **closed(
        ("name",),
        name=NAME,
        configMap=closed(("name",), name=NAME, items=listed(ANY)),
        persistentVolumeClaim=closed(("claimName",), claimName=TEXT, readOnly=FLAG),
    ),
    "minProperties": 2,
}
POD = closed(
    ("containers",),
    containers=listed(CONTAINER, 1),
    volumes=listed(VOLUME),
    automountServiceAccountToken=FLAG,
    securityContext=closed(fsGroup=NUMBER, runAsUser=NUMBER, runAsNonRoot=FLAG),
    nodeSelector=TEXTS,
    tolerations=listed(ANY),
)
TEMPLATE = closed(("spec",), metadata=ANY, spec=POD)
CLUSTER_SPEC = closed(
    ("headGroupSpec",),
    suspend=FLAG,
    managedBy=TEXT,
    autoscalerOptions=ANY,
    authOptions=closed(mode={"enum": ["token", "disabled"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=ANY,
    headGroupSpec=closed(
        ("template",),
        template=TEMPLATE,
        headService=ANY,
        enableIngress=FLAG,
        rayStartParams=TEXTS,
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    ),
    rayVersion=TEXT,
    workerGroupSpecs=listed(
        closed(
            ("groupName", "template"),
            suspend=FLAG,
            groupName=NAME,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            idleTimeoutSeconds=NUMBER,
            rayStartParams=TEXTS,
            template=TEMPLATE,
            scaleStrategy=ANY,
            numOfHosts=NUMBER,
        )
    ),
)
VERSION = {"const": "ray.io/v1"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "ConfigMap": closed(
        ("apiVersion", "kind", "metadata"),
        apiVersion={"const": "v1"},
        kind={"const": "ConfigMap"},
        metadata=METADATA,
        data=TEXTS,
        immutable=FLAG,
    ),
    "RayCluster": closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion=VERSION,
        kind={"const": "RayCluster"},
        metadata=METADATA,
        spec=CLUSTER_SPEC,
    ),
    "RayJob": closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion=VERSION,
        kind={"const": "RayJob"},
        metadata=METADATA,
        spec=closed(
            ("entrypoint", "rayClusterSpec"),
            activeDeadlineSeconds=NUMBER,
            backoffLimit=NUMBER,
            rayClusterSpec=CLUSTER_SPEC,
            submitterPodTemplate=TEMPLATE,
            metadata=TEXTS,
            clusterSelector=TEXTS,
            submitterConfig=ANY,
            managedBy=TEXT,
            deletionStrategy=ANY,
            entrypoint=TEXT,
            runtimeEnvYAML=TEXT,
            jobId=TEXT,
            submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
            entrypointResources=TEXT,
            entrypointNumCpus={"type": "number"},
            entrypointNumGpus={"type": "number"},
            ttlSecondsAfterFinished=NUMBER,
            shutdownAfterJobFinishes=FLAG,
            suspend=FLAG,
        ),
    ),
}
