"""Pages of --report: whole HTML, with every picture inside, and tables that know their numbers."""

from html.parser import HTMLParser

from duquantpp_jax.lab.webpage import image, page, sortable

LINES = [
    [("row", None, "a<b"), ("KL", 0.5, "0.5000"), ("PPL", None, "")],
    [("row", None, "c"), ("KL", 0.25, "0.2500"), ("PPL", 3.0, "3.000")],
]


class Read(HTMLParser):
    """What a browser would find: texts by element, sources of pictures, and that each is closed."""

    EMPTY = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.sources, self.values = [], {}, [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        assert not {"href", "onclick"} & set(found)
        self.sources += [found["src"]] if "src" in found else []
        self.values += [found["data-value"]] if "data-value" in found else []
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def test_a_page_is_whole_html_that_needs_nothing_else():
    text = page(
        "n<m", "about & more", [sortable(LINES, [True, False]), image(b"PNG", "p")], {"o": 1}
    )
    found = Read(text)
    assert found.texts["title"] == found.texts["h1"] == ["n<m"]
    assert found.texts["td"] == ["a<b", "0.5000", "c", "0.2500", "3.000"]
    assert found.texts["th"] == ["row", "KL", "PPL"]
    assert found.values == ["0.5", "0.25", "3.0"]
    assert found.sources == ["data:image/png;base64,UE5H"]
    assert "http" not in text
    assert text.count("<th class=text>") == 1
    assert text.count("class=baseline>") == 1
