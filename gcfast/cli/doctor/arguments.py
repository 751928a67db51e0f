"""The arguments of ``gcfast doctor``."""

from __future__ import annotations

from typing import Any

from gcfast.cli.arguments import _command


def add_doctor(commands: Any) -> None:
    """Add the command to the parser's."""
    doctor = _command(
        commands,
        "doctor",
        "doctor.command:examine",
        "what is installed here, and whether it works: for a report, in less than a minute",
    )
    doctor.add_argument("--json", action="store_true", help="machine-readable")
