"""A network that fails: requests are tried again, and nothing that has come is asked for twice."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants, file_download
from hypothesis import given
from hypothesis import strategies as st
from support.folders import every_file, flip_bit, without_source
from support.hub import Fault, Hub, running
from support.processes import our_threads, until
from support.specs import SMALL_SHARD_NBYTES
from test_hub import ID, fetched_once, run
from typer.testing import Result

from fp4moe_convert import CheckpointError, Progress, UnreachableError, convert, verify
from fp4moe_convert.execution import output_folder
from fp4moe_convert.execution.crew import Crew
from fp4moe_convert.format.manifest import FileIdentity, Provenance
from fp4moe_convert.storage import hub as hub_store
from fp4moe_convert.storage import prefetch, remote
from fp4moe_convert.storage.buffers import Bytes, block_buffer
from fp4moe_convert.storage.http_answers import asked_wait
from fp4moe_convert.storage.prefetch import Range, open_prefetching
from fp4moe_convert.storage.remote import RemoteStore, StoppedError, TryAgainError, fill_from

SIGNED = "GET /signed"
RESOLVE = "/resolve/"
CONTENT = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)


class Made(RemoteStore):
    """A store of one file, and what it is asked for."""

    def __init__(self, connections: int = 3) -> None:
        super().__init__("made", {"file": FileIdentity(CONTENT.size)}, connections=connections)
        self.asked: list[tuple[int, int]] = []

    def request(self, name: str, offset: int, into: Bytes) -> Iterator[int]:
        assert name == "file"
        self.asked.append((offset, offset + into.size))
        yield from fill_from(self.answer(CONTENT[offset : offset + into.size].tobytes()), into)

    def answer(self, data: bytes) -> Iterator[bytes]:
        """In pieces, as they come."""
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]

    def provenance(self) -> Provenance:
        return Provenance("made")


@contextmanager
def little_room() -> Iterator[None]:
    """Fetch so little ahead that there is a middle of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetch, "REQUEST_NBYTES", 5_000)
        patch.setattr(prefetch, "BATCH_NBYTES", 20_000)
        patch.setattr(prefetch, "SMALL_NBYTES", 0)  # else all of so small a model is one batch
        yield


def down_after(hub: Hub, fraction: float) -> Fault:
    """Down once so much of the model has been sent: a small one may all be on its way before the
    first of it is written."""
    nbytes = sum(file.nbytes for file in hub.repositories[ID].files.values())
    return Fault(SIGNED, float("inf"), after=fraction * nbytes, status=503)


# --- through the library --------------------------------------------------------------------------

FAULTS = {
    "busy": Fault(SIGNED, 4, status=503),
    "too many requests": Fault("", 3, status=429, headers={"Retry-After": "0"}),
    "a bad gateway, first of all": Fault("/api/models", 1, status=502),
    "a page of whoever is between": Fault("/api/models", 1, status=200),
    "the addresses of files are not to be had": Fault(f"HEAD.*{RESOLVE}", 2, status=500),
    "bodies are cut": Fault(SIGNED, 9, cut_after=700),
    "bodies never begin": Fault(SIGNED, 3, cut_after=0),
    "another range is sent": Fault(SIGNED, 3, shift=1),
    "the length is wrong": Fault(SIGNED, 3, headers={"Content-Length": "5"}),
    "addresses have expired": Fault(SIGNED, 3, status=403),
    "ranges of small files are ignored": Fault(f"{RESOLVE}.*json", 99, ignores_range=True),
}


@pytest.mark.parametrize("case", FAULTS)
def test_the_same_bytes_in_spite_of(
    case: str,
    hub: Hub,
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1.0)
    hub.add(ID, source)
    hub.faults.append(dataclasses.replace(FAULTS[case]))
    convert(ID, tmp_path / "out", max_shard_nbytes=SMALL_SHARD_NBYTES)
    assert without_source(every_file(tmp_path / "out")) == without_source(expected)
    assert case.startswith("ranges") or hub.faults[0].times == 0
    if "cut" in case or "never" in case:
        fetched_once(hub, source)


