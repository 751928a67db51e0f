"""Overlays and the HTML page."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from gcfast.images.html import Linked, Panel, ReportRow, write_report
from gcfast.images.overlay import colorize, overlay


def photo(height=12, width=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ramp(height=12, width=20):
    return np.tile(np.linspace(0, 1, width, dtype=np.float32), (height, 1))


def test_colours_have_the_ends_of_inferno_and_rising_lightness():
    colours = colorize(np.linspace(0, 1, 256)[None])[0].astype(float)
    np.testing.assert_array_equal(colours[0], [0, 0, 4])
    np.testing.assert_array_equal(colours[255], [252, 255, 164])
    luminance = colours @ [0.2126, 0.7152, 0.0722]
    assert (luminance[4:] > luminance[:-4]).all()  # over four steps, for the rounding to 8 bits


def test_cold_areas_keep_the_photograph_and_hot_ones_take_the_colour():
    image = photo()
    np.testing.assert_array_equal(overlay(image, np.zeros((12, 20), np.float32)), image)
    np.testing.assert_array_equal(overlay(image, ramp(), alpha=0.0), image)
    hot = overlay(image, np.ones((12, 20), np.float32), alpha=1.0)
    np.testing.assert_array_equal(hot, np.broadcast_to([252, 255, 164], hot.shape))


def test_overlay_by_hand():
    # Grey 100, heat 1, alpha 0.5: halfway between the photograph and the hottest colour.
    image = np.full((1, 1, 3), 100, np.uint8)
    got = overlay(image, np.ones((1, 1)), alpha=0.5)
    np.testing.assert_array_equal(got[0, 0], [176, 178, 132])


def test_a_dimmed_photograph_by_hand():
    # Luma 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2; half of the color, then 3/4 of the light.
    image = np.full((1, 1, 3), (200, 100, 50), np.uint8)
    cold = overlay(image, np.zeros((1, 1)), dim=0.5)
    np.testing.assert_array_equal(cold[0, 0], [122, 84, 65])
    hot = overlay(image, np.ones((1, 1)), dim=0.5, alpha=1.0)
    np.testing.assert_array_equal(hot[0, 0], [252, 255, 164])
    with pytest.raises(ValueError, match=r"`dim` must be in \[0, 1\], got -0.1"):
        overlay(photo(), ramp(), dim=-0.1)


def test_overlay_leaves_its_inputs_alone():
    image, heat = photo(), ramp()
    before = image.copy(), heat.copy()
    overlay(image, heat)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(heat, before[1])


@pytest.mark.parametrize(
    ("image", "heat", "error", "words"),
    [
        (photo().astype(np.float32), ramp(), TypeError, "`image` must be a uint8 array"),
        (
            photo()[..., 0],
            ramp(),
            ValueError,
            r"`image` must have shape \[H, W, 3\], got \[12, 20\]",
        ),
        (
            photo(),
            ramp().astype(int),
            TypeError,
            "`heat` must be a floating-point array, got int64",
        ),
        (photo(), ramp()[None], ValueError, r"`heat` must have shape \[H, W\], got \[1, 12, 20\]"),
        (photo(), ramp(4, 4), ValueError, r"height and width of `image`, \[12, 20\], got \[4, 4\]"),
        (photo(), ramp() * 2, ValueError, r"`heat` must be in \[0, 1\], got 0 to 2"),
        (photo(), ramp() * np.nan, ValueError, r"`heat` must be in \[0, 1\]"),
    ],
)
def test_overlay_refuses(image, heat, error, words):
    with pytest.raises(error, match=words):
        overlay(image, heat)


def test_overlay_refuses_alpha_out_of_range():
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], got 1.5"):
        overlay(photo(), ramp(), alpha=1.5)


class Outline(html.parser.HTMLParser):
    """The tags of a page, and whether they nest."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def find(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def page(tmp_path, **changes):
    settings = {"title": "Title", "lead": "Lead.", "rows": []} | changes
    path = tmp_path / "page.html"
    write_report(path, **settings)
    text = path.read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    return text, outline


