"""There and back: what a conversion made, restored, and converted once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp4moe_convert import RunReport, convert, restore

from .folders import MANIFEST, every_file


def there_and_back(source: Path, folder: Path, **options: Any) -> RunReport:
    """Restore ``folder/converted``, which was made from ``source`` with these options, and convert
    the result again: the source's files come back, each byte of them, and then the same checksums.

    Returns:
        What restore reports.
    """
    report = restore(folder / "converted", folder / "restored", verify=True)
    assert every_file(folder / "restored") == every_file(source)
    convert(folder / "restored", folder / "again", **options)
    first = json.loads((folder / "converted" / MANIFEST).read_text())
    second = json.loads((folder / "again" / MANIFEST).read_text())
    for key in ("files", "shards", "plan", "row_order"):
        assert first[key] == second[key]
    assert first["source"]["files"] == second["source"]["files"]
    return report
