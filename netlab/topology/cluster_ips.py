"""The families and cluster IPs of Services: what is given is kept, the rest decided.

* A Service has the families that its ipFamilies, clusterIPs and ipFamilyPolicy name, as the API
  server reads them; the default is the first Service CIDR's.
* A cluster IP that is not given is the lowest free one of the Service CIDR from its eleventh
  address on (10.96.0.11, fd00:10:96::b; those before are where clusters have `kubernetes` and DNS),
  then the lower ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from netlab.topology import kubernetes as k8s
from netlab.topology.addresses import (
    DUAL_STACK_HINT,
    Address,
    Network,
    address,
    address_at,
    family,
    family_of,
    first_of,
    hosts,
    of_families,
    width,
)
from netlab.topology.model import Family
from netlab.topology.networks import Networks
from netlab.topology.objects import Stated
from netlab.topology.places import Complaints, Path

_OF_SERVICES = "Services of this lab are"
_FIRST_CLUSTER_IP = 11  # counted from the network's address


class ClusterIPs:
    """The families and cluster IPs of a lab's Services."""

    def __init__(
        self, stated: list[Stated[k8s.Service]], networks: Networks, found: Complaints
    ) -> None:
        self._found = found
        families = networks.families
        self._cidrs = [cidr for cidr in networks.service_cidrs if family(cidr) in families]
        # Their first one is what a Service has by default.
        self._available = tuple(dict.fromkeys(map(family, self._cidrs))) or families
        self._owner: dict[Address, str] = {}
        self._families: dict[str, tuple[Family, ...]] = {}  # by the title of the Service
        self._decided: dict[str, dict[Family, str]] = {}
        for each in stated:
            self._keep(each, each.item.spec or k8s.ServiceSpec())
        for of in self._available:
            self._allocate(of, [each for each in stated if self._lacks(each, of)])

    def families(self, each: Stated[k8s.Service]) -> tuple[Family, ...]:
        """The families of a Service, the primary one first; none of an ExternalName."""
        return self._families[each.title]

    def of(self, each: Stated[k8s.Service]) -> tuple[str, ...]:
        """Its cluster IPs in the order of its families, "None", or nothing if ExternalName."""
        families, decided = self._families[each.title], self._decided[each.title]
        if families and is_headless(each.item.spec):
            return ("None",)
        return tuple(decided[of] for of in families if of in decided)

    def _keep(self, each: Stated[k8s.Service], spec: k8s.ServiceSpec) -> None:
        self._families[each.title] = ()
        self._decided[each.title] = decided = {}
        if spec.type == "ExternalName":
            if spec.selector:
                message = f"{each.title}: an ExternalName Service has no use for its selector"
                self._found.warning("selects-nothing", message, each.origin, "spec", "selector")
            return
        given: dict[Family, tuple[str, Path]] = {}
        if not is_headless(spec):
            ips, title, origin = _stated_ips(spec), each.title, each.origin
            given = of_families(ips, self._available, title, self._found, origin, _OF_SERVICES)
        for of, (text, path) in given.items():
            ip = address(text, each.title, self._found, each.origin, path)
            if ip is not None:
                self._check(each, ip, path)
                self._owner[ip] = each.title
                decided[of] = str(ip)
        self._families[each.title] = self._families_of(each, spec)

    def _check(self, each: Stated[k8s.Service], ip: Address, path: Path) -> None:
        cidrs = [cidr for cidr in self._cidrs if cidr.version == ip.version]
        if ip in self._owner:
            message = f"{each.title}: {ip} is already the cluster IP of {self._owner[ip]}"
            self._found.error("duplicate-address", message, each.origin, *path)
        elif cidrs and not any(_holds(cidr, ip) for cidr in cidrs):
            # (As after a ServiceCIDR was removed; kube-proxy does not ask.)
            message = (
                f"{each.title}: its cluster IP {ip} is outside the Service CIDR {_list(cidrs)}; "
                "it is kept"
            )
            self._found.warning("outside-cidr", message, each.origin, *path)

    def _families_of(self, each: Stated[k8s.Service], spec: k8s.ServiceSpec) -> tuple[Family, ...]:
        """As the API server decides: initIPFamilyFields, pkg/registry/core/service/storage."""
        stated = spec.ipFamilies or []
        of_ips: list[Family] = []
        if not is_headless(spec):
            of_ips = list(dict.fromkeys(family_of(text) for text, _ in _stated_ips(spec) if text))
        named = tuple(dict.fromkeys((*stated, *of_ips)))
        open_ended = is_headless(spec) and not spec.selector  # its endpoints may be anything
        policy = spec.ipFamilyPolicy or ("RequireDualStack" if open_ended else "SingleStack")
        self._check_families(each, stated, of_ips, policy)
        kept = tuple(of for of in named if of in self._available)
        if policy == "RequireDualStack" and len(self._available) < 2:
            # (One that has two addresses is of a cluster of both families: half of it is here.)
            if not open_ended and len(of_ips) < 2:
                message = (
                    f"{each.title}: ipFamilyPolicy is RequireDualStack; "
                    f"{_OF_SERVICES} {self._available[0]} only"
                )
                path = ("spec", "ipFamilyPolicy")
                self._found.error(
                    "mixed-families", message, each.origin, *path, hint=DUAL_STACK_HINT
                )
        elif len(kept) < len(named) and not of_ips:
            message = (
                f"{each.title}: spec.ipFamilies is {', '.join(named)}; "
                f"{_OF_SERVICES} {self._available[0]} only"
            )
            where = (message, each.origin, "spec", "ipFamilies")
            if kept:
                self._found.warning("other-family", *where)
            else:
                self._found.error("mixed-families", *where, hint=DUAL_STACK_HINT)
        kept = kept or self._available[:1]
        if policy == "SingleStack":
            return kept[:1]
        return tuple(dict.fromkeys((*kept, *self._available)))

    def _check_families(
        self, each: Stated[k8s.Service], stated: list[Family], of_ips: list[Family], policy: str
    ) -> None:
        """What does not fit together, whatever the lab."""
        found, origin = self._found, each.origin
        if len(set(stated)) < len(stated):
            message = f"{each.title}: spec.ipFamilies has two of {stated[0]}"
            found.error("mixed-families", message, origin, "spec", "ipFamilies")
        for index, (of, is_of) in enumerate(zip(stated, of_ips, strict=False)):
            if of != is_of:
                message = (
                    f"{each.title}: spec.ipFamilies[{index}] is {of}, its cluster IP is {is_of}"
                )
                found.error("mixed-families", message, origin, "spec", "ipFamilies", index)
        field = "ipFamilies" if len(stated) > 1 else "clusterIPs"
        if policy == "SingleStack" and max(len(stated), len(of_ips)) > 1:
            message = f"{each.title}: spec.{field} has two families, ipFamilyPolicy is SingleStack"
            hint = "give it ipFamilyPolicy: PreferDualStack or RequireDualStack"
            found.error("mixed-families", message, origin, "spec", field, hint=hint)

    def _lacks(self, each: Stated[k8s.Service], of: Family) -> bool:
        return (
            of in self._families[each.title]
            and of not in self._decided[each.title]
            and not is_headless(each.item.spec)
        )

    def _allocate(self, of: Family, waiting: list[Stated[k8s.Service]]) -> None:
        cidrs = [cidr for cidr in self._cidrs if family(cidr) == of]
        free = (ip for ip in _candidates(cidrs) if ip not in self._owner)
        for served, each in enumerate(waiting if cidrs else ()):
            chosen = next(free, None)
            if chosen is not None:
                self._decided[each.title][of] = str(chosen)
                continue
            more = len(waiting) - served - 1
            others = f" and {more} more" if more else ""
            message = (
                f"the Service CIDR {_list(cidrs)} has no address left for {each.title}{others}"
            )
            hint = "give the lab a wider spec.serviceCIDR"
            self._found.error("exhausted-cidr", message, each.origin, hint=hint)
            break


def is_headless(spec: k8s.ServiceSpec | None) -> bool:
    """Whether a Service has `clusterIP: None`."""
    return spec is not None and "None" in (spec.clusterIP, *(spec.clusterIPs or ()))


def _stated_ips(spec: k8s.ServiceSpec) -> Iterator[tuple[str | None, Path]]:
    yield spec.clusterIP, ("spec", "clusterIP")
    for index, ip in enumerate(spec.clusterIPs or ()):
        yield ip, ("spec", "clusterIPs", index)


def _list(cidrs: list[Network]) -> str:
    return ", ".join(map(str, cidrs))


def _holds(cidr: Network, ip: Address) -> bool:
    return ip in cidr if cidr.prefixlen > width(family(cidr)) - 2 else int(ip) in hosts(cidr)


def _candidates(cidrs: list[Network]) -> Iterator[Address]:
    for cidr in cidrs:
        possible = hosts(cidr)
        start = min(first_of(cidr) + _FIRST_CLUSTER_IP, possible.stop)
        for number in chain(range(start, possible.stop), range(possible.start, start)):
            yield address_at(number, family(cidr))
