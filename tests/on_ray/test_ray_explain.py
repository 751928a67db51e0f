"""Pictures from every source, and maps to every format, against maps of one process."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import gcfast
from gcfast.errors import NoDatabaseError
from gcfast.images.folder import ImageFolder
from gcfast.images.loader import UnreadableImageError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("on_ray")]


@pytest.fixture(scope="module")
def database(pictures, tmp_path_factory):
    from ray_case import BATCH, PREPROCESSING, SETTINGS, model

    folder = tmp_path_factory.mktemp("database") / "db"
    loader = ImageFolder(pictures).loader(PREPROCESSING, batch_size=BATCH)
    explainer = gcfast.Explainer(model(), **SETTINGS)
    explainer.build(loader, preprocessing=PREPROCESSING.to_dict(), out=folder)
    return folder


def some(pictures):
    """Three readable pictures: paths, and what the network sees of them."""
    from ray_case import PREPROCESSING

    paths = sorted((pictures / "class0").glob("*.png"))[:3]
    return [str(p) for p in paths], np.stack([PREPROCESSING.view(p) for p in paths])


def from_parquet(paths, folder):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray

    contents = [Path(path).read_bytes() for path in paths]
    pq.write_table(pa.table({"image": contents, "id": paths}), folder / "pictures.parquet")
    return ray.data.read_parquet(str(folder / "pictures.parquet")), "image"


def from_web_dataset(paths, folder):
    import ray

    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for number, path in enumerate(paths):
            tar.add(path, f"{number}.png")
            label = tarfile.TarInfo(f"{number}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"0"))
    return ray.data.read_webdataset(str(folder / "pictures.tar"), decoder=False), "png"


def from_hugging_face(paths, _):
    import datasets
    import ray

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    made = datasets.Dataset.from_dict({"image": paths, "label": [0] * len(paths)}, features)
    return ray.data.from_huggingface(made), "image"


def from_images(paths, _):
    import ray

    return ray.data.read_images(paths, mode="RGB", override_num_blocks=1), "image"


# Of pandas, about what Ray makes of WebDataset.
@pytest.mark.filterwarnings("ignore:The inplace keyword:DeprecationWarning")
@pytest.mark.parametrize("source", [from_parquet, from_web_dataset, from_hugging_face, from_images])
def test_sources(pictures, tmp_path, source):
    from ray_case import PREPROCESSING

    from gcfast.ray import Prepare
    from gcfast.ray.cluster import in_order

    paths, views = some(pictures)
    dataset, column = source(paths, tmp_path)
    with in_order(dataset):
        batch = Prepare(PREPROCESSING, image=column, strict=True)(dataset.take_batch(10))
    assert np.array_equal(batch["view"], views)
    assert column not in batch


def test_explain_and_continue(pictures, database, tmp_path, monkeypatch):
    import pyarrow.parquet as pq
    from ray_case import BATCH, PREPROCESSING, files, model

    from gcfast.ray import explain

    def run(dataset, **settings):
        settings |= {"batch_size": BATCH, "part_rows": 16}
        return explain(dataset, model, database.name, tmp_path / "maps", **settings)

    monkeypatch.chdir(database.parent)  # where the cluster was not started
    whole = files(pictures)
    assert run(whole.limit(40)).new == 40
    with pytest.raises(FileExistsError, match="resume=True"):
        run(whole)
    for name, other in (("maps", {"maps": "float32"}), ("center", {"options": {"center": 1.0}})):
        with pytest.raises(ValueError, match=f"results of the same {name} to be continued"):
            run(whole, resume=True, **other)
    # Finished rows are left out; the store is made of all.
    done = run(whole, resume=True, format="zarr", k=1, requery=False, options={"center": 0.0})
    assert (done.pictures, done.new, done.unreadable) == (133, 93, 1)
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["maps.zarr", "rows.parquet"]

    import zarr

    rows = pq.read_table(tmp_path / "maps" / "rows.parquet").to_pydict()
    store = zarr.open_group(tmp_path / "maps" / "maps.zarr", mode="r")
    assert store["map"].shape == (133, 16, 16)
    explainer = gcfast.load(database, model())
    at = {name: number for number, name in enumerate(rows["id"])}
    for images, _, ids in ImageFolder(pictures).loader(PREPROCESSING, batch_size=BATCH):
        why = explainer.explain_batch(images, details=True)
        numbers = [at[name] for name in ids]
        maps = torch.tensor(store["map"][:][numbers])
        assert (maps.float() / 255 - why.maps).abs().max() <= 0.5 / 255 + 1e-6
        assert store["neighbor_row"][:][numbers].tolist() == why.neighbors[:, 0].tolist()
        near = [rows["neighbor"][n] for n in numbers]
        assert all(a == b for a, b in zip(near, ids, strict=True) if b != "alone/0.png")
        assert [rows["label"][n] for n in numbers] == [row[0] for row in why.label_names]
    bad = at["class1/05.png"]
    assert rows["error"][bad].startswith("UnidentifiedImageError: ")
    assert (rows["neighbor"][bad], store["neighbor_row"][bad]) == ("", -1)
    assert not store["map"][bad].any()
    with pytest.raises(FileExistsError, match=r"has maps\.zarr"):
        run(whole, resume=True)


@pytest.mark.parametrize("ids", [list("abcdabcd"), list("abcdefga"), [*"abcdefg", None]], ids=str)
def test_ids_that_come_twice(pictures, database, tmp_path, ids):
    """Batches of the same ids would have one file for both."""
    import ray
    from ray_case import model

    from gcfast.ray import explain

    path = some(pictures)[0][0]
    dataset = ray.data.from_items([{"image": path, "id": name} for name in ids])
    got = len(set(ids) - {None})
    with pytest.raises(ValueError, match=f"'id' must have another .*, got {got} values in 8 rows"):
        explain(dataset, model, database, tmp_path / "maps", batch_size=4, part_rows=4)
    assert not list((tmp_path / "maps").iterdir())
    with pytest.raises(NoDatabaseError, match="there is no database at"):
        explain(dataset, model, tmp_path / "none", tmp_path / "maps")


def test_no_rows(database, tmp_path):
    import pyarrow as pa
    import ray
    from ray_case import model

    from gcfast.ray import explain

    columns = pa.table({name: pa.array([], pa.string()) for name in ("image", "id")})
    for dataset in (ray.data.from_items([]), ray.data.from_arrow(columns)):
        with pytest.raises(ValueError, match="`dataset` must have rows, got none"):
            explain(dataset, model, database, tmp_path / "maps")
        assert not list(tmp_path.rglob("*.*"))


def test_parquet_holds_tensors(pictures, database, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    from ray_case import files, model

    from gcfast.ray import explain

    settings = {"maps": "float32", "options": {"size": 9, "relu": False, "center": 3.0}}
    explain(files(pictures).limit(20), model(), database, tmp_path / "maps", **settings)
    (part,) = (tmp_path / "maps").glob("part-*.parquet")
    kind = pq.read_schema(part).field("map").type
    assert kind == pa.fixed_shape_tensor(pa.float32(), (9, 9))
    batch = ray.data.read_parquet(str(part)).take_batch(20)
    assert batch["map"].shape == (20, 9, 9)
    assert batch["map"].min() < 0


def test_actors_in_this_process(pictures, database):
    from ray_case import PREPROCESSING, model

    from gcfast.ray import Embed, Explain

    paths, views = some(pictures)
    batch = {"image": np.array([*paths, "nowhere.png"], dtype=object), "id": np.arange(4)}
    images = PREPROCESSING.normalize(torch.tensor(views))
    wanted = gcfast.load(database, model()).explain_batch(images, details=True)
    embedded = Embed(model, "backbone", preprocessing=PREPROCESSING)(dict(batch))
    assert np.array_equal(embedded["embedding"][:3], wanted.embeddings.numpy())
    assert np.isnan(embedded["embedding"][3]).all()
    assert embedded["error"][3].startswith("FileNotFoundError")
    assert embedded["id"].tolist() == [0, 1, 2, 3]
    # A function in place of the preprocessing.
    explained = Explain(model(), database, preprocessing=lambda _: images, maps="float32")(
        {"image": np.array(paths, dtype=object)}
    )
    assert np.array_equal(explained["map"], wanted.maps.numpy())
    none = Explain(model(), database)({"image": np.array(["a", "b"], dtype=object)})
    assert none["map"].shape == (2, 16, 16)
    assert none["label"].tolist() == ["", ""]
    with pytest.raises(UnreadableImageError, match=r"nowhere\.png"):
        Embed(model, preprocessing=PREPROCESSING, strict=True)(dict(batch))
    with pytest.raises(ValueError, match=r"`image` must be a column .* got 'picture'"):
        Explain(model(), database, image="picture")(batch)
    with pytest.raises(ValueError, match="`maps` must be 'float32' or 'float16'"):
        Explain(model(), database, options={"normalize": None})
    with pytest.raises(ValueError, match="`maps` must be"):
        Explain(model(), database, maps="int8")


def test_a_single_cpu(pictures, database, tmp_path):
    """Actors that take every CPU would leave none to what reads, and it would never end."""
    program = [sys.executable, "-P", __file__, pictures, database, tmp_path / "maps"]
    subprocess.run(list(map(str, program)), check=True, timeout=300)
    assert len(list((tmp_path / "maps").glob("part-*.parquet"))) == 1


if __name__ == "__main__":
    import tempfile

    from ray_case import cluster, files, model

    from gcfast.ray import explain

    root, db, out = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, cluster(folder, cpus=1):
        explain(files(root), model, db, out)
