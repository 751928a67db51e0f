"""That a child of the tests ends, whatever becomes of it."""

import os
import signal

import pytest
from forks import was_killed


def test_a_child_ends_where_it_raises(capfd):
    with pytest.raises(AssertionError, match="the child raised: wait status 256"):
        was_killed(lambda: 1 // 0)
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert not was_killed(lambda: None)
    assert was_killed(lambda: os.kill(os.getpid(), signal.SIGKILL))
