"""Children of the test process that never go on as pytest."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import pytest
import torch

# Of children that need a backward pass. Where there is a GPU, autograd has threads for it from its
# first use on, which a child lacks.
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a fork that needs autograd")


def forked(run: Callable[[], object]) -> int:
    """The id of a child that calls a function and ends: with status 1 where it raises."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def was_killed(run: Callable[[], object]) -> bool:
    """Whether a signal ended a child that calls a function, which otherwise has to return."""
    status = os.waitpid(forked(run), 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, f"the child raised: wait status {status}"
    return os.WIFSIGNALED(status)