def test_page_is_one_file_that_loads_nothing(tmp_path):
    rows = [ReportRow("one", [Panel(photo(), "a"), Panel(photo(seed=1), "b")])]
    text, outline = page(tmp_path, rows=rows)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert not outline.find("script")
    assert not outline.find("link")
    assert all(img["src"].startswith("data:image/") for img in outline.find("img"))
    assert not re.search(r"https?://|url\(|@import", text)


def test_images_come_back(tmp_path):
    mask = np.zeros((8, 6, 3), np.uint8)
    mask[2:5] = 255
    smooth = np.stack([*np.meshgrid(np.arange(200), np.arange(100)), np.full((100, 200), 90)], -1)
    smooth = smooth.astype(np.uint8)
    _, outline = page(tmp_path, rows=[ReportRow("r", [Panel(mask, "m"), Panel(smooth, "p")])])
    images = outline.find("img")
    kinds = [img["src"].partition(";")[0] for img in images]
    assert kinds == ["data:image/png", "data:image/jpeg"]  # exact for masks, small for photographs
    back = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(img["src"].partition(",")[2]))))
        for img in images
    ]
    np.testing.assert_array_equal(back[0], mask)
    assert np.abs(back[1].astype(int) - smooth).mean() < 2
    assert (images[1]["width"], images[1]["height"]) == ("200", "100")


def test_every_text_is_escaped(tmp_path):
    bad = '<b title="x">&'
    text, outline = page(
        tmp_path,
        title=bad,
        lead=bad,
        rows=[ReportRow(bad, [Panel(photo(), bad)], notes=bad)],
        table=[[bad, bad], [bad, bad]],
        table_caption=bad,
        facts=[(bad, bad)],
    )
    assert not outline.find("b")
    assert bad not in text
    assert outline.find("img")[0]["alt"] == f"{bad}: {bad}"


def test_alternative_text_and_headings(tmp_path):
    _, outline = page(tmp_path, rows=[ReportRow("wren.jpg", [Panel(photo(), "heat")])])
    assert outline.find("img")[0]["alt"] == "wren.jpg: heat"
    assert outline.find("html")[0]["lang"] == "en"
    assert len(outline.find("h1")) == 1


def test_table_aligns_numbers_and_marks_the_best(tmp_path):
    table = [
        ["method", "score", "ratio", "note"],
        ["a", "0.75", "1.20 ×", "control"],
        ["b", "0.8", "1,000 ×", ""],
        ["c", "0.80", "0.9 ± 0.1", "–"],
        ["d", "-", "−2e3", ""],
    ]
    text, outline = page(tmp_path, table=table, lower_is_better=["ratio"])
    assert re.findall(r"<strong>(.*?)</strong>", text) == ["0.8", "0.80", "−2e3"]
    assert [th.get("class") for th in outline.find("th")[:4]] == [None, "num", "num", None]
    assert len([td for td in outline.find("td") if "class" in td]) == 8


def test_a_column_of_equal_numbers_has_no_best(tmp_path):
    text, _ = page(tmp_path, table=[["m", "n"], ["a", "1"], ["b", "1"]])
    assert "<strong>" not in text


def test_the_table_above_or_below_the_pictures(tmp_path):
    rows = [ReportRow("r", [Panel(photo(), "p")])]
    for last in (False, True):
        text, outline = page(tmp_path, rows=rows, table=[["m", "n"], ["a", "1"]], table_last=last)
        assert len(outline.find("table")) == 1
        assert (text.index("<table") > text.index("<article")) is last


def test_further_pictures_are_opened_on_demand(tmp_path):
    rows = [
        ReportRow("a", [Panel(photo(), "p")], more=[Panel(photo(), "q")], more_label="others"),
        ReportRow("b", [Panel(photo(), "r")], comment="as it should be"),
    ]
    text, outline = page(tmp_path, rows=rows)
    assert len(outline.find("details")) == 1
    hidden = text[text.index("<details") : text.index("</details>")]
    assert "others" in hidden
    assert re.findall('alt="(.*?)"', hidden) == ["a: q"]
    assert text.count("as it should be") == text.count('class="comment"') == 1


