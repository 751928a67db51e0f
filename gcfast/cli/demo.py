"""The command ``gcfast demo``."""

from __future__ import annotations

import argparse

from gcfast.demo.run import run_demo


def show_demo(options: argparse.Namespace) -> None:
    """Run the demonstration and write its page."""
    run_demo(out_dir=options.out, seed=0, progress=True)
