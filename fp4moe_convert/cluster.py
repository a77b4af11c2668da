"""A conversion on a Ray cluster: one task a shard, on whichever node has room.

The driver alone holds the folder's lock and its journal. A task fills a shard's temporary file and
returns the checksums; the driver then records the shard and gives it its name. So a node that dies
costs the shards that it was at: Ray runs their tasks again elsewhere.
"""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from . import defaults
from .conversion import ConversionReport, convert_with, write_here
from .errors import CheckpointError, ClusterError, ConvertError, OutputError, one_line
from .execution.dropping import remaining
from .execution.scatter import WriteRequest
from .execution.work import Conversion
from .format.manifest import ShardIdentity
from .plan import PlannedShard
from .preparation import plan_of
from .progress import Running, RunOptions
from .source.checkpoint import open_checkpoint
from .storage.durable import WriteFile, partial_path
from .storage.opening import open_store
from .storage.reader import Store

if TYPE_CHECKING:
    from typing_extensions import Unpack

RETRIES = 5
"""Of a task whose node or process has died."""
ENDING_SECONDS = 2
"""For tasks to end by themselves where another one has failed."""
STOPPING_SECONDS = 10
ANSWER_SECONDS = 5
"""Until a machine is taken to be away."""
JOINING_SECONDS = 60
"""Until what answers is taken to be no cluster. Ray itself tries for 14 minutes, and longer."""


def convert_on_ray(
    model_dir: str | Path | Store,
    out_dir: str | Path,
    cluster: str = "auto",
    *,
    max_shard_nbytes: int = defaults.MAX_SHARD_NBYTES,
    verify: bool = False,
    overwrite: bool = False,
    **running: Unpack[Running],
) -> ConversionReport:
    """Convert with the nodes of a Ray cluster.

    All of them see the output folder, and the source if it is a folder, under the same paths.

    Args:
        cluster: its address, as `ray.init` takes it: HOST:PORT, or ``auto`` for that in the
            variable RAY_ADDRESS, or else for the cluster that runs on this machine.

    The other arguments, and the errors, are those of `conversion.convert`. In particular:

    Raises:
        ClusterError: the cluster cannot be reached, or nodes have died too often.
        ConvertError: Ray, or what it needs for such an address, is not installed, or of another
            version than on the cluster; or that is no address.
    """
    options = RunOptions(**running)
    try:
        import ray
    except ImportError:
        raise ConvertError(
            "Ray is not installed; pip install 'fp4moe-convert[ray]', on all nodes"
        ) from None
    with ExitStack() as stack:
        if not ray.is_initialized():
            _join(ray, cluster)
            stack.callback(ray.shutdown)
        return convert_with(
            options,
            model_dir,
            out_dir,
            max_shard_nbytes=max_shard_nbytes,
            verify=verify,
            overwrite=overwrite,
            write_shards=_write_on_ray,
        )


def _join(ray: Any, cluster: str) -> None:
    """`ray.init`, with errors that name the cluster, and an end.

    Raises:
        ClusterError: it does not answer.
        ConvertError: it cannot be asked.
    """
    named = f"Ray at {cluster!r}"
    address = os.environ.get("RAY_ADDRESS") or "auto" if cluster == "auto" else cluster
    if address not in ("auto", "local"):
        _find(address, named if address == cluster else f"{named}, which is {address!r}")
    joined: Future[None] = Future()
    given_up = Event()

    def join() -> None:
        try:
            ray.init(cluster, log_to_driver=False, logging_level="error")
            if given_up.is_set():
                ray.shutdown()
            joined.set_result(None)
        except BaseException as error:
            joined.set_exception(error)

    # In a thread, which is left behind where Ray goes on trying.
    thread = Thread(target=join, daemon=True)
    thread.start()
    thread.join(JOINING_SECONDS)
    if thread.is_alive():
        given_up.set()
        raise ClusterError(f"{named}: has not answered for {JOINING_SECONDS} s")
    try:
        joined.result()
    except (ImportError, ValueError) as error:
        raise ConvertError(f"{named}: {one_line(error)}") from error
    except (ConnectionError, TimeoutError, RuntimeError) as error:
        if "mismatch" in str(error):  # of Ray's or Python's versions
            raise ConvertError(f"{named}: {one_line(error)}") from error
        # What Ray advises next is about its own commands.
        why = one_line(error).partition(". ")[0].removesuffix(".")
        advice = "; --ray HOST:PORT names a cluster" if address == "auto" else ""
        raise ClusterError(f"{named}: {why}{advice}") from error


def _find(address: str, named: str) -> None:
    """Make sure that a machine answers there. Ray would try for long, and print each time."""
    match = re.fullmatch(r"(?:ray://)?(\[.+\]|[^:/]+):(\d+)", address)
    if match is None and "://" in address:  # Ray knows more of these
        return
    try:
        if match is None or not 0 < int(match[2]) < 2**16:
            raise ValueError
        where = match[1].strip("[]"), int(match[2])
        socket.create_connection(where, ANSWER_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"{named}: does not answer: {error.strerror or error}") from error
    except ValueError:  # UnicodeError is one, and means that there is no such name
        raise ConvertError(
            f"{named}: is no address such as HOST:PORT; auto finds the cluster that runs here"
        ) from None


