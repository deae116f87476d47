"""What pods are called and how they find names, as their specs say."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from ipaddress import ip_address

from netlab.topology import kubernetes_parts as k8s_parts
from netlab.topology import kubernetes_pods as k8s_pods
from netlab.topology import model
from netlab.topology.places import Complaints, Path
from netlab.topology.pods import DraftPod

_LABEL = "k8s-app", "kube-dns"  # that CoreDNS has in a cluster
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_DNS_NAME = re.compile(rf"{k8s_parts.LABEL}(\.{k8s_parts.LABEL})*\.?")
MOST_SERVERS = 3  # MAXNS of resolv.h: the C library asks no more


def is_dns_name(text: str) -> bool:
    """Whether a text may be a name in DNS as Kubernetes has them."""
    return len(text) <= 253 and bool(_DNS_NAME.fullmatch(text))


def servers(drafts: Sequence[DraftPod], of_cluster: bool, found: Complaints) -> list[DraftPod]:
    """The pods that the cluster's name server runs in: those that have the label of CoreDNS.

    A cluster's lab goes without where the program is missing; who wrote the file wants it.
    """
    name, value = _LABEL
    labelled = [
        draft
        for draft in drafts
        if draft.namespace == "kube-system" and draft.labels.get(name) == value
    ]
    path = f"{os.environ.get('PATH', os.defpath)}:{_SBIN}"
    if labelled and of_cluster and shutil.which(model.NAME_SERVER, path=path) is None:
        message = f"no names are told by {labelled[0].title}: {model.NAME_SERVER} is not installed"
        hint = f"apt-get install {model.KNOT} (on Debian; `./bootstrap.sh test` does so)"
        found.warning("not-run", message, hint=hint)
        return []
    return labelled


def of_pod(draft: DraftPod, found: Complaints) -> model.Naming:
    """A pod's own naming; complains of addresses that are none, and of a policy without servers."""
    spec = draft.spec
    config = spec.dnsConfig or k8s_pods.DnsConfig()
    servers = config.nameservers or []
    decided = model.Naming(
        host_name=spec.hostname or "",
        subdomain=spec.subdomain or "",
        as_fqdn=bool(spec.setHostnameAsFQDN),
        aliases=tuple(
            model.HostAlias(ip=each.ip, names=tuple(each.hostnames or ()))
            for each in spec.hostAliases or ()
        ),
        dns_policy=spec.dnsPolicy or "ClusterFirst",
        name_servers=tuple(servers),
        searches=tuple(config.searches or ()),
        options=tuple((each.name, each.value) for each in config.options or ()),
    )
    if decided == model.USUAL_NAMING:
        return model.USUAL_NAMING
    for index, server in enumerate(servers):
        _check_address(server, draft, found, ("dnsConfig", "nameservers", index))
    for index, alias in enumerate(decided.aliases):
        _check_address(alias.ip, draft, found, ("hostAliases", index, "ip"))
    if len(servers) > MOST_SERVERS:
        message = f"{draft.title} names {len(servers)} name servers; {MOST_SERVERS} are asked"
        path = (*draft.path, "dnsConfig", "nameservers")
        found.error("too-many-name-servers", message, draft.origin, *path)
    if decided.dns_policy == "None" and not servers:
        message = f"{draft.title} has dnsPolicy None and names no name server"
        hint = "say which in dnsConfig.nameservers, or leave dnsPolicy out"
        path = (*draft.path, "dnsPolicy")
        found.error("no-name-server", message, draft.origin, *path, hint=hint)
    return decided


def _check_address(text: str, draft: DraftPod, found: Complaints, path: Path) -> None:
    try:
        ip_address(text)
    except ValueError:
        message = f'{draft.title}: "{text}" is not an address'
        found.error("bad-address", message, draft.origin, *draft.path, *path)
