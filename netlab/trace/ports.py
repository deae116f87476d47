"""Which Service, protocol and port a request means, where its destination leaves that open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netlab.problems import NetlabError, Problem
from netlab.topology.model import Lab, Service, ServicePort
from netlab.topology.references import Reference
from netlab.trace.family import Family, first_of
from netlab.trace.form import USUAL_PORTS, require_transport
from netlab.trace.model import ProbeProtocol

if TYPE_CHECKING:
    from netlab.trace.aim import Request


def require_one_port(request: Request, target: Reference) -> None:
    """Refuse a port beside another one in the destination's text."""
    text = request.destination
    has_port = "]:" in text or (text.count(":") == 1 and "[" not in text)
    written = target.port_number if has_port else None
    if request.port and written not in (None, request.port):
        raise _error(
            "two-ports",
            f'"{text}" has the port {written}, and --port says {request.port}: a packet has one',
        )


def service_of(
    lab: Lab, target: Reference, request: Request, family: Family
) -> tuple[Service | None, ServicePort | None]:
    """The Service behind the destination, and its port: by cluster IP, or by node port."""
    number = request.port or target.port_number
    wanted = request.transport.upper() if request.transport else None
    if target.service:
        ports = [
            port
            for port in target.service.ports
            if (number is None or port.port == number) and wanted in (None, port.protocol)
        ]
        ports.sort(key=lambda port: port.protocol != "TCP")
        return target.service, target.port or (ports[0] if ports else None)
    if target.node and not target.pod:
        for service in lab.services:
            of_family = first_of(family, service.cluster_ips) is not None
            for port in service.ports if of_family else ():
                if number and port.node_port == number and wanted in (None, port.protocol):
                    return service, port
    return None, None


def protocol_of(request: Request, target: Reference, port: ServicePort | None) -> ProbeProtocol:
    """What is sent: what was asked for, else that of the Service's port."""
    if request.transport:
        return request.transport
    if port:
        if port.protocol == "SCTP":
            raise _error(
                "sctp", f'port {port.port} of "{request.destination}" is SCTP, which is not traced'
            )
        return "tcp" if port.protocol == "TCP" else "udp"
    if request.port or target.port_number or target.service:
        return "tcp"
    server = target.pod or target.host or target.container
    if server and server.listen:
        return "tcp" if any(protocol == "TCP" for protocol, _ in server.listen) else "udp"
    return "icmp"


def port_of(request: Request, target: Reference, protocol: ProbeProtocol) -> int:
    """The port to send to.  Raises NetlabError (exit code 2) if it is left open."""
    number = request.port or target.port_number
    usual = USUAL_PORTS.get(request.protocol or "")
    if usual and target.service:
        require_transport(request, target.service, number, protocol)
    if number:
        return number
    if target.service:
        ports = [port for port in target.service.ports if port.protocol == protocol.upper()]
        ports = [port for port in ports if port.port == usual] or ports
        if len(ports) == 1:
            return ports[0].port
        known = ", ".join(port.name or str(port.port) for port in target.service.ports)
    else:
        server = target.pod or target.host or target.container
        listening = server.listen if server else ()
        of_protocol = [open_port for name, open_port in listening if name == protocol.upper()]
        if usual and (usual in of_protocol or protocol == "udp" or not of_protocol):
            return usual
        if of_protocol:
            return of_protocol[0]
        known = ", ".join(str(open_port) for _, open_port in listening)
    raise _error(
        "port-needed",
        f'"{request.destination}" leaves the {protocol} port open',
        f"write {request.destination}:PORT or --port; it has {known}" if known else "write --port",
    )


def named(request: Request, target: Reference, port: int | None) -> str:
    """The destination, with the port that was chosen from several."""
    several = target.service is not None and len(target.service.ports) > 1
    if port and several and not (request.port or target.port_number or target.port):
        return f"{request.destination}:{port}"
    return request.destination


def _error(code: str, message: str, hint: str | None = None) -> NetlabError:
    return NetlabError(Problem(code, message, hint=hint))