@pytest.mark.parametrize(
    ("tiles", "columns", "last"),
    [(1, 1, 1), (3, 3, 1), (5, 5, 1), (6, 3, 1), (7, 4, 2), (8, 4, 1), (10, 5, 1), (11, 4, 2)],
)
def test_no_tile_strands(tmp_path, tiles, columns, last):
    _, outline = page(tmp_path, facts=[("a", "1")] * tiles)
    assert outline.find("dl")[0]["style"] == f"--n:{columns};--last:{last}"
    assert (tiles - 1 + last) % columns == 0


def test_rows_may_be_a_generator_and_are_held_one_at_a_time(tmp_path):
    alive = []

    def rows():
        for i in range(3):
            alive.append(i)
            yield ReportRow(str(i), [Panel(photo(seed=i), "p")])

    _, outline = page(tmp_path, rows=rows())
    assert len(outline.find("article")) == 3


def test_failing_rows_leave_the_old_page(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    bad = [ReportRow("r", [Panel(np.zeros((4, 4, 3)), "p")])]
    with pytest.raises(TypeError, match=r"`rows\[0\].panels\[0\].image` must be a uint8 array"):
        write_report(path, title="t", lead="l", rows=bad)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_refuses_a_ragged_table_and_unknown_columns(tmp_path):
    with pytest.raises(ValueError, match=r"rows as long as its header \(2 cells\), got 1 in row 2"):
        page(tmp_path, table=[["a", "b"], ["1", "2"], ["3"]])
    with pytest.raises(ValueError, match="`lower_is_better` must name columns of `table`"):
        page(tmp_path, table=[["a", "b"], ["1", "2"]], lower_is_better=["c"])


def linked_page(tmp_path, table, **options):
    panels = [Panel(photo(seed=i), name) for i, name in enumerate(("one", "heat", "two"))]
    linked = Linked((0, 2), ("one <b>", "two"), table, **options)
    rows = [ReportRow("plain", panels[:1]), ReportRow("a", panels, linked=linked)]
    write_report(tmp_path / "page.html", title="t", lead="l", rows=rows)
    return (tmp_path / "page.html").read_text()


def test_linked_pictures(tmp_path):
    table = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    page = linked_page(tmp_path, table, shares=((1.0, 0.5), (1.0, 1.0)))
    assert page.count("<script>") == 1
    assert "Point at a place of one &lt;b&gt; or of two" in page
    sides = re.findall(r'<figure data-side="(\d)"><span><img [^>]* alt="a: (\w+)">', page)
    assert sides == [("0", "one"), ("1", "two")]
    (text,) = re.findall(r'data-linked="([^"]*)"', page)
    found = json.loads(html.unescape(text))
    assert found["grids"] == [[2, 3], [4, 5]]
    assert found["shares"] == [[1.0, 0.5], [1.0, 1.0]]
    packed = np.frombuffer(base64.b64decode(found["table"]), np.int8).reshape(table.shape)
    assert np.abs(packed - table * 127 / np.abs(table).max()).max() <= 0.5 + 1e-4


def test_large_grids_are_linked_by_blocks(tmp_path):
    table = np.random.default_rng(0).uniform(size=(30, 14, 15, 2))
    (text,) = re.findall(r'data-linked="([^"]*)"', linked_page(tmp_path, table))
    found = json.loads(html.unescape(text))
    assert found["grids"] == [[10, 14], [8, 2]]
    assert found["shares"] == [[1.0, 1.0], [16 / 15, 1.0]]  # the last block is half a one
    packed = np.frombuffer(base64.b64decode(found["table"]), np.int8).reshape(10, 14, 8, 2)
    padded = np.pad(table, ((0, 0), (0, 0), (0, 1), (0, 0)))
    wanted = padded.reshape(10, 3, 14, 8, 2, 2).sum((1, 4))
    assert np.abs(packed - wanted * 127 / wanted.max()).max() <= 0.51


def test_tables_that_link_nothing_are_refused(tmp_path):
    for table in (np.zeros((2, 2, 4)), np.full((2, 2, 2, 2), np.nan), np.zeros((2, 0, 2, 2))):
        with pytest.raises(ValueError, match=r"`rows\[1\].linked.table` must be finite and have"):
            linked_page(tmp_path, table)
    page = linked_page(tmp_path, np.zeros((2, 2, 2, 2)))  # nothing in common links to nothing
    assert "AAAAAAAAAAAAAAAAAAAAAA==" in page
