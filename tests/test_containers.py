"""Containers of pods: what the file says of them, what runs, and in which environment."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from labs import fresh_name, ipv6_lab, small_lab
from netlab.datapath import environment
from netlab.datapath.build import build
from netlab.lab import control, lifecycle
from netlab.problems import NetlabError
from netlab.topology.load import Loaded, load
from netlab.topology.model import (
    Container,
    ContainerPort,
    Lab,
    MountedFile,
    Pod,
    Service,
    ServicePort,
    Variable,
)
from netlab.topology.references import resolve

NETLAB = Path(sys.executable).parent / "netlab"
LAB = "apiVersion: netlab/v1\nkind: Lab\nmetadata: {name: t}\n---\n"


def loaded(directory: Path, text: str, own: str = LAB) -> Loaded:
    file = directory / "t.yaml"
    file.write_text(own + textwrap.dedent(text).replace("\n        ---\n", "\n---\n"))
    return load(file)


def problems(directory: Path, text: str) -> dict[str, str]:
    """What is wrong, by code: the sentence with its place."""
    with pytest.raises(NetlabError) as caught:
        loaded(directory, text)
    return {each.code: str(each) for each in caught.value.problems}


def pod(containers: str, rest: str = "", metadata: str = "") -> str:
    return (
        "apiVersion: v1\nkind: Pod\n"
        f"metadata: {{name: p, namespace: demo, labels: {{app: web}}{metadata}}}\n"
        f"spec:\n  containers: {containers}\n{rest}"
    )


# --- what the file says --------------------------------------------------------------------------


def test_a_command_runs_where_its_program_is_there(tmp_path: Path) -> None:
    text = pod("[{name: a, image: busybox, command: [sleep], args: ['9']}]")
    result = loaded(tmp_path, text)
    assert result.warnings == ()
    assert result.lab.pods[0].containers == (
        Container(name="a", image="busybox", command=("sleep",), args=("9",), runs=True),
    )


def test_one_line_tells_what_is_not_on_this_machine(tmp_path: Path) -> None:
    text = pod("[{name: a, command: [no-such-program]}, {name: b, command: [no-such-program]}]")
    result = loaded(tmp_path, text)
    (warning,) = result.warnings
    assert warning.code == "not-run"
    assert '"no-such-program" (Pod demo/p, container a and 1 more)' in warning.message
    assert not any(container.runs for container in result.lab.pods[0].containers)


@pytest.mark.parametrize("own", ["", LAB])
def test_nothing_runs_of_a_dump_or_of_a_file_without_a_lab(tmp_path: Path, own: str) -> None:
    uid = ", uid: 7d5c" if own else ""
    result = loaded(tmp_path, pod("[{name: a, command: [sleep, '9']}]", metadata=uid), own)
    assert any(each.code == "not-run" for each in result.warnings)
    (container,) = result.lab.pods[0].containers
    assert (container.command, container.runs) == (("sleep", "9"), False)
    assert build(result.lab).processes == ()


def test_variables_of_fields_and_config_maps(tmp_path: Path) -> None:
    text = """\
        apiVersion: v1
        kind: ConfigMap
        metadata: {name: settings, namespace: demo}
        data: {colour: blue, price: $(5)}
        ---
        apiVersion: v1
        kind: Node
        metadata: {name: n1}
        ---
        apiVersion: v1
        kind: Pod
        metadata: {name: p, namespace: demo, labels: {app: web}}
        spec:
          containers:
          - name: a
            envFrom:
            - prefix: of_
              configMapRef: {name: settings}
            env:
            - {name: plain, value: "1"}
            - {name: name, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
            - {name: namespace, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
            - {name: label, valueFrom: {fieldRef: {fieldPath: "metadata.labels['app']"}}}
            - {name: node, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
            - {name: address, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
            - {name: host, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
            - {name: colour, valueFrom: {configMapKeyRef: {name: settings, key: colour}}}
            - {name: none, valueFrom: {configMapKeyRef: {name: absent, key: a, optional: true}}}
            - {name: secret, valueFrom: {secretKeyRef: {name: s, key: a}}}
            - {name: both, value: "$(node)/$(of_price)/$$(node)/$(nothing)"}
        """
    result = loaded(tmp_path, text)
    (warning,) = result.warnings
    assert "env of other things than fields and ConfigMaps (1)" in warning.message
    lab = result.lab
    (only,) = lab.pods
    assert environment.of_container(lab, only, only.containers[0]) == {
        "HOSTNAME": "p",
        "of_colour": "blue",
        "of_price": "$(5)",
        "plain": "1",
        "name": "p",
        "namespace": "demo",
        "label": "web",
        "node": "n1",
        "address": "10.244.1.2",
        "host": "172.21.32.2",
        "colour": "blue",
        "both": "n1/$(5)/$(node)/$(nothing)",
    }


def test_files_of_config_maps_with_items_and_a_part(tmp_path: Path) -> None:
    text = """\
        apiVersion: v1
        kind: ConfigMap
        metadata: {name: files, namespace: demo}
        data: {a: "1", b: "2", c: "3"}
        ---
        apiVersion: v1
        kind: Pod
        metadata: {name: p, namespace: demo}
        spec:
          containers:
          - name: all
            volumeMounts: [{name: whole, mountPath: /run/all/}]
          - name: some
            volumeMounts:
            - {name: some, mountPath: /run/some}
            - {name: whole, mountPath: /run/one.conf, subPath: b}
            - {name: some, mountPath: /run/part, subPath: below}
          volumes:
          - {name: whole, configMap: {name: files}}
          - name: some
            configMap: {name: files, items: [{key: a, path: x}, {key: c, path: below/y}]}
        """
    every, some = loaded(tmp_path, text).lab.pods[0].containers
    assert {file.path: file.text for file in every.files} == {
        "/run/all/a": "1",
        "/run/all/b": "2",
        "/run/all/c": "3",
    }
    assert {file.path: file.text for file in some.files} == {
        "/run/some/x": "1",
        "/run/some/below/y": "3",
        "/run/one.conf": "2",
        "/run/part/y": "3",
    }


@pytest.mark.parametrize(
    ("containers", "rest", "code", "said"),
    [
        (
            "[{name: a, ports: [{containerPort: 80}]}, {name: b, ports: [{containerPort: 80}]}]",
            "",
            "port-collision",
            "t.yaml:9:91: error[port-collision]: Pod demo/p: TCP 80 of container b is already "
            "container a's",
        ),
        ("[{name: a}, {name: a}]", "", "duplicate-name", "two containers of the name"),
        (
            "[{name: a, envFrom: [{configMapRef: {name: m}}]}]",
            "",
            "unknown-configmap",
            "there is no ConfigMap demo/m",
        ),
        (
            "[{name: a, volumeMounts: [{name: v, mountPath: /run/a}]}]",
            "",
            "unknown-volume",
            'has no volume "v"',
        ),
        (
            "[{name: a, volumeMounts: [{name: v, mountPath: a}]}]",
            "  volumes: [{name: v, configMap: {name: m}}]\n",
            "bad-value",
            "does not begin with /",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    tmp_path: Path, containers: str, rest: str, code: str, said: str
) -> None:
    found = problems(tmp_path, pod(containers, rest))
    assert said in found[code]
    assert "t.yaml:" in found[code]


# --- what Services are called in the environment -------------------------------------------------


def _service(name: str, namespace: str = "demo", address: str = "10.96.0.7") -> Service:
    ports = (
        ServicePort(port=80, name="http", target_port=8002),
        ServicePort(port=53, protocol="UDP", name="dns-udp", target_port=53),
    )
    return Service(namespace=namespace, name=name, cluster_ip=address, ports=ports)


def _lab(*services: Service) -> Lab:
    return replace(small_lab(name="t", pods=1), services=services, endpoints=())


def test_variables_of_a_service_are_those_of_kubernetes() -> None:
    lab = _lab(_service("my-blog"))
    assert environment.of_services(lab, lab.pods[0]) == {
        "MY_BLOG_SERVICE_HOST": "10.96.0.7",
        "MY_BLOG_SERVICE_PORT": "80",
        "MY_BLOG_SERVICE_PORT_HTTP": "80",
        "MY_BLOG_SERVICE_PORT_DNS_UDP": "53",
        "MY_BLOG_PORT": "tcp://10.96.0.7:80",
        "MY_BLOG_PORT_80_TCP": "tcp://10.96.0.7:80",
        "MY_BLOG_PORT_80_TCP_PROTO": "tcp",
        "MY_BLOG_PORT_80_TCP_PORT": "80",
        "MY_BLOG_PORT_80_TCP_ADDR": "10.96.0.7",
        "MY_BLOG_PORT_53_UDP": "udp://10.96.0.7:53",
        "MY_BLOG_PORT_53_UDP_PROTO": "udp",
        "MY_BLOG_PORT_53_UDP_PORT": "53",
        "MY_BLOG_PORT_53_UDP_ADDR": "10.96.0.7",
    }


def test_only_the_own_namespace_has_variables_and_the_api_server() -> None:
    lab = _lab(
        _service("here"),
        _service("there", namespace="other"),
        _service("kubernetes", namespace="default", address="10.96.0.1"),
        _service("headless", address="None"),
    )
    (only,) = lab.pods
    hosts = {name for name in environment.of_services(lab, only) if name.endswith("_HOST")}
    assert hosts == {"HERE_SERVICE_HOST", "KUBERNETES_SERVICE_HOST"}
    alone = replace(only, service_links=False)
    hosts = {name for name in environment.of_services(lab, alone) if name.endswith("_HOST")}
    assert hosts == {"KUBERNETES_SERVICE_HOST"}


def test_an_ipv6_address_stands_in_brackets_where_a_port_follows() -> None:
    lab = _lab(_service("web", address="fd00::7"))
    found = environment.of_services(lab, lab.pods[0])
    assert found["WEB_SERVICE_HOST"] == "fd00::7"
    assert found["WEB_PORT"] == "tcp://[fd00::7]:80"


def test_what_a_container_declares_comes_before_services() -> None:
    lab = _lab(_service("web"))
    own = (
        Variable(name="WEB_SERVICE_PORT", value="9"),
        Variable(name="URL", value="http://$(WEB_SERVICE_HOST):$(WEB_SERVICE_PORT)/"),
    )
    found = environment.of_container(lab, lab.pods[0], Container(name="a", env=own))
    assert found["WEB_SERVICE_PORT"] == "9"
    assert found["URL"] == "http://10.96.0.7:9/"


@given(st.text("$()AB", max_size=12))
def test_texts_expand_as_kubernetes_does_it(text: str) -> None:
    assert environment.expanded(text.replace("$", "$$"), {"A": "1"}) == text
    if "$" not in text:
        assert environment.expanded(text, {"A": "1"}) == text


# --- who answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "served"),
    [
        ((False, False), (80, 81, 90)),
        ((True, False), (81, 90)),  # (90: a Service's, which no container declares)
        ((True, True), ()),
    ],
)
def test_the_workload_answers_for_what_does_not_run(
    runs: tuple[bool, ...], served: tuple[int, ...]
) -> None:
    containers = tuple(
        Container(name=f"c{port}", ports=(ContainerPort(port=port),), runs=each)
        for port, each in zip((80, 81), runs, strict=True)
    )
    found = Pod(
        namespace="demo",
        name="p",
        node="n1",
        address="10.244.1.2",
        containers=containers,
        listen=(("TCP", 80), ("TCP", 81), ("TCP", 90)),
    )
    assert found.served == tuple(("TCP", port) for port in served)


# --- on the kernel -------------------------------------------------------------------------------

_SERVE = (
    "import http.server, os, sys\n"
    "class Answer(http.server.BaseHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        self.send_response(200); self.end_headers()\n"
    "        said = f\"{os.environ['WEB_SERVICE_HOST']} {sys.argv[1]} {os.getcwd()}\"\n"
    "        self.wfile.write((said + ' ' + open('/run/said').read()).encode())\n"
    "http.server.HTTPServer(('', 8002), Answer).serve_forever()\n"
)


def _running(name: str) -> Lab:
    lab = small_lab(name=name, pods=2, nodes=1)
    container = Container(
        name="web",
        command=("python3", "-c", _SERVE),
        args=("$(NAME)@$(WEB_SERVICE_PORT)",),
        directory="/usr",
        env=(Variable(name="NAME", value="me"),),
        ports=(ContainerPort(port=8002),),
        files=(MountedFile(path="/run/said", text="hello"),),
        runs=True,
    )
    pods = (lab.pods[0], replace(lab.pods[1], containers=(container,), ports=container.ports))
    return replace(lab, pods=pods)


def _said(lab: Lab, source: str, url: str) -> str:
    command = ["ip", "netns", "exec", f"{lab.name}:demo:{source}", "curl", "-sf", url]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.kernel
def test_a_command_answers_in_its_pod_with_its_environment_and_files(
    up: Callable[[Lab], lifecycle.Outcome],
) -> None:
    lab = _running(fresh_name())
    outcome = up(lab)
    assert (outcome.unserved, outcome.unready) == ((), ())
    assert _said(lab, "p0", "http://10.244.1.3:8002/") == "10.99.0.1 me@80 /usr hello"
    init = control.connect(lab.name)
    assert init is not None
    (program,) = init.status().programs
    assert (program.name, program.running) == ("web", True)
    assert up(lab).changes == ()


@pytest.mark.kernel
def test_another_service_is_no_reason_to_start_a_command_again(
    up: Callable[[Lab], lifecycle.Outcome],
) -> None:
    lab = _running(fresh_name())
    up(lab)
    init = control.connect(lab.name)
    assert init is not None
    before = [each.pid for each in init.status().processes if each.name == "python3"]
    up(replace(lab, services=(*lab.services, _service("more", address="10.99.0.9"))))
    assert [each.pid for each in init.status().processes if each.name == "python3"] == before


@pytest.mark.kernel
def test_exec_has_the_variables_of_the_container_that_is_asked_for(
    up: Callable[[Lab], lifecycle.Outcome],
) -> None:
    lab = small_lab(pods=1, nodes=1)
    containers = tuple(
        Container(name=name, env=(Variable(name="WHO", value=name),)) for name in ("one", "two")
    )
    lab = replace(lab, pods=(replace(lab.pods[0], containers=containers),))
    up(lab)

    def said(*options: str, text: str = "$WHO $WEB_SERVICE_HOST $HOSTNAME") -> str:
        command = [NETLAB, "exec", "--lab", lab.name, *options, "p0", "--", "sh", "-c"]
        done = subprocess.run([*command, f'echo "{text}"'], capture_output=True, text=True)
        return done.stdout.strip() or done.stderr

    assert said() == "one 10.99.0.1 p0"
    assert said("-c", "two") == "two 10.99.0.1 p0"
    assert 'Pod demo/p0 has no container "three"' in said("-c", "three")


@pytest.mark.kernel
def test_exec_sees_the_files_of_config_maps_also_where_nothing_runs(
    up: Callable[[Lab], lifecycle.Outcome],
) -> None:
    lab = small_lab(pods=1, nodes=1)
    file = MountedFile(path="/run/settings/colour", text="blue")
    container = Container(name="one", files=(file,))
    lab = replace(lab, pods=(replace(lab.pods[0], containers=(container,)),))
    up(lab)
    command = [NETLAB, "exec", "--lab", lab.name, "p0", "--", "cat", file.path]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "blue"


def test_two_files_at_one_path_of_a_pod_are_an_error(tmp_path: Path) -> None:
    maps = "".join(
        f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: demo}}\n"
        f"data: {{a: {name}}}\n---\n"
        for name in ("one", "two")
    )
    text = maps + pod(
        "[{name: a, volumeMounts: [{name: one, mountPath: /run/x}]},"
        " {name: b, volumeMounts: [{name: two, mountPath: /run/x}]}]",
        "  volumes: [{name: one, configMap: {name: one}}, {name: two, configMap: {name: two}}]\n",
    )
    assert "container b has another file at /run/x/a" in problems(tmp_path, text)["path-taken"]


def test_localhost_is_an_address_of_the_source() -> None:
    lab = small_lab(name="t")
    found = resolve(lab, "localhost:80")
    assert (found.kind, found.address, found.port_number) == ("address", "127.0.0.1", 80)
    assert resolve(ipv6_lab(lab), "localhost").address == "::1"
