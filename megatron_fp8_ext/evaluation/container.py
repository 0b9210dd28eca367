"""The container that a model's programs run in; loaded by runner.py inside evalscope's environment.

ms-enclave's Docker sandbox, which evalscope uses, sets memory, CPU and network, but runs programs as
root with every default capability, without a limit on processes, in containers that one program
hands to the next as it left them. Its failures count as wrong answers. This class closes those:
evalscope takes it in place of ms-enclave's through the registry of sandboxes.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any, NoReturn

NOBODY = "65534:65534"
PROCESSES = 128
SCRATCH_BYTES = 256 << 20  # /tmp, the only place to write; it counts towards the memory limit
LABEL = "megatron-fp8-eval"
EXIT_CODE = 70  # of evalscope's process when a container fails
FAILED = "the container sandbox-"  # begins the line that says why

# Process 1, which `kill -1` spares: reaps what programs leave behind, ends when told to.
_INIT = "trap 'exit 0' TERM; while :; do sleep 60 & wait; done"
OUTPUT_BYTES = 16 << 20  # of a program; evalscope would hold all of it in memory
# Runs `$1` for `$2`, then ends what it left running, prints at most `$3` bytes of its output and the
# start of its errors, and empties the places it can write to: the next program starts clean.
_CLEAN_RUN = """
timeout -s TERM -k 5s "$2" sh -c "$1" >/tmp/.output 2>/tmp/.errors
code=$?
kill -s KILL -1 2>/dev/null
head -c "$3" /tmp/.output
head -c 65536 /tmp/.errors >&2
rm -rf /tmp/* /tmp/.[!.]* /dev/shm/*
exit "$code"
"""
_NOT_CLEAN = (126, 127, 137, 255)  # exit codes after which the lines above may not have run
_PROBE = """
import json, os, socket
def writes(path):
    try:
        open(path, "w").close(); return True
    except OSError:
        return False
print(json.dumps({"user": os.getuid(), "networks": [n for _, n in socket.if_nameindex()],
                  "writes": [p for p in ("/x", "/usr/x", "/etc/x", "/var/tmp/x") if writes(p)],
                  "scratch": writes("/tmp/x"), "capabilities": [line.split()[1] for line in
                  open("/proc/self/status") if line.startswith("CapEff")][0]}))
"""


def arguments(config: Any, name: str, label: str) -> dict[str, Any]:
    """Return what the Docker SDK's `containers.create` is given for a DockerSandboxConfig."""
    from docker.types import DriverConfig, Mount, Ulimit

    scratch = {"type": "tmpfs", "device": "tmpfs", "o": f"size={SCRATCH_BYTES},uid=65534,gid=65534"}
    return {
        "image": config.image,
        "name": name,
        "entrypoint": [],
        "command": ["sh", "-c", _INIT],
        "labels": {LABEL: label},
        "detach": True,
        "working_dir": "/tmp",
        # Not sys.path[0]: there, a file json.py that a program left would be imported.
        "environment": {"HOME": "/tmp", "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        "user": NOBODY,
        "read_only": True,
        # A volume, since files cannot be copied into a tmpfs of a read-only container.
        "mounts": [
            Mount("/tmp", None, type="volume", driver_config=DriverConfig("local", scratch))
        ],
        "shm_size": "1m",
        "network_mode": "none",
        "privileged": False,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "pids_limit": PROCESSES,
        "ulimits": [Ulimit(name="core", soft=0, hard=0)],
        "mem_limit": config.memory_limit,
        "memswap_limit": config.memory_limit,
        "cpu_period": 100_000,
        "cpu_quota": int(config.cpu_limit * 100_000),
    }


def install(label: str) -> type[Any]:
    """Register the class for evalscope's `docker` engine and return it.

    Args:
        label: of the containers, by which megatron-fp8 removes what a killed run left.
    """
    from evalscope.benchmarks.live_code_bench.testing_util import import_string
    from ms_enclave.sandbox.boxes import DockerSandbox, SandboxFactory
    from ms_enclave.sandbox.model import ExecutionStatus, SandboxStatus, SandboxType

    class Container(DockerSandbox):  # type: ignore[misc]
        """One container; programs run in it one after another."""

        async def _create_container(self) -> None:
            given = arguments(self.config, f"sandbox-{self.id}", label)
            self.container = await self._run_blocking(self.client.containers.create, **given)

        async def _ensure_image_exists(self) -> None:
            await self._run_blocking(self.client.images.get, self.config.image)  # never pulls

        async def put_file(self, path: str, content: str, encoding: str = "utf-8") -> bool:
            """Write a program into the container, below the imports of LiveCodeBench's own grader."""
            try:
                return bool(await super().put_file(path, import_string + content, encoding))
            except Exception as error:
                _failed(self.id, error)

        async def execute_command(
            self, command: Any, timeout: Any = None, stream: bool = True
        ) -> Any:
            """Run a program; whatever is not the program's own failure ends the evaluation."""
            result = await super().execute_command(command, timeout, stream=False)
            if result.status == ExecutionStatus.ERROR and result.exit_code == -1:
                _failed(self.id, result.stderr or "no exit code")
            if result.status == ExecutionStatus.TIMEOUT or result.exit_code in _NOT_CLEAN:
                try:
                    await self._run_blocking(self.container.restart, timeout=0)
                except Exception as error:
                    _failed(self.id, error)
            return result

        @staticmethod
        def _wrap_command_timeout(command: Any, timeout: Any) -> list[str]:
            if not isinstance(command, str):
                raise TypeError(f"a program's command is one string, not {command!r}")
            return [
                "sh",
                "-c",
                _CLEAN_RUN,
                "sh",
                command,
                f"{float(timeout or 30)}s",
                str(OUTPUT_BYTES),
            ]

        async def stop(self) -> None:
            """Remove the container with its volume."""
            await self.cleanup()
            self.update_status(SandboxStatus.STOPPED)

        async def cleanup(self) -> None:
            """Remove the container with its volume, then what the base class holds."""
            if self.container:
                await self._run_blocking(self.container.remove, force=True, v=True)
                self.container = None
            await super().cleanup()

    SandboxFactory.register_sandbox(SandboxType.DOCKER, Container)
    return Container


def _failed(name: str, reason: object) -> NoReturn:
    """End this process at once: evalscope would score the answer as wrong."""
    line = " ".join(str(reason).split())
    print(f"\n{FAILED}{name} failed: {line}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


def probe(config: dict[str, Any], label: str) -> str | None:
    """Run a program in a container as evalscope will; return what is wrong, or None."""
    from ms_enclave.sandbox.model import DockerSandboxConfig
    from ms_enclave.sandbox.tools.sandbox_tools.python_executor import PythonExecutor

    box = install(label)(DockerSandboxConfig(**config))

    async def run() -> Any:
        try:
            await box.start()
            return await PythonExecutor().execute(box, _PROBE, timeout=60)
        finally:
            await box.stop()

    answer = asyncio.run(run())
    if answer.status != "success":
        return f"a program fails in it: {' '.join(str(answer.error or answer.output).split())}"
    found = json.loads(answer.output)
    wrong = [
        ("it runs programs as root", found["user"] == 0),
        (f"it has a network ({', '.join(found['networks'])})", found["networks"] != ["lo"]),
        (f"programs can write {', '.join(found['writes'])}", bool(found["writes"])),
        ("programs cannot write /tmp", not found["scratch"]),
        (f"it has capabilities {found['capabilities']}", int(found["capabilities"], 16) != 0),
    ]
    return next((text for text, holds in wrong if holds), None)
