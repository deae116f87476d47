"""`netlab proxy`: the service proxy of a running lab."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from netlab.cli.change import Options, carry_out, dry_run_option
from netlab.cli.common import (
    lab_option,
    output_option,
    print_json,
    print_table,
    proxy_mode_option,
    running_lab,
)
from netlab.problems import Exit

if TYPE_CHECKING:
    import msgspec

    from netlab.topology.model import ServiceProxy


@click.command()
@proxy_mode_option("--mode", "Let it work in this mode from now on.")
@lab_option
@dry_run_option
@output_option("json", "name")
def proxy(mode: str | None, lab_name: str | None, dry_run: bool, output: str | None) -> int:
    """Show mode and settings of the service proxy, or switch a running lab to another mode.

    The rules of the new mode are loaded on every node, then those of the old one are removed.  The
    other settings stay; connections through Services live on, but not in mode none.
    """
    if mode is not None:
        from netlab.lab import change

        options = Options(lab_name, None, dry_run, output)
        return carry_out(lambda lab: change.proxy(lab, mode), options)
    lab = running_lab(lab_name)
    if output == "json":
        print_json({"lab": lab.name, "serviceProxy": _as_json(lab.service_proxy)})
    elif output == "name":
        click.echo(lab.service_proxy.mode)
    else:
        print_table(("SETTING", "VALUE"), list(_settings(lab.service_proxy)))
    return int(Exit.YES)


def _settings(proxy: ServiceProxy) -> Iterator[tuple[str, str]]:
    """What counts in this mode, under its name in KubeProxyConfiguration."""
    yield "mode", proxy.mode
    if proxy.mode == "none":
        return
    for name, value in _flat(_as_json(proxy)):
        block = name.partition(".")[0]
        other_modes = block in ("iptables", "nftables") and not proxy.mode.startswith(block)
        if name == "nodePortAddresses" and not value:
            # pkg/proxy/apis/config/v1alpha1/defaults.go of kube-proxy
            everywhere = proxy.mode in ("iptables", "userspace")
            yield name, f"{'all' if everywhere else 'primary'} (the default of this mode)"
        elif block == "conntrack" and not value:
            continue  # left as the kernel has it
        elif name != "mode" and not other_modes and value not in ("", {}):
            yield name, _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, list | tuple) else str(value)


def _flat(settings: dict[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{within}{name}.")
        else:
            yield within + name, value


def _as_json(settings: msgspec.Struct) -> dict[str, Any]:
    """Every setting, defaults too."""
    import msgspec

    return {
        name: _as_json(value) if isinstance(value, msgspec.Struct) else value
        for name, value in msgspec.structs.asdict(settings).items()
    }
