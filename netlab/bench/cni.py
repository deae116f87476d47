"""The reference CNI plugins as a container runtime calls them: `bridge` with `host-local`.

For each pod the runtime makes a network namespace (as containerd does, by unshare and a bind mount
in its own process), then runs the plugin with the pod in CNI_* variables and the configuration on
standard input; to remove a pod it runs the plugin again with DEL and takes the namespace away.
Source of the protocol: the CNI specification 1.0, section 2 and 3.
"""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from netlab.bench import floor

# Where the packages of distributions put the plugins.
DIRECTORIES = ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni")


def directory() -> str | None:
    """Where `bridge` and `host-local` are installed, or None."""
    for path in DIRECTORIES:
        if os.access(f"{path}/bridge", os.X_OK) and os.access(f"{path}/host-local", os.X_OK):
            return path
    return None


class Node:
    """One node of `count` pods, in a namespace of its own, so that the host sees no bridge."""

    def __init__(self, name: str, plugins: str, data: Path, count: int) -> None:
        self._name = name
        self._plugins = plugins
        self._pods = [f"{name}-pod{number}" for number in range(count)]
        self._configuration = json.dumps(
            {
                "cniVersion": "1.0.0",
                "name": name,
                "type": "bridge",
                "bridge": "cbr0",
                "isGateway": True,
                "hairpinMode": True,
                "mtu": 1450,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(data),
                    "ranges": [[{"subnet": "10.244.0.0/16"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ).encode()
        # The runtime: a thread, because it moves between namespaces.
        self._runtime = ThreadPoolExecutor(max_workers=1)
        self._node = self._runtime.submit(floor.named_namespace, name).result()

    def up(self) -> None:
        """Add every pod, one after the other."""
        self._runtime.submit(self._add_all).result()

    def down(self) -> None:
        """Delete every pod, one after the other."""
        self._runtime.submit(self._delete_all).result()

    def close(self) -> None:
        """Take away the node, and what a failed run left of the pods."""
        os.close(self._node)
        self._runtime.shutdown()
        for name in (*self._pods, self._name):
            if os.path.lexists(f"{floor.RUN_DIR}/{name}"):
                floor.remove_name(name)

    def _add_all(self) -> None:
        for pod in self._pods:
            os.close(floor.named_namespace(pod))
            floor.enter(self._node)
            self._run("ADD", pod)

    def _delete_all(self) -> None:
        for pod in self._pods:
            self._run("DEL", pod)
            floor.remove_name(pod)

    def _run(self, command: str, pod: str) -> None:
        """Run the plugin in the node's namespace, where the calling thread is."""
        result = subprocess.run(
            [f"{self._plugins}/bridge"],
            input=self._configuration,
            env={
                "CNI_COMMAND": command,
                "CNI_CONTAINERID": pod,
                "CNI_NETNS": f"{floor.RUN_DIR}/{pod}",
                "CNI_IFNAME": "eth0",
                "CNI_PATH": self._plugins,
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            },
            capture_output=True,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(f"bridge {command} {pod}: {result.stdout.decode()}")
