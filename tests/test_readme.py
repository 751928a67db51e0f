"""The README's Python example is run as it stands, and the front page leads to every page."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_example_runs_twice_in_one_folder(tmp_path, monkeypatch, capsys):
    """The second time over the database that the first has written."""
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("torch.Size([4, 128, 128])") == 2


def test_the_front_page_links_every_guide_and_reference():
    linked = re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "docs" / "index.md").read_text())
    pages = {f"{p.parent.name}/{p.name}" for p in (ROOT / "docs").glob("*/*.md")}
    assert pages <= set(linked)
