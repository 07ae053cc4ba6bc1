"""Colours, described figures, the video player: what a reader's eyes rely on."""

import base64
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from fmri_book import figures


def decode(png, columns, shape, limit, levels=63):
    "Frames back from the player's picture, independently of how it was packed."
    picture = np.asarray(Image.open(io.BytesIO(png))).astype(float)
    _, height, width = shape
    cells = [
        picture[(i // columns) * height :, (i % columns) * width :][:height, :width] for i in range(shape[0])
    ]
    grey = np.stack(cells)
    return np.where(grey == 0, np.nan, (grey - 1) / (levels - 1) * 2 * limit - limit)


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_frames_survive_the_picture(frames, height, width, seed):
    rng = np.random.default_rng(seed)
    video = np.where(
        rng.random((frames, height, width)) < 0.2, np.nan, rng.uniform(-1, 1, (frames, height, width))
    )
    png, columns = figures._sprite(video, -1, 1)
    back = decode(png, columns, video.shape, 1)
    assert np.array_equal(np.isnan(back), np.isnan(video))
    assert np.nanmax(np.abs(back - video), initial=0) <= 1 / 62 + 1e-9  # half a grey level


def test_wide_videos_wrap_into_rows():
    video = np.random.default_rng(0).uniform(-1, 1, (7, 3, 2000))
    png, columns = figures._sprite(video, -1, 1)
    assert columns == 2 and Image.open(io.BytesIO(png)).size == (4000, 12)
    assert np.abs(decode(png, columns, video.shape, 1) - video).max() <= 1 / 62 + 1e-9


def test_oklab_against_known_colours():
    # the OKLab coordinates of sRGB's primaries, as published by Ottosson (rounded there to three digits)
    known = {
        (0.628, 0.225, 0.126): (1, 0, 0),
        (0.866, -0.234, 0.179): (0, 1, 0),
        (0.452, -0.032, -0.312): (0, 0, 1),
    }
    for lab, rgb in known.items():
        assert np.allclose(figures.oklab_to_rgb(np.array(lab)), rgb, atol=0.03)


def test_diverging_map_is_neutral_in_the_middle_and_darkens_both_ways():
    colours = figures.diverging_colours(257)
    middle = colours[128]
    assert np.ptp(middle) < 0.02 and middle.min() > 0.9
    assert colours[0, 2] > colours[0, 0] and colours[-1, 0] > colours[-1, 2]  # blue below, red above
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness[:129]) > 0).all() and (np.diff(lightness[128:]) < 0).all()


def test_a_figure_needs_a_description():
    import matplotlib.pyplot as plt

    fig, _ = plt.subplots()
    with pytest.raises(ValueError, match="expected a sentence .* found nothing"):
        figures.show(fig, alt=" ")
    with pytest.raises(ValueError, match="expected a sentence"):
        figures.player(np.zeros((1, 2, 2)), ["a"], "v", alt="")
    html = figures.show(fig, alt='it says "5 < 6"').data
    assert 'alt="it says &quot;5 &lt; 6&quot;"' in html and not plt.fignum_exists(fig.number)
    png = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])
    assert Image.open(io.BytesIO(png)).format == "PNG"


def test_player_says_what_it_expected():
    with pytest.raises(ValueError, match=r"found shape \(2, 3\) and 2 labels"):
        figures.player(np.zeros((2, 3)), ["a", "b"], "v", alt="x")
    with pytest.raises(ValueError, match="1 labels"):
        figures.player(np.zeros((2, 3, 3)), ["a"], "v", alt="x")


def test_player_cannot_be_closed_by_a_label():
    html = figures.player(np.ones((1, 2, 2)), ["</script><b>"], "v", alt="x").data
    assert html.count("</script>") == 1
    data = json.loads(re.search(r",d=(\{.*?\}),W=", html)[1])
    assert data["labels"] == ["</script><b>"]


def test_surface_with_blank_vertices():
    coords = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0]])
    faces = [[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]]
    fig = figures.surface_figure([1, 2, np.nan, 4], coords, faces)
    assert len(fig.data) == 2 and len(fig.data[0].i) == 1 and len(fig.data[1].i) == 3
    assert fig.data[0].cmin == -fig.data[0].cmax
    assert figures.surface_figure(np.full(4, np.nan), coords, faces).data[0].cmax == 1
    with pytest.raises(ValueError, match=r"each of 4 vertices, found shape \(3,\)"):
        figures.surface_figure([1, 2, 3], coords, faces)


@pytest.mark.parametrize("in_book, has_library", [("1", False), ("", True)])
def test_interactive_figures_never_ask_the_network(monkeypatch, in_book, has_library):
    monkeypatch.setenv("FMRI_BOOK_BUILD", in_book)
    fig = figures.surface_figure([1, 2, 3, 4], np.eye(4)[:, :3], [[0, 1, 2]])
    html = figures.plotly_html(fig, "d", alt="a triangle").data
    assert not re.search(r"<(script|link)[^>]+(src|href)=.?https?:", html)
    assert (len(html) > 1_000_000) == has_library and 'id="d"' in html


def test_results_table_finds_the_repository_and_says_what_made_it(tmp_path, monkeypatch, capsys):
    "A command in a comment or in a column; from a folder inside; and a line where there is no repository."
    (tmp_path / "results").mkdir()
    (tmp_path / "_build" / "page").mkdir(parents=True)
    (tmp_path / "results" / "a.csv").write_text(
        "# command: python a.py | date: 2026-01-01 | device: CPU | more\nx\n1\n"
    )
    (tmp_path / "results" / "b.csv").write_text("x,device,date,command\n1,CPU,2026-01-01,python b.py\n")
    monkeypatch.chdir(tmp_path / "_build" / "page")
    assert figures.results_table("a.csv").attrs["about"].splitlines() == [
        "python a.py",
        "date: 2026-01-01",
        "device: CPU",
    ]
    assert figures.results_table("b.csv").attrs["about"].splitlines() == ["python b.py", "2026-01-01", "CPU"]
    assert figures.results_table("b.csv").x.tolist() == [1] and not capsys.readouterr().out
    assert figures.results_table("c.csv") is None
    assert "see results/c.csv" in capsys.readouterr().out
