"""Entry points; ``python -m fp4moe_convert`` is ``fp4moe``.

Only the child imports the command line: that takes a fifth of a second, and on a disk that does
not answer for ever.
"""

from __future__ import annotations

import sys

from .foreground import attend


def main() -> None:
    """Entry point ``fp4moe``."""

    def work() -> None:
        from .cli import app, run

        run(app)

    sys.exit(attend(work))


def main_convert() -> None:
    """Entry point ``fp4moe-convert``."""

    def work() -> None:
        from .cli import convert_app, run

        run(convert_app)

    sys.exit(attend(work))


if __name__ == "__main__":
    main()