def test_a_connection_that_stalls_is_given_up(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.add(ID, source)
    hub.faults.append(Fault(SIGNED, 4, stall_after=500))
    convert(ID, tmp_path / "out")
    verify(tmp_path / "out", source)
    assert hub.faults[0].times == 0
    every_byte = sum(path.stat().st_size for path in source.iterdir())
    assert hub.sent_nbytes <= every_byte + 4 * 500  # what came of the pieces that stalled


def test_signed_addresses_are_renewed(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add(ID, source)

    def on_progress(progress: Progress) -> None:
        hub.epoch = 8 * progress.done // progress.total

    with little_room():
        convert(ID, tmp_path / "out", max_shard_nbytes=SMALL_SHARD_NBYTES, on_progress=on_progress)
    fetched_once(hub, source)
    asked = [each for each in hub.requests if each.startswith("HEAD")]
    assert len(asked) > len(set(asked)) == 3


def test_after_the_last_try_what_is_finished_is_kept(
    hub: Hub, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(ID, source)
    hub.faults.append(down_after(hub, 0.5))
    with (
        little_room(),
        pytest.raises(UnreachableError, match=r"503 .*, 8 times in a row") as failure,
    ):
        convert(ID, tmp_path / "out", max_shard_nbytes=SMALL_SHARD_NBYTES)
    assert "\n" not in str(failure.value)
    kept = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert kept
    hub.faults.clear()
    hub.forget()
    result = run("convert", ID, tmp_path / "out", "--max-shard-size", SMALL_SHARD_NBYTES)
    assert result.exit_code == 0
    assert f"{len(kept)} of" in result.stderr
    assert without_source(every_file(tmp_path / "out")) == without_source(expected)


def run_until(
    hub: Hub, out: Path, fraction: float, max_shard_nbytes: int = 10**9
) -> dict[str, bytes]:
    """Convert until that much has been sent, in all runs, and then the Hub is down; what the folder
    has then."""
    hub.faults.append(down_after(hub, fraction))
    with little_room(), pytest.raises(UnreachableError):
        convert(ID, out, max_shard_nbytes=max_shard_nbytes)
    hub.faults.clear()
    return every_file(out)


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """What `source` becomes in one shard."""
    convert(source, tmp_path / "whole")
    return without_source(every_file(tmp_path / "whole"))


def test_a_shard_goes_on_where_it_stopped(
    hub: Hub, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(ID, source)
    for fraction in (0.3, 0.6, 0.85):
        [partial] = [n for n in run_until(hub, tmp_path / "out", fraction) if "partial" in n]
        assert partial == "model-00001-of-00001.safetensors.partial"
    before = hub.sent_nbytes
    notes: list[str] = []
    convert(ID, tmp_path / "out", on_note=notes.append)
    assert without_source(every_file(tmp_path / "out")) == whole
    assert notes == [
        "model-00001-of-00001.safetensors: resuming: what an earlier run has fetched for it is kept"
    ]
    every_byte = sum(path.stat().st_size for path in source.iterdir())
    # What each run had fetched and not written yet, a tensor or two, comes again, and so do the
    # headers. Without what is kept the last run alone would fetch all.
    assert hub.sent_nbytes - before < 0.5 * every_byte
    assert hub.sent_nbytes < 1.5 * every_byte


@pytest.mark.parametrize("max_shard_nbytes", [SMALL_SHARD_NBYTES, 10**9])
def test_the_dry_run_counts_what_is_there(
    hub: Hub, source: Path, tmp_path: Path, max_shard_nbytes: int
) -> None:
    """Finished shards, and what an unfinished one holds."""
    hub.add(ID, source)
    out, size = tmp_path / "out", ("--max-shard-size", max_shard_nbytes)

    def foreseen(*options: str) -> tuple[int, int, int]:
        arguments = ("convert", ID, out, *size, "--dry-run", *options)
        plan, shown = json.loads(run(*arguments, "--json").stdout), run(*arguments).stdout
        assert f"{plan['to_fetch_bytes']:,} bytes, " in shown
        [disk] = re.findall(r"^disk +([\d,]+) bytes", shown, re.MULTILINE)
        return plan["to_fetch_bytes"], int(disk.replace(",", "")), plan["fetched"]["bytes"]

    afresh = foreseen()
    run_until(hub, out, 0.6, max_shard_nbytes)
    shards = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert bool(shards) is (max_shard_nbytes == SMALL_SHARD_NBYTES)
    to_fetch, disk, headers = foreseen()
    assert disk == afresh[1] - shards
    assert foreseen("--overwrite")[:2] == afresh[:2]
    report = json.loads(run("convert", ID, out, *size, "--json").stdout)
    # A small file that is copied may be among what the dry run has fetched.
    assert report["fetched"]["bytes"] == pytest.approx(to_fetch + headers, abs=1000)
    assert to_fetch < 0.8 * afresh[0]
    assert foreseen()[1] == 0


def test_bytes_that_a_crash_has_lost_are_fetched_again(
    hub: Hub, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(ID, source)
    run_until(hub, tmp_path / "out", 0.7)
    [partial] = (tmp_path / "out").glob("*.partial")
    # The header, and something of each megabyte.
    for position in (0, 500_000, 1_000_000, 2_000_000):
        flip_bit(partial, position)
    convert(ID, tmp_path / "out")
    assert without_source(every_file(tmp_path / "out")) == whole


def test_a_shard_of_another_length_is_begun_again(
    hub: Hub, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(ID, source)
    run_until(hub, tmp_path / "out", 0.5)
    [partial] = (tmp_path / "out").glob("*.partial")
    os.truncate(partial, 1000)
    convert(ID, tmp_path / "out")
    assert without_source(every_file(tmp_path / "out")) == whole


def test_other_options_begin_afresh(
    hub: Hub, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(ID, source)
    run_until(hub, tmp_path / "out", 0.5)
    convert(ID, tmp_path / "out", max_shard_nbytes=SMALL_SHARD_NBYTES)
    assert without_source(every_file(tmp_path / "out")) == without_source(expected)


def test_overwrite_begins_afresh(
    hub: Hub, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(ID, source)
    run_until(hub, tmp_path / "out", 0.8)
    hub.forget()
    convert(ID, tmp_path / "out", overwrite=True)
    fetched_once(hub, source)
    assert without_source(every_file(tmp_path / "out")) == whole


def test_a_folder_goes_on_with_what_the_hub_began(
    hub: Hub, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """As little as that is: another source has other times of change."""
    hub.add(ID, source)
    run_until(hub, tmp_path / "out", 0.5)
    convert(source, tmp_path / "out")
    assert without_source(every_file(tmp_path / "out")) == whole


def test_a_branch_that_has_moved_is_refused(
    hub: Hub, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    first = hub.add(ID, source).commit
    run_until(hub, tmp_path / "out", 0.5)
    newer = Path(shutil.copytree(source, tmp_path / "newer"))
    (newer / "tokenizer.json").write_text("{}")
    second = hub.add(ID, newer).commit
    result = run("convert", ID, tmp_path / "out")
    assert result.exit_code == 1
    assert (
        f"was begun from {ID}@{first}, and this is {ID}@{second}; --revision {first} goes on"
        in result.stderr
    )
    # The advice is for the command at hand.
    assert result.stderr.endswith(" goes on with that, --overwrite starts afresh\n")
    result = run("convert", ID, tmp_path / "out", "--part", "1/2")
    assert result.stderr.endswith(" goes on with that, fp4moe-convert --overwrite starts afresh\n")
    hub.add("org/other", newer)
    result = run("convert", "org/other", tmp_path / "out")
    assert f"; hf://{ID}@{first} goes on with that, --overwrite" in result.stderr
    result = run("convert", ID, tmp_path / "out", "--revision", first)
    assert (result.exit_code, "resuming" in result.stderr) == (0, True)
    assert without_source(every_file(tmp_path / "out")) == whole


def test_a_power_cut_costs_little(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_calls: list[Any]
) -> None:
    """Shard and journal are synced now and then, the shard first."""
    monkeypatch.setattr(output_folder, "SYNC_NBYTES", 500_000)
    hub.add(ID, source)
    convert(ID, tmp_path / "out", threads=1)
    partial, journal = "model-00001-of-00001.safetensors.partial", ".fp4moe-journal.jsonl"
    synced = [call[1] for call in disk_calls if call[0] == "sync"]
    at = [number for number, name in enumerate(synced) if name == partial]
    assert len(at) == 1 + 2_800_000 // 500_000
    assert all(synced[number + 1] == journal for number in at)


@pytest.mark.slow
def test_a_kill_costs_what_was_in_memory(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    code = (
        "from fp4moe_convert.storage import prefetch\n"
        "prefetch.REQUEST_NBYTES, prefetch.BATCH_NBYTES = 10_000, 50_000\n"
        "prefetch.SMALL_NBYTES = 0\n"  # as in `little_room`
        "from fp4moe_convert.__main__ import main_convert; main_convert()"
    )
    every_byte = sum(path.stat().st_size for path in source.iterdir())
    with running({ID: source}, rate=2e7) as hub:
        command = [sys.executable, "-c", code, ID, tmp_path / "out", "-q", "--connections", "2"]
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        for fraction in (0.3, 0.7):
            process = subprocess.Popen(command, env=environment)
            until(lambda limit=fraction * every_byte: hub.sent_nbytes > limit)
            process.kill()
            process.wait()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        assert without_source(every_file(tmp_path / "out")) == whole
        assert hub.sent_nbytes < 1.25 * every_byte


def test_a_server_that_sends_no_ranges_is_refused(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_store, "MAX_SKIPPED_NBYTES", 1000)
    hub.add(ID, source)
    hub.faults.append(Fault(SIGNED, float("inf"), ignores_range=True))
    with pytest.raises(CheckpointError, match="sends no ranges"):
        convert(ID, tmp_path / "out")


def test_a_storage_that_leads_elsewhere_is_followed(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)  # which does not go there
    hub.add(ID, source)
    hub.detour = True
    convert(ID, tmp_path / "out")
    fetched_once(hub, source)


@pytest.mark.parametrize("setting", ["HTTP_PROXY", "ALL_PROXY"])
def test_through_a_proxy(
    hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """A server that is asked for a whole URL, as proxies are, and has it: the Hub itself."""
    hub.add(ID, source)
    monkeypatch.setenv(setting, hub.endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    template = "http://hub.invalid/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    convert(ID, tmp_path / "out")
    fetched_once(hub, source)
    assert all(" http://" in each for each in hub.requests)


def test_a_file_that_is_not_as_listed_is_refused(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.add(ID, source)
    hub.faults.append(Fault(f"HEAD.*{RESOLVE}", 1, headers={"X-Linked-Size": "5"}))
    with pytest.raises(CheckpointError, match=r"has 5 bytes .* lists it with \d+ and "):
        convert(ID, tmp_path / "out")


@pytest.mark.parametrize("stated", ["ETag", "X-Linked-Etag"])
def test_a_small_file_that_is_not_as_listed_is_refused(
    hub: Hub, source: Path, tmp_path: Path, stated: str
) -> None:
    listed = hub.add(ID, source).files["tokenizer.json"].etag
    fault = Fault(f"{RESOLVE}.*tokenizer.json", 99, headers={stated: f'W/"{listed}"'})
    hub.faults.append(fault)
    convert(ID, tmp_path / "out")
    fault.headers = {stated: '"5"'}
    with pytest.raises(
        CheckpointError, match=r"^tokenizer.json: .* the ETag 5, but the Hub lists it"
    ):
        verify(tmp_path / "out", ID)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "120"}, 120),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"ratelimit": '"api";r=0;t=55', "retry-after": "1"}, 55),
        ({"ratelimit": '"api";r=3;t=55'}, None),
        ({}, None),
    ],
)
def test_how_long_a_server_wants_us_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_wait(headers) == seconds


def test_until_when_a_server_wants_us_to_wait() -> None:
    in_a_minute = formatdate(time.time() + 60, usegmt=True)
    assert asked_wait({"retry-after": in_a_minute}) == pytest.approx(60, abs=5)


# --- one range ------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited, without waiting."""
    waited: list[float] = []

    def wait(event: threading.Event, timeout: float) -> bool:
        waited.append(timeout)
        return event.is_set()

    monkeypatch.setattr(threading.Event, "wait", wait)
    return waited


def fetched(store: RemoteStore, offset: int, nbytes: int) -> None:
    into = np.zeros(nbytes, np.uint8)
    store.fetch("file", offset, into)
    assert np.array_equal(into, CONTENT[offset : offset + nbytes])


def test_waits_longer_after_each_failure_and_gives_up(waits: list[float]) -> None:
    class Down(Made):
        def answer(self, data: bytes) -> Iterator[bytes]:
            raise TryAgainError("is down")
            yield data

    with pytest.raises(UnreachableError, match=r"^made: file: is down, 8 times in a row"):
        fetched(Down(), 0, 10)
    assert waits == [1, 2, 4, 8, 16, 32, 60]


def test_what_comes_resets_the_backoff(waits: list[float]) -> None:
    class Cuts(Made):
        def answer(self, data: bytes) -> Iterator[bytes]:
            yield data[:1000]
            raise TryAgainError("is cut")

    store = Cuts()
    fetched(store, 500, 20_000)
    assert store.asked == [(start, 20_500) for start in range(500, 20_500, 1000)]
    assert set(waits) == {1}


def test_waits_as_long_as_it_is_told(waits: list[float]) -> None:
    class Busy(Made):
        def answer(self, data: bytes) -> Iterator[bytes]:
            if len(self.asked) < 4:
                raise TryAgainError("is busy", after=[7, 7000, 0][len(self.asked) - 1])
            yield data

    fetched(Busy(), 0, 10)
    assert waits == [7, remote.MAX_ASKED_WAIT_SECONDS, 0]


def test_a_trickle_is_given_up(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.0)
    monkeypatch.setattr(remote, "MIN_BYTES_PER_SECOND", 1e15)
    store = Made()
    fetched(store, 0, 3000)
    assert [start for start, _ in store.asked] == [0, 1000, 2000]
    assert set(waits) == {0}


def test_more_than_was_asked_for_is_not_taken() -> None:
    class Generous(Made):
        def answer(self, data: bytes) -> Iterator[bytes]:
            yield data + b"more"
            yield b"and more"
            raise AssertionError("it was asked on")

    fetched(Generous(), 10, 100)


def test_nobody_waits_any_more() -> None:
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(StoppedError):
        Made().fetch("file", 0, np.empty(10, np.uint8), stopped)


def test_the_start_of_a_file_is_fetched_once() -> None:
    store = Made()
    reader = store.open("file")
    for offset, nbytes in ((0, 8), (0, 3000), (10, 20), (0, 3000)):
        data = reader.read(block_buffer(nbytes), offset, nbytes)
        assert np.array_equal(data, CONTENT[offset : offset + nbytes])
    assert store.asked == [(0, 8), (8, 3000)]


def test_a_read_beyond_the_end_is_refused() -> None:
    with pytest.raises(CheckpointError, match="ends at byte 100000"):
        Made().open("file").read(block_buffer(10), CONTENT.size - 5, 10)


# --- ahead of what is read ------------------------------------------------------------------------


@given(
    cuts=st.sets(st.integers(1, CONTENT.size - 1), min_size=2, max_size=60),
    sizes=st.lists(st.integers(1, 6), min_size=60, max_size=60),
    request=st.sampled_from([1000, 7000, 10**6]),
    shuffled=st.randoms(),
)
def test_each_byte_is_fetched_once_and_handed_out(
    cuts: set[int], sizes: list[int], request: int, shuffled: random.Random
) -> None:
    ranges = [Range("file", start, stop - start) for start, stop in pairwise(sorted(cuts))]
    shuffled.shuffle(ranges)
    left = iter(ranges)
    moves = [own for size in sizes if (own := list(islice(left, size)))]
    store = Made()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetch, "REQUEST_NBYTES", request)
        patch.setattr(prefetch, "BATCH_NBYTES", 20_000)
        patch.setattr(prefetch, "SMALL_NBYTES", 0)
        with open_prefetching(store, moves, direct=True) as sources:
            for move in moves:
                for file, offset, nbytes in move:
                    data = sources.open(file).read(block_buffer(nbytes), offset, nbytes)
                    assert np.array_equal(data, CONTENT[offset : offset + nbytes])
    asked = sorted(store.asked)
    assert all(stop - start <= request for start, stop in asked)
    read = sorted((each.offset, each.offset + each.nbytes) for move in moves for each in move)
    assert covered(asked) == covered(read)


def covered(ranges: list[tuple[int, int]]) -> list[int]:
    """The bytes of disjoint ranges, as the ends of their runs."""
    ends: list[int] = []
    for start, stop in ranges:
        if ends and ends[-1] == start:
            ends.pop()
        else:
            assert not ends or ends[-1] < start
            ends.append(start)
        ends.append(stop)
    return ends


def test_what_touches_is_one_request() -> None:
    store = Made(connections=1)
    moves = [[Range("file", 300, 100), Range("file", 500, 4)], [Range("file", 400, 100)]]
    with open_prefetching(store, moves, direct=True) as sources:
        sources.open("file").read(block_buffer(100), 300, 100)
    assert store.asked == [(300, 504)]


def test_scalars_that_several_moves_gather_are_one_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second of them is too much for the batch."""
    monkeypatch.setattr(prefetch, "BATCH_NBYTES", 50_000)
    monkeypatch.setattr(prefetch, "SMALL_NBYTES", 1000)
    store = Made(connections=1)
    large = [Range("file", 40_000, 49_700)]
    even = [Range("file", start, 4) for start in range(0, 400, 8)]
    odd = [Range("file", start + 4, 4) for start in range(0, 400, 8)]
    with open_prefetching(store, [large, even, odd], direct=True) as sources:
        sources.open("file").read(block_buffer(4), 4, 4)
    assert store.asked == [(40_000, 89_700), (0, 400)]


def test_a_failure_reaches_the_reader_and_the_threads_end() -> None:
    class Broken(Made):
        def answer(self, data: bytes) -> Iterator[bytes]:
            raise CheckpointError("is broken")
            yield data

    with (
        open_prefetching(Broken(), [[Range("file", 0, 100)]], direct=True) as sources,
        pytest.raises(CheckpointError, match="is broken"),
    ):
        sources.open("file").read(block_buffer(100), 0, 100)
    assert our_threads() == []


def test_what_is_not_planned_is_read_all_the_same() -> None:
    store = Made()
    with open_prefetching(store, [[Range("file", 0, 100)]], direct=True) as sources:
        reader = sources.open("file")
        for offset, nbytes in ((50, 100), (0, 100), (0, 100)):  # not whole, planned, once more
            data = reader.read(block_buffer(nbytes), offset, nbytes)
            assert np.array_equal(data, CONTENT[offset : offset + nbytes])


def test_no_more_is_fetched_ahead_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "REQUEST_NBYTES", 1000)
    monkeypatch.setattr(prefetch, "BATCH_NBYTES", 2000)
    monkeypatch.setattr(prefetch, "SMALL_NBYTES", 0)
    store = Made(connections=6)
    moves = [[Range("file", start, 1000)] for start in range(0, CONTENT.size, 1000)]
    with open_prefetching(store, moves, direct=True) as sources:
        read = partial(sources.open("file").read, block_buffer(1000))
        for n, [move] in enumerate(moves):
            time.sleep(0.001)
            assert len(store.asked) <= n + 6 + 2 * 2
            read(move.offset, move.nbytes)


# --- failures while others wait -------------------------------------------------------------------

FAILURES = {
    "for now": (Fault(SIGNED, float("inf"), after=500_000, status=503), 75, "503"),
    "for good": (Fault(SIGNED, float("inf"), after=500_000, ignores_range=True), 1, "no ranges"),
}


@pytest.mark.parametrize("command", ["convert", "convert --part 1/2", "ci", "verify"])
@pytest.mark.parametrize("kind", FAILURES)
def test_a_command_of_many_threads_ends(
    kind: str,
    command: str,
    hub: Hub,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_store, "MAX_SKIPPED_NBYTES", 1000)
    hub.add(ID, source)
    name, *options = command.split()
    arguments = [ID, tmp_path / "out", *options, "--max-shard-size", 10**6]
    if name == "verify":
        convert(source, tmp_path / "out")
        arguments = [tmp_path / "out", "--source", ID]
    fault, code, what = FAILURES[kind]
    hub.faults.append(dataclasses.replace(fault))
    results: list[Result] = []

    def attempt() -> None:
        with little_room():
            results.append(run(name, *arguments, "--threads", 64, "--connections", 1, "-q"))

    assert failure_of(attempt) is None
    [result] = results
    assert result.exit_code == code
    assert what in result.stderr
    assert result.stderr.count("\n") == 1


MOVES = [[Range("file", start, 1000)] for start in range(0, CONTENT.size, 1000)]


def failure_of(function: Callable[[], object]) -> BaseException | None:
    """What a function raises, which must not wait for ever."""
    raised: list[BaseException] = []

    def attempt() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for ever"
    return raised[0] if raised else None


def read_by_many(store: Made, use: Callable[[int], None] = lambda _: None) -> None:
    """Read `MOVES` with more threads than there is room for. Once each thread has a move, ``use``
    is called before one is read."""
    threads = 40
    all_have_one = threading.Barrier(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetch, "REQUEST_NBYTES", 1000)
        patch.setattr(prefetch, "BATCH_NBYTES", 1000)
        patch.setattr(prefetch, "SMALL_NBYTES", 0)
        with open_prefetching(store, MOVES, direct=True) as sources:

            def make_worker() -> Callable[[int], None]:
                buffer = block_buffer(1000)

                def work(number: int) -> None:
                    if number < threads:
                        all_have_one.wait()
                    use(number)
                    for file, offset, nbytes in MOVES[number]:
                        sources.open(file).read(buffer, offset, nbytes)

                return work

            Crew(threads, on_stop=sources.stop).run(iter(range(len(MOVES))), make_worker)


@pytest.mark.parametrize("connections", [1, 16])
@pytest.mark.parametrize("first", [0, 20_000, CONTENT.size - 1000])
def test_a_failure_ends_those_that_wait_for_what_lies_beyond_the_room(
    first: int, connections: int
) -> None:
    class Broken(Made):
        def request(self, name: str, offset: int, into: Bytes) -> Iterator[int]:
            if offset >= first:
                raise CheckpointError("is broken")
            return super().request(name, offset, into)

    error = failure_of(lambda: read_by_many(Broken(connections)))
    assert (type(error), str(error)) == (CheckpointError, "is broken")
    assert our_threads() == []


def test_a_failure_to_find_memory_reaches_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*_: object) -> Bytes:
        raise MemoryError

    monkeypatch.setattr(prefetch.np, "empty", empty)
    assert isinstance(failure_of(lambda: read_by_many(Made())), MemoryError)


def test_workers_that_fail_with_bytes_unread_end_those_that_wait_for_their_room() -> None:
    def use(number: int) -> None:
        if number < 20:
            raise OSError("the disk is full")

    assert str(failure_of(lambda: read_by_many(Made(), use))) == "the disk is full"


def test_a_worker_that_fails_ends_those_that_wait_for_the_network() -> None:
    waiting = threading.Event()

    class Silent(Made):
        def answer(self, data: bytes) -> Iterator[bytes]:
            waiting.set()
            raise TryAgainError("is busy", after=600)
            yield data

    def use(number: int) -> None:
        if number == 5:
            waiting.wait()
            raise OSError("the disk is full")

    assert str(failure_of(lambda: read_by_many(Silent(), use))) == "the disk is full"


def test_a_failure_ends_a_read_that_was_not_planned() -> None:
    waiting = threading.Event()

    class Half(Made):
        def request(self, name: str, offset: int, into: Bytes) -> Iterator[int]:
            assert (name, into.size) == ("file", 100)
            if offset:
                waiting.set()
                raise TryAgainError("is busy", after=600)
            waiting.wait()
            raise CheckpointError("is broken")
            yield

    def read() -> None:
        with open_prefetching(Half(), [[Range("file", 0, 100)]], direct=True) as sources:
            sources.open("file").read(block_buffer(100), 500, 100)

    assert str(failure_of(read)) == "is broken"


def test_ctrl_c_ends_those_that_wait_for_the_network(source: Path, tmp_path: Path) -> None:
    """In Python: a command ends whatever waits."""
    code = (
        "import signal, sys; from fp4moe_convert import convert\n"
        "from fp4moe_convert.storage import prefetch\n"
        "prefetch.REQUEST_NBYTES, prefetch.BATCH_NBYTES = 5_000, 20_000\n"
        # A job in the background of a script ignores it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "convert(*sys.argv[1:])"
    )
    with running({ID: source}) as hub:
        fault = Fault(SIGNED, 1000, after=500_000, status=503, headers={"Retry-After": "600"})
        hub.faults.append(fault)
        process = subprocess.Popen(
            [sys.executable, "-c", code, ID, tmp_path / "out"],
            env={**os.environ, **hub.environment(tmp_path / "home")},
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: fault.times < 1000)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert said.endswith("KeyboardInterrupt\n")
