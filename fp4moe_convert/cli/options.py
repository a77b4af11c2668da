"""What commands take: arguments and options that several of them have, and how they are parsed."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from ..plan import Part

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes from "5GB", "500 MiB" or "1000000"; units of a thousand unless they say "i"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not 1 <= (nbytes := float(match[1]) * unit) < 2**63:
        raise typer.BadParameter(f"{text!r} is not a size such as 5GB or 500MiB")
    return round(nbytes)


def parse_part(text: str) -> Part:
    """ "2/4" is part 2 of 4."""
    from ..plan import Part

    number, _, count = text.partition("/")
    try:
        return Part(int(number), int(count))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a part such as 2/4") from None


def not_empty(text: str) -> str:
    """An unset variable of a script must not mean the current folder."""
    if not text:
        raise typer.BadParameter("is empty; is a variable not set?")
    return text


def parse_path(text: str) -> Path:
    return Path(not_empty(text))


class TakesBareRay(TyperCommand):
    """A command whose --ray may stand alone, for --ray auto. Typer has no such options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        before_dashes = args.index("--") if "--" in args else len(args)
        if "--ray" in args[:before_dashes]:
            at = args.index("--ray")
            following = args[at + 1] if at + 1 < before_dashes else "--"
            if following.startswith("-") or self._is_argument(ctx, args, following):
                args[at] = "--ray=auto"
        return super().parse_args(ctx, args)

    def _is_argument(self, ctx: Any, args: list[str], word: str) -> bool:
        """Whether a word after --ray is MODEL or OUT_DIR: the command would lack one without it,
        and it does not look like an address."""
        if re.fullmatch(r"auto|local|(ray://)?[^/]+:\d+", word):
            return False
        values, _, _ = self.make_parser(ctx).parse_args([*args])
        return not isinstance(values.get("out_dir"), str)


argument = functools.partial(typer.Argument, show_default=False, parser=not_empty)
path_argument = functools.partial(typer.Argument, show_default=False, parser=parse_path)
Model = Annotated[
    str,
    argument(
        metavar="MODEL",
        help="A model with NVFP4 experts: a folder, OWNER/NAME on the Hub, or a URL for fsspec.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a model on the Hub.", show_default=False),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        parser=parse_path,
        metavar="PATH",
        help="The Hub's cache, where it is not in its usual place. It is read, never written.",
        show_default=False,
    ),
]
Connections = Annotated[
    int, typer.Option(min=1, max=256, help="Requests under way, where MODEL is on the network.")
]
OutDir = Annotated[
    Path,
    path_argument(
        metavar="OUT_DIR", help="The converted checkpoint: a new or empty folder, or one to resume."
    ),
]
MaxShardSize = Annotated[
    int, typer.Option(parser=parse_size, metavar="SIZE", help="Upper bound of an output file.")
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Start afresh: delete what earlier conversions left in OUT_DIR."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DirectIo = Annotated[
    bool,
    typer.Option(
        "--direct-io/--no-direct-io",
        help="Read and write past the page cache where the file system allows.",
    ),
]
Threads = Annotated[
    int, typer.Option(min=1, max=256, help="Workers; each takes about 17 MB of memory.")
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME",
        show_default=False,
        help="Upload the result to a repository on the Hub, as fp4moe push does.",
    ),
]
Private = Annotated[
    bool,
    typer.Option("--private", help="Make the repository private. One that is there must be."),
]
