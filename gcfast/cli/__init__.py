"""The command ``gcfast``.

Results go to standard output; progress, counts of what was left out and errors to standard error.
Exit status: 0 done, 2 an error told in one line, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from gcfast._log import written
from gcfast.cli.arguments import parser
from gcfast.errors import GcfastError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments, without the program's name; None takes those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: the arguments do not parse (status 2), or ask for help (0).
    """
    options = parser().parse_args(argv)
    try:
        # Imported only now, so that no command waits for, or fails with, the parts of another.
        module, _, function = options.run.partition(":")
        with written(options.log_level, options.log_json):
            getattr(import_module(f"gcfast.cli.{module}"), function)(options)
    except KeyboardInterrupt as stop:
        print(_said("; ".join(["gcfast: stopped", *_notes(stop)]), options.words), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (``gcfast info DB | head``) has closed it. Python would complain
        # once more while closing the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (GcfastError, ValueError, TypeError, OSError) as error:
        line = "; ".join([f"gcfast: {_one_line(error)}", *_notes(error)])
        print(_said(line, options.words), file=sys.stderr)
        return 2
    return 0


def _said(text: str, words: Mapping[str, str]) -> str:
    """Say what the library calls its arguments in the words of the command line."""
    text = text.replace("resume=True", "--resume").replace("overwrite=True", "--force")
    return re.sub(r"`(\w+)`", lambda name: f"`{words.get(name[1], name[1])}`", text)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return text
