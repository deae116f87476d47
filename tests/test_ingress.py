"""Ingress objects: nginx's configuration, requests, reloads, traces of two connections."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from labs import fresh_name
from netlab.datapath import ingress
from netlab.datapath.outside_names import host_namespace
from netlab.doctor import overlay_problems
from netlab.lab import lifecycle
from netlab.lab.change import apply, ready, scale
from netlab.problems import NetlabError
from netlab.topology.ingresses import is_installed
from netlab.topology.load import Loaded, load, read_objects
from netlab.topology.model import Lab
from netlab.trace.aim import Request
from netlab.trace.ingress import backend_for
from netlab.trace.run import trace

GOLDEN = Path(__file__).parent / "golden" / "ingress-nginx.conf"
needs_nginx = pytest.mark.skipif(not is_installed(), reason="nginx or openssl is not installed")

CONTROLLER = """\
apiVersion: netlab/v1
kind: Lab
metadata: {name: t}
---
apiVersion: v1
kind: Pod
metadata:
  namespace: ingress-nginx
  name: controller
  labels: {app.kubernetes.io/name: ingress-nginx}
---
apiVersion: v1
kind: Pod
metadata: {name: blog, labels: {app: blog}}
spec: {containers: [{ports: [{containerPort: 8002}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: shop, labels: {app: shop}}
spec: {containers: [{ports: [{containerPort: 8080, name: web}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: blog}
spec: {selector: {app: blog}, ports: [{port: 80, targetPort: 8002}]}
---
apiVersion: v1
kind: Service
metadata: {name: shop}
spec: {selector: {app: shop}, ports: [{port: 80, targetPort: web, name: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: empty}
spec: {selector: {app: none}, ports: [{port: 80}]}
"""


def rule(host: str, *paths: tuple[str, str, str]) -> str:
    """A rule with paths, their types and Services."""
    made = ", ".join(
        f"{{path: {path}, pathType: {kind}, backend: {{service: {{name: {service}, "
        "port: {number: 80}}}}"
        for path, kind, service in paths
    )
    at = f'host: "{host}", ' if host else ""
    return f"{{{at}http: {{paths: [{made}]}}}}"


def an_ingress(name: str, *rules: str, more: str = "", annotations: str = "{}") -> str:
    return (
        f"---\napiVersion: networking.k8s.io/v1\nkind: Ingress\n"
        f"metadata: {{name: {name}, annotations: {annotations}}}\n"
        f"spec: {{rules: [{', '.join(rules)}]{more}}}\n"
    )


SOME = (
    an_ingress(
        "blog",
        rule("blog.example", ("/", "Prefix", "blog"), ("/shop", "Prefix", "shop")),
        rule("*.wild.example", ("/only", "Exact", "blog")),
        rule("", ("/any", "ImplementationSpecific", "empty")),
    )
    + an_ingress(
        "shop",
        rule("shop.example", ("/", "Prefix", "shop")),
        more=", tls: [{hosts: [shop.example], secretName: shop-tls}]",
    )
    + "---\napiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: rest}\n"
    "spec: {defaultBackend: {service: {name: blog, port: {number: 80}}}}\n"
)


def read(tmp_path: Path, text: str) -> Loaded:
    file = tmp_path / "t.yaml"
    file.write_text(CONTROLLER + text)
    return load(file, name=fresh_name())


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (
            an_ingress("a", rule("a.example", ("/x", "Prefix", "blog")))
            + an_ingress("b", rule("a.example", ("/x/", "Prefix", "shop"))),
            "duplicate-path",
            "already a rule of Ingress default/a",
        ),
        (an_ingress("a", rule("a.*.example", ("/", "Prefix", "blog"))), "bad-host", "a.*.example"),
        (an_ingress("a", rule("a;b", ("/", "Prefix", "blog"))), "bad-host", "a;b"),
        (an_ingress("a", rule("a.example", ("x", "Prefix", "blog"))), "bad-path", "not a path"),
        (an_ingress("a", rule("a.example", ("'/a;b'", "Prefix", "blog"))), "bad-path", "a;b"),
        (an_ingress("a"), "missing-field", "neither rules nor a defaultBackend"),
        (an_ingress("a", rule("a.example", ("/", "Prfix", "blog"))), "bad-value", "Prfix"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, text: str, code: str, words: str) -> None:
    with pytest.raises(NetlabError) as caught:
        read(tmp_path, text)
    assert code in {each.code for each in caught.value.problems}
    assert any(words in each.message for each in caught.value.problems)


def test_an_exact_path_and_a_prefix_are_two(tmp_path: Path) -> None:
    both = rule("a.example", ("/x", "Prefix", "blog"), ("/x", "Exact", "shop"))
    lab = read(tmp_path, an_ingress("a", both)).lab
    assert [path.exact for path in lab.ingresses[0].rules[0].paths] == [False, True]


def test_what_leads_nowhere_is_told(tmp_path: Path) -> None:
    text = an_ingress("a", rule("a.example", ("/", "Prefix", "nobody")))
    found = read(tmp_path, text)
    assert "unknown-service" in {each.code for each in found.warnings}
    assert "return 503;" in ingress.config(found.lab)
    file = tmp_path / "alone.yaml"
    file.write_text(text)
    assert "no-controller" in {each.code for each in load(file).warnings}


def test_another_controllers_ingress_is_not_served(tmp_path: Path) -> None:
    of = "---\napiVersion: networking.k8s.io/v1\nkind: IngressClass\nmetadata: {name: %s}\n"
    text = an_ingress("a", rule("a.example", ("/", "Prefix", "blog")), more=", ingressClassName: x")
    theirs = of % "x" + "spec: {controller: example.com/other}\n"
    ours = of % "x" + "spec: {controller: k8s.io/ingress-nginx}\n"
    assert read(tmp_path, text + theirs).lab.ingresses == ()
    assert len(read(tmp_path, text + ours).lab.ingresses) == 1


def test_the_configuration_is_what_it_was(tmp_path: Path) -> None:
    """Written anew with NETLAB_WRITE_GOLDEN=1, and then looked at."""
    text = ingress.config(read(tmp_path, SOME).lab)
    if "NETLAB_WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@needs_nginx
def test_nginx_takes_it(tmp_path: Path) -> None:
    config = ingress.config(read(tmp_path, SOME).lab)
    config = re.sub(r".*ssl_certificate.*\n", "", config).replace(" ssl", "")
    config = config.replace(ingress.DIRECTORY, str(tmp_path))
    file = tmp_path / "nginx.conf"
    file.write_text(config)
    done = subprocess.run(
        ["/usr/sbin/nginx", "-t", "-q", "-e", "stderr", "-c", file], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("host", "path", "service"),
    [
        ("blog.example", "/", "blog"),
        ("BLOG.example:8080", "/shop", "shop"),
        ("blog.example", "/shop/cart?x=1", "shop"),
        ("blog.example", "/shopping", "blog"),
        ("a.wild.example", "/only", "blog"),
        ("a.wild.example", "/only/", None),
        ("a.b.wild.example", "/only", "blog"),
        ("other.example", "/any/thing", "empty"),
        ("other.example", "/", "blog"),
        ("shop.example", "/", None),
    ],
)
def test_who_answers_for_a_host_and_a_path(
    tmp_path: Path, host: str, path: str, service: str | None
) -> None:
    found = backend_for(read(tmp_path, SOME).lab, host, path)
    assert (found[1].service if found else None) == (service and f"default/{service}")


def test_what_is_missing_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = read(tmp_path, SOME).lab
    monkeypatch.setattr("netlab.doctor._which", lambda program: None)
    hints = {each.hint or "" for each in overlay_problems(lab)}
    assert any("nginx-light" in hint for hint in hints)


# On the kernel


def curl(lab: Lab, *words: str) -> str:
    inside = ["ip", "netns", "exec", host_namespace(lab, lab.hosts[0])]
    done = subprocess.run(
        [*inside, "curl", "-s", "-k", "-m", "5", *words], capture_output=True, text=True
    )
    return done.stdout.strip() or f"curl: {done.returncode}"


@pytest.fixture
def lab(up: Callable[[Lab], object]) -> Lab:
    made = load("ingress", name=fresh_name()).lab
    up(made)
    return made


@needs_nginx
@pytest.mark.kernel
def test_hosts_paths_and_tls_lead_to_their_services(lab: Lab) -> None:
    shop, *_ = (pod.name for pod in lab.pods if pod.labels.get("app") == "shop")
    blogs = {pod.name for pod in lab.pods if pod.labels.get("app") == "myblog"}
    blog = ["-H", "Host: myblog.example"]
    said = {curl(lab, *blog, "http://192.0.2.1/hostname") for _ in range(4)}
    assert said == blogs  # in turns
    assert curl(lab, *blog, "http://192.0.2.1/shop/hostname") == shop
    assert "404" in curl(lab, "-i", "http://192.0.2.1/")
    assert "308" in curl(lab, "-i", "-H", "Host: shop.example", "http://192.0.2.1/")
    over_tls = ["--resolve", "shop.example:443:192.0.2.1", "https://shop.example/hostname"]
    assert curl(lab, *over_tls) == shop
    assert "subject: O=netlab; CN=shop.example" in curl(lab, "-v", "--stderr", "-", *over_tls)
    assert lifecycle.up(lab).changes == ()


@needs_nginx
@pytest.mark.kernel
def test_a_trace_joins_both_connections(lab: Lab) -> None:
    found = trace(lab, Request("host/client", "http://myblog.example/shop"))
    assert found.delivered
    assert found.application is not None
    assert found.application.status == 200
    assert found.probe.to == "http://myblog.example/shop"
    assert found.delivered_to is not None
    assert found.delivered_to.name.startswith("demo/shop-")
    assert found.connections is not None
    (second,) = found.connections
    assert second.probe.from_.startswith("ingress-nginx/")
    # The Service of the endpoint is never met: nginx asks the endpoint itself.
    assert [each.kind for each in found.translations] == ["dnat", "proxy"]
    assert [each.prediction and each.prediction.differs for each in (found, second)] == [[], []]
    alone = trace(lab, Request("host/client", "http://shop.example/"))
    assert alone.application is not None
    assert alone.application.status == 308
    inside = trace(lab, Request("deploy/myblog", "http://myblog.example/"))
    assert inside.delivered
    assert inside.connections


@needs_nginx
@pytest.mark.kernel
def test_changes_are_followed_and_no_request_is_lost(lab: Lab, tmp_path: Path) -> None:
    failed: list[str] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            said = curl(lab, "-o", "/dev/null", "-w", "%{http_code}", *blog)
            if said != "200":
                failed.append(said)

    blog = ["-H", "Host: myblog.example", "http://192.0.2.1/hostname"]
    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        lifecycle.change(lab.name, lambda now: scale(now, ["deploy/myblog"], 4))
        changed, outcome = lifecycle.change(lab.name, lambda now: scale(now, ["deploy/myblog"], 3))
        assert outcome.unready == ()
        blogs = [pod.name for pod in changed.lab.pods if pod.labels.get("app") == "myblog"]
        lifecycle.change(lab.name, lambda now: ready(now, blogs[:1], False))
        file = tmp_path / "more.yaml"
        file.write_text(
            an_ingress("more", rule("more.example", ("/", "Prefix", "shop"))).replace(
                "name: more,", "name: more, namespace: demo,"
            )
        )
        documents, _ = read_objects([str(file)])
        changed, _ = lifecycle.change(lab.name, lambda now: apply(now, documents))
    finally:
        stop.set()
        asking.join()
    assert failed == []
    assert {curl(lab, *blog) for _ in range(6)} == set(blogs[1:])
    assert curl(lab, "-H", "Host: more.example", "http://192.0.2.1/hostname").startswith("shop-")
    assert lifecycle.differences(changed.lab) == []
    assert lifecycle.up(changed.lab).changes == ()


@needs_nginx
@pytest.mark.kernel
def test_ingresses_are_listed_with_the_address_in_front(lab: Lab) -> None:
    from click.testing import CliRunner

    from netlab.cli.main import netlab

    done = CliRunner().invoke(netlab, ["get", "ingresses", "--lab", lab.name, "-o", "json"])
    items = json.loads(done.stdout)["items"]
    assert [each["metadata"]["name"] for each in items] == ["myblog", "shop"]
    assert items[0]["status"]["loadBalancer"] == {"ingress": [{"ip": "192.0.2.1"}]}
