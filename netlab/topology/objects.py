"""The objects of a topology by kind, each with the place where it stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from netlab.problems import suggest
from netlab.topology import kubernetes as k8s
from netlab.topology import kubernetes_networking as k8s_networking
from netlab.topology import kubernetes_pods as k8s_pods
from netlab.topology import lab_document, model
from netlab.topology.convert import convert, shown
from netlab.topology.places import Complaints, Document, Origin

T_co = TypeVar("T_co", covariant=True)

_DEEPEST_LIST = 8  # a List in a List in a List ...


@dataclass(frozen=True, slots=True)
class Stated(Generic[T_co]):
    """An object and where it stands."""

    item: T_co
    origin: Origin

    @property
    def title(self) -> str:
        """`Pod demo/pod1`."""
        return k8s.title(self.item)

    @property
    def namespace(self) -> str:
        """Its namespace, "default" if it names none; "" if its kind has none."""
        return k8s.namespace_of(self.item)


@dataclass(frozen=True, slots=True)
class Own(Generic[T_co]):
    """An object of netlab's own kinds, which are in no namespace."""

    item: T_co
    title: str  # `Host client`
    origin: Origin


@dataclass(slots=True)
class Objects:
    """What a topology states, in the file's order."""

    lab: Stated[lab_document.Lab] | None = None
    nodes: list[Stated[k8s.Node]] = field(default_factory=list)
    pods: list[Stated[k8s_pods.Pod]] = field(default_factory=list)
    controllers: list[Stated[k8s_pods.Controller]] = field(default_factory=list)
    services: list[Stated[k8s.Service]] = field(default_factory=list)
    endpoints: list[Stated[k8s.Endpoints]] = field(default_factory=list)
    slices: list[Stated[k8s.EndpointSlice]] = field(default_factory=list)
    service_cidrs: list[Stated[k8s.ServiceCIDR]] = field(default_factory=list)
    namespaces: list[Stated[k8s.Namespace]] = field(default_factory=list)
    config_maps: list[Stated[k8s.ConfigMap]] = field(default_factory=list)
    policies: list[Stated[k8s_networking.NetworkPolicy]] = field(default_factory=list)
    ingresses: list[Stated[k8s_networking.Ingress]] = field(default_factory=list)
    ingress_classes: list[Stated[k8s_networking.IngressClass]] = field(default_factory=list)
    hosts: list[Own[lab_document.Host]] = field(default_factory=list)
    gateways: list[Own[lab_document.Gateway]] = field(default_factory=list)
    balancers: list[Own[lab_document.LoadBalancer]] = field(default_factory=list)
    containers: list[Own[lab_document.Container]] = field(default_factory=list)
    container_networks: list[Own[lab_document.ContainerNetwork]] = field(default_factory=list)
    settings: list[Document] = field(default_factory=list)  # of a cluster: ConfigMaps, pools
    declared: list[Document] = field(default_factory=list)  # the values that all these come from
    # Pods that go: what they have is not free yet.
    leaving: list[model.Pod] = field(default_factory=list)
    # Pods whose readiness probes have passed; None before there is a lab: all will.
    passed: frozenset[str] | None = None
    # Nodes whose machine is off.
    stopped: frozenset[str] = frozenset()
    # Addresses that load balancers gave to Services (`namespace/name`) until now.
    balanced: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def of_cluster(self) -> bool:
        """Whether they come from an API server, which gives each object a `uid`."""
        parts = (each.value.get("metadata") for each in (*self.declared, *self.settings))
        return any(isinstance(metadata, dict) and "uid" in metadata for metadata in parts)

    @property
    def runs_programs(self) -> bool:
        """Whether what containers say is run: in netlab's own files alone.

        A program that this machine has by accident is not to be run for a cluster's dump.
        """
        return not self.of_cluster and any(each.value["kind"] == "Lab" for each in self.declared)

    def frame_is_whole(self) -> bool:
        """Whether every Lab, Node and ServiceCIDR that was declared is among the objects."""
        kinds = Counter(document.value["kind"] for document in self.declared)
        return (
            kinds["Lab"] <= (self.lab is not None)
            and kinds["Node"] == len(self.nodes)
            and kinds["ServiceCIDR"] == len(self.service_cidrs)
        )

    def add(self, item: Any, origin: Origin) -> None:
        """Sort one object in."""
        if isinstance(item, k8s_pods.Controller):
            self.controllers.append(Stated(item, origin))
            return
        lists: dict[type, list[Any]] = {
            k8s.Node: self.nodes,
            k8s_pods.Pod: self.pods,
            k8s.Service: self.services,
            k8s.Endpoints: self.endpoints,
            k8s.EndpointSlice: self.slices,
            k8s.ServiceCIDR: self.service_cidrs,
            k8s.Namespace: self.namespaces,
            k8s.ConfigMap: self.config_maps,
            k8s_networking.NetworkPolicy: self.policies,
            k8s_networking.Ingress: self.ingresses,
            k8s_networking.IngressClass: self.ingress_classes,
        }
        if type(item) in lists:
            lists[type(item)].append(Stated(item, origin))


