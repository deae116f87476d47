"""Mininet with its Linux bridge: `mn --switch lxbr --topo single,N` without the command line.

Runs under the interpreter that has the package `mininet` (Debian's own), in a network namespace of
its own, and prints the seconds that `start` and `stop` took; imports are not counted.

    unshare --net /usr/bin/python3 mininet_bridge.py 100
"""

import json
import sys
import time

from mininet.net import Mininet
from mininet.nodelib import LinuxBridge
from mininet.topo import SingleSwitchTopo

# Mininet would raise limits of the whole machine (kernel.pty.max, neighbour tables): not here.
Mininet.inited = True


def main(hosts: int) -> None:
    begin = time.perf_counter()
    net = Mininet(topo=SingleSwitchTopo(k=hosts), switch=LinuxBridge, controller=None)
    net.start()
    up = time.perf_counter()
    net.stop()
    down = time.perf_counter()
    print(json.dumps({"up": up - begin, "down": down - up}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
