"""What Kubernetes objects of every kind are made of: names, and the bases of all others."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"

# `$` also matches before a final line break, hence the (?!\n).
Label = Annotated[
    str,
    Meta(
        pattern=rf"^{LABEL}$(?!\n)",
        max_length=63,
        description="RFC 1123 label: at most 63 of a-z, 0-9 and -, beginning and ending in "
        "a letter or a digit",
    ),
]
Subdomain = Annotated[
    str,
    Meta(
        pattern=rf"^{LABEL}(\.{LABEL})*$(?!\n)",
        max_length=253,
        description="RFC 1123 subdomain: at most 253 of a-z, 0-9, - and ., each part beginning "
        "and ending in a letter or a digit",
    ),
]
Port = Annotated[int, Meta(ge=1, le=65535)]
PortOrZero = Annotated[int, Meta(ge=0, le=65535)]
Labels = dict[str, str]


class Part(msgspec.Struct, frozen=True):
    """Base of everything inside an object."""


class Object(Part, frozen=True, tag_field="kind"):
    """Base of the kinds; the tag is the kind's name."""


class OwnerReference(Part, frozen=True):
    kind: str
    name: str
    controller: bool | None = None


class Metadata(Part, frozen=True):
    name: Subdomain
    namespace: Label | None = None
    labels: Labels | None = None
    deletionTimestamp: str | None = None
    ownerReferences: list[OwnerReference] | None = None


class LabelMetadata(Metadata, frozen=True, kw_only=True):
    """Metadata of a kind whose name has to be a label."""

    name: Label
