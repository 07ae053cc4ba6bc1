"""Chapter 3 as built: the film that a slider moves, the figures, and what the page must have printed."""

import re

import pytest

pytestmark = pytest.mark.timeout(120)

PICTURE = "() => document.querySelector('#mae-film .fb-canvas').toDataURL()"


@pytest.fixture(scope="module")
def page(make_page):
    page = make_page("03_mae")
    yield page
    page.context.close()


def ready(page):
    page.locator("#mae-film").scroll_into_view_if_needed()
    page.wait_for_function("() => document.getElementById('mae-film').dataset.ready === '1'")


def move_slider(page, value):
    page.eval_on_selector(
        "#mae-film .fb-slider", "(s, v) => { s.value = v; s.dispatchEvent(new Event('input')) }", value
    )


def printed(page):
    return "\n".join(page.locator("main .cell_output").all_inner_texts())


def test_the_slider_moves_input_guess_and_recording(page):
    ready(page)
    move_slider(page, 3)
    before, label = page.evaluate(PICTURE), page.locator("#mae-film .fb-time").inner_text()
    move_slider(page, 60)
    assert page.evaluate(PICTURE) != before
    assert page.locator("#mae-film .fb-time").inner_text() != label
    move_slider(page, 3)
    assert page.evaluate(PICTURE) == before
    assert page.wrong == []


def test_more_and_more_of_the_film_is_shown_from_top_to_bottom(page):
    """Visible patches above: a quarter of the guess; guess and recording fill the same pixels."""
    ready(page)
    shares = page.evaluate(
        """() => { const c = document.querySelector('#mae-film .fb-canvas'), k = c.getContext('2d');
        const gap = Math.round(c.height * 3 / 102), h = (c.height - 2 * gap) / 3;
        return [0, 1, 2].map(i => { const d = k.getImageData(0, Math.round(i * (h + gap)), c.width, Math.round(h)).data;
        let n = 0; for (let j = 3; j < d.length; j += 4) n += d[j] > 0; return n }) }"""
    )
    assert shares[1] == shares[2] > 0
    assert 0.1 < shares[0] / shares[2] < 0.4


def test_the_network_beats_mean_and_interpolation_and_says_who_beats_it(page):
    text = printed(page)
    at_75 = {
        name: float(loss)
        for name, loss in re.findall(
            r"^(mean|distance|kriging|linear predictor) .*75%: (\d\.\d+)", text, re.MULTILINE
        )
    }
    assert set(at_75) == {"mean", "distance", "kriging", "linear predictor"}
    found = re.search(r"held-out loss at 75%: (\d\.\d+) \(95 % interval (\d\.\d+) to (\d\.\d+)\)", text)
    loss, low, high = map(float, found.groups())
    assert low < loss < high
    assert at_75["linear predictor"] < loss < min(at_75["mean"], at_75["distance"], at_75["kriging"])


def test_measured_faults_of_the_original_are_on_the_page(page):
    text = printed(page)
    hides = float(re.search(r"a ratio of 0\.9 over all patches hides (\d+\.\d)%", text).group(1))
    assert 80 < hides < 89
    kept = [int(x) for x in re.findall(r"(\d+)%", re.search(r"raster order keeps.*", text).group(0))]
    assert len(kept) == 4 and kept[0] > kept[-1]


def test_on_a_phone_nothing_is_wider_than_the_page(open_page):
    page = open_page("03_mae", viewport={"width": 390, "height": 844})
    ready(page)
    box = page.locator("#mae-film").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_every_figure_has_a_caption_and_a_description(page):
    images = page.locator("main .cell_output img")
    assert images.count() >= 5
    for k in range(images.count()):
        assert len(images.nth(k).get_attribute("alt")) > 15
    assert page.locator("main p > em", has_text="Figure:").count() >= 6
