"""`netlab bench ... --vm`: the same command on a kernel that has every mode, in a virtual machine.

What is compared is measured on one kernel, so that all modes go there together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_MEMORY_MIB = 3072


def measure_there(reports: Sequence[str]) -> int:
    """Run this very command in a virtual machine; the exit code is its.

    `reports` are files that it writes.  NetlabError as `netlab vm` raises it.
    """
    from netlab.cli.vm import environment, to
    from netlab.vm import machine

    arguments = [word for word in sys.argv[1:] if word != "--vm"]
    # (an option may stand in the environment, too)
    around = {name: value for name, value in environment().items() if not name.endswith("_VM")}
    job = machine.Job(
        command=(os.path.abspath(sys.argv[0]), *arguments),
        environment=around,
        directory=os.getcwd(),
        writable=tuple({os.path.dirname(os.path.abspath(file)) for file in reports}),
    )
    size = machine.Size(memory_mib=_MEMORY_MIB)
    return machine.run(job, {"stdout": to(1), "stderr": to(2)}, size)
