"""Pages load nothing, and say which package they lack."""

import re
import sys
from pathlib import Path

import pytest

from corda_vlm.pages import address_of, page, require_extra


def test_a_page_loads_nothing_and_shows_html_as_text(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    (tmp_path / "own.j2").write_text('{% extends "frame.html.j2" %}{% block sections %}<img src="{{ picture }}">{{ text }}{% endblock %}')
    evil = '<script>alert("x")</script>'
    values = {"picture": address_of(b"abc", "png"), "text": evil}
    written = page("own.j2", tmp_path, evil, values, {evil: {evil: evil}})
    assert "<script" not in written
    assert written.count("&lt;script&gt;") == 6
    assert re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']?([^"'\s>]+)""", written) == ["data:image/png;base64,YWJj"]
    assert not re.search(r"url\(|@import|<link|<iframe", written)
    assert "default-src 'none'" in written


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} is not installed; run: pip install 'corda-vlm\[demo\]'"):
        require_extra()
