"""Objects as an API server gives them out: with everything that a datapath does not need."""

from __future__ import annotations

import json
import uuid
from typing import Any

Object = dict[str, Any]

_TIME = "2026-03-01T09:00:00Z"


def dump(*objects: Object) -> Object:
    """A List, as `kubectl get ... -o json` prints it."""
    items = list(objects)
    return {"apiVersion": "v1", "items": items, "kind": "List", "metadata": {"resourceVersion": ""}}


def metadata(name: str, namespace: str | None = None, **more: Any) -> Object:
    """Metadata with what a server adds."""
    identity = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{namespace}/{name}"))
    where = {"namespace": namespace} if namespace else {}
    fields = {"manager": "kubelet", "operation": "Update", "time": _TIME, "fieldsType": "FieldsV1"}
    return {
        "creationTimestamp": _TIME,
        "managedFields": [{**fields, "fieldsV1": {"f:status": {"f:conditions": {".": {}}}}}],
        "name": name,
        **where,
        "resourceVersion": "7",
        "uid": identity,
        **more,
    }


def node(name: str, address: str, cidr: str | None = None, zone: str = "zone-a") -> Object:
    """A Node; without a CIDR as clouds and some CNI plugins leave it."""
    labels = {
        "kubernetes.io/arch": "amd64",
        "kubernetes.io/hostname": name,
        "topology.kubernetes.io/zone": zone,
    }
    spec: Object = {"podCIDR": cidr, "podCIDRs": [cidr]} if cidr else {"providerID": f"x:///{name}"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": metadata(
            name, labels=labels, annotations={"node.alpha.kubernetes.io/ttl": "0"}
        ),
        "spec": spec,
        "status": {
            "addresses": [
                {"address": address, "type": "InternalIP"},
                {"address": name, "type": "Hostname"},
            ],
            "capacity": {"cpu": "4", "memory": "16Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": _TIME}],
            "nodeInfo": {"kernelVersion": "6.1.0", "kubeProxyVersion": "v1.37.2"},
        },
    }


def pod(
    name: str,
    node: str,
    host: str,
    ip: str | None,
    *,
    namespace: str = "shop",
    app: str | None = None,
    ports: tuple[int, ...] = (8080,),
    phase: str = "Running",
    ready: bool = True,
    host_network: bool = False,
) -> Object:
    """A Pod of a ReplicaSet, with probes and volumes."""
    container = {
        "name": "main",
        "image": "registry.example/main:1.0",
        "ports": [{"containerPort": number, "protocol": "TCP"} for number in ports],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": ports[0]}, "periodSeconds": 10},
        "livenessProbe": {"exec": {"command": ["false"]}},
        "volumeMounts": [{"mountPath": "/var/run/secrets", "name": "token", "readOnly": True}],
    }
    spec: Object = {
        "containers": [container],
        "serviceAccountName": "default",
        "tolerations": [{"effect": "NoExecute", "key": "node.kubernetes.io/not-ready"}],
        "volumes": [{"name": "token", "projected": {"sources": [{"configMap": {"name": "ca"}}]}}],
    }
    if node:
        spec["nodeName"] = node
    if host_network:
        spec["hostNetwork"] = True
    condition = {"type": "Ready", "status": str(ready), "lastTransitionTime": _TIME}
    status: Object = {"phase": phase, "qosClass": "BestEffort"}
    if phase == "Running":
        status |= {
            "conditions": [condition],
            "containerStatuses": [{"name": "main", "ready": ready}],
        }
    if node:
        status |= {"hostIP": host, "hostIPs": [{"ip": host}]}
    if ip:
        status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": name.rpartition("-")[0]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata(
            name,
            namespace,
            labels={"app": app or name.rpartition("-")[0]},
            ownerReferences=[{**owner, "controller": True, "uid": "1"}],
        ),
        "spec": spec,
        "status": status,
    }


