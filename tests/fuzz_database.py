"""Damage database folders at random, and use them: every fault has to be an error in words.

    python tests/fuzz_database.py [--cases 2000] [--seed 0]

A case copies a sound folder, damages one or two of its files (text, JSON values, bytes, columns,
or what a file is: a link, a pipe, a folder), in half of the cases with the manifest's sizes and
checksums made to fit, and goes through what readers and writers do. It must end in a result or in
an exception that is meant for users, within a bound of time and memory. Each case depends on the
seed and its number alone; --case runs one, and shows its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from forks import forked
from networks import common, loader, pictures
from safetensors.torch import load, save

import gcfast
from gcfast.database import shards
from gcfast.database.manifest import BESIDE_SHARDS, MANIFEST, STATE

ROWS, CLASSES = 12, ("robin", "wren", "tit")
SETTINGS: dict[str, Any] = {"channels": 5, "triplets": 3}
# Of one case. What a sound one takes is two orders of magnitude less.
SECONDS, BYTES = 30, 1 << 30
MEANT = (gcfast.errors.GcfastError, OSError, ValueError, TypeError)
# An odd value for anything: of another type, out of range, or long.
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63 - 1, 2**63, 10**30, -(2**63), 0.5, 1e308, 1e-300,
    float("nan"), float("inf"), "", "x", "\0", "é" * 300, "../../etc/passwd", "/dev/zero", ".",
    "float64", [], {}, [None], [[]], {"a": 1}, [1e400], ["a", 1],
)  # fmt: skip
NUMBERS = (-1, 0, 1, 7, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
REALS = (float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-45, 0.0, -0.0)


# --- sound folders


def made(folder: Path) -> list[Path]:
    """Databases of every kind, and an unfinished build, in a folder."""
    with patch.object(shards, "SHARD_ROWS", 5):
        _make(folder)
    return sorted(folder.iterdir())


def _make(folder: Path) -> None:
    images, numbers = pictures(ROWS)
    names = [CLASSES[i] for i in numbers]
    model = common()
    gradients = gcfast.Explainer(model, "backbone", **SETTINGS)
    gradients.build(loader(images, names), out=folder / "names")
    half = gradients.build(loader(images, numbers), storage="float16")
    half.save(folder / "float16")
    half.compress(3).save(folder / "compressed")
    indexed = gradients.build(loader(images, names), out=folder / "indexed")
    indexed.build_index("Flat")
    cotangents = gcfast.Explainer(model, "backbone", method="elementwise")
    cotangents.build(loader(images, names), out=folder / "elementwise")
    proxy = gcfast.Explainer(model, "backbone", method="proxy")
    proxy.build(loader(images, names), out=folder / "proxy")

    def stops() -> Iterator[Any]:
        yield from loader(images, names, 4)[:2]
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        gradients.build(stops(), out=folder / "unfinished")


# --- damage


def damage(random_: random.Random, folder: Path) -> str:
    """Change a folder, and say how."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    done = []
    for _ in range(random_.choice((1, 1, 1, 2))):
        path = random_.choice(files)
        # Half of the cases in the files that say what the others are.
        if random_.random() < 0.5:
            path = folder / (STATE if (folder / STATE).exists() else MANIFEST)
        if not path.is_file() or path.is_symlink():
            continue
        ways: list[Callable[[random.Random, Path], str]] = [in_bytes]
        ways += [in_json] * 6 if path.suffix == ".json" else []
        ways += [in_columns] * 4 if path.suffix == ".safetensors" else []
        ways += [as_another_kind] if random_.random() < 0.2 else []
        done.append(f"{path.name}: {random_.choice(ways)(random_, path)}")
    if random_.random() < 0.5:
        done.append(resigned(folder))
    return "; ".join(done)


