"""The Ingress controller of a pod: nginx, its certificates, and its configuration read again.

A program of a lab, in a pod's namespace.  It makes the certificates that are asked for and are not
there yet, starts nginx, and at SIGHUP has it read a configuration that nginx itself has found
right: a wrong one is told to the log, and the old one stays.  When nginx tells that it has the new
one, a Unix socket gets a name with its digest.

It runs in a bare interpreter: only the standard library can be imported here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import NoReturn

NAME = "netlab-ingress"
_DAYS = "3650"
_PATIENCE_S = 10.0  # for nginx to have read its configuration
_LOOK_S = 0.01
_OWN = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def main(directory: str, port: int) -> NoReturn:
    """Run nginx with the configuration of a directory until it or this is ended."""
    _Controller(directory, port).run()


class _Controller:
    def __init__(self, directory: str, port: int) -> None:
        self._directory = directory
        self._port = port
        self._named: socket.socket | None = None
        self._nginx: subprocess.Popen[bytes] | None = None

    def run(self) -> NoReturn:
        # What comes meanwhile waits until it is asked for, once for each kind.
        signal.pthread_sigmask(signal.SIG_BLOCK, _OWN)
        self._make_certificates()
        self._nginx = subprocess.Popen(
            self._command(), preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _OWN)
        )
        self._await_digest()
        while True:
            number = signal.sigwait(_OWN)
            if number == signal.SIGCHLD:
                if (code := self._nginx.poll()) is not None:
                    sys.exit(code if code >= 0 else 128 - code)
            elif number == signal.SIGHUP:
                self._reload()
            else:
                self._nginx.terminate()
                self._nginx.wait()
                sys.exit(0)

    def _command(self, *more: str) -> list[str]:
        config = f"{self._directory}/nginx.conf"
        return ["nginx", "-p", self._directory, "-e", "stderr", "-c", config, *more]

    def _reload(self) -> None:
        if self._named:
            self._named.close()
            self._named = None
        self._make_certificates()
        if subprocess.run(self._command("-t", "-q"), check=False).returncode:
            print(f"{NAME}: the configuration before stays", file=sys.stderr, flush=True)
            return
        assert self._nginx is not None
        self._nginx.send_signal(signal.SIGHUP)
        self._await_digest()

    def _await_digest(self) -> None:
        """Wait until a worker with the new configuration answers, and say so."""
        with open(f"{self._directory}/digest", encoding="ascii") as file:
            wanted = file.read()
        deadline = time.monotonic() + _PATIENCE_S
        while self._digest() != wanted and time.monotonic() < deadline:
            assert self._nginx is not None
            if self._nginx.poll() is not None:
                return
            time.sleep(_LOOK_S)
        self._named = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._named.bind(f"\0{NAME}:{wanted}")

    def _digest(self) -> str | None:
        """What nginx says that it has."""
        try:
            with socket.create_connection(("127.0.0.1", self._port), 1.0) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                said = b""
                while data := connection.recv(4096):
                    said += data
        except OSError:
            return None
        return said.partition(b"\r\n\r\n")[2].decode(errors="replace").strip()

    def _make_certificates(self) -> None:
        """Keys and certificates signed by themselves, kept in this pod's own /run."""
        tls = f"{self._directory}/tls"
        os.makedirs(tls, mode=0o700, exist_ok=True)
        with open(f"{self._directory}/certificates", encoding="utf-8") as file:
            wanted = [line.split() for line in file]
        for name, *hosts in wanted:
            certificate, made_for = f"{tls}/{name}.crt", f"{tls}/{name}.hosts"
            if _text(made_for) != " ".join(hosts):
                self._make(name, hosts, certificate)
                with open(made_for, "w", encoding="utf-8") as opened:
                    opened.write(" ".join(hosts))

    def _make(self, name: str, hosts: list[str], certificate: str) -> None:
        key = f"{self._directory}/tls/{name}.key"
        subject = ("-subj", f"/O=netlab/CN={hosts[0][:64]}")
        names = ",".join(f"DNS:{host}" for host in hosts)
        done = subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
                *("ec_paramgen_curve:prime256v1", "-nodes", "-days", _DAYS),
                *(*subject, "-addext", f"subjectAltName={names}"),
                *("-keyout", key, "-out", certificate),
            ],
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            sys.exit(f"{NAME}: openssl could not make a certificate for {names}: {said}")


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
