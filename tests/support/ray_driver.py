"""Conversions on a Ray cluster whose nodes are all on this machine; test_ray.py runs it.

python tests/support/ray_driver.py MODEL FOLDER MAX_SHARD_NBYTES RESULTS.json
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from fp4moe_convert import ConvertError, Progress, convert_on_ray
from support.processes import FP4MOE_CONVERT


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        found.append(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def at_work_below(parent: int, folder: Path) -> tuple[int, str] | None:
    """A process below another one that has a half-written shard open, and that shard's name."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                for fd in (entry / "fd").iterdir():
                    target = os.readlink(fd)
                    ours = target.startswith(f"{folder}/") and target.endswith(".partial")
                    if ours and parent in ancestors(int(entry.name)):
                        return int(entry.name), Path(target).name.removesuffix(".partial")
            except OSError:  # it has ended, or closed the file
                continue
    return None


def kill_while_it_writes(cluster: Cluster, node: Any, folder: Path) -> str:
    """Kill a node that has begun a shard and cannot have finished it; the shard's name."""
    raylet = node.all_processes["raylet"][0].process.pid
    while (found := at_work_below(raylet, folder)) is None:
        time.sleep(0.001)
    pid, name = found
    os.kill(pid, signal.SIGSTOP)
    cluster.remove_node(node, allow_graceful=False)
    os.kill(pid, signal.SIGKILL)
    return name


def refusal(*arguments: Any, **options: Any) -> str:
    try:
        convert_on_ray(*arguments, **options)
    except ConvertError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main() -> None:
    model, folder, results = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[4])
    options: dict[str, Any] = {"max_shard_nbytes": int(sys.argv[3])}
    found: dict[str, Any] = {}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)

    # A node is killed.
    killed: list[str] = []
    killer = threading.Thread(
        target=lambda: killed.append(kill_while_it_writes(cluster, second, folder / "killed"))
    )
    killer.start()
    report = convert_on_ray(model, folder / "killed", cluster.address, **options)
    killer.join()
    found["killed"] = {"shard": killed[0], "written": report.bytes_written == report.bytes_out}

    # A run is interrupted and resumed.
    cluster.add_node(num_cpus=1)

    def interrupt(progress: Progress) -> None:
        if progress.done > progress.total // 3:
            raise KeyboardInterrupt

    try:
        convert_on_ray(model, folder / "resumed", cluster.address, on_progress=interrupt, **options)
    except KeyboardInterrupt:
        left = sorted(path.name for path in (folder / "resumed").glob("*.safetensors"))
    steps: list[Progress] = []
    report = convert_on_ray(
        model, folder / "resumed", cluster.address, on_progress=steps.append, **options
    )
    found["resumed"] = {
        "left": left,
        "kept": report.shards_kept,
        "progress": [steps[-1].done, steps[-1].total, len(steps)],
    }

    # On the command line.
    done = subprocess.run(
        [
            *FP4MOE_CONVERT,
            *(model, folder / "command", "--max-shard-size", sys.argv[3]),
            *("--ray", cluster.address, "--json", "--quiet"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    found["command"] = [done.returncode, done.stdout, done.stderr]

    # What a task cannot do.
    bad = Path(f"{model}-bad")
    found["bad source"] = refusal(bad, folder / "bad", cluster.address, **options)
    results.write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
