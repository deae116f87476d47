"""`netlab get`: the objects of a lab, with the manners of kubectl."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from netlab.cli.common import (
    lab_option,
    namespace_option,
    output_option,
    print_json,
    print_table,
    running_lab,
)
from netlab.problems import NetlabError, Problem, suggest

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from netlab.topology.model import Lab

Object = dict[str, Any]

_NAMES = {
    **dict.fromkeys(("nodes", "node", "no"), "nodes"),
    **dict.fromkeys(("pods", "pod", "po"), "pods"),
    **dict.fromkeys(("services", "service", "svc"), "services"),
    **dict.fromkeys(
        ("endpointslices", "endpointslice", "endpoints", "eps", "ep"), "endpointslices"
    ),
    **dict.fromkeys(("networkpolicies", "networkpolicy", "netpol"), "networkpolicies"),
    **dict.fromkeys(("hosts", "host"), "hosts"),
    **dict.fromkeys(("ingresses", "ingress", "ing"), "ingresses"),
    **dict.fromkeys(("containers", "container"), "containers"),
    **dict.fromkeys(("loadbalancers", "loadbalancer", "lb"), "loadbalancers"),
}
_SINGULAR = {
    "nodes": "node",
    "pods": "pod",
    "services": "service",
    "endpointslices": "endpointslice",
    "networkpolicies": "networkpolicy",
    "hosts": "host",
    "ingresses": "ingress",
    "containers": "container",
    "loadbalancers": "loadbalancer",
}


def _complete_kind(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(name) for name in (*_SINGULAR, "all") if name.startswith(incomplete)]


@click.command()
@click.argument("kinds", shell_complete=_complete_kind, metavar="KIND[,KIND]|KIND/NAME")
@click.argument("names", nargs=-1)
@lab_option
@namespace_option
@click.option("-A", "--all-namespaces", is_flag=True, help="Of every namespace (the default).")
@click.option(
    "-l", "--selector", metavar="LABELS", help="Only with these labels: app=web,tier!=db."
)
@click.option(
    "-w", "--watch", is_flag=True, help="With -o json: first what is there, then each change."
)
@output_option("wide", "json", "yaml", "name")
def get(
    kinds: str,
    names: tuple[str, ...],
    lab_name: str | None,
    namespace: str | None,
    all_namespaces: bool,
    selector: str | None,
    watch: bool,
    output: str | None,
) -> None:
    """List nodes, pods, services, endpointslices and what else a lab has (or `all`).

    That is networkpolicies, ingresses, hosts, containers and loadbalancers.

    With --watch -o json each line is an event, as `kubectl get --watch --output-watch-events`
    prints it, until the lab goes down.
    """
    if watch and output != "json":
        message = "--watch prints each event as a line of JSON"
        raise NetlabError(Problem("usage", message, hint="add `-o json`"))
    if "/" in kinds:
        kinds, _, name = kinds.partition("/")
        names = (name, *names)
    lab = running_lab(lab_name, on_machines=True)
    matches = _selector(selector)
    wanted = list(_SINGULAR) if kinds == "all" else [_kind(word) for word in kinds.split(",")]

    def chosen(lab: Lab, kind: str) -> list[Object]:
        return [
            item
            for item in _objects(lab, kind)
            if matches(item["metadata"].get("labels") or {})
            and (
                namespace is None
                or all_namespaces
                or item["metadata"].get("namespace", namespace) == namespace
            )
        ]

    found = [
        (kind, _named(kind, objects, names) if names else objects)
        for kind in wanted
        for objects in (chosen(lab, kind),)
    ]
    if watch:
        _print_events(
            lab.name,
            lambda lab: (
                item
                for kind in wanted
                for item in chosen(lab, kind)
                if not names or item["metadata"]["name"] in names
            ),
        )
        return
    _print(found, output, single=bool(names) and len(names) == 1 and len(wanted) == 1)


def _kind(word: str) -> str:
    if word not in _NAMES:
        near = suggest(word, list(_NAMES))
        hint = f'did you mean "{near}"? ' if near else ""
        raise NetlabError(
            Problem("unknown-kind", f'"{word}" is no kind', hint=f"{hint}{', '.join(_SINGULAR)}")
        )
    return _NAMES[word]


def _objects(lab: Lab, kind: str) -> list[Object]:
    from netlab.lab.container_status import with_containers
    from netlab.topology import status

    listed: dict[str, Callable[[Lab], list[Object]]] = {
        "nodes": status.nodes,
        "pods": lambda lab: with_containers(lab, status.pods(lab)),
        "services": status.services,
        "endpointslices": status.endpoint_slices,
        "networkpolicies": status.network_policies,
        "hosts": status.hosts,
        "ingresses": status.ingresses,
        "containers": status.containers,
        "loadbalancers": status.load_balancers,
    }
    return listed[kind](lab)


def _named(kind: str, objects: list[Object], names: Sequence[str]) -> list[Object]:
    chosen, problems = [], []
    for name in names:
        hits = [item for item in objects if item["metadata"]["name"] == name]
        if not hits:
            near = suggest(name, [item["metadata"]["name"] for item in objects])
            problems.append(
                Problem(
                    f"unknown-{_SINGULAR[kind]}",
                    f'there is no {_SINGULAR[kind]} "{name}"',
                    hint=f'did you mean "{near}"?' if near else f"`netlab get {kind}` lists them",
                )
            )
        chosen += hits
    if problems:
        raise NetlabError(problems)
    return chosen


def _selector(text: str | None) -> Callable[[dict[str, str]], bool]:
    """`key=value`, `key==value`, `key!=value`, `key`, `!key`, joined by commas."""
    tests: list[Callable[[dict[str, str]], bool]] = []
    for term in (text or "").split(","):
        key, operator, value = _term(term.strip())
        if not key:
            continue
        if operator == "!=":
            tests.append(lambda labels, k=key, v=value: labels.get(k) != v)  # type: ignore[misc]
        elif operator == "=":
            tests.append(lambda labels, k=key, v=value: labels.get(k) == v)  # type: ignore[misc]
        elif operator == "!":
            tests.append(lambda labels, k=key: k not in labels)  # type: ignore[misc]
        else:
            tests.append(lambda labels, k=key: k in labels)  # type: ignore[misc]
    return lambda labels: all(test(labels) for test in tests)


def _term(term: str) -> tuple[str, str, str]:
    for operator in ("!=", "==", "="):
        key, found, value = term.partition(operator)
        if found:
            return key.strip(), "!=" if operator == "!=" else "=", value.strip()
    return (term[1:].strip(), "!", "") if term.startswith("!") else (term, "", "")


def _print_events(name: str, objects_of: Callable[[Lab], Iterable[Object]]) -> None:
    """Until the lab goes down."""
    import json

    from netlab.lab.events import watch

    for events in watch(name, objects_of):
        lines = (json.dumps(event, ensure_ascii=False, separators=(",", ":")) for event in events)
        click.echo("\n".join(lines))
    click.echo(f"{name} is down: nothing more will happen", err=True)


def _print(found: list[tuple[str, list[Object]]], output: str | None, single: bool) -> None:
    everything = [item for _, objects in found for item in objects]
    if output in ("json", "yaml"):
        value: Object = (
            everything[0]
            if single and len(everything) == 1
            else {"apiVersion": "v1", "kind": "List", "items": everything}
        )
        if output == "json":
            print_json(value)
        else:
            import yaml

            click.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), nl=False)
        return
    if output == "name":
        for kind, objects in found:
            for item in objects:
                click.echo(f"{_SINGULAR[kind]}/{item['metadata']['name']}")
        return
    if not everything:
        click.echo("nothing found", err=True)
    first = True
    for kind, objects in found:
        if not objects:
            continue
        if not first:
            click.echo()
        first = False
        header, row, wide = _TABLES[kind]
        columns = len(header) if output == "wide" else len(header) - wide
        print_table(header[:columns], [row(item)[:columns] for item in objects])


def _node_row(item: Object) -> list[str]:
    address = next(a["address"] for a in item["status"]["addresses"] if a["type"] == "InternalIP")
    return [item["metadata"]["name"], address, ",".join(item["spec"]["podCIDRs"])]


def _pod_row(item: Object) -> list[str]:
    ready = any(
        c["type"] == "Ready" and c["status"] == "True" for c in item["status"]["conditions"]
    )
    metadata, status = item["metadata"], item["status"]
    return [
        metadata["namespace"],
        metadata["name"],
        "True" if ready else "False",
        _pod_status(item),
        str(sum(each.get("restartCount", 0) for each in status.get("containerStatuses") or ())),
        status["podIP"],
        item["spec"]["nodeName"],
    ]


def _pod_status(item: Object) -> str:
    """As kubectl sums it up."""
    if item["metadata"].get("deletionTimestamp"):
        return "Terminating"
    for each in item["status"].get("containerStatuses") or ():
        if waiting := (each.get("state") or {}).get("waiting"):
            return str(waiting.get("reason") or "Waiting")
    return str(item["status"]["phase"])


def _service_row(item: Object) -> list[str]:
    spec = item["spec"]
    ingress = item["status"]["loadBalancer"].get("ingress") or []
    external = [
        *(spec.get("externalIPs") or []),
        *(entry.get("ip") or entry.get("hostname", "?") for entry in ingress),
    ]
    ports = (
        f"{port['port']}:{port['nodePort']}/{port['protocol']}"
        if "nodePort" in port
        else f"{port['port']}/{port.get('protocol', 'TCP')}"
        for port in spec.get("ports") or []
    )
    selector = ",".join(f"{k}={v}" for k, v in (spec.get("selector") or {}).items())
    return [
        item["metadata"]["namespace"],
        item["metadata"]["name"],
        spec["type"],
        spec.get("clusterIP", "<none>"),
        ",".join(external) or "<none>",
        ",".join(ports) or "<none>",
        selector or "<none>",
    ]


def _slice_row(item: Object) -> list[str]:
    endpoints = [
        f"{endpoint['addresses'][0]}" + ("" if endpoint["conditions"]["ready"] else " (unready)")
        for endpoint in item["endpoints"]
    ]
    ports = [f"{port['port']}/{port['protocol']}" for port in item["ports"]]
    return [
        item["metadata"]["namespace"],
        item["metadata"]["name"],
        item["addressType"],
        ",".join(ports) or "<unset>",
        ",".join(endpoints) or "<none>",
    ]


def _policy_row(item: Object) -> list[str]:
    labels = (item["spec"].get("podSelector") or {}).get("matchLabels") or {}
    selector = ",".join(f"{key}={text}" for key, text in labels.items())
    types = ",".join(item["spec"]["policyTypes"])
    return [item["metadata"]["namespace"], item["metadata"]["name"], types, selector or "<none>"]


def _ingress_row(item: Object) -> list[str]:
    spec, metadata = item.get("spec") or {}, item["metadata"]
    hosts = dict.fromkeys(rule.get("host") or "*" for rule in spec.get("rules") or ())
    ingress = (item["status"].get("loadBalancer") or {}).get("ingress") or ()
    addresses = ",".join(str(entry.get("ip") or entry.get("hostname")) for entry in ingress)
    name = spec.get("ingressClassName") or "<none>"
    return [metadata["namespace"], metadata["name"], name, ",".join(hosts) or "*", addresses]


def _balancer_row(item: Object) -> list[str]:
    spec = item["spec"]
    return [item["metadata"]["name"], spec["address"], spec["pool"], spec["mode"]]


def _host_row(item: Object) -> list[str]:
    spec = item["spec"]
    return [item["metadata"]["name"], spec["address"], spec.get("network") or "underlay"]


def _container_row(item: Object) -> list[str]:
    spec = item["spec"]
    published = [
        f"{port['hostPort']}->{port['port']}/{port.get('protocol', 'TCP')}"
        for port in spec.get("ports") or ()
        if port.get("hostPort")
    ]
    name, address = item["metadata"]["name"], spec.get("address") or "<none>"
    return [name, spec["network"], address, spec["node"], ",".join(published) or "<none>"]


# Header, how an object becomes a row, and how many last columns are for `-o wide` only.
_TABLES: dict[str, tuple[list[str], Callable[[Object], list[str]], int]] = {
    "networkpolicies": (["NAMESPACE", "NAME", "TYPES", "POD-SELECTOR"], _policy_row, 0),
    "hosts": (["NAME", "ADDRESS", "NETWORK"], _host_row, 0),
    "ingresses": (["NAMESPACE", "NAME", "CLASS", "HOSTS", "ADDRESS"], _ingress_row, 0),
    "containers": (["NAME", "NETWORK", "ADDRESS", "NODE", "PUBLISHED"], _container_row, 0),
    "loadbalancers": (["NAME", "ADDRESS", "POOL", "MODE"], _balancer_row, 0),
    "nodes": (["NAME", "INTERNAL-IP", "POD-CIDR"], _node_row, 0),
    "pods": (
        ["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "IP", "NODE"],
        _pod_row,
        2,
    ),
    "services": (
        ["NAMESPACE", "NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "SELECTOR"],
        _service_row,
        1,
    ),
    "endpointslices": (["NAMESPACE", "NAME", "ADDRESSTYPE", "PORTS", "ENDPOINTS"], _slice_row, 0),
}
