"""The proxies of a node in userspace mode: HAProxy for TCP, nginx's stream module for UDP.

kube-proxy was the proxy itself; these do what it did.  Endpoints take turns, a client with affinity
keeps its endpoint, and a connection that one endpoint does not take goes to the next.  A Service
without endpoints has a proxy all the same: it takes connections and closes them, and loses
datagrams.

Source: kube-proxy v1.25, pkg/proxy/userspace/proxysocket.go and roundrobin.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netlab.datapath.services.userspace import Proxied, proxied
from netlab.datapath.state import File, Process, namespace_name
from netlab.topology.model import Endpoint, Lab, Node

MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"
PROGRAMS = (
    ("haproxy", "haproxy"),
    ("nginx", "nginx-light"),
    (MODULE, "libnginx-mod-stream"),
)

_HAPROXY_CONFIG = "/run/haproxy/haproxy.cfg"
_NGINX = "/run/nginx"
_ANY = {4: "0.0.0.0", 6: "::"}

_HAPROXY = """\
global
  user haproxy
  group haproxy
  nbthread 1
  maxconn 4096
  stats socket /run/haproxy/admin.sock mode 600 level admin expose-fd listeners

defaults
  mode tcp
  balance roundrobin
  retries 3
  option redispatch 1
  timeout connect 1s
  timeout client 1d
  timeout server 1d
"""

# An idle flow of datagrams is forgotten after a second; kube-proxy's --udp-timeout was 250 ms.
_NGINX_CONFIG = """\
user www-data;
daemon off;
pid /run/nginx/nginx.pid;
error_log stderr crit;
worker_processes 1;
load_module {module};
events {{
  worker_connections 4096;
}}
stream {{
  proxy_timeout 1s;
  proxy_next_upstream off;
"""


def processes(lab: Lab, node: Node) -> tuple[Process, ...]:
    """What runs on a node, if it has a Service for it."""
    families = tuple(family for family in (4, 6) if f"IPv{family}" in lab.families)
    ports = [(family, each) for family in families for each in proxied(lab, node, family)]
    streams = [entry for entry in ports if entry[1].info.protocol == "tcp"]
    datagrams = [entry for entry in ports if entry[1].info.protocol == "udp"]
    namespace = namespace_name(lab.name, node.name)
    found = []
    if streams:
        found.append(
            Process(
                name="haproxy",
                namespace=namespace,
                command=("haproxy", "-W", "-f", _HAPROXY_CONFIG, "-p", "/run/haproxy/haproxy.pid"),
                package="haproxy",
                files=(File(path=_HAPROXY_CONFIG, text="\n".join(_of_streams(streams))),),
                directories=(("/run/haproxy", ""),),
                reload="SIGUSR2",
                listens=tuple(("TCP", port) for port in _ports(streams)),
            )
        )
    if datagrams:
        path = f"{_NGINX}/nginx.conf"
        found.append(
            Process(
                name="nginx",
                namespace=namespace,
                command=("nginx", "-e", "stderr", "-p", _NGINX, "-c", path),
                package="nginx-light",
                files=(File(path=path, text="\n".join(_of_datagrams(datagrams))),),
                directories=((_NGINX, ""),),
                reload="SIGHUP",
                listens=tuple(("UDP", port) for port in _ports(datagrams)),
            )
        )
    return tuple(found)


def _ports(entries: Iterable[tuple[int, Proxied]]) -> Iterator[int]:
    """Each port once."""
    yield from dict.fromkeys(each.proxy_port for _, each in entries)


def _of_streams(entries: Iterable[tuple[int, Proxied]]) -> Iterator[str]:
    """HAProxy's configuration."""
    yield _HAPROXY
    for family, each in entries:
        yield f"# {each.info.name}"
        yield f"listen {_name(each, family)}"
        only = " v6only" if family == 6 else ""
        yield f"  bind {_ANY[family]}:{each.proxy_port}{only}"
        if each.info.affinity_s is not None:
            kind = "ipv6" if family == 6 else "ip"
            yield f"  stick-table type {kind} size 100k expire {each.info.affinity_s}s"
            yield "  stick on src"
        for endpoint in each.endpoints:
            yield f"  server {endpoint.address}:{endpoint.port} {_end(endpoint)}"
        yield ""


def _of_datagrams(entries: Iterable[tuple[int, Proxied]]) -> Iterator[str]:
    """Nginx's configuration."""
    yield _NGINX_CONFIG.format(module=MODULE)
    for family, each in entries:
        name = _name(each, family)
        yield f"  # {each.info.name}"
        yield f"  upstream {name} {{"
        if each.info.affinity_s is not None:
            yield "    hash $remote_addr consistent;"
        for endpoint in each.endpoints:
            yield f"    server {_end(endpoint)} max_fails=0;"
        if not each.endpoints:
            yield "    server 127.0.0.1:9 down;"  # one there must be
        yield "  }"
        address = f"[::]:{each.proxy_port}" if family == 6 else f"{each.proxy_port}"
        only = " ipv6only=on" if family == 6 else ""
        yield f"  server {{ listen {address} udp{only}; proxy_pass {name}; }}"
    yield "}"
    yield ""


def _end(endpoint: Endpoint) -> str:
    address = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
    return f"{address}:{endpoint.port}"


def _name(each: Proxied, family: int) -> str:
    """What both programs take for a name: "demo.myblog.http"; no part of it has a dot."""
    name = each.info.name.replace("/", ".").replace(":", ".")
    return f"{name}.ipv6" if family == 6 else name
