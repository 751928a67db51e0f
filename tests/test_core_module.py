"""The compiled module's own checks: it is called with arrays, and says what it wants."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gcfast import _core


def _arguments(**change):
    arguments = {
        "anchors": np.ones((2, 3), np.float32),
        "anchor_labels": np.zeros(2, np.int64),
        "anchor_rows": np.arange(2),
        "embeddings": np.ones((4, 3), np.float32),
        "labels": np.array([0, 0, 1, 1]),
        "by_label": np.arange(4),
        "sketch": None,
        "triplets": 2,
        "margin": 0.2,
        "seed": 0,
        "first": -1,
        "tries": 0,
        "threads": 1,
    }
    return {**arguments, **change}


def test_accepts_what_it_documents():
    positives, negatives, counts, hardest, exact = _core.sample_triplets(**_arguments())
    assert positives.tolist() == [[1, 1], [0, 0]]
    assert negatives.tolist() == [[2, 3], [2, 3]]
    assert counts.tolist() == [2, 2]
    assert hardest.tolist() == [[1, 2], [0, 2]]
    assert exact.tolist() == [True, True]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"anchors": np.ones((2, 3))}, TypeError, "incompatible function arguments"),
        ({"embeddings": np.ones((3, 4), np.float32).T}, TypeError, "incompatible"),
        ({"labels": [0, 0, 1, 1]}, TypeError, "incompatible"),
        ({"embeddings": np.ones((4, 2), np.float32)}, ValueError, "same width D"),
        ({"labels": np.zeros(3, np.int64)}, ValueError, r"`labels` must have shape \[N\]"),
        ({"anchor_rows": np.zeros(3, np.int64)}, ValueError, "`anchor_rows` must have shape"),
        ({"by_label": np.zeros(3, np.int64)}, ValueError, r"`by_label` must have shape \[N\]"),
        ({"by_label": np.full(4, 4)}, ValueError, "`by_label` must hold the numbers of all rows"),
        (
            {"sketch": np.zeros((4, 3), np.uint8)},
            ValueError,
            r"`sketch` must have shape \[N, D \+ 8\]",
        ),
        ({"tries": -1}, ValueError, "`tries` must be from 0"),
        ({"triplets": 0}, ValueError, "`triplets` must be at least 1"),
        ({"threads": 0}, ValueError, "`threads` must be at least 1"),
        ({"margin": float("nan")}, ValueError, "`margin` must be a number"),
    ],
    ids=lambda v: "" if not isinstance(v, dict) else "-".join(v),
)
def test_refuses_anything_else(change, error, words):
    with pytest.raises(error, match=words):
        _core.sample_triplets(**_arguments(**change))


def test_importing_the_package_is_lean():
    """No FAISS, no Triton, no CUDA context and no compiled code of ours before they are needed."""
    code = (
        "import sys, torch, gcfast; "
        "bad = {'faiss', 'triton', 'gcfast._core', 'gcfast.demo', 'PIL'} & set(sys.modules); "
        "assert not bad, bad; assert not torch.cuda.is_initialized()"
    )
    # Not at the root of the source, which would be imported in the place of the installed package.
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_the_source_tree_says_so():
    """Without its compiled module the package would fail where that is first needed."""
    root = Path(__file__).parents[1]
    # -S: without an editable installation, which would find the module.
    program = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(root)!r})"]
    program[-1] += "; import gcfast"
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    wanted = f"gcfast was imported from {root / 'gcfast'}, its source code, which has no compiled"
    assert wanted in run.stderr
