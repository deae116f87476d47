"""`netlab describe`: a Service, a pod or a node, and why it is chosen or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from netlab.cli.common import (
    complete_node,
    complete_reference,
    lab_option,
    namespace_option,
    node_named,
    output_option,
    print_json,
    print_table,
    running_lab,
)
from netlab.problems import Exit, NetlabError, Problem

_NONE = "<none>"  # as kubectl writes it
_MANY = 5
_VERDICTS = {"reject": "REJECT", "drop": "DROP"}


@click.command()
@click.argument(
    "references", metavar="REFERENCE...", nargs=-1, required=True, shell_complete=complete_reference
)
@click.option(
    "--node",
    metavar="NODE",
    multiple=True,
    shell_complete=complete_node,
    help="Of a Service: who is chosen on this node only; may be repeated.",
)
@namespace_option
@lab_option
@output_option("json")
def describe(
    references: tuple[str, ...],
    node: tuple[str, ...],
    namespace: str | None,
    lab_name: str | None,
    output: str | None,
) -> int:
    """Tell all of svc/NAME, pod/NAME, node/NAME or networkpolicy/NAME.

    Of a Service: its endpoints and, for each node, who is chosen with which probability, why others
    are left out, and what happens if there is nobody.
    """
    lab = running_lab(lab_name, on_machines=True)
    from netlab.report import describe as report
    from netlab.report import policies
    from netlab.topology.references import resolve

    nodes = [node_named(lab, name) for name in node] or list(lab.nodes)
    described = []
    for text in references:
        policy = policies.named(lab, text, namespace)
        if policy is not None:
            described.append(policies.policy(lab, policy))
            continue
        reference = resolve(lab, text, namespace)
        if reference.service is not None:
            described.append(report.service(lab, reference.service, nodes))
        elif reference.pod is not None:
            described.append(report.pod(lab, reference.pod))
        elif reference.node is not None:
            described.append(report.node(lab, reference.node))
        else:
            message = f'"{text}" is no Service, pod or node of lab {lab.name}'
            raise NetlabError(Problem("nothing-to-describe", message, hint="`netlab get all`"))
    if output == "json":
        print_json(described[0] if len(described) == 1 else described)
        return int(Exit.YES)
    tell: dict[str, Callable[[Mapping[str, Any]], None]] = {
        "Service": _tell_service,
        "Pod": _tell_pod,
        "Node": _tell_node,
        "NetworkPolicy": lambda facts: click.echo("\n".join(policies.lines(facts))),
    }
    for index, facts in enumerate(described):
        if index:
            click.echo()
        tell[facts["kind"]](facts)
    return int(Exit.YES)


def _tell_service(facts: Mapping[str, Any]) -> None:
    spec = facts["object"]["spec"]
    ingress = facts["object"]["status"]["loadBalancer"].get("ingress") or []
    config = spec.get("sessionAffinityConfig", {}).get("clientIP", {})
    affinity = spec.get("sessionAffinity", "None")
    if affinity == "ClientIP":
        affinity += f" ({config.get('timeoutSeconds', 10800)} s)"
    _tell_metadata(facts)
    _tell(
        {
            "Selector": _labels(spec.get("selector")),
            "Type": spec["type"],
            "IPs": _list(spec.get("clusterIPs")),
            "External IPs": _list(spec.get("externalIPs"), ""),
            "LoadBalancer Ingress": _list(
                (entry.get("ip") or entry.get("hostname", "?") for entry in ingress), ""
            ),
            "LoadBalancer Source Ranges": _list(spec.get("loadBalancerSourceRanges"), ""),
            "External Name": spec.get("externalName", ""),
            "Session Affinity": affinity,
            "Internal Traffic Policy": spec.get("internalTrafficPolicy", ""),
            "External Traffic Policy": spec.get("externalTrafficPolicy", ""),
            "HealthCheck NodePort": str(spec.get("healthCheckNodePort", "")),
            "Proxy Mode": facts["mode"],
            "Not Proxied": facts["notProxied"] or "",
            "Taken": _list(
                (
                    f"{each['address']} port {each['port']}/{each['protocol']} by {each['by']}"
                    for each in facts["taken"]
                ),
                "",
            ),
        }
    )
    for port in facts["ports"]:
        name = f"{port['name']} " if port["name"] else ""
        node_port = f", NodePort {port['nodePort']}" if port["nodePort"] else ""
        click.echo(
            f"\nPort {name}{port['port']}/{port['protocol']} → {port['targetPort']}{node_port}"
        )
        if port["endpoints"]:
            print_table(
                ("ENDPOINT", "POD", "NODE", "ZONE", "CONDITION"),
                [_endpoint(each) for each in port["endpoints"]],
                indent="  ",
            )
        else:
            click.echo("  no endpoint")
        for each in port["withoutEndpoint"]:
            click.echo(f"  no endpoint: pod {each['pod']}: {each['why']}")
        nodes: list[str] = []
        for choice in port["choices"]:
            if choice["nodes"] != nodes:
                nodes = choice["nodes"]
                click.echo(f"On node{'s' * (len(nodes) > 1)} {', '.join(nodes)}")
            _tell_choice(choice)
    others = facts["notSelected"]
    if others:
        shown = [f"{each['name']} ({_labels(each['labels'])})" for each in others[:_MANY]]
        more = f" and {len(others) - _MANY} more" if len(others) > _MANY else ""
        click.echo(f"\nNot selected: {', '.join(shown)}{more}")


def _tell_choice(choice: Mapping[str, Any]) -> None:
    verdict = _VERDICTS.get(choice["verdict"])
    outcome = f"{verdict}: {choice['reason']}" if verdict else choice["reason"]
    click.echo(f"  {', '.join(choice['to'])} from {choice['client']}: {outcome}")
    chosen = choice["chosen"]
    for each in chosen:
        click.echo(f"    1/{len(chosen)}  {_named(each)}")
    for each in choice["leftOut"]:
        click.echo(f"    -    {_named(each)}: {each['why']}")


def _tell_pod(facts: Mapping[str, Any]) -> None:
    value = facts["object"]
    _tell_metadata(facts)
    ready = value["status"]["conditions"]
    _tell(
        {
            "Node": f"{value['spec']['nodeName']}/{value['status']['hostIP']}",
            "Host Network": "yes" if value["spec"].get("hostNetwork") else "",
            "IPs": _list(facts["addresses"]),
            "Controlled By": facts["owner"] or "",
            "Ready": next((each["status"] for each in ready if each["type"] == "Ready"), ""),
            "Answers On": _list(f"{each['port']}/{each['protocol']}" for each in facts["listens"]),
        }
    )
    if not facts["services"]:
        click.echo("\nNo Service selects it.")
        return
    click.echo()
    print_table(
        ("SERVICE", "PORT", "ENDPOINT", "CONDITION"),
        [
            (
                f"{each['namespace']}/{each['name']}",
                f"{each['port']}/{each['protocol']}",
                each.get("endpoint", _NONE),
                each.get("condition") or each["why"],
            )
            for each in facts["services"]
        ],
    )


def _tell_node(facts: Mapping[str, Any]) -> None:
    _tell_metadata(facts)
    _tell(
        {
            "Addresses": _list(facts["addresses"]),
            "PodCIDRs": _list(facts["podCIDRs"]),
            "Zone": facts["zone"] or "",
            "Proxy Mode": facts["mode"],
        }
    )
    click.echo()
    print_table(
        ("NAMESPACE", "POD", "IP", "READY"),
        [
            (
                each["namespace"],
                each["name"],
                ",".join(each["addresses"]) + " (host)" * each["hostNetwork"],
                str(each["ready"]),
            )
            for each in facts["pods"]
        ],
    )


def _tell_metadata(facts: Mapping[str, Any]) -> None:
    metadata = facts["object"]["metadata"]
    _tell(
        {
            "Name": metadata["name"],
            "Namespace": metadata.get("namespace", ""),
            "Labels": _labels(metadata.get("labels")),
        }
    )


def _tell(fields: Mapping[str, str]) -> None:
    """`Name:   value`; what is empty has no part in this object."""
    for name, value in fields.items():
        if value:
            click.echo(f"{name + ':':<28}{value}")


def _endpoint(each: Mapping[str, Any]) -> tuple[str, ...]:
    pod = (each["pod"] or _NONE).partition("/")[2] or _NONE
    return each["endpoint"], pod, each["node"] or _NONE, each["zone"] or _NONE, each["condition"]


def _named(each: Mapping[str, Any]) -> str:
    return f"{each['endpoint']} {(each['pod'] or '').partition('/')[2]}".rstrip()


def _labels(labels: Mapping[str, str] | None) -> str:
    return _list(f"{name}={text}" for name, text in (labels or {}).items())


def _list(texts: Iterable[str] | None, nothing: str = _NONE) -> str:
    return ", ".join(texts or ()) or nothing