def in_bytes(random_: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    match random_.randrange(7):
        case 0:
            path.write_bytes(content[: random_.randrange(len(content) + 1)])
            return "cut off"
        case 1:
            path.write_bytes(content + random_.randbytes(random_.randrange(1, 100)))
            return "longer"
        case 2:
            deep = random_.choice((b"[", b'{"a":')) * 100_000
            path.write_bytes(deep)
            return "nested"
        case 3:
            path.write_bytes(
                random_.choice((b"", b"\0" * 100, b"null", b"[]", b"1", b'"x"', b"\xff"))
            )
            return "another content"
        case 4 if len(content) > 8:
            path.write_bytes(
                struct.pack("<Q", random_.choice((0, 2**20, 2**40, 2**64 - 1))) + content[8:]
            )
            return "another length of its header"
        case _:
            for _ in range(random_.randrange(1, 9)):
                if content:
                    content[random_.randrange(len(content))] = random_.randrange(256)
            path.write_bytes(content)
            return "other bytes"


def in_json(random_: random.Random, path: Path) -> str:
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return "no JSON any more"
    places = list(_places(tree))
    if not places:
        return "empty"
    holder, key, name = random_.choice(places)
    if random_.random() < 0.15:
        del holder[key]
        what = f"without {name}"
    else:
        holder[key] = random_.choice(ODD)
        what = f"{name} = {holder[key]!r:.40}"
    path.write_text(json.dumps(tree))
    return what


def _places(tree: Any, name: str = "") -> Iterator[tuple[Any, Any, str]]:
    items: Iterable[Any] = tree.items() if isinstance(tree, dict) else ()
    items = enumerate(tree) if isinstance(tree, list) else items
    for key, value in list(items):
        yield tree, key, f"{name}.{key}"
        if isinstance(value, (dict, list)):
            yield from _places(value, f"{name}.{key}")


def in_columns(random_: random.Random, path: Path) -> str:
    try:
        columns = load(path.read_bytes())
    except Exception:
        return "no safetensors any more"
    name = random_.choice(sorted(columns))
    column = columns[name].clone()
    match random_.randrange(5):
        case 0:
            del columns[name]
            what = f"without {name}"
        case 1:
            columns[name] = column[: len(column) // 2].contiguous()
            what = f"half of {name}"
        case 2:
            columns[name] = column.reshape(-1, 1).contiguous()
            what = f"another shape of {name}"
        case _:
            flat = column.reshape(-1)
            if flat.numel() == 0:
                return f"empty {name}"
            at = random_.randrange(len(flat))
            values = NUMBERS if not flat.is_floating_point() else REALS
            value = random_.choice(values)
            with contextlib.suppress(RuntimeError, OverflowError):  # of a small dtype
                flat[at] = value
            columns[name] = column
            what = f"{name}[{at}] = {value}"
    path.write_bytes(save(columns))
    return what


def as_another_kind(random_: random.Random, path: Path) -> str:
    path.unlink()
    match random_.randrange(6):
        case 0:
            return "missing"
        case 1:
            path.mkdir()
            return "a folder"
        case 2:
            os.mkfifo(path)
            return "a pipe"
        case 3:
            to = random_.choice(("/dev/zero", "/etc/passwd", "/dev/null", "/proc/self/mem"))
            path.symlink_to(to)
            return f"a link to {to}"
        case 4:
            path.symlink_to(path.name)
            return "a link to itself"
        case _:
            path.symlink_to("nowhere")
            return "a link to nothing"


def resigned(folder: Path) -> str:
    """Make the manifest's sizes and checksums fit, as one who means harm would."""
    path = folder / MANIFEST
    if not path.is_file():
        return "not signed"
    try:
        manifest = json.loads(path.read_bytes())
        entries = [*manifest["shards"], *(manifest[n] for n in BESIDE_SHARDS if n in manifest)]
        for entry in entries:
            file = folder / entry["file"]
            # FAISS reads an index without such checks, see SECURITY.md.
            if file.is_file() and not file.is_symlink() and file.suffix != ".faiss":
                content = file.read_bytes()
                entry["bytes"] = len(content)
                entry["sha256"] = hashlib.sha256(content).hexdigest()
        path.write_text(json.dumps(manifest))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return "not signed"
    return "signed"


# --- use


def used(folder: Path) -> None:
    """What readers and writers do with a folder; a step that is refused does not stop the next."""
    model = common()
    images, numbers = pictures(4)
    tasks: list[Callable[[], object]] = [
        lambda: _read(folder),
        lambda: _explained(model, folder, images),
        lambda: _appended(model, folder, images, numbers),
        lambda: _changed(folder),
        lambda: _resumed(model, folder),
    ]
    for task in tasks:
        try:
            task()
        except MEANT as error:
            if not str(error).strip():
                raise AssertionError(f"{type(error).__name__} without words") from error


def _read(folder: Path) -> None:
    database = gcfast.Database.open(folder, verify=True)
    repr(database), dict(database.report), list(database.ids), database.class_names
    for name in shards.FIELDS:
        getattr(database, name).sum()


def _explained(model: torch.nn.Module, folder: Path, images: torch.Tensor) -> None:
    database = gcfast.Database.open(folder)
    indices = ("exact", "stored") if "index" in database.manifest else ("exact",)
    for index in indices:
        explainer = gcfast.load(folder, model, index=index)
        why = explainer.explain_batch(images, details=True, center=0.0)
        assert why.maps.shape == (4, *images.shape[2:])
        assert ((why.maps >= 0) & (why.maps <= 1)).all()
        why.label_names  # noqa: B018
        explainer.explain_labelled(images, why.labels[:, 0])


def _appended(
    model: torch.nn.Module, folder: Path, images: torch.Tensor, numbers: torch.Tensor
) -> None:
    explainer = gcfast.load(folder, model)
    names = [CLASSES[i] for i in numbers]
    given = names if explainer.database and explainer.database.class_names else numbers
    explainer.append([(images, given, [f"new {i}" for i in range(4)])])


def _changed(folder: Path) -> None:
    database = gcfast.Database.open(folder)
    database.remove([next(iter(database.ids))])
    database.relabel({database.ids[0]: database.class_names[0] if database.class_names else 1})
    database.save(folder.parent / "saved", overwrite=True)


def _resumed(model: torch.nn.Module, folder: Path) -> None:
    images, numbers = pictures(ROWS)
    names = [CLASSES[i] for i in numbers]
    explainer = gcfast.Explainer(model, "backbone", **SETTINGS)
    explainer.build(loader(images, names, 4), out=folder, resume=True)


# --- the loop


def case(sound: list[Path], seed: int, number: int) -> tuple[str, Exception | None]:
    """One case: what was done to which folder, and what is wrong."""
    random_ = random.Random(f"{seed} {number}")
    origin = random_.choice(sound)
    with tempfile.TemporaryDirectory(dir=sound[0].parents[1]) as folder:
        copied = Path(folder) / "db"
        shutil.copytree(origin, copied)
        what = f"{origin.name}: {damage(random_, copied)}"
        try:
            used(copied)
        except Exception as error:
            return what, error
    return what, None


def _out_of_time(*_: object) -> None:
    raise AssertionError(f"more than {SECONDS} s")


def cases(sound: list[Path], seed: int, numbers: range, log: Path) -> None:
    """Cases in this process, each with a line in the log before it and one where it fails."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _out_of_time)
    # Beyond what the process has mapped already.
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
    with (
        log.open("a") as file,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        for number in numbers:
            file.write(json.dumps({"case": number}) + "\n")
            file.flush()
            signal.alarm(SECONDS)
            what, error = case(sound, seed, number)
            signal.alarm(0)
            if error is not None:
                frames = traceback.extract_tb(error.__traceback__)
                at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
                line = {"what": what, "error": f"{type(error).__name__}: {error}"[:300], "at": at}
                file.write(json.dumps({"failed": number, **line}) + "\n")


def failures(count: int, seed: int, folder: Path, *, batch: int = 250) -> list[dict[str, Any]]:
    """Run cases in children, and return what is wrong: a child that dies takes one case with it."""
    sound_folder = folder / "sound"
    sound_folder.mkdir()
    sound = made(sound_folder)
    log = folder / "log"
    start, found = 0, []
    while start < count:
        numbers = range(start, min(start + batch, count))
        log.unlink(missing_ok=True)
        child = forked(lambda numbers=numbers: cases(sound, seed, numbers, log))
        status = os.waitpid(child, 0)[1]
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        found += [line for line in lines if "failed" in line]
        start = numbers.stop
        if status != 0:
            last = max(line["case"] for line in lines if "case" in line)
            how = f"wait status {status}, signal {os.WTERMSIG(status)}"
            found.append({"failed": last, "what": "the process died", "error": how, "at": ""})
            start = last + 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone, and show what it raises")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.case is not None:
            (folder / "sound").mkdir()
            what, error = case(made(folder / "sound"), options.seed, options.case)
            print(what)
            if error is not None:
                raise error
            return 0
        found = failures(options.cases, options.seed, folder)
    kinds = Counter((f["error"][:90], f["at"]) for f in found)
    for (error, at), times in kinds.most_common():
        one = next(f for f in found if (f["error"][:90], f["at"]) == (error, at))
        print(f"{times} × {error} ({at}), as case {one['failed']}: {one['what']}")
    print(f"{options.cases:,} cases, {len(found)} wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
