"""Which address families a lab has, the primary one first.

The first of these that names any decides:

1. `spec.podCIDR` of the Lab;
2. the nodes' pod CIDRs;
3. the pods' addresses;
4. the nodes' addresses;
5. what else has addresses: the Service CIDRs, the underlay, the Services.

Without any a lab is IPv4.
"""

from __future__ import annotations

from collections.abc import Iterator

from netlab.topology import kubernetes as k8s
from netlab.topology import kubernetes_pods as k8s_pods
from netlab.topology import lab_document
from netlab.topology.addresses import family_of
from netlab.topology.model import Family
from netlab.topology.objects import Objects


def decide(objects: Objects) -> tuple[Family, ...]:
    """One family or both."""
    spec = (objects.lab.item.spec if objects.lab else None) or lab_document.LabSpec()
    for texts in (
        _parts(spec.podCIDR),
        _node_cidrs(objects),
        pod_addresses(objects),
        _node_addresses(objects),
        _others(spec, objects),
    ):
        named = tuple(dict.fromkeys(family_of(text) for text in texts))
        if named:
            return named
    return ("IPv4",)


def _parts(text: str | None) -> list[str]:
    return text.split(",") if text else []


def _node_cidrs(objects: Objects) -> Iterator[str]:
    for node in objects.nodes:
        spec = node.item.spec or k8s.NodeSpec()
        yield from filter(None, (spec.podCIDR, *(spec.podCIDRs or ())))


def pod_addresses(objects: Objects) -> Iterator[str]:
    """The addresses that pods of the file have, those of nodes left out."""
    for pod in objects.pods:
        status = pod.item.status or k8s_pods.PodStatus()
        if not (pod.item.spec and pod.item.spec.hostNetwork):
            yield from filter(None, (status.podIP, *(each.ip for each in status.podIPs or ())))


def _node_addresses(objects: Objects) -> Iterator[str]:
    for node in objects.nodes:
        listed = (node.item.status.addresses if node.item.status else None) or ()
        internal = [entry.address for entry in listed if entry.type == "InternalIP"]
        yield from internal or (entry.address for entry in listed if entry.type == "ExternalIP")


def _others(spec: lab_document.LabSpec, objects: Objects) -> Iterator[str]:
    yield from _parts(spec.serviceCIDR)
    for each in objects.service_cidrs:
        yield from each.item.spec.cidrs
    yield from _parts(spec.underlay.cidr if spec.underlay else None)
    for service in objects.services:
        stated = service.item.spec or k8s.ServiceSpec()
        for text in (stated.clusterIP, *(stated.clusterIPs or ())):
            if text and text != "None":
                yield text