def _write_on_ray(work: Conversion, request: WriteRequest, options: RunOptions) -> None:
    """`conversion.WriteShards` by tasks of a cluster."""
    import ray

    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    if not (cpus := min((each for each in nodes if each), default=0)):
        raise ClusterError("the Ray cluster has no node with a CPU")
    task = (
        ray.remote(_write_shard)
        .options(
            num_cpus=min(options.threads, cpus), max_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        .remote
    )
    write = partial(
        task,
        source=work.store.provenance().address,
        connections=work.store.connections,
        max_shard_nbytes=work.plan.max_shard_nbytes,
        out_dir=request.out_dir.absolute(),
        direct_io=options.direct_io,
        threads=options.threads,
        run=uuid.uuid4().hex,
    )
    tasks = {
        write(
            name=shard.name,
            fingerprint=shard.fingerprint,
            sources={name: work.identities[name] for name in shard.source_files},
            filled=request.filled.get(shard.name, {}),
        ): shard
        for shard in request.shards
    }
    try:
        while tasks:
            [task_done], _ = ray.wait(list(tasks), num_returns=1)
            shard = tasks[task_done]
            try:
                outcome: _Filled | _Failed = ray.get(task_done)
            except ray.exceptions.RayTaskError as error:
                # It is of the task's own error's class as well.
                cannot_start = isinstance(error, (ImportError, AttributeError, TypeError))
                if not cannot_start and "failed to import" not in str(error):
                    raise
                why = str(error).strip().splitlines()[-1]
                raise ConvertError(
                    f"{shard.name}: its task failed ({why}); is the same release of fp4moe-convert "
                    "installed on all nodes?"
                ) from error
            except ray.exceptions.RayError as error:
                raise ClusterError(f"{shard.name}: {str(error).splitlines()[0]}") from error
            if isinstance(outcome, _Failed):
                raise outcome.error from outcome.cause
            del tasks[task_done]
            try:
                file = WriteFile(partial_path(request.out_dir / shard.name), None, direct=False)
            except OutputError as error:
                raise OutputError(
                    f"{error}, though {outcome.node} has written it: all nodes must share "
                    f"{request.out_dir}"
                ) from error
            request.on_filled(shard, file, outcome.checksums)
            request.on_bytes(shard.name, shard.nbytes - len(shard.header))
    finally:
        if tasks:
            # They end before the folder is tidied up. Not by force, nor at once, because where one
            # has failed others often do: Ray 2.60 aborts a driver that cancels what is just ending
            # ("Tried to complete task that was not pending").
            _, left = ray.wait(list(tasks), num_returns=len(tasks), timeout=ENDING_SECONDS)
            for each in left:
                ray.cancel(each)
            ray.wait(list(tasks), num_returns=len(tasks), timeout=STOPPING_SECONDS)


@dataclass(frozen=True, slots=True)
class _Filled:
    """A task has filled its shard's temporary file."""

    node: str
    checksums: dict[str, str]
    """XXH3-128 of each tensor."""


@dataclass(frozen=True, slots=True)
class _Failed:
    """A task has not."""

    error: ConvertError
    cause: BaseException | None
    """Of the error, which would lose it on its way."""


def _write_shard(
    *,
    source: str,
    connections: int,
    max_shard_nbytes: int,
    out_dir: Path,
    direct_io: bool,
    threads: int,
    run: str,
    name: str,
    fingerprint: str,
    sources: Mapping[str, ShardIdentity],
    filled: Mapping[int, str],
) -> _Filled | _Failed:
    """A task: fill one shard's temporary file."""
    node = socket.gethostname()
    checksums: dict[str, str] = {}

    def keep(_: PlannedShard, file: WriteFile, digests: dict[str, str]) -> None:
        file.sync()
        checksums.update(digests)

    try:
        work = _prepared(source, connections, out_dir, max_shard_nbytes, run)
        shard = next((shard for shard in work.plan.shards if shard.name == name), None)
        for file, identity in sources.items():
            if work.identities.get(file) != identity:
                raise CheckpointError(f"{file}: is not the same file as on the driver's machine")
        if shard is None or shard.fingerprint != fingerprint:
            raise CheckpointError(f"{name}: is planned otherwise by the release that is installed")
        if not filled:
            # What a task that has died may have left. One that only seems dead goes on writing the
            # same bytes into a file that has no name.
            partial_path(out_dir / name).unlink(missing_ok=True)
        write_here(
            work,
            WriteRequest([shard], out_dir, lambda *_: None, keep, filled={name: filled}),
            RunOptions(direct_io=direct_io, threads=threads),
        )
        work.check_unchanged(sources)
    except ConvertError as error:
        return _Failed(type(error)(f"{error} (on {node})"), error.__cause__)
    return _Filled(node, checksums)


@lru_cache(maxsize=1)
def _prepared(
    source: str,
    connections: int,
    out_dir: Path,
    max_shard_nbytes: int,
    run: str,  # noqa: ARG001
) -> Conversion:
    """The whole plan, made once a ``run`` in each process that works at its tasks."""
    store = open_store(source, connections=connections)
    checkpoint = open_checkpoint(remaining(store, out_dir))
    return Conversion(checkpoint, plan_of(checkpoint, max_shard_nbytes=max_shard_nbytes))
