"""How fast a model is converted from a Hub, beside a raw download over as many connections.

    python -m benchmarks.hub                                # a model of 4.3 GB, three minutes
    python -m benchmarks.hub --connection-rate 40e6 --latency 0.03    # as from far away
    python -m benchmarks.hub --connections 4 --json hub.json

A Hub on this machine (tests/support/hub.py, in a process of its own) has the model in the page
cache, and takes the place of the network. In turn, the model is fetched by ``curl``, ranges of
64 MiB of the Hub's own addresses, --connections at a time, into files that are synced at the end;
and converted, over as many connections, as a whole process. Both leave every byte on the disk. The
conversion also has to read headers first, to arrange the bytes and to take their checksums.

It takes room for the model three times over in --work-dir.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from fp4moe_convert import verify

from .common import (
    environment,
    made_model,
    model_files,
    our_command,
    run_child,
    scratch_folder,
    sync_folder,
)
from .report import headline, parser_of, say, table, write_json

ID = "org/model"
CHUNK_NBYTES = 64 * 2**20
LINE = ("rate", "connection_rate", "latency")
"""What the Hub's line is like, as far as it is not to be as fast as it goes."""


@contextlib.contextmanager
def serving(model: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """A Hub with the model; its endpoint."""
    command = [sys.executable, "-m", "tests.support.hub", f"{ID}={model}"]
    for name in LINE:
        if (value := vars(arguments)[name]) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def download(endpoint: str, model: Path, out: Path, connections: int) -> float:
    """Fetch all shards with curl; the wall time until they are on the disk."""
    out.mkdir()
    ranges = [
        (path.name, start, min(start + CHUNK_NBYTES, path.stat().st_size) - 1)
        for path in sorted(model.glob("*.safetensors"))
        for start in range(0, path.stat().st_size, CHUNK_NBYTES)
    ]

    def fetch(wanted: tuple[str, int, int]) -> None:
        name, first, last = wanted
        url = f"{endpoint}/{ID}/resolve/main/{name}"
        target = out / f"{name}.{first}"
        run_child("curl", "-fsSL", "-r", f"{first}-{last}", "-o", target, url)

    started = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(fetch, ranges))
    sync_folder(out)
    return time.perf_counter() - started


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=160)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--rate", type=float, help="bytes a second of the line")
    parser.add_argument("--connection-rate", type=float, help="bytes a second of one connection")
    parser.add_argument("--latency", type=float, help="seconds until an answer begins")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write all results here")
    arguments = parser.parse_args()
    with scratch_folder(arguments.work_dir) as scratch:
        model = made_model(scratch / "model", arguments.layers, arguments.experts, arguments)
        nbytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        os.environ["HF_HOME"] = str(scratch / "home")
        raw: list[float] = []
        ours: list[float] = []
        memory = 0
        with serving(model, arguments) as endpoint:
            os.environ["HF_ENDPOINT"] = endpoint
            for number in range(arguments.rounds):
                say(f"round {number + 1} of {arguments.rounds}")
                run_child("wc", "-l", *model_files(model))  # reads them into the page cache
                raw.append(download(endpoint, model, scratch / "raw", arguments.connections))
                shutil.rmtree(scratch / "raw")
                out = scratch / "out"
                run_child("wc", "-l", *model_files(model))
                usage = run_child(
                    *(our_command(), ID, out, "--quiet", "--json"),
                    *("--connections", str(arguments.connections)),
                )
                ours.append(usage.wall_s)
                memory = max(memory, usage.peak_rss_bytes)
                fetched = json.loads(usage.stdout)["fetched"]
                if number == 0:
                    verify(out, model)
                shutil.rmtree(out)
        about = environment(scratch, nbytes)
    ratios = [theirs / own for theirs, own in zip(raw, ours, strict=True)]
    print(headline(about))
    rows = [
        [name, f"{median(times):.2f}", f"{nbytes / median(times) / 1e6:.0f}"]
        for name, times in (("raw download", raw), ("fp4moe-convert", ours))
    ]
    print(*table(["", "s", "MB/s"], rows), sep="\n")
    print(f"throughput of the conversion over that of the download: {median(ratios):.2f}")
    print(f"{fetched['requests']:,} requests, {fetched['bytes']:,} bytes, {memory / 1e6:.0f} MB")
    write_json(
        arguments.json,
        {
            "environment": about,
            "connections": arguments.connections,
            **{name: vars(arguments)[name] for name in LINE},
            "raw_s": raw,
            "convert_s": ours,
            "ratio": ratios,
            "fetched": fetched,
            "peak_rss_bytes": memory,
        },
    )


if __name__ == "__main__":
    main()
