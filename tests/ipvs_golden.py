"""What the real kube-proxy left in ipvs mode, to compare with: tests/golden/ipvs.

Recorded on a Debian kernel; tests/golden/ipvs/README.md says how.
"""

from __future__ import annotations

import re

import yaml
from msgspec.structs import replace

from netlab.datapath.services import ipvs_listing
from netlab.datapath.state import Balancing, IpSet
from netlab.topology.model import Lab, Node, Overlay
from services_golden import GOLDEN, lab_of

IPVS = GOLDEN / "ipvs"
STATES = sorted(
    str(path.parent.relative_to(IPVS))
    for path in IPVS.glob("**/ipvsadm.txt")
    # a proxy that does not run, and what is there while connections end: test_ipvs_kernel.py
    if path.parent.name not in ("2-stopped", "3-endpoint-removed", "5-removed-again")
    and path.parent.name != "6-connection-closed"
)


def read(state: str, name: str) -> str:
    return (IPVS / state / name).read_text()


def golden_lab(state: str) -> tuple[Lab, Node]:
    """The lab of a state, and the node that was recorded."""
    folder = IPVS / state
    config = folder / "config.yaml"
    objects = list(yaml.safe_load_all((folder / "objects.yaml").read_text()))
    if not config.exists():  # a step, whose nodes are those of the sequence
        config = folder.parent / "config.yaml"
        first = yaml.safe_load_all((folder.parent / "objects.yaml").read_text())
        objects += (each for each in first if each["kind"] == "Node")
    lab, node = lab_of(f"ipvs/{state}", objects, yaml.safe_load(config.read_text()))
    proxy = replace(lab.service_proxy, mode="ipvs")
    # No overlay was there, and so no address of one
    return replace(lab, service_proxy=proxy, overlay=Overlay(type="host-gw")), node


def servers(state: str) -> list[str]:
    """Virtual and real servers as `ipvsadm-save -n` printed them."""
    return [line for line in read(state, "ipvsadm.txt").splitlines() if re.match("-[aA] ", line)]


def timeouts(state: str) -> str:
    """`900 120 300`, of TCP, of TCP that ends, and of UDP."""
    return read(state, "ipvsadm.txt").rstrip().rpartition(": ")[2]


def listed(state: str) -> dict[str, str]:
    """What the tools printed, by family, as `netlab.lab.rules.printed` has it."""
    below = [line for line in read(state, "ipset.txt").splitlines() if line] + servers(state)
    six = [line for line in below if " KUBE-6-" in line or " [" in line]
    four = [line for line in below if line not in six]
    return {
        "ip": read(state, "iptables.txt") + "".join(f"{line}\n" for line in four),
        "ip6": read(state, "ip6tables.txt") + "".join(f"{line}\n" for line in six),
    }


def addresses(state: str) -> set[str]:
    """Addresses of kube-ipvs0, with their lengths."""
    return set(re.findall(r"^kube-ipvs0 inet6? (\S+)", read(state, "addresses.txt"), re.M))


def sysctls(state: str) -> dict[str, str]:
    found = re.findall(r"^net\.(\S+) = (\S+)", read(state, "sysctls.txt"), re.M)
    return {f"net/{name.replace('.', '/')}": value for name, value in found}


def as_saved(balancing: Balancing) -> list[str]:
    """Servers as `ipvsadm-save -n` prints them, sorted as the recording is."""
    servers = sorted(balancing.servers, key=ipvs_listing.service)
    return [line for server in servers for line in ipvs_listing.as_saved(server)]


def as_listed(sets: tuple[IpSet, ...]) -> tuple[list[str], list[str]]:
    """Sets as ipset prints them, and their entries, both sorted."""
    made = sorted(map(ipvs_listing.creation, sets))
    entries = sorted(f"add {each.name} {entry}" for each in sets for entry in each.entries)
    return made, entries