def gather(documents: list[Document], found: Complaints) -> Objects:
    """All objects of the documents; what is wrong with each is complained of."""
    objects = Objects()
    seen: dict[tuple[str, str, str], Origin] = {}
    left_out: Counter[str] = Counter()
    not_built: Counter[tuple[str, str]] = Counter()
    for value, origin in _unfolded(documents, found):
        group, _, _ = value["apiVersion"].rpartition("/")
        kind = value["kind"]
        if group == "netlab" or kind == "Lab":
            _add_own(objects, value, origin, found)
        elif _tells_settings(group, kind, value):
            objects.settings.append(Document(value, origin))
        elif (group, kind) in k8s.KINDS and not _is_of_no_use(kind, value):
            name = f"{kind} {_name(value)}"
            item = convert(value, k8s.KINDS[group, kind], name, origin, found)
            objects.declared.append(Document(value, origin))
            if item is not None and _is_new(item, origin, seen, found):
                objects.add(item, origin)
        elif (group, kind) in k8s.NOT_BUILT:
            not_built[group, kind] += 1
        elif not _is_misspelt(group, kind, origin, found):
            left_out[kind] += 1
    for key, count in not_built.items():
        message = f"{count} {key[1]} in the file: {key[1]} {k8s.NOT_BUILT[key]} by this version"
        found.warning("not-built", message)
    if left_out:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(left_out.items()))
        message = f"left out, as they have no part in the datapath: {kinds}"
        found.warning("no-part", message)
    return objects


def _tells_settings(group: str, kind: str, value: dict[str, Any]) -> bool:
    names = k8s.SETTINGS.get((group, kind))
    metadata = value.get("metadata")
    if names is None or not isinstance(metadata, dict):
        return False
    return not names or metadata.get("name") in names


def _is_of_no_use(kind: str, value: dict[str, Any]) -> bool:
    """A cluster's ConfigMap: the programs that would read it do not run here."""
    metadata = value.get("metadata")
    return kind == "ConfigMap" and isinstance(metadata, dict) and "uid" in metadata


def _unfolded(
    documents: list[Document], found: Complaints
) -> Iterator[tuple[dict[str, Any], Origin]]:
    """Every object that says what it is, those inside Lists too."""
    for document in documents:
        yield from _unfold(document.value, document.origin, found, None, 0)


def _unfold(
    value: Any, origin: Origin, found: Complaints, inside: tuple[str, str] | None, depth: int
) -> Iterator[tuple[dict[str, Any], Origin]]:
    """One object, or those of a list.  `inside`: version and kind of a typed list's items."""
    if not isinstance(value, dict):
        found.error(
            "not-an-object",
            f"{shown(value)} stands where an object should",
            origin,
            hint="an object is a mapping with apiVersion, kind and metadata",
        )
        return
    if inside and "kind" not in value:
        value = {"apiVersion": inside[0], "kind": inside[1], **value}
    missing = [name for name in ("apiVersion", "kind") if value.get(name) is None]
    if missing:
        message = f"this object has no {' and no '.join(missing)}"
        hint = "every document is one object: apiVersion, kind, metadata with a name"
        found.error("missing-field", message, origin, hint=hint)
        return
    wrong = [name for name in ("apiVersion", "kind") if not isinstance(value[name], str)]
    for name in wrong:
        message = f"{name} is {shown(value[name])}; it takes a text"
        found.error("wrong-type", message, origin, name)
    if wrong:
        return
    kind, version = value["kind"], value["apiVersion"]
    if not (kind.endswith("List") and isinstance(value.get("items"), list)):
        yield value, origin
        return
    if depth == _DEEPEST_LIST:
        found.error("nesting", f"{kind} stands in more than {_DEEPEST_LIST} others", origin)
        return
    items_are = None if kind == "List" else (version, kind.removesuffix("List"))
    for index, item in enumerate(value["items"]):
        path = (*origin.path, "items", index)
        at = Origin(origin.source, origin.document, path)
        yield from _unfold(item, at, found, items_are, depth + 1)


