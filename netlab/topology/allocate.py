"""From stated objects to a decided lab: what is given is kept, what is left out is allocated.

The same objects in the same order always give the same lab.  The rules stand where they are
applied, in `networks`, `pods`, `placement`, `services`, `endpoints`, and in docs/topology-files.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from msgspec.structs import replace

from netlab.problems import suggest
from netlab.topology import (
    balancers,
    docker,
    endpoints,
    ingresses,
    lab_document,
    model,
    naming,
    network_policies,
    networks,
    outside,
    overlays,
    placement,
    services,
)
from netlab.topology.addresses import is_network, network, split
from netlab.topology.containers import Containers
from netlab.topology.convert import shown
from netlab.topology.networks import Networks
from netlab.topology.nodes import DraftNode
from netlab.topology.objects import Objects, Stated
from netlab.topology.places import Complaints
from netlab.topology.pods import DraftPod

PROXY_MODES = ("iptables", "nftables", "nftables-flat", "ipvs", "userspace", "none")
NODE_PORT_ADDRESSES = ("primary", "localhost", "all")  # words for networks
_NODE_PORT_ADDRESSES_HINT = "a network such as 172.21.32.0/24, or primary, localhost or all"
# Gates of kube-proxy v1.37: those that rules depend on, and those that are locked to true.
FEATURE_GATES = ("AllowServiceExternalIPs", "KubeProxyNFTablesLocalhostNodePorts")
LOCKED_GATES = ("MultiCIDRServiceAllocator", "NFTablesProxyMode", "PreferSameTrafficDistribution")
# Those that Linux has (net/netfilter/ipvs/Kconfig).
_SCHEDULERS = "rr wrr lc wlc fo ovf lblc lblcr dh sh mh sed nq twos"
IPVS_TIMEOUTS = ("tcpTimeout", "tcpFinTimeout", "udpTimeout")
TIMEOUTS = ("tcpEstablishedTimeout", "tcpCloseWaitTimeout", "udpTimeout", "udpStreamTimeout")
# IFNAMSIZ less the end of a text; behind a prefix rules have a + (iptables) or a * (nftables).
_LONGEST = {"bridgeInterface": 15, "interfaceNamePrefix": 14}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def allocate(objects: Objects, name: str, found: Complaints) -> model.Lab:
    """The lab that the objects describe; `name` is its name unless a Lab object has one.

    Raises NetlabError with everything that is wrong.
    """
    decided = networks.decide(objects, found)
    overlay = overlays.decide(objects.lab, decided, found)
    proxy = _service_proxy(objects.lab, decided, found)
    drafts = placement.decide(objects, decided, found)
    _await_probes(objects, drafts)
    for draft in drafts:
        if draft.node and draft.node.name in objects.stopped:
            draft.ready = False
    made = services.decide(objects.services, decided, objects.of_cluster, found)
    gateway = outside.gateway(objects, decided, found)
    boxes = balancers.decide(objects, decided, gateway, found)
    made = balancers.with_addresses(objects, made, boxes, found)
    behind = endpoints.decide(objects, decided, made, drafts, found)
    _listen_on_declared(drafts, found)
    hosts = outside.hosts(objects, decided, gateway, boxes, drafts, behind, found)
    policies = network_policies.decide(objects, drafts, found)
    if (
        overlay.masquerade == "none"
        and not _says_masquerade(objects.lab)
        and (gateway or hosts or boxes)
    ):
        overlay = replace(overlay, masquerade="outside")
    expected = tuple(_expected(objects.lab, found))
    found.raise_errors()
    nodes = tuple(_node(draft, decided.families) for draft in decided.nodes)
    containers = Containers(objects, found, {node.name: node.addresses for node in nodes})
    name_servers = naming.servers(drafts, objects.of_cluster, found)
    pods = tuple(
        _pod(
            draft,
            decided.families,
            containers.of(draft),
            naming.of_pod(draft, found),
            draft in name_servers,
        )
        for draft in drafts
    )
    docker_networks = docker.networks(objects, decided, nodes, found)
    docker_containers = docker.containers(
        objects, docker_networks, nodes, drafts, containers, found
    )
    containers.tell()
    served, pods = ingresses.decide(objects, made, pods, found)
    found.raise_errors()
    pod_cidr, *other_pod_cidrs = map(str, decided.pod_cidrs)
    return model.Lab(
        name=objects.lab.item.metadata.name if objects.lab else name,
        pod_cidr=pod_cidr,
        other_pod_cidrs=tuple(other_pod_cidrs),
        service_cidrs=tuple(str(cidr) for cidr in decided.service_cidrs),
        underlay=decided.underlay,
        overlay=overlay,
        service_proxy=proxy,
        iptables_backend=_iptables_backend(objects.lab),
        nodes=nodes,
        pods=pods,
        services=tuple(made),
        endpoints=tuple(behind),
        docker_networks=tuple(docker_networks),
        docker_containers=tuple(docker_containers),
        gateway=gateway,
        hosts=tuple(hosts),
        balancers=tuple(boxes),
        policies=tuple(policies),
        ingresses=tuple(served),
        expected=expected,
        declared=tuple(each.value for each in objects.declared),
        unready=tuple(draft.key for draft in drafts if not draft.passes),
        stopped=tuple(node.name for node in nodes if node.name in objects.stopped),
    )


def _node(draft: DraftNode, families: tuple[model.Family, ...]) -> model.Node:
    address, *other_addresses = (str(draft.addresses[each]) for each in families)
    pod_cidr, *other_pod_cidrs = (str(draft.pod_cidrs[each]) for each in families)
    return model.Node(
        name=draft.name,
        address=address,
        other_addresses=tuple(other_addresses),
        pod_cidr=pod_cidr,
        other_pod_cidrs=tuple(other_pod_cidrs),
        labels=draft.labels,
    )


def _pod(
    draft: DraftPod,
    families: tuple[model.Family, ...],
    containers: tuple[model.Container, ...],
    named: model.Naming,
    name_server: bool,
) -> model.Pod:
    assert draft.node is not None
    address, *other_addresses = (str(draft.addresses[each]) for each in families)
    grace = draft.spec.terminationGracePeriodSeconds
    return model.Pod(
        namespace=draft.namespace,
        name=draft.name,
        node=draft.node.name,
        address=address,
        other_addresses=tuple(other_addresses),
        labels=draft.labels,
        containers=containers,
        ports=tuple(port for container in containers for port in container.ports),
        listen=tuple(draft.listen),
        service_links=draft.spec.enableServiceLinks is not False,
        host_network=draft.host_network,
        ready=draft.ready,
        owner=draft.owner,
        naming=named,
        terminating=draft.terminating,
        grace_s=30 if grace is None else grace,
        name_server=name_server,
    )


def _await_probes(objects: Objects, drafts: list[DraftPod]) -> None:
    """Pods whose readiness probes have not passed are not ready, whatever else says so."""
    if objects.passed is None or not objects.runs_programs:
        return
    for draft in drafts:
        if draft.is_probed and draft.key not in objects.passed:
            draft.passes = draft.ready = False


def _listen_on_declared(drafts: list[DraftPod], found: Complaints) -> None:
    """Add the declared ports; on a node's own addresses only one pod can have a port."""
    owner: dict[tuple[str, str, int], DraftPod] = {}
    for draft in drafts:
        declared: dict[tuple[model.Protocol, int], None] = {
            (port.protocol or "TCP", port.containerPort): None for port in draft.ports
        }
        draft.listen = {**declared, **draft.listen}
        if not draft.host_network or draft.node is None:
            continue
        for protocol, number in list(draft.listen):
            first = owner.setdefault((draft.node.name, protocol, number), draft)
            if first is not draft:
                del draft.listen[protocol, number]
                found.warning(
                    "port-taken",
                    f"{draft.title}: {protocol} {number} on node {draft.node.name} is already "
                    f"{first.title}'s, which answers there",
                    draft.origin,
                )


