"""Entry points; ``python -m fp4moe_convert`` is ``fp4moe``.

The commands are imported once Ctrl-C can be handled: importing typer takes a tenth of a second.
"""

from __future__ import annotations

from .cli.process import run


def main() -> None:
    """Entry point ``fp4moe``."""

    def command() -> None:
        from .cli.commands import app

        app()

    run(command)


def main_convert() -> None:
    """Entry point ``fp4moe-convert``."""

    def command() -> None:
        from .cli.commands import convert_app

        convert_app()

    run(command)


if __name__ == "__main__":
    main()
