"""`netlab trace`."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Literal

import click

from netlab.cli.common import (
    complete_node,
    complete_reference,
    lab_option,
    namespace_option,
    new_console,
    output_option,
    print_json,
    require_root,
)
from netlab.lab.named import declared_lab, is_on_machines
from netlab.problems import Exit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from netlab.topology.model import Lab
    from netlab.trace.aim import Request
    from netlab.trace.expectation import Expectation, Expected
    from netlab.trace.form import AskedProtocol
    from netlab.trace.model import Trace
    from netlab.trace.run import Recorded


def _print_schema(context: click.Context, parameter: click.Parameter, what: str | None) -> None:
    if what is None:
        return
    from netlab.trace import schema

    made = {
        "trace": schema.trace_schema,
        "series": schema.series_schema,
        "prediction": schema.prediction_schema,
    }
    print_json(made[what]())
    context.exit()


def _take_family(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Keep the one of two flags that was given as the parameter `family`."""
    known = context.params.setdefault("family", None)
    if wanted and known:
        raise click.UsageError("-4 and -6: a packet is of one family", context)
    if wanted:
        context.params["family"] = 4 if option.name == "ipv4" else 6


@click.command()
@click.argument("source", metavar="SRC", shell_complete=complete_reference)
@click.argument("destination", metavar="[DST]", required=False, shell_complete=complete_reference)
@click.option(
    "--protocol",
    type=click.Choice(("tcp", "udp", "icmp", "http", "dns")),
    help="What to send.  [default: what the Service port says, else tcp; icmp without a port]",
)
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Destination port, if DST leaves it open."
)
@click.option(
    "-4",
    "--ipv4",
    is_flag=True,
    expose_value=False,
    callback=_take_family,
    help="Over IPv4, in a lab of both families.",
)
@click.option(
    "-6", "--ipv6", is_flag=True, expose_value=False, callback=_take_family, help="Over IPv6."
)
@click.option(
    "--source-port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="Send from this port, as a client that always uses the same.",
)
@click.option(
    "--size",
    type=click.IntRange(1, 65535),
    metavar="BYTES",
    help="Length of the IP packet, over UDP and ICMP; it may not be fragmented.",
)
@click.option("--fragment", is_flag=True, help="Let it be fragmented, with --size.")
@click.option(
    "--ttl",
    type=click.IntRange(1, 255),
    metavar="HOPS",
    help="TTL of the probe, over IPv6 its hop limit.",
)
@click.option(
    "--from-address",
    metavar="ADDRESS",
    help="Send from this address, whether SRC has it or not.",
)
@click.option("--path", metavar="PATH", help="What to ask for over HTTP.  [default: /]")
@click.option(
    "--query",
    metavar="NAME",
    help="Name to ask for over DNS.  [default: kubernetes.default.svc.cluster.local]",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.01, 60),
    metavar="SECONDS",
    help="How long to wait for an answer; over TCP at most 0.95.  [default: 0.8]  "
    "With --watch, for the packet.  [default: until Ctrl-C]",
)
@click.option(
    "--watch",
    "watched",
    metavar="[FILTER]",
    is_flag=False,
    flag_value="",
    help="Send nothing: trace the next TCP connection that SRC opens, or its ping, or where FILTER "
    "says udp its datagram, that FILTER, in tcpdump's language, holds for.",
)
@click.option(
    "--dropped",
    is_flag=True,
    help="With --watch: a connection, ping or datagram after one that has had no answer.",
)
@click.option(
    "--pcapng",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True),
    help="Write the packets to FILE for Wireshark, from all devices, with what was done to them.",
)
@click.option(
    "--predict", is_flag=True, help="Send nothing: tell what should happen, by what is declared."
)
@click.option(
    "--topology",
    metavar="TOPOLOGY",
    type=click.Path(allow_dash=True),
    help="With --predict: the lab of a file, or a shipped topology, which need not be up.",
)
@click.option(
    "--expect",
    type=click.Choice(("delivered", "rejected", "dropped")),
    help="Exit 0 if this happens, and 1 if anything else does.",
)
@click.option(
    "--via",
    metavar="NODE",
    multiple=True,
    shell_complete=complete_node,
    help="Expect it to pass this node on its way there; repeatable.",
)
@click.option(
    "--to", metavar="POD", shell_complete=complete_reference, help="Expect this pod to receive it."
)
@click.option(
    "--count",
    type=click.IntRange(1),
    metavar="N",
    help="Send N probes from new source ports, and count who receives them.",
)
@click.option(
    "--endpoint",
    metavar="POD",
    shell_complete=complete_reference,
    help="Try source ports until the Service chooses this endpoint.",
)
@click.option(
    "--schema",
    type=click.Choice(("trace", "series", "prediction")),
    is_flag=False,
    flag_value="trace",
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON Schema of -o json (series: with --count, prediction: with --predict), and "
    "do nothing else.",
)
@namespace_option
@lab_option
@output_option("json", "ndjson")
def trace(
    source: str,
    destination: str | None,
    protocol: AskedProtocol | None,
    port: int | None,
    family: Literal[4, 6] | None,
    source_port: int | None,
    size: int | None,
    fragment: bool,
    ttl: int | None,
    from_address: str | None,
    path: str | None,
    query: str | None,
    timeout_s: float | None,
    expect: Expected | None,
    via: tuple[str, ...],
    to: str | None,
    count: int | None,
    endpoint: str | None,
    watched: str | None,
    dropped: bool,
    pcapng: str | None,
    predict: bool,
    topology: str | None,
    namespace: str | None,
    lab_name: str | None,
    output: str | None,
) -> int:
    """Send one probe from SRC to DST and tell what happened to it, there and back.

    SRC is a pod, a node, an address of one, or an address outside the lab, from where one comes by
    the underlay's gateway.  DST is a pod, svc/NAME, svc/NAME:PORT, an address
    with or without :PORT, or node/NAME:PORT.

    The exit code is 0 if it was delivered there and back, 1 if it was rejected or dropped, 4 if it
    could not be observed.  With --expect, --via or --to it is 0 if all was as expected, 1 if not;
    with --predict it is that of what should happen.

    \b
      netlab trace pod1 svc/myblog
      netlab trace pod1 --watch 'tcp port 80'
    """
    of_probe = (destination, protocol, port, source_port, size, fragment, ttl, from_address)
    if watched is not None and any((*of_probe, path, query, count, endpoint)):
        raise click.UsageError("a packet of SRC's own is as it is: only SRC goes with --watch")
    if watched is None and dropped:
        raise click.UsageError("--dropped tells --watch what to wait for")
    if watched is None and destination is None:
        raise click.UsageError("a probe needs a DST; --watch waits for a packet of SRC's own")
    if count and endpoint:
        raise click.UsageError("--count leaves the choice to the Service, --endpoint does not.")
    if predict and (watched is not None or count or endpoint or pcapng or expect or via or to):
        raise click.UsageError("--predict sends nothing: it goes with what a probe is, alone.")
    if topology and not predict:
        raise click.UsageError("--topology goes with --predict: only a lab that is up is traced")
    if topology and _was_typed("lab_name"):
        raise click.UsageError("--topology and --lab both say which lab")
    if to and expect in ("rejected", "dropped"):
        raise click.UsageError(f"--to says who is to receive it, and what is {expect} nobody does")
    if not count and watched is None:
        # Nothing that one trace makes is garbage before it ends, unless it waits for long.
        gc.disable()
    if topology:
        declared = _loaded(topology)
    else:
        require_root()
        declared = declared_lab(lab_name, on_machines=True)
    from netlab.trace.aim import DEFAULT_TIMEOUT_S, Request

    request = Request(
        source=source,
        destination=destination or "",
        namespace=namespace,
        protocol=protocol,
        port=port,
        family=family,
        timeout_s=DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s,
        size=size,
        source_port=source_port,
        fragment=fragment,
        ttl=ttl,
        from_address=from_address,
        path=path,
        query=query,
    )
    on_machines = is_on_machines(declared.name)
    if on_machines and (predict or count or endpoint or watched is not None):
        raise click.UsageError(
            "a lab on machines is traced probe by probe, without --predict, --count, --endpoint "
            "and --watch"
        )
    if predict:
        return _foretell(declared, request, output)
    from netlab.datapath.faults import faulty

    lab = faulty(declared)
    if pcapng == "-" and output:
        raise click.UsageError(f"-o {output} and --pcapng - both write to stdout")
    if pcapng and (count or endpoint):
        raise click.UsageError("--pcapng is of one probe, without --count or --endpoint.")
    expected = None
    if expect or via or to:
        from netlab.trace.expectation import expectation

        expected = expectation(lab, expect, via, to, namespace)
    if count:
        from netlab.cli.trace_series import run_series

        return run_series(
            lab, declared, request, count, expected, output, None if output else new_console()
        )
    recorded: list[Recorded] = []
    if pcapng:
        from netlab.cli.pcapng import require_writable

        require_writable(pcapng)
    if watched is not None:
        from netlab.trace.waiting import Wait, trace_next

        wait = Wait(source, watched, dropped, timeout_s, namespace, family)
        found = trace_next(
            lab,
            wait,
            recorded,
            lambda place: click.echo(f"waiting for {place} to send", err=True),
            declared,
        )
    elif endpoint:
        from netlab.trace.series import trace_to_endpoint

        found = trace_to_endpoint(lab, request, endpoint, declared)
    elif on_machines:
        from netlab.hosts import lifecycle, tracing

        with lifecycle.gateways_of(declared.name) as gateways:
            found = tracing.trace(gateways, lab, request, recorded)
    else:
        from netlab.trace.run import trace as run

        found = run(lab, request, recorded, declared)
    if pcapng:  # before who reads what is printed may go away
        _write_pcapng(found, recorded, pcapng)
    if pcapng == "-":
        from netlab.report.terminal import headline

        click.echo(headline(found), err=True)
    else:
        _print(found, output)
    return _exit_code(found, expected)


