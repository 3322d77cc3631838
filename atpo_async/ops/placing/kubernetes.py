"""Manifests of a run for Kubernetes: the buffer with a volume, the learner as a Job, actors that come and go.

Pods need nothing of one another's disks: the learner and actors join the buffer at its Service's name.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atpo_async.config import Config
from atpo_async.core.errors import ConfigError, SetupError
from atpo_async.ops.placing import kubernetes_commands as commands
from atpo_async.ops.placing import payload
from atpo_async.ops.placing.placement import check_checkpoints, check_devices, learner_nodes
from atpo_async.ops.specs import role_shares

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
"""RFC 1123."""
MOST_NAME = 40
"""Characters: Kubernetes puts roles and hashes behind it, and takes 63."""
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([EPTGMk]i?|m)?")
IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
RESOURCE = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
MOST_CONFIGURATION = 1 << 20
"""Bytes that a ConfigMap takes."""
GRACE_S = {"buffer": 60, "learner": 600, "actor": 120}
"""Between SIGTERM and SIGKILL: the learner saves, an actor finishes turns and hands its leases back."""
GROUP = 1000
"""Of every pod: an image's user that is not root reads the keys and writes the buffer's volume by it."""
MOST_FAILURES = 20
"""Of each of the learner's pods."""
Keys = Mapping[str, bytes]
"""Path under ``links.keys_dir`` -> content."""


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """What the user asks of Kubernetes."""

    image: str
    name: str = ""
    """Empty: the run's name."""
    namespace: str = ""
    volume: str = "50Gi"
    storage_class: str = ""
    gpus_per_node: int = 8
    """At most so many for one pod."""
    gpu_resource: str = "nvidia.com/gpu"
    cpus: str = ""
    """Requested by each learner and actor pod."""
    memory: str = ""
    image_pull_policy: str = "IfNotPresent"


def manifests(config: Config, options: KubernetesOptions, keys: Keys) -> list[dict[str, Any]]:
    """The documents, in the order in which they are applied.

    Args:
        config: of the run, as the user has it.
        options: names, image, resources.
        keys: of a folder as ``atpo keys new`` makes it.

    Raises:
        ConfigError: a name or a quantity that Kubernetes does not take.
        SetupError: a pod would need more GPUs than a node has.
    """
    name = check(config, options)
    here = payload.for_nodes(config, run_dir=commands.RUNS)
    files = payload.files_of(config)
    if payload.ACCELERATE in files:
        update = {"accelerate_config": f"{commands.CONFIG}/{payload.ACCELERATE}"}
        here = here.model_copy(update={"learner": here.learner.model_copy(update=update)})
    data = {commands.CONFIG_FILE: payload.as_text(here), **files}
    if (nbytes := sum(len(text.encode()) for text in data.values())) > MOST_CONFIGURATION:
        raise ConfigError(f"the configuration has {nbytes} bytes, a ConfigMap takes {MOST_CONFIGURATION}")
    check_devices(here, gpus=options.gpus_per_node)
    made = _Maker(here, options, name)
    return [
        made.document("v1", "ConfigMap", "config", data=data),
        made.secret("keys-serving", keys),
        made.secret("keys-joining", {file: keys[file] for file in commands.JOINING}),
        made.service("buffer", {"actors": here.links.actors_port, "learner": here.links.learner_port}),
        made.buffer(sorted(keys)),
        made.budget(),
        *made.learner(sorted(keys)),
        made.actors(),
    ]


def check(config: Config, options: KubernetesOptions) -> str:
    """The name of everything.  Raises ConfigError for what Kubernetes does not take."""
    name = options.name or config.run.name
    if not LABEL.fullmatch(name) or len(name) > MOST_NAME:
        fits = re.sub(r"[^a-z0-9]+", "-", name.lower())[:MOST_NAME].strip("-") or "run"
        whose = f"--name {name!r}" if options.name else f"run.name = {name!r}"
        raise ConfigError(
            f"{whose} is no name in Kubernetes: up to {MOST_NAME} lower-case letters, digits and '-', a letter or "
            f"digit at both ends; give --name {fits}"
        )
    if options.namespace and (not LABEL.fullmatch(options.namespace) or len(options.namespace) > 63):
        raise ConfigError(f"--namespace {options.namespace!r} is none: lower-case letters, digits and '-' (RFC 1123)")
    if not IMAGE.fullmatch(options.image):
        raise ConfigError(f"--image {options.image!r} is no reference of an image")
    if not RESOURCE.fullmatch(options.gpu_resource):
        raise ConfigError(f"--gpu-resource {options.gpu_resource!r} is none; expected one as nvidia.com/gpu")
    for option, text in (("--volume", options.volume), ("--cpus", options.cpus), ("--memory", options.memory)):
        if text and not QUANTITY.fullmatch(text):
            raise ConfigError(f"{option} {text!r} is no quantity of Kubernetes; expected one as 50Gi, or 8")
    if options.storage_class and not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", options.storage_class):
        raise ConfigError(f"--storage-class {options.storage_class!r} is no name (RFC 1123)")
    return name


