"""Chapter 1 in a browser: the figures that its reader turns, slides and clicks."""

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def page(make_page):
    page = make_page("01_data")
    yield page
    page.context.close()


def intensity(page):
    return np.array(page.evaluate("Array.from(document.getElementById('seed-explorer').data[0].intensity)"))


def explorer(page):
    plot = page.locator("#seed-explorer")
    plot.scroll_into_view_if_needed()
    page.wait_for_function("document.getElementById('seed-explorer').dataset.seed")
    return plot


def test_seed_map_is_the_correlation_with_the_seed(page):
    from fmri_book import data

    plot = explorer(page)
    menu = page.locator("#seed-explorer-seeds")
    run = data.load_example_run()
    for option in (0, 1):
        menu.select_option(index=option)
        seed = int(plot.get_attribute("data-seed"))
        shown, exact = intensity(page), data.seed_correlation(run.bold, seed)
        cortex = run.sites.cortex
        assert np.abs(shown[cortex] - exact[cortex]).max() < 0.12  # 64 directions and 8 bits
        assert np.sqrt(((shown[cortex] - exact[cortex]) ** 2).mean()) < 0.02
        assert shown[seed] == pytest.approx(1, abs=0.01)


def test_a_click_on_the_cortex_moves_the_seed(page):
    plot = explorer(page)
    before = plot.get_attribute("data-seed")
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.42 * box["width"], box["y"] + 0.5 * box["height"], steps=4)
    page.wait_for_timeout(1000)
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function("old => document.getElementById('seed-explorer').dataset.seed !== old", arg=before)
    seed = int(plot.get_attribute("data-seed"))
    assert intensity(page)[seed] == pytest.approx(1, abs=0.01)
    assert page.locator("#seed-explorer-label").inner_text().endswith(str(seed))


def test_the_slider_changes_the_vertex(page):
    plot = page.locator("#vertex-slider")
    plot.scroll_into_view_if_needed()
    first = page.evaluate("Array.from(document.getElementById('vertex-slider').data[0].y).slice(0, 20)")
    box = page.locator("#vertex-slider .slider-rail-touch-rect").bounding_box()
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2)
    page.wait_for_timeout(600)
    assert page.evaluate("Array.from(document.getElementById('vertex-slider').data[0].y).slice(0, 20)") != first


def test_nothing_went_wrong(page):
    assert page.wrong == []
