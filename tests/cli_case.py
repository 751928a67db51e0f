"""What the tests of the command line share: pictures, a network, a database, ways to run it."""

import os

from PIL import Image, ImageDraw

from gcfast.cli import main

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(16, 6)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

def build(seed=0):
    torch.manual_seed(seed)
    return Net()

def other():
    return build(1)

def tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 12, 8, 8)
            self.block = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
            self.head = nn.Linear(12, 6)

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([x.new_zeros(len(x), 1, 12), x], 1)
            return self.head(self.block(x).amax(1))

    torch.manual_seed(0)
    return Tokens()

def keyed():
    class Keyed(Net):
        def forward(self, x):
            return {"mean": x.mean(), "vector": super().forward(x)}
    torch.manual_seed(0)
    return Keyed()
"""

SETTINGS = ("--model", "cli_net:build", "--workers", "0")
VIEW = ("--size", "32", "--channels", "5")


def picture(kind, number):
    """Red discs, green squares, blue stripes, at places that differ."""
    image = Image.new("RGB", (48, 40), (90, 90, 90))
    draw = ImageDraw.Draw(image)
    x = 4 + 3 * number
    if kind == "red":
        draw.ellipse((x, 6, x + 18, 24), (230, 20, 20))
    elif kind == "green":
        draw.rectangle((x, 10, x + 15, 25), (20, 220, 30))
    else:
        for y in range(2, 40, 6):
            draw.line((0, y, 48, y + number), (30, 40, 230), 2)
    return image


def prepare(root):
    """A folder with a network's module, pictures in every mode and a database of them, `db`."""
    (root / "cli_net.py").write_text(NET)
    for kind in ("red", "green", "blue"):
        folder = root / "pictures" / kind
        folder.mkdir(parents=True)
        for i, mode in enumerate(("RGB", "RGBA", "P", "RGB", "L", "CMYK")):
            image = picture(kind, i).convert(mode)
            image.save(folder / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    (root / "pictures" / "red" / "broken.png").write_bytes(b"no picture")
    before = os.getcwd()
    os.chdir(root)
    try:
        assert main(["build", "--images", "pictures", "--out", "db", *SETTINGS, *VIEW]) == 0
    finally:
        os.chdir(before)
    return root


def run(capsys, *arguments):
    capsys.readouterr()
    status = main([os.fspath(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys, *arguments):
    """The one line that a failing command prints."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    lines = err.splitlines()
    assert lines[-1].startswith("gcfast: ")
    assert "Traceback" not in err
    return lines[-1]