class _Maker:
    """Makes the documents of one run."""

    def __init__(self, config: Config, options: KubernetesOptions, name: str) -> None:
        self._config, self._options, self._name = config, options, name

    def document(self, version: str, kind: str, part: str, **more: Any) -> dict[str, Any]:
        """One document, called ``NAME-PART``."""
        metadata: dict[str, Any] = {"name": f"{self._name}-{part}", "labels": self._labels()}
        if self._options.namespace:
            metadata["namespace"] = self._options.namespace
        return {"apiVersion": version, "kind": kind, "metadata": metadata, **more}

    def _labels(self, role: str = "") -> dict[str, str]:
        labels = {"app.kubernetes.io/name": "atpo-async", "app.kubernetes.io/instance": self._name}
        return labels | ({"app.kubernetes.io/component": role} if role else {})

    def secret(self, part: str, keys: Keys) -> dict[str, Any]:
        """Keys by file; a path's '/' is none of a Secret's key, so that it is mounted by its path again."""
        data = {_secret_key(path): base64.b64encode(content).decode() for path, content in sorted(keys.items())}
        return self.document("v1", "Secret", part, type="Opaque", data=data)

    def service(self, role: str, ports: Mapping[str, int]) -> dict[str, Any]:
        """Headless: its name is the address of the pods themselves."""
        spec = {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": self._labels(role),
            "ports": [{"name": name, "port": port, "targetPort": port} for name, port in ports.items()],
        }
        return self.document("v1", "Service", role, spec=spec)

    @property
    def _address(self) -> str:
        return f"{self._name}-buffer-0.{self._name}-buffer"

    def buffer(self, paths: Sequence[str]) -> dict[str, Any]:
        """A StatefulSet of one pod: after the loss of its node it comes back with its volume and its name."""
        container = self._container("buffer", commands.buffer(self._config), gpus=0)
        container["volumeMounts"].append({"name": "runs", "mountPath": commands.RUNS})
        links = self._config.links
        container["ports"] = [
            {"name": "actors", "containerPort": links.actors_port},
            {"name": "learner", "containerPort": links.learner_port},
        ]
        container["startupProbe"] = _probe(commands.buffer_alive(self._config), every_s=10, failures=60)
        container["livenessProbe"] = _probe(commands.buffer_alive(self._config), every_s=30, failures=6)
        spec = {
            "serviceName": f"{self._name}-buffer",
            "replicas": 1,
            "selector": {"matchLabels": self._labels("buffer")},
            "template": self._pod("buffer", container, secret="keys-serving", paths=paths),
            "volumeClaimTemplates": [{"metadata": {"name": "runs"}, "spec": self._claim()}],
        }
        return self.document("apps/v1", "StatefulSet", "buffer", spec=spec)

    def _claim(self) -> dict[str, Any]:
        """Of a volume."""
        claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": self._options.volume}}}
        return claim | ({"storageClassName": self._options.storage_class} if self._options.storage_class else {})

    def budget(self) -> dict[str, Any]:
        """A node is not drained of the buffer without being told to: the whole run stands still meanwhile."""
        spec = {"minAvailable": 1, "selector": {"matchLabels": self._labels("buffer")}}
        return self.document("policy/v1", "PodDisruptionBudget", "buffer", spec=spec)

    def learner(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        """A Job that is done with the run; a pod for each node's share of the ranks.  It serves weights, and so proves
        itself to actors as the buffer does."""
        share = role_shares(self._config)[1]
        limit = self._options.gpus_per_node
        count = learner_nodes(share.num_gpus, gpus=limit, nodes=share.num_gpus) if share.num_gpus and limit else 1
        check_checkpoints(self._config, machines=count)
        own = self._config.learner.checkpoint_url is None
        folder = commands.LEARNER if own else f"{commands.SCRATCH}/learner"
        meeting = f"{self._name}-learner-0.{self._name}-learner" if count > 1 else ""
        command = commands.learner(self._config, join=self._address, folder=folder, count=count, meeting=meeting)
        container = self._container("learner", command, gpus=share.num_gpus // count if limit else 0)
        container["livenessProbe"] = _probe(commands.role_alive(folder), every_s=30, failures=20, delay_s=600)
        pod = self._pod("learner", container, secret="keys-serving", paths=paths)
        found = []
        if own:
            # A pod's own disk goes with the pod: the next one would have no checkpoint.
            found.append(self.document("v1", "PersistentVolumeClaim", "learner", spec=self._claim()))
            container["volumeMounts"].append({"name": "learner", "mountPath": folder})
            claim = {"claimName": f"{self._name}-learner"}
            pod["spec"]["volumes"].append({"name": "learner", "persistentVolumeClaim": claim})
        pod["spec"] |= {"restartPolicy": "Never"} | ({"subdomain": f"{self._name}-learner"} if count > 1 else {})
        # What only the user can mend is not tried again; a pod that was evicted is no failure.
        policy = [
            {
                "action": "FailJob",
                "onExitCodes": {"containerName": "learner", "operator": "In", "values": [commands.EXIT_USER]},
            },
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        ]
        spec = {
            "completions": count,
            "parallelism": count,
            "completionMode": "Indexed",
            "backoffLimit": MOST_FAILURES * count,
            "podFailurePolicy": {"rules": policy},
            "template": pod,
        }
        if count > 1:
            found.append(self.service("learner", {"meeting": payload.MEETING_PORT}))
        return [*found, self.document("batch/v1", "Job", "learner", spec=spec)]

    def actors(self) -> dict[str, Any]:
        """A Deployment: scale it while the run goes on (kubectl scale)."""
        shares = role_shares(self._config)[2:]
        config, limit = self._config, self._options.gpus_per_node
        gpus = config.actor.tensor_parallel_size if limit and config.actor.device != "cpu" else 0
        container = self._container("actor", commands.actor(config, join=self._address), gpus=gpus)
        container["livenessProbe"] = _probe(commands.role_alive(), every_s=30, failures=20, delay_s=600)
        spec = {
            "replicas": len(shares),
            "selector": {"matchLabels": self._labels("actor")},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}},
            "template": self._pod("actor", container, secret="keys-joining", paths=commands.JOINING),
        }
        return self.document("apps/v1", "Deployment", "actor", spec=spec)

    def _container(self, role: str, script: str, *, gpus: int) -> dict[str, Any]:
        options = self._options
        requests = {name: text for name, text in (("cpu", options.cpus), ("memory", options.memory)) if text}
        if role == "buffer":
            requests = {"cpu": "1", "memory": "2Gi"}
        resources: dict[str, Any] = {"requests": requests} if requests else {}
        if gpus:
            resources["limits"] = {options.gpu_resource: gpus}
        return {
            "name": role,
            "image": options.image,
            "imagePullPolicy": options.image_pull_policy,
            "command": ["/bin/sh", "-c", script],
            "env": [{"name": name, "value": text} for name, text in commands.environment(role).items()]
            + [{"name": commands.POD_NAME, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
            "resources": resources,
            "volumeMounts": [
                {"name": "config", "mountPath": commands.CONFIG, "readOnly": True},
                {"name": "keys", "mountPath": commands.KEYS, "readOnly": True},
                {"name": "scratch", "mountPath": commands.SCRATCH},
                {"name": "shm", "mountPath": "/dev/shm"},
            ],
        }

    def _pod(self, role: str, container: Mapping[str, Any], *, secret: str, paths: Sequence[str]) -> dict[str, Any]:
        items = [{"key": _secret_key(path), "path": path} for path in paths]
        volumes = [
            {"name": "config", "configMap": {"name": f"{self._name}-config"}},
            {
                "name": "keys",
                "secret": {"secretName": f"{self._name}-{secret}", "defaultMode": 0o400, "items": items},
            },
            {"name": "scratch", "emptyDir": {}},
            # The container runtime's own has 64 MiB, less than a version of the weights.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ]
        return {
            "metadata": {"labels": self._labels(role)},
            "spec": {
                "terminationGracePeriodSeconds": GRACE_S[role],
                "automountServiceAccountToken": False,
                "securityContext": {"fsGroup": GROUP, "fsGroupChangePolicy": "OnRootMismatch"},
                "containers": [container],
                "volumes": volumes,
            },
        }


def _secret_key(path: str) -> str:
    return path.replace("/", "__")


def _probe(command: str, *, every_s: int, failures: int, delay_s: int = 0) -> dict[str, Any]:
    probe = {
        "exec": {"command": ["/bin/sh", "-c", command]},
        "periodSeconds": every_s,
        "timeoutSeconds": 10,
        "failureThreshold": failures,
    }
    return probe | ({"initialDelaySeconds": delay_s} if delay_s else {})


def missing_keys(keys: Keys) -> list[str]:
    """Files that a set of keys lacks."""
    return [file for file in ("server.key", "server.key_secret", *commands.JOINING) if file not in keys]


def check_keys(keys: Keys, folder: str) -> None:
    """Raises SetupError where a set of keys is not whole."""
    if missing := missing_keys(keys):
        raise SetupError(f"{folder} has no {missing[0]}; `atpo keys new --dir {folder}` makes what is missing")
