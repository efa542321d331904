"""Hosts on one machine: namespaces of their own (network, name, mounts, processes) with an sshd, on a bridge of theirs.

None of this touches the machine's own network, and all of it ends with the processes started here.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("ip", "nsenter", "unshare", "ssh", "ssh-keygen", "sshd")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def why_not() -> str | None:
    """Return why hosts cannot be made on this machine, if so."""
    if os.geteuid() != 0:
        return "hosts are made by root"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        return f"hosts need {', '.join(missing)} (Debian: openssh-server openssh-client iproute2 util-linux)"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "this machine allows no namespaces" if probe.returncode else None


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, env={**os.environ, "PATH": PATH})


class Hosts:
    """`node1` … `nodeN`; each reaches the others by ssh."""

    def __init__(self, inner: dict[str, int], ssh_folder: Path):
        self._inner, self.ssh_folder = inner, ssh_folder

    def run(self, name: str, *command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
        """Run a command on a host to its end."""
        namespaces = ["nsenter", "-t", str(self._inner[name]), "--net", "--uts", "--mount", "--pid", f"--wdns={cwd}"]
        return subprocess.run(
            [*namespaces, "--", *command],
            env={**os.environ, "PATH": f"{self.ssh_folder}:{PATH}", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )


@contextmanager
def hosts(folder: Path, count: int) -> Iterator[Hosts]:
    """Hosts for as long as the block lasts; `folder` holds their keys and settings."""
    names, prefix = [f"node{number + 1}" for number in range(count)], f"dsr{os.getpid()}"
    for key in ("key", "host_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
    addresses = "".join(f"10.78.0.{number + 1} {name}\n" for number, name in enumerate(names))
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + addresses)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PermitRootLogin prohibit-password\n"
    )
    # The launchers call the first ssh of the path: this one leaves the user's own settings alone.
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(
        f"#!/bin/sh\nexec {shutil.which('ssh')} -F none -i {folder}/key -o LogLevel=ERROR "
        '-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "$@"\n'
    )
    (folder / "bin/ssh").chmod(0o755)
    sshd = shutil.which("sshd", path=PATH)
    with ExitStack() as stack:

        def network(name: str) -> str:
            _run("ip", "netns", "add", f"{prefix}-{name}")
            stack.callback(_run, "ip", "netns", "del", f"{prefix}-{name}")
            return f"{prefix}-{name}"

        switch = network("switch")
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        inner = {}
        for number, name in enumerate(names):
            own = network(name)
            pair = ("type", "veth", "peer", "name", "eth0", "netns", own)
            _run("ip", "-n", switch, "link", "add", name, *pair)
            _run("ip", "-n", switch, "link", "set", name, "master", "br0", "up")
            _run("ip", "-n", own, "link", "set", "lo", "up")
            _run("ip", "-n", own, "addr", "add", f"10.78.0.{number + 1}/24", "dev", "eth0")
            _run("ip", "-n", own, "link", "set", "eth0", "up")
            script = (
                f"hostname {name} && mount --bind {folder}/hosts /etc/hosts && mount -t tmpfs tmpfs /dev/shm && "
                f"mount -t tmpfs tmpfs /run && mkdir /run/sshd && {sshd} -f {folder}/sshd_config && echo up && "
                "exec sleep infinity"
            )
            process = subprocess.Popen(
                [
                    *("nsenter", f"--net=/run/netns/{own}", "unshare", "--uts", "--mount", "--pid", "--fork"),
                    *("--mount-proc", "--kill-child", "sh", "-c", script),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PATH": PATH},
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)  # and with it all that runs on the host
            line = process.stdout.readline()
            assert line == "up\n", line
            inner[name] = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        made = Hosts(inner, folder / "bin")
        deadline = time.monotonic() + 20
        while any(made.run(names[0], "ssh", name, "true", cwd=folder).returncode for name in names):
            assert time.monotonic() < deadline, "the hosts do not reach each other"
        yield made