def _was_typed(parameter: str) -> bool:
    """Whether an option stands in the command, and not in its environment."""
    source = click.get_current_context().get_parameter_source(parameter)
    return source is click.core.ParameterSource.COMMANDLINE


def _print(found: Trace, output: str | None) -> None:
    if output:
        from netlab.trace.model import encode, encode_line

        click.echo((encode(found) if output == "json" else encode_line(found)).decode())
        return
    from netlab.report.terminal import print_trace

    print_trace(found, new_console())


def _write_pcapng(found: Trace, recorded: Sequence[Recorded], path: str) -> None:
    from netlab.cli.pcapng import pcapng_stream
    from netlab.report import trace_pcapng

    with pcapng_stream(path) as stream:
        trace_pcapng.write(found, recorded, stream)


def _exit_code(found: Trace, expected: Expectation | None) -> int:
    if found.disposition == "unobserved":
        return Exit.UNOBSERVED
    if expected is None:
        return Exit.YES if found.delivered else Exit.NO
    differences = expected.differences(found)
    if differences:
        click.echo(f"not as expected: it {'; it '.join(differences)}", err=True)
    return Exit.NO if differences else Exit.YES


def _loaded(topology: str) -> Lab:
    from netlab.topology.load import load

    loaded = load(topology)
    for warning in loaded.warnings:
        click.echo(str(warning), err=True)
    return loaded.lab


def _foretell(lab: Lab, request: Request, output: str | None) -> int:
    """Print what should become of a probe; whether it should be delivered."""
    from netlab.datapath.name_files import serves_names
    from netlab.trace.prediction import foretell

    if serves_names(lab):
        from netlab.trace import resolution

        if resolution.is_name(lab, request):
            request = resolution.foretold(lab, request)
    foretold = foretell(lab, request)
    if output:
        from netlab.trace.model import encode, encode_line

        click.echo((encode if output == "json" else encode_line)(foretold).decode())
    else:
        from netlab.report.prediction import print_foretold

        print_foretold(foretold, new_console())
    ways = [foretold.prediction, *foretold.prediction.others]
    return Exit.YES if all(way.disposition == "delivered" for way in ways) else Exit.NO
