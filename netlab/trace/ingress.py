"""What an Ingress controller makes of a request, by the declared lab: who answers for a host.

Written from what Ingress objects mean (networking.k8s.io/v1), without the code that renders nginx's
configuration.
"""

from __future__ import annotations

from netlab.topology.model import Ingress, IngressBackend, IngressPath, Lab, Pod, Service


def controllers(lab: Lab) -> list[Pod]:
    """The pods that run a controller."""
    return [pod for pod in lab.pods if pod.ingress_controller]


def rules_for(lab: Lab, host: str) -> list[tuple[Ingress, IngressPath]]:
    """The paths of a host; else those of a wildcard, else those of any host."""
    name = host.partition(":")[0].lower()
    wild = f"*.{name.partition('.')[2]}"
    for wanted in (name, wild, ""):
        found = [
            (ingress, path)
            for ingress in lab.ingresses
            for rule in ingress.rules
            if rule.host == wanted
            for path in rule.paths
        ]
        if found or any(r.host == wanted for i in lab.ingresses for r in i.rules if wanted):
            return found
    return []


def is_host(lab: Lab, host: str) -> bool:
    """Whether some Ingress rule is for a host by its name."""
    name = host.lower()
    hosts = {rule.host for ingress in lab.ingresses for rule in ingress.rules if rule.host}
    return name in hosts or f"*.{name.partition('.')[2]}" in hosts


def backend_for(lab: Lab, host: str, path: str) -> tuple[Ingress, IngressBackend] | None:
    """Who answers for a request over HTTP; None: the controller itself does."""
    asked = path.partition("?")[0]
    found = rules_for(lab, host)
    exact = [(ingress, each) for ingress, each in found if each.exact and each.path == asked]
    below = [
        (ingress, each) for ingress, each in found if not each.exact and _is_below(asked, each.path)
    ]
    below.sort(key=lambda one: -len(one[1].path.rstrip("/")))
    chosen = next(iter((*exact, *below)), None)
    if chosen is None:
        return _default(lab, host)
    ingress, rule = chosen
    return None if is_sent_on(lab, host) else (ingress, rule.backend)


def is_sent_on(lab: Lab, host: str) -> bool:
    """Whether a request over HTTP is answered with the address over HTTPS."""
    name = host.partition(":")[0].lower()
    for ingress in lab.ingresses:
        if any(rule.host == name for rule in ingress.rules):
            for tls in ingress.tls:
                if name in tls.hosts or not tls.hosts:
                    return ingress.redirects
    return False


def _is_below(asked: str, prefix: str) -> bool:
    """Whether a path has all elements of a prefix: /foo has /foo/bar below it, not /foobar."""
    plain = prefix.rstrip("/")
    return asked == plain or asked.startswith(f"{plain}/")


def _default(lab: Lab, host: str) -> tuple[Ingress, IngressBackend] | None:
    """The default backend of an Ingress with rules for the host, or of one without any rule."""
    name = host.partition(":")[0].lower()
    if is_host(lab, name):
        for each in lab.ingresses:
            if each.default_backend and any(rule.host == name for rule in each.rules):
                return each, each.default_backend
        return None
    for each in lab.ingresses:
        if each.default_backend and not each.rules:
            return each, each.default_backend
    return None


def front(lab: Lab) -> Service | None:
    """The Service by which one comes to the controller: outside by preference."""
    keys = {pod.key for pod in controllers(lab)}
    found = {
        entry.service: entry
        for entry in lab.endpoints
        if any(end.pod in keys for end in entry.endpoints)
    }
    services = [
        each
        for each in lab.services
        if each.name in found and each.namespace == found[each.name].namespace
    ]
    order = ("LoadBalancer", "NodePort", "ClusterIP")
    services.sort(key=lambda each: order.index(each.type) if each.type in order else len(order))
    return services[0] if services else None