def _says_masquerade(lab: Stated[lab_document.Lab] | None) -> bool:
    spec = lab.item.spec.overlay if lab and lab.item.spec else None
    return spec is not None and spec.masquerade is not None


def _expected(
    lab: Stated[lab_document.Lab] | None, found: Complaints
) -> Iterator[model.Expectation]:
    spec = lab.item.spec.verify if lab and lab.item.spec else None
    for index, each in enumerate(spec.expect or () if spec else ()):
        for name, text, kinds in (
            ("from", each.source, outside.SOURCES),
            ("to", each.destination, outside.DESTINATIONS),
        ):
            if text.partition("/")[0] not in kinds and lab:
                what = f"verify.expect[{index}].{name}"
                message = f"{_title(lab)}: {what} {shown(text)} is no pattern"
                hint = f"it begins with {', '.join(f'{kind}/' for kind in kinds)}; * matches all"
                at = ("spec", "verify", "expect", index, name)
                found.error("bad-value", message, lab.origin, *at, hint=hint)
        yield model.Expectation(
            source=each.source,
            destination=each.destination,
            outcome=each.outcome or "unreachable",
        )


def _service_proxy(
    lab: Stated[lab_document.Lab] | None, decided: Networks, found: Complaints
) -> model.ServiceProxy:
    spec = (lab.item.spec.serviceProxy if lab and lab.item.spec else None) or (
        lab_document.ServiceProxySpec()
    )
    if lab is not None:
        _check_service_proxy(lab, spec, found)
    usual = model.ServiceProxy()
    local = spec.detectLocal or lab_document.DetectLocalSpec()
    iptables = spec.iptables or lab_document.IPTablesSpec()
    bit, localhost = iptables.masqueradeBit, iptables.localhostNodePorts
    nftables = spec.nftables or lab_document.NFTablesSpec()
    nftables_bit = nftables.masqueradeBit
    conntrack = spec.conntrack or lab_document.ConntrackSpec()
    ipvs = spec.ipvs or lab_document.IPVSSpec()
    return model.ServiceProxy(
        mode=spec.mode or usual.mode,
        detectLocalMode=spec.detectLocalMode or usual.detectLocalMode,
        detectLocal=model.DetectLocal(
            bridgeInterface=local.bridgeInterface or "",
            interfaceNamePrefix=local.interfaceNamePrefix or "",
        ),
        clusterCIDR=(
            ",".join(map(str, decided.pod_cidrs)) if spec.clusterCIDR is None else spec.clusterCIDR
        ),
        nodePortAddresses=tuple(spec.nodePortAddresses or ()),
        iptables=model.IPTablesProxy(
            masqueradeAll=bool(iptables.masqueradeAll),
            masqueradeBit=usual.iptables.masqueradeBit if bit is None else bit,
            localhostNodePorts=localhost is not False,
        ),
        nftables=model.NFTablesProxy(
            masqueradeAll=bool(nftables.masqueradeAll),
            masqueradeBit=usual.nftables.masqueradeBit if nftables_bit is None else nftables_bit,
        ),
        ipvs=model.IPVSProxy(
            scheduler=ipvs.scheduler or usual.ipvs.scheduler,
            strictARP=bool(ipvs.strictARP),
            **{name: _seconds(getattr(ipvs, name)) or 0 for name in IPVS_TIMEOUTS},
        ),
        conntrack=model.ConntrackProxy(
            tcpBeLiberal=bool(conntrack.tcpBeLiberal),
            **{name: _seconds(getattr(conntrack, name)) or 0 for name in TIMEOUTS},
        ),
        featureGates=spec.featureGates or {},
    )


