"""netlab: Kubernetes datapaths on a real Linux kernel, without a cluster.

From Python: `netlab.topology.load.load` reads a topology, `netlab.lab.lifecycle.up` and `down`
build and remove it, `netlab.trace.run.trace` follows a packet.  docs/design.md is the map.
"""
