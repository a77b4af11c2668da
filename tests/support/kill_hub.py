"""Kill a conversion of a model on the Hub many times, and count what it has fetched in the end.

    python -m tests.support.kill_hub --layers 1 --experts 320 --kills 20    # 8.6 GB

A Hub on this machine serves a made model at a rate like a network's. Runs are killed at random
moments, each after a share of the bytes that were left, until the last one ends. The result has to
be that of an unbroken conversion of the folder. All the while the disk that the output takes is
measured, and the largest amount is compared with the output's size and one shard.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fp4moe_convert import convert
from fp4moe_convert.storage.copying import record_of
from fp4moe_convert.storage.local import LocalReader

from .folders import MANIFEST
from .hub import running
from .make_checkpoint import Spec, make_checkpoint
from .processes import FP4MOE_CONVERT

ID = "org/model"


def checksums(folder: Path) -> dict[str, str]:
    """Of every file; of a manifest without what it says of the source."""
    found = {}
    for path in folder.rglob("*"):
        if path.name == MANIFEST:
            content = json.loads(path.read_text())
            del content["source"], content["manifest"]
            found[path.name] = json.dumps(content)
        elif path.is_file():
            found[path.name] = record_of(LocalReader(path)).checksum
    return found


def used_nbytes(folder: Path) -> int:
    """Disk that a folder's files take; some may vanish in the meantime."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 512 * path.lstat().st_blocks
        except FileNotFoundError:
            continue
    return total


def main() -> None:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rate", type=float, default=250e6, help="bytes a second of the line")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where there is room")
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        model, out = folder / "model", folder / "out"
        make_checkpoint(
            model, Spec(layers=arguments.layers, dense_layers=0, experts=arguments.experts)
        )
        every_byte = sum(path.stat().st_size for path in model.iterdir())
        convert(model, folder / "whole")
        expected = checksums(folder / "whole")
        sizes = [path.stat().st_size for path in (folder / "whole").iterdir()]
        shutil.rmtree(folder / "whole")
        peak = 0
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.02):
                peak = max(peak, used_nbytes(out) + used_nbytes(folder / "home"))

        watching = threading.Thread(target=watch)
        watching.start()
        with running({ID: model}, rate=arguments.rate) as hub:
            command = [*FP4MOE_CONVERT, ID, out, "-q", "--connections", str(arguments.connections)]
            environment = {**os.environ, **hub.environment(folder / "home")}
            started = time.monotonic()
            moments = sorted(choose.uniform(0, every_byte) for _ in range(arguments.kills))
            for moment in moments:
                process = subprocess.Popen(command, env=environment)
                # Of what has been fetched, and a little for being late.
                while process.poll() is None and hub.sent_nbytes < moment:
                    time.sleep(0.002)
                time.sleep(choose.uniform(0, 0.2))
                process.kill()
                process.wait()
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            seconds = time.monotonic() - started
            fetched = hub.sent_nbytes
        ended.set()
        watching.join()
        if checksums(out) != expected:
            sys.exit(f"seed {arguments.seed}: the result differs")
    print(
        f"{arguments.kills} kills in {seconds:.0f} s: the same bytes; {fetched:,} bytes fetched "
        f"for {every_byte:,} ({fetched / every_byte - 1:.1%} again); peak disk {peak:,} bytes, "
        f"output {sum(sizes):,}, its largest shard {max(sizes):,}"
    )
    if fetched > 1.1 * every_byte or peak > sum(sizes) + max(sizes):
        sys.exit("too much")


if __name__ == "__main__":
    main()
