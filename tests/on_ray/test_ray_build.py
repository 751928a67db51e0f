"""Builds on a cluster, against builds on one machine."""

import logging
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

import gcfast
from gcfast.database import shards
from gcfast.images.folder import ImageFolder
from gcfast.images.loader import UnreadableImageError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("on_ray")]


def serial(pictures, out, head="linear", *, storage="float32", **settings):
    from ray_case import BATCH, PREPROCESSING, SETTINGS, model

    loader = ImageFolder(pictures).loader(PREPROCESSING, batch_size=BATCH)
    explainer = gcfast.Explainer(model(head), **(SETTINGS | settings))
    kept = PREPROCESSING.to_dict()
    return explainer.build(loader, preprocessing=kept, out=out, storage=storage)


def on_cluster(dataset, out, head="linear", **settings):
    from ray_case import BATCH, PREPROCESSING, SETTINGS, model

    from gcfast.ray import build, pool

    options = {"preprocessing": PREPROCESSING, "batch_size": BATCH, "part_rows": 16}
    options |= {"actors": pool(2, cpus=0.5)} | SETTINGS | settings
    return build(dataset, model(head), out, **options)


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        ("linear", {"method": "gradcam++", "storage": "float16"}),
        ("gem", {}),  # a second pass over the pictures
        ("gem", {"method": "elementwise", "channels": 50}),
        ("linear", {"method": "proxy", "triplets": 50, "channels": 50}),
    ],
)
def test_as_on_one_machine(pictures, tmp_path, monkeypatch, caplog, head, settings):
    from ray_case import files, same

    # Rows are left out, so that shards do not begin where units of work do.
    monkeypatch.setattr(shards, "SHARD_ROWS", 10)
    monkeypatch.setattr("gcfast.ray.distributed.UNIT_ROWS", 64)
    serial(pictures, tmp_path / "serial", head, **settings)
    caplog.set_level(logging.INFO, "gcfast.build")
    with pytest.warns(UserWarning, match=r"unreadable pictures, left out: 1 \(class1/05.png: Un"):
        database = on_cluster(files(pictures), tmp_path / "ray", head, **settings)
    assert same(tmp_path / "serial", tmp_path / "ray")
    begins, ended = [record.facts for record in caplog.records if record.name == "gcfast.build"]
    assert (begins["event"], begins["on"], ended["event"]) == ("build begins", "ray", "build ended")
    assert ended["rows"] == len(database)
    assert len(database.shards) == 14
    assert sorted(os.listdir(tmp_path)) == ["ray", "serial"]


def test_a_dataset_in_another_order(pictures, tmp_path):
    """Rows are in the order of ids; batches are others, so that bits may be."""
    from ray_case import files

    wanted = serial(pictures, tmp_path / "serial", "gem")
    backwards = files(pictures, backwards=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        database = on_cluster(backwards, tmp_path / "ray", "gem")
    assert list(database.ids) == list(wanted.ids)
    assert database.channels.tolist() == wanted.channels.tolist()
    assert (database.weights - wanted.weights).abs().max() < 1e-6 * wanted.weights.abs().max()


def test_killed_and_resumed(pictures, tmp_path, monkeypatch, caplog):
    """A driver that is killed with SIGKILL: the next run embeds what is missing, and no more."""
    import pyarrow.parquet as pq
    from ray_case import files, same

    from gcfast.ray.parts import Unfinished, listed

    def rows(folder):
        return sum(pq.ParquetFile(file).metadata.num_rows for file in listed(folder))

    serial(pictures, tmp_path / "serial")
    program = [sys.executable, "-P", __file__, str(pictures), str(tmp_path / "ray")]
    process = subprocess.Popen(program)
    parts = tmp_path / "ray.parts" / "embeddings"
    deadline = time.monotonic() + 300
    while not (parts.exists() and len(list(parts.glob("part-*.parquet"))) >= 2):
        assert process.poll() is None, "it was to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Its actors may write a little longer: what is done is what the next run finds.
    done = []
    find = Unfinished.__init__
    monkeypatch.setattr(
        Unfinished,
        "__init__",
        lambda self, folder, key: done.append(rows(folder)) or find(self, folder, key),
    )
    with pytest.raises(FileExistsError, match="resume=True"):
        on_cluster(files(pictures), tmp_path / "ray")
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "gcfast.ray"):
        warnings.simplefilter("ignore")
        on_cluster(files(pictures), tmp_path / "ray", resume=True)
    assert same(tmp_path / "serial", tmp_path / "ray")
    (stage,) = [r for r in caplog.records if r.name == "gcfast.ray" and r.args[0] == "embedding"]
    assert 0 < done[0] < 133
    assert stage.args[1] == 133 - done[0]


@pytest.mark.filterwarnings("ignore:unreadable pictures")
def test_an_order_with_ties(pictures, tmp_path):
    from ray_case import files

    with pytest.raises(ValueError, match=r"`order` must be .* got 5 values of 'label' in 132 rows"):
        on_cluster(files(pictures), tmp_path / "ordered", order="label")


def test_wrong_calls(pictures, tmp_path):
    import ray
    from ray_case import files

    with pytest.raises(ValueError, match=r"`label` must be a column .* has 'image'"):
        on_cluster(files(pictures), tmp_path / "ray", label="class")
    with pytest.raises(ValueError, match="`id` must be another column than `image`"):
        on_cluster(files(pictures), tmp_path / "ray", id="image")
    with pytest.raises(TypeError, match=r"`dataset` must be a ray.data.Dataset, got list"):
        on_cluster([], tmp_path / "ray")
    with pytest.raises(TypeError, match="`preprocessing` must be a gcfast"):
        on_cluster(files(pictures), tmp_path / "ray", preprocessing=None)
    rows = files(pictures).take_all()
    with pytest.raises(UnreadableImageError, match=r"cannot read .*05\.png") as held:
        on_cluster(files(pictures), tmp_path / "ray", strict=True)
    # The error is held, and takes no CPUs from the next run.
    assert held.value.__context__ is None
    rows = [row | {"id": row["id"].replace("class3", "class2")} for row in rows]
    with pytest.raises(ValueError, match=r"'id' must have another value .*, got 100 values in 133"):
        on_cluster(ray.data.from_items(rows), tmp_path / "ray")
    assert not os.listdir(tmp_path)
    (tmp_path / "ray.parts").mkdir()
    with pytest.raises(FileExistsError, match=r"must have a build\.json .*ray\.parts"):
        on_cluster(files(pictures), tmp_path / "ray", resume=True)


if __name__ == "__main__":
    import tempfile

    from ray_case import cluster, files

    def slowly(row):
        time.sleep(0.1)  # leaves time to kill it
        return row

    with tempfile.TemporaryDirectory(prefix="ray-") as folder, cluster(folder):
        on_cluster(files(sys.argv[1]).map(slowly), sys.argv[2])
