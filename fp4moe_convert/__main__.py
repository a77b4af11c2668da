"""Entry points; ``python -m fp4moe_convert`` is ``fp4moe``."""

from __future__ import annotations

from .cli.process import run


def main() -> None:
    """Entry point ``fp4moe``."""
    run("app")


def main_convert() -> None:
    """Entry point ``fp4moe-convert``."""
    run("convert_app")


if __name__ == "__main__":
    main()
