"""Text in pictures: which font draws a character, what no font has, and how lines are broken."""

import logging

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minigpt4_jax.visualization import fonts
from minigpt4_jax.visualization.drawing import truncate_text, wrap_text
from minigpt4_jax.visualization.fonts import load_font

CACHES = (
    fonts._font_files, fonts._find_font, fonts._characters, fonts._open, fonts._report_missing
)  # fmt: skip


@pytest.fixture
def dejavu_only(monkeypatch):
    """As without the optional fonts."""
    monkeypatch.setattr(fonts, "_PACKAGES", ("minigpt4_jax_fonts_that_do_not_exist",))
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


def picture_of(text, size=30):
    picture = Image.new("L", (400, 60), 255)
    load_font(size).draw(ImageDraw.Draw(picture), (5, 5), text, 0)
    return np.asarray(picture)


def names_of(text):
    return [file.name.split("[")[0] for file, _ in fonts._files_of(text)]


def test_each_character_is_drawn_in_the_first_font_that_has_it():
    assert set(names_of("café Ελλάδα Москва")) == {"DejaVuSans.ttf"}
    assert names_of("a猫") == ["DejaVuSans.ttf", "NotoSansCJK-VF.otf.ttc"]
    assert names_of("हि") == ["NotoSansDevanagari"] * 2  # with its mark
    assert names_of("👍🏽") == ["NotoEmoji"] * 2


@pytest.mark.parametrize("text", ["é", "猫", "고", "か", "हि", "👍"])
def test_no_character_is_drawn_as_another(text):
    """A font's box for what it lacks would be the same for all."""
    assert not np.array_equal(picture_of(text), picture_of("?"))
    assert not np.array_equal(picture_of(text), picture_of("\U0010fffd"))
    assert picture_of(text).min() < 60


def test_a_combining_accent_is_part_of_its_letter():
    assert np.array_equal(picture_of("cafe\u0301"), picture_of("café"))


def test_a_variant_that_no_font_has_is_drawn_as_its_letter():
    assert np.array_equal(picture_of("\U0001d4d5\U0001d4ea"), picture_of("Fa"))


def test_the_width_is_that_of_what_is_drawn():
    columns = np.flatnonzero((picture_of("a猫b") < 255).any(0))
    width = load_font(30).length("a猫b")
    assert columns[-1] - 5 == pytest.approx(width, abs=4)


def test_characters_that_no_font_has_are_said_once(dejavu_only, caplog):
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(picture_of("a 猫\u200d b"), picture_of("a ? b"))
        picture_of("猫 and a")
    (record,) = caplog.records
    assert record.getMessage() == (
        "pictures: no font has '猫'; drawn as \"?\"; for Chinese, Japanese, Korean and other scripts, "
        "and for emoji, pip install 'minigpt4_jax[fonts]'"
    )


def test_with_all_fonts_there_is_nothing_to_install(caplog):
    fonts._report_missing.cache_clear()
    with caplog.at_level(logging.WARNING):
        picture_of("猫 \ud800 \x00")
    assert [r.getMessage() for r in caplog.records] == [
        "pictures: no font has '\\ud800'; drawn as \"?\""
    ]


def test_lines_are_broken_between_words_and_between_chinese_characters():
    font = load_font(20)
    lines = wrap_text("a red cat on a sofa and averylongwordthatdoesnotfit", 120, font)
    assert lines[:3] == ["a red cat", "on a sofa", "and"]
    assert "".join(lines[3:]) == "averylongwordthatdoesnotfit"
    chinese = wrap_text("一只红色的猫坐在沙发上。旁边有一个枕头。", 100, font)
    assert "".join(chinese) == "一只红色的猫坐在沙发上。旁边有一个枕头。"
    assert not any(line[0] in "。" for line in chinese)
    assert all(font.length(line) <= 120 for line in [*lines, *chinese])
    assert wrap_text("", 100, font) == [""]


def test_what_does_not_fit_ends_in_an_ellipsis():
    font = load_font(20)
    text = "一只红色的猫 sits on a sofa and looks at us"
    for cut in (truncate_text(text, 150, font), wrap_text(text, 150, font, 2)[-1]):
        assert cut.endswith("…") and font.length(cut) <= 150
    assert truncate_text("short\n text", 150, font) == "short text"
