"""nginx as Ingress controller: its configuration, and the program that keeps it in the pods.

As ingress-nginx does, it sends requests to the endpoints themselves, in turns, and not to cluster
IPs; where one refuses, the next is asked.  Without the Lua of ingress-nginx each change of
endpoints is a change of the configuration, which nginx reads again without losing a connection.
Connections to endpoints are not kept: each request has one.

A request is for the server of its host, else for the default one, and there for an exact path, else
for the longest prefix that ends at a slash of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator

import netlab
from netlab.datapath import podnet
from netlab.datapath.state import File, Process
from netlab.topology.model import (
    Endpoint,
    Ingress,
    IngressBackend,
    IngressPath,
    Lab,
    Pod,
)

PROCESS = "ingress-nginx"
DIRECTORY = "/run/ingress-nginx"
CONFIG = f"{DIRECTORY}/nginx.conf"
USER = "www-data"  # Debian's nginx runs as
STATUS_PORT = 10246  # ingress-nginx's own, on loopback
DEFAULT_CERTIFICATE = "default"
_DIGEST = "@DIGEST@"
_ANY = {4: "", 6: "[::]:"}

_HEAD = """\
# Rendered from the Ingress objects by netlab.
user www-data;
worker_processes 1;
daemon off;
pid {directory}/nginx.pid;
error_log stderr warn;

events {{
  worker_connections 4096;
}}

