"""The verb `doctor`."""

from __future__ import annotations

import click

from netlab.cli.common import output_option
from netlab.problems import Exit


@click.command()
@output_option("json")
def doctor(output: str | None) -> int:
    """Tell what this machine can do, what it lacks, and how to get it.

    Everything is tried in namespaces that are gone afterwards. Exit code 3 if something that
    netlab cannot do without is missing.
    """
    from netlab.doctor import examine, is_fit

    checks = examine()
    if output == "json":
        import dataclasses
        import json

        click.echo(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
        return int(Exit.YES if is_fit(checks) else Exit.MACHINE)
    width = max(len(check.name) for check in checks)
    for check in checks:
        if check.ok:
            sign = click.style("✓", fg="green")
        elif check.ok is None:
            sign = "•"  # could not be tried, so nothing is known
        else:
            sign = click.style("✗", fg="red" if check.required else "yellow")
        need = "" if check.ok or check.required else "optional: "
        detail = click.style(f"({check.detail})", dim=True)
        click.echo(f"{sign} {check.name:<{width}}  {need}{check.why} {detail}")
        if not check.ok and check.fix:
            click.echo(f"{'':{width + 4}}fix: {check.fix}")
    lacking = [check.name for check in checks if check.required and not check.ok]
    optional = [check.name for check in checks if not check.required and not check.ok]
    if lacking:
        click.echo(f"missing: {', '.join(lacking)}", err=True)
    elif optional:
        click.echo(f"all that is needed is there; without {', '.join(optional)}", err=True)
    else:
        click.echo("everything is there", err=True)
    return int(Exit.MACHINE if lacking else Exit.YES)