def service(
    name: str,
    ip: str,
    *,
    namespace: str = "shop",
    port: int = 80,
    target: int = 8080,
    selector: bool = True,
    **spec: Any,
) -> Object:
    """A Service of one port, ClusterIP unless `spec` says otherwise."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(name, namespace, labels={"app": name}),
        "spec": {
            "clusterIP": ip,
            "clusterIPs": [ip],
            "internalTrafficPolicy": "Cluster",
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "ports": [{"port": port, "protocol": "TCP", "targetPort": target}],
            "sessionAffinity": "None",
            "type": "ClusterIP",
            **({"selector": {"app": name}} if selector else {}),
            **spec,
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(service: str, port: int, *pods: Object, namespace: str = "shop") -> Object:
    """The slice that the controller makes of pods."""
    endpoints = [
        {
            "addresses": [each["status"]["podIP"]],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "nodeName": each["spec"]["nodeName"],
            "targetRef": {
                "kind": "Pod",
                "name": each["metadata"]["name"],
                "namespace": namespace,
                "uid": each["metadata"]["uid"],
            },
            "zone": "zone-a",
        }
        for each in pods
    ]
    labels = {
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        "kubernetes.io/service-name": service,
    }
    return {
        "addressType": "IPv4",
        "apiVersion": "discovery.k8s.io/v1",
        "endpoints": endpoints,
        "kind": "EndpointSlice",
        "metadata": metadata(f"{service}-x7k2p", namespace, labels=labels),
        "ports": [{"name": "", "port": port, "protocol": "TCP"}],
    }


def config_map(name: str, namespace: str = "kube-system", **data: str) -> Object:
    """A ConfigMap; `_` in a key stands for `.`, `__` for `-`."""
    renamed = {key.replace("__", "-").replace("_", "."): text for key, text in data.items()}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(name, namespace),
        "data": renamed,
    }


def kube_proxy(mode: str = "", cidr: str = "", more: str = "") -> Object:
    """kube-proxy's ConfigMap as kubeadm writes it."""
    text = f"""\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
clientConnection:
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
clusterCIDR: {cidr or '""'}
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  tcpEstablishedTimeout: null
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  syncPeriod: 0s
kind: KubeProxyConfiguration
mode: {mode or '""'}
nodePortAddresses: null
{more}"""
    return config_map(
        "kube-proxy", config_conf=text, kubeconfig_conf="apiVersion: v1\nkind: Config\n"
    )


def flannel(backend: Object, network: str = "10.244.0.0/16") -> Object:
    """The ConfigMap of flannel."""
    settings = json.dumps({"Network": network, "EnableNFTables": False, "Backend": backend})
    return config_map(
        "kube-flannel-cfg", "kube-flannel", cni__conf_json="{}", net__conf_json=settings
    )


def ip_pool(cidr: str, **spec: str) -> Object:
    """A pool of Calico."""
    return {
        "apiVersion": "crd.projectcalico.org/v1",
        "kind": "IPPool",
        "metadata": metadata("default-ipv4-ippool"),
        "spec": {"cidr": cidr, "blockSize": 26, "natOutgoing": True, **spec},
    }


def calico_cluster() -> list[Object]:
    """Three nodes with Calico: pods in /26 blocks that are not the nodes' pod CIDRs."""
    front = pod("front-6f7d9-a1b2c", "worker-1", "192.168.56.11", "172.16.235.129")
    back = pod("back-75b4c-d3e4f", "worker-2", "192.168.56.12", "172.16.189.66")
    other = pod("back-75b4c-g5h6i", "worker-1", "192.168.56.11", "172.16.235.130")
    proxy = pod(
        "kube-proxy-x1",
        "worker-1",
        "192.168.56.11",
        "192.168.56.11",
        namespace="kube-system",
        ports=(10249,),
        host_network=True,
    )
    done = pod("report-1-z", "worker-2", "192.168.56.12", "172.16.189.70", phase="Succeeded")
    waiting = pod("big-1-w", "", "", None, phase="Pending")
    apiserver = endpoint_slice("kubernetes", 6443, namespace="default")
    apiserver["endpoints"] = [{"addresses": ["192.168.56.10"], "conditions": {"ready": True}}]
    return [
        node("control", "192.168.56.10", "172.16.0.0/24"),
        node("worker-1", "192.168.56.11", "172.16.1.0/24"),
        node("worker-2", "192.168.56.12", "172.16.2.0/24"),
        front,
        back,
        other,
        proxy,
        done,
        waiting,
        service("kubernetes", "10.96.0.1", namespace="default", port=443, selector=False),
        service("back", "10.96.41.7"),
        apiserver,
        endpoint_slice("back", 8080, back, other),
    ]