http {{
  access_log off;
  server_tokens off;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  server_names_hash_bucket_size 512;

  proxy_http_version 1.1;
  proxy_set_header Host $http_host;
  proxy_set_header Connection "";
  proxy_set_header X-Real-IP $remote_addr;
  proxy_set_header X-Forwarded-For $remote_addr;
  proxy_set_header X-Forwarded-Host $http_host;
  proxy_set_header X-Forwarded-Port $server_port;
  proxy_set_header X-Forwarded-Proto $scheme;
  proxy_connect_timeout 5s;

  server {{
    listen 127.0.0.1:{port};
    location / {{
      return 200 "{digest}\\n";
    }}
  }}
"""


def backends(lab: Lab, backend: IngressBackend) -> list[Endpoint]:
    """The ready endpoints behind a backend, in order, each once, of the Service's first family."""
    if backend.port is None:
        return []
    service = next((each for each in lab.services if each.key == backend.service), None)
    if service is None:
        return []
    first = next(iter(service.ip_families or lab.families))
    ends = (
        end
        for end in lab.endpoints_of(service, backend.port)
        if end.ready and (":" in end.address) == (first == "IPv6")
    )
    found = {(end.address, end.port): end for end in ends}
    return [found[key] for key in sorted(found)]


def every_backend(lab: Lab) -> Iterator[IngressBackend]:
    """All of a lab, some of them more than once."""
    for ingress in lab.ingresses:
        for rule in ingress.rules:
            yield from (path.backend for path in rule.paths)
        if ingress.default_backend:
            yield ingress.default_backend


def config(lab: Lab) -> str:
    """nginx.conf, with a digest of itself that the status port tells."""
    text = "\n".join(_lines(lab)) + "\n"
    return text.replace(_DIGEST, digest(text))


def digest(text: str) -> str:
    """What a configuration is known by."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def process(lab: Lab, pod: Pod, namespace: str) -> Process:
    """The controller of a pod."""
    text = "\n".join(_lines(lab)) + "\n"
    root = os.path.dirname(next(iter(netlab.__path__)))
    code = (
        f"import sys; sys.path.append({root!r}); "
        f"from netlab.lab.ingress_controller import main; main({DIRECTORY!r}, {STATUS_PORT})"
    )
    return Process(
        name=PROCESS,
        namespace=namespace,
        command=(sys.executable, "-I", "-S", "-c", code),
        package="nginx-light",
        files=(
            File(path=CONFIG, text=text.replace(_DIGEST, digest(text))),
            File(path=f"{DIRECTORY}/digest", text=digest(text)),
            File(path=f"{DIRECTORY}/certificates", text=_certificates(lab)),
        ),
        directories=((DIRECTORY, ""),),
        reload="SIGHUP",
        names=(f"netlab-ingress:{digest(text)}",),
    )


def _certificates(lab: Lab) -> str:
    """A line for each certificate that has to be made: its name and its hosts."""
    lines = [f"{DEFAULT_CERTIFICATE} ingress.local"]
    for ingress in lab.ingresses:
        for number, each in enumerate(ingress.tls):
            hosts = each.hosts or tuple(rule.host for rule in ingress.rules if rule.host)
            if hosts:
                lines.append(" ".join((_certificate(ingress, number), *dict.fromkeys(hosts))))
    return "".join(f"{line}\n" for line in lines)


def _certificate(ingress: Ingress, number: int) -> str:
    secret = ingress.tls[number].secret or f"{ingress.name}-tls-{number}"
    return f"{ingress.namespace}-{secret}"


# The configuration


def _lines(lab: Lab) -> Iterator[str]:
    yield _HEAD.format(directory=DIRECTORY, port=STATUS_PORT, digest=_DIGEST).rstrip("\n")
    for name, ends in _upstreams(lab).items():
        yield ""
        yield f"  upstream {name} {{"
        for end in ends:
            address = f"[{end.address}]" if ":" in end.address else end.address
            yield f"    server {address}:{end.port} max_fails=0;"
        yield "  }"
    yield ""
    yield "  server {"
    yield from _listening(lab, " default_server")
    yield "    server_name _;"
    yield from _tls_of(DEFAULT_CERTIFICATE)
    default = (
        each.default_backend for each in lab.ingresses if each.default_backend and not each.rules
    )
    yield from _locations(lab, _paths(lab, ""), next(default, None))
    yield "  }"
    for host in dict.fromkeys(rule.host for each in lab.ingresses for rule in each.rules):
        if host:
            yield from _server(lab, host)
    yield "}"


def _server(lab: Lab, host: str) -> Iterator[str]:
    certificate, redirects = _tls_for(lab, host)
    yield ""
    yield "  server {"
    yield from _listening(lab, "")
    yield f"    server_name {_server_name(host)};"
    yield from _tls_of(certificate or DEFAULT_CERTIFICATE)
    if redirects:
        yield "    if ($scheme = http) {"
        yield "      return 308 https://$host$request_uri;"
        yield "    }"
    own = (
        each.default_backend
        for each in lab.ingresses
        if each.default_backend and any(rule.host == host for rule in each.rules)
    )
    yield from _locations(lab, _paths(lab, host), next(own, None))
    yield "  }"


def _server_name(host: str) -> str:
    """A wildcard stands for one label, of which nginx's own would take several."""
    if not host.startswith("*."):
        return host
    return f'"~^[^.]+{re.escape(host[1:])}$"'


def _listening(lab: Lab, rest: str) -> Iterator[str]:
    families = [podnet.family_of(cidr) for cidr in lab.pod_cidrs]
    for family in families:
        only = " ipv6only=on" if family == 6 and rest else ""
        yield f"    listen {_ANY[family]}80{rest}{only};"
        yield f"    listen {_ANY[family]}443 ssl{rest}{only};"


def _tls_of(name: str) -> Iterator[str]:
    yield f"    ssl_certificate {DIRECTORY}/tls/{name}.crt;"
    yield f"    ssl_certificate_key {DIRECTORY}/tls/{name}.key;"


def _tls_for(lab: Lab, host: str) -> tuple[str | None, bool]:
    """The certificate of a host, and whether HTTP is sent on to HTTPS; of the first that says."""
    for ingress in lab.ingresses:
        if not any(rule.host == host for rule in ingress.rules):
            continue
        for number, each in enumerate(ingress.tls):
            if host in each.hosts or not each.hosts:
                return _certificate(ingress, number), ingress.redirects
    return None, False


def _paths(lab: Lab, host: str) -> list[IngressPath]:
    return [
        path
        for each in lab.ingresses
        for rule in each.rules
        if rule.host == host
        for path in rule.paths
    ]


def _locations(
    lab: Lab, paths: Iterable[IngressPath], default: IngressBackend | None
) -> Iterator[str]:
    """Exact paths, then prefixes with what is below them; the rest is the default backend's."""
    exact: dict[str, IngressBackend] = {}
    below: dict[str, IngressBackend] = {}
    for path in paths:
        if path.exact:
            exact.setdefault(path.path, path.backend)
        else:
            below.setdefault(path.path.rstrip("/") + "/", path.backend)
    for prefix, backend in below.items():
        if prefix != "/":
            exact.setdefault(prefix.rstrip("/"), backend)
    for path_text in sorted(exact):
        yield from _location(lab, f"= {path_text}", exact[path_text])
    for prefix in sorted(below, key=lambda each: (-len(each), each)):
        yield from _location(lab, prefix, below[prefix])
    if "/" not in below:
        yield from _location(lab, "/", default)


def _location(lab: Lab, matched: str, backend: IngressBackend | None) -> Iterator[str]:
    yield f"    location {matched} {{"
    if backend is None:
        yield "      return 404;"
    elif not backends(lab, backend):
        yield f"      return 503;  # {backend.service or 'no Service'} has no endpoint"
    else:
        yield f"      proxy_pass http://{_upstream(backend)};"
    yield "    }"


def _upstreams(lab: Lab) -> dict[str, list[Endpoint]]:
    found: dict[str, list[Endpoint]] = {}
    for backend in every_backend(lab):
        if ends := backends(lab, backend):
            found[_upstream(backend)] = ends
    return dict(sorted(found.items()))


def _upstream(backend: IngressBackend) -> str:
    """As ingress-nginx calls them: demo-myblog-80."""
    assert backend.port is not None
    return f"{backend.service.replace('/', '-')}-{backend.port.name or backend.port.port}"