def _iptables_backend(lab: Stated[lab_document.Lab] | None) -> model.IPTablesBackend | None:
    return lab.item.spec.iptablesBackend if lab and lab.item.spec else None


def _check_service_proxy(
    lab: Stated[lab_document.Lab], spec: lab_document.ServiceProxySpec, found: Complaints
) -> None:
    title, origin, path = _title(lab), lab.origin, ("spec", "serviceProxy")
    if spec.clusterCIDR:
        where = (*path, "clusterCIDR")
        for part in split(spec.clusterCIDR, title, found, origin, where).values():
            network(part, title, found, origin, where)
    for index, text in enumerate(spec.nodePortAddresses or ()):
        if text not in NODE_PORT_ADDRESSES and not is_network(text):
            message = f"{title}: nodePortAddresses[{index}] {shown(text)} is not a CIDR"
            near = suggest(text, NODE_PORT_ADDRESSES)
            hint = f'did you mean "{near}"?' if near else _NODE_PORT_ADDRESSES_HINT
            at = ("nodePortAddresses", index)
            found.error("bad-cidr", message, origin, *path, *at, hint=hint)
    local = spec.detectLocal or lab_document.DetectLocalSpec()
    for mode, name, value in (
        ("BridgeInterface", "bridgeInterface", local.bridgeInterface),
        ("InterfaceNamePrefix", "interfaceNamePrefix", local.interfaceNamePrefix),
    ):
        if spec.detectLocalMode == mode and not value:
            message = f"{title}: detectLocalMode {mode} needs detectLocal.{name}"
            found.error("missing-field", message, origin, *path, "detectLocalMode")
        elif value and not _is_interface(value, _LONGEST[name]):
            message = (
                f"{title}: detectLocal.{name} {shown(value)} cannot be the name of an interface"
            )
            hint = f"at most {_LONGEST[name]} characters, no blank, /, : or quotation mark"
            found.error("bad-value", message, origin, *path, "detectLocal", name, hint=hint)
    scheduler = spec.ipvs.scheduler if spec.ipvs else None
    if scheduler and scheduler not in _SCHEDULERS.split():
        message = f"{title}: ipvs.scheduler {shown(scheduler)} is no scheduler of IPVS"
        near = suggest(scheduler, _SCHEDULERS.split())
        known = f"Linux has {', '.join(_SCHEDULERS.split())}"
        hint = f'did you mean "{near}"? {known}' if near else known
        found.error("unknown-scheduler", message, origin, *path, "ipvs", "scheduler", hint=hint)
    for part, names in (("conntrack", TIMEOUTS), ("ipvs", IPVS_TIMEOUTS)):
        settings = getattr(spec, part)
        for name in names if settings else ():
            text = getattr(settings, name)
            if text is not None and _seconds(text) is None:
                message = f"{title}: {part}.{name} {shown(text)} is not a duration"
                hint = "hours, minutes and seconds, such as 24h, 1h30m or 45s"
                found.error("bad-value", message, origin, *path, part, name, hint=hint)
    for gate, on in (spec.featureGates or {}).items():
        key = (*path, "featureGates", gate)
        if gate not in (*FEATURE_GATES, *LOCKED_GATES):
            message = f"{title}: the feature gate {gate} is not built by this version"
            near = suggest(gate, FEATURE_GATES)
            hint = f'did you mean "{near}"?' if near else f"it knows {', '.join(FEATURE_GATES)}"
            found.error("unsupported", message, origin, *key, hint=hint, at_key=True)
        elif gate in LOCKED_GATES and not on:
            message = f"{title}: the feature gate {gate} cannot be switched off any more"
            found.error("bad-value", message, origin, *key)


def _is_interface(name: str, longest: int) -> bool:
    """Whether the kernel takes a name (dev_valid_name, net/core/dev.c), and rules can hold it."""
    return (
        len(name.encode()) <= longest
        and name.isprintable()
        and name not in (".", "..")
        and not set(" /:\"'") & set(name)
    )


def _seconds(duration: str | None) -> int | None:
    """Whole seconds of a duration in Go's spelling; None if it is none."""
    if duration == "0":
        return 0
    parts = _DURATION.findall(duration or "")
    if not parts or "".join(map("".join, parts)) != duration:
        return None
    return int(sum(float(number) * _UNITS[unit] for number, unit in parts))


def _title(lab: Stated[lab_document.Lab]) -> str:
    return f"Lab {lab.item.metadata.name}"
