"""A service proxy of one's own: reads the events of Services and EndpointSlices, writes nft tables.

netlab get services,endpointslices -o json --watch | python3 docs/own_proxy.py NODE...

It knows ClusterIPs of IPv4 and readiness, and nothing else of what a Service can be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]


def main(nodes: list[str]) -> None:
    known: dict[tuple[str, str, str], Object] = {}
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for event in map(json.loads, lines):
            item = event["object"]
            key = item["kind"], item["metadata"]["namespace"], item["metadata"]["name"]
            if event["type"] == "DELETED":
                known.pop(key, None)
            else:  # ADDED and MODIFIED have the whole object
                known[key] = item
        if lines:
            table = render(list(known.values()))
            for node in nodes:
                command = ["netlab", "exec", f"node/{node}", "--", "nft", "-f", "-"]
                subprocess.run(command, input=table, text=True, check=True)
            print(f"{len(lines)} events written", flush=True)


def render(objects: list[Object]) -> str:
    """The table, replaced as a whole in one transaction."""
    services, refused, hairpins = [], [], []
    for service in (item for item in objects if item["kind"] == "Service"):
        for port in service["spec"].get("ports", ()):
            protocol = port.get("protocol", "TCP").lower()
            at = f"ip daddr {service['spec'].get('clusterIP')} {protocol} dport {port['port']}"
            ready = sorted(set(endpoints(objects, service, port)))
            ways = ", ".join(f"{i} : {ip} . {number}" for i, (ip, number) in enumerate(ready))
            chosen = f"numgen random mod {len(ready)} map {{ {ways} }}"
            if "." not in service["spec"].get("clusterIP", ""):
                continue  # headless, IPv6, or another name for something outside
            if ready:
                services.append(f"{at} dnat ip addr . port to {chosen};")
                hairpins += [f"ip saddr {ip} ip daddr {ip} masquerade;" for ip, _ in ready]
            else:
                refused.append(f"{at} reject;")
    return f"""
        table ip own-proxy
        delete table ip own-proxy
        table ip own-proxy {{
            chain services {{ {" ".join(services)} }}
            chain refused {{ {" ".join(refused)} }}
            chain hairpins {{ {" ".join(dict.fromkeys(hairpins))} }}
            chain prerouting {{ type nat hook prerouting priority -100; jump services; }}
            chain output {{ type nat hook output priority -100; jump services; }}
            chain forward {{ type filter hook forward priority 0; jump refused; }}
            chain local {{ type filter hook output priority 0; jump refused; }}
            chain postrouting {{ type nat hook postrouting priority 100; jump hairpins; }}
        }}
    """


def endpoints(objects: list[Object], service: Object, port: Object) -> Iterator[tuple[str, int]]:
    """Address and port of what is ready behind a Service's port."""
    for item in objects:
        metadata = item["metadata"]
        if (
            item["kind"] == "EndpointSlice"
            and item["addressType"] == "IPv4"
            and metadata["namespace"] == service["metadata"]["namespace"]
            and metadata["labels"]["kubernetes.io/service-name"] == service["metadata"]["name"]
        ):
            for number in item["ports"]:
                same = (number.get("name") or "") == port.get("name", "")
                if same and number["protocol"] == port.get("protocol", "TCP"):
                    for endpoint in item["endpoints"]:
                        if endpoint["conditions"]["ready"]:
                            yield endpoint["addresses"][0], number["port"]


if __name__ == "__main__":
    main(sys.argv[1:])
