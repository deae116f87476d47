"""Topologies of any size: a Deployment whose pods answer, spread over nodes, behind one Service."""

from __future__ import annotations

_LAB = """\
apiVersion: netlab/v1
kind: Lab
metadata: {{name: {name}}}
spec: {{podCIDR: 10.244.0.0/16, serviceCIDR: 10.96.0.0/12}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{namespace: demo, name: web}}
spec:
  replicas: {pods}
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      containers:
      - name: web
        ports: [{{containerPort: 8080}}]
---
apiVersion: v1
kind: Service
metadata: {{namespace: demo, name: web}}
spec:
  selector: {{app: web}}
  ports: [{{port: 80, targetPort: 8080}}]
"""

_NODE = """\
---
apiVersion: v1
kind: Node
metadata: {{name: node{number}}}
"""


def topology(name: str, pods: int, nodes: int) -> str:
    """The text of a topology file."""
    return _LAB.format(name=name, pods=pods) + "".join(
        _NODE.format(number=number) for number in range(1, nodes + 1)
    )
