"""What `up FILE` takes back: the changes that commands made since the last `up`, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from netlab.lab.edits import Object, declared_objects
from netlab.topology.model import Lab, Pod


def undone(before: Lab | None, after: Lab) -> list[str]:
    """`deployment/myblog scaled to 5` for each change that `before` has and `after` has not."""
    if before is None:
        return []
    faults = [f"fault/{each.name} injected" for each in before.faults if each not in after.faults]
    off = [f"node/{name} stopped" for name in before.stopped if name not in after.stopped]
    return [*faults, *off, *_undone_changes(before, after)]


def _undone_changes(before: Lab, after: Lab) -> list[str]:
    if not before.changed:
        return []
    old, new = declared_objects(before), declared_objects(after)
    old_pods, new_pods = ({pod.key: pod for pod in lab.pods} for lab in (before, after))
    lines = []
    for key in before.changed:
        kind, namespace, name = key
        if kind == "Lab":
            was, will_be = before.service_proxy.mode, after.service_proxy.mode
            lines += [f"lab/{name} switched to {was}"] if was != will_be else []
            continue
        if kind == "Pod":
            pod = f"{namespace}/{name}"
            words = list(_of_pod(old_pods.get(pod), new_pods.get(pod), pod in before.unready))
            there = pod in old_pods and pod in new_pods
        else:
            words = list(_of_object(old.get(key), new.get(key)))
            there = True
        if there and key in old and key in new and _rest(old[key]) != _rest(new[key]):
            words.append("configured")
        lines += [f"{kind.lower()}/{name} {', '.join(words)}"] if words else []
    return lines


def _of_pod(was: Pod | None, will_be: Pod | None, by_probes: bool) -> Iterator[str]:
    """`by_probes`: whether they say that it was not ready, whatever a command said."""
    if was is None or will_be is None:
        yield from _comings_and_goings(was is not None, will_be is not None)
        return
    if was.labels != will_be.labels:
        yield _labeled(was.labels, will_be.labels)
    if was.ready is not will_be.ready and not by_probes:
        yield "made ready" if was.ready else "made not ready"


def _of_object(was: Object | None, will_be: Object | None) -> Iterator[str]:
    if was is None or will_be is None:
        yield from _comings_and_goings(was is not None, will_be is not None)
        return
    labels = [each["metadata"].get("labels") or {} for each in (was, will_be)]
    if labels[0] != labels[1]:
        yield _labeled(*labels)
    replicas = [_replicas(each) for each in (was, will_be)]
    if replicas[0] != replicas[1]:
        yield f"scaled to {replicas[0]}"


def _comings_and_goings(was: bool, will_be: bool) -> Iterator[str]:
    if was is not will_be:
        yield "created" if was else "deleted"


def _labeled(was: Mapping[str, str], will_be: Mapping[str, str]) -> str:
    """In the words of the command: `labeled app=web tier-`."""
    added = [f"{name}={text}" for name, text in was.items() if will_be.get(name) != text]
    removed = [f"{name}-" for name in will_be if name not in was]
    return " ".join(("labeled", *added, *removed))


def _replicas(value: Object) -> int | None:
    spec = value.get("spec") or {}
    replicas = spec.get("replicas")
    return 1 if replicas is None and "template" in spec else replicas


def _rest(value: Object) -> Object:
    """An object without what the words above are about."""
    metadata = {
        k: v for k, v in value["metadata"].items() if k not in ("labels", "ownerReferences")
    }
    rest = {**value, "metadata": metadata}
    if "template" in (value.get("spec") or {}):
        rest["spec"] = {k: v for k, v in value["spec"].items() if k != "replicas"}
    if value["kind"] == "Pod":
        status = value.get("status") or {}
        conditions = [c for c in status.get("conditions") or () if c.get("type") != "Ready"]
        others = {k: v for k, v in status.items() if k != "conditions"}
        rest["status"] = others | ({"conditions": conditions} if conditions else {})
    return rest