def _name(value: dict[str, Any]) -> str:
    """The name of an object that may be wrong in every way."""
    metadata = value.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        return "without a name"
    name: str = metadata["name"]
    shortened = name if len(name) <= 63 else f"{name[:60]}..."
    namespace = metadata.get("namespace")
    return f"{namespace}/{shortened}" if isinstance(namespace, str) else shortened


def _is_new(
    item: Any, origin: Origin, seen: dict[tuple[str, str, str], Origin], found: Complaints
) -> bool:
    key = (type(item).__name__, k8s.namespace_of(item), item.metadata.name)
    first = seen.setdefault(key, origin)
    if first is origin:
        return True
    found.error(
        "duplicate-name",
        f"{k8s.title(item)} stands twice",
        origin,
        "metadata",
        "name",
        hint="give one of them another name, or remove it",
    )
    return False


def _add_own(objects: Objects, value: dict[str, Any], origin: Origin, found: Complaints) -> None:
    """An object of netlab's own kinds."""
    kind, version = value["kind"], value["apiVersion"]
    if kind not in lab_document.KINDS:
        near = suggest(kind, list(lab_document.KINDS))
        kinds = ", ".join(lab_document.KINDS)
        hint = f'did you mean "{near}"?' if near else f"netlab's kinds are {kinds}"
        message = f'there is no kind "{kind}" in {lab_document.API_VERSION}'
        found.error("unknown-kind", message, origin, "kind", hint=hint)
    elif version != lab_document.API_VERSION:
        message = f'{kind} {_name(value)}: apiVersion is "{version}"'
        hint = f"kind: {kind} has apiVersion: {lab_document.API_VERSION}"
        found.error("unknown-version", message, origin, "apiVersion", hint=hint)
    elif kind != "Lab":
        _add_outside(objects, value, origin, found)
    elif objects.lab is not None:
        message = f"Lab {_name(value)} is the second Lab; a topology has one at most"
        found.error("duplicate-lab", message, origin)
    else:
        item = convert(value, lab_document.Lab, f"Lab {_name(value)}", origin, found)
        objects.declared.append(Document(value, origin))
        if item is not None:
            objects.lab = Stated(item, origin)


def _add_outside(
    objects: Objects, value: dict[str, Any], origin: Origin, found: Complaints
) -> None:
    """What is outside the cluster, or beside its pods."""
    title = f"{value['kind']} {_name(value)}"
    item = convert(value, lab_document.KINDS[value["kind"]], title, origin, found)
    objects.declared.append(Document(value, origin))
    lists: dict[type, list[Any]] = {
        lab_document.Host: objects.hosts,
        lab_document.LoadBalancer: objects.balancers,
        lab_document.Container: objects.containers,
        lab_document.ContainerNetwork: objects.container_networks,
    }
    same_kind = lists.get(type(item))
    if item is not None and same_kind is not None:
        if any(item.metadata.name == other.item.metadata.name for other in same_kind):
            hint = "give one of them another name, or remove it"
            found.error(
                "duplicate-name", f"{title} stands twice", origin, "metadata", "name", hint=hint
            )
        same_kind.append(Own(item, title, origin))
    elif isinstance(item, lab_document.Gateway):
        if objects.gateways:
            message = f"{title} is the second Gateway; a topology has one at most"
            found.error("duplicate-gateway", message, origin)
        objects.gateways.append(Own(item, title, origin))


def _is_misspelt(group: str, kind: str, origin: Origin, found: Complaints) -> bool:
    """Whether a kind is nearly one that matters: `Pods`, `Servce`, or Service in apps/v1."""
    known = [*k8s.KINDS, *k8s.NOT_BUILT]
    groups = {known_group for known_group, _ in known}
    if group not in groups:
        return False
    version_of = {known_kind: known_group for known_group, known_kind in known}
    if kind in version_of:
        right = f"{version_of[kind]}/v1".removeprefix("/")
        message = f'there is no kind "{kind}" in API group "{group or "v1"}"'
        hint = f"{kind} has apiVersion: {right}"
        found.error("unknown-version", message, origin, "apiVersion", hint=hint)
        return True
    near = suggest(kind, list(version_of))
    if near is None or not _one_slip(kind, near):
        return False
    message = f'there is no kind "{kind}"'
    found.error("unknown-kind", message, origin, "kind", hint=f'did you mean "{near}"?')
    return True


def _one_slip(kind: str, near: str) -> bool:
    """Near enough to be a slip: `Servce`, `pod`; not ServiceAccount or IngressClass."""
    from difflib import SequenceMatcher

    return SequenceMatcher(None, kind.lower(), near.lower()).ratio() > 0.8
