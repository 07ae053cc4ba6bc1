"""Chapter 2 in a browser: the film, the three views with one slider, and pycortex's viewer."""

import importlib.util

import pytest

pytestmark = pytest.mark.timeout(180)

PICTURE = "selector => document.querySelector(selector).toDataURL()"


@pytest.fixture(scope="module")
def page(make_page):
    page = make_page("02_flat_maps")
    yield page
    page.context.close()


def ready(page, identity):
    page.locator(f"#{identity}").scroll_into_view_if_needed()
    page.wait_for_function("id => document.getElementById(id).dataset.ready === '1'", arg=identity)


def move_slider(page, identity, value):
    page.eval_on_selector(
        f"#{identity} .fb-slider", "(s, v) => { s.value = v; s.dispatchEvent(new Event('input')) }", value
    )


@pytest.mark.parametrize(
    "identity, canvases", [("flat-film", [".fb-canvas"]), ("three-views", [".fb-flat", ".fb-slices"])]
)
def test_the_slider_changes_the_picture(page, identity, canvases):
    ready(page, identity)
    move_slider(page, identity, 5)
    before = {c: page.evaluate(PICTURE, f"#{identity} {c}") for c in canvases}
    label = page.locator(f"#{identity} .fb-time").inner_text()
    move_slider(page, identity, 25)
    for canvas, picture in before.items():
        assert page.evaluate(PICTURE, f"#{identity} {canvas}") != picture
    assert page.locator(f"#{identity} .fb-time").inner_text() != label
    move_slider(page, identity, 5)
    for canvas, picture in before.items():
        assert page.evaluate(PICTURE, f"#{identity} {canvas}") == picture


@pytest.mark.parametrize("identity", ["flat-film", "three-views"])
def test_the_button_plays_and_pauses(page, identity):
    ready(page, identity)
    slider, button = page.locator(f"#{identity} .fb-slider"), page.locator(f"#{identity} .fb-play")
    start = slider.input_value()
    button.click()
    assert button.inner_text() == "pause"
    page.wait_for_function(
        "([id, v]) => document.querySelector(`#${id} .fb-slider`).value !== v", arg=[identity, start]
    )
    button.click()
    assert button.inner_text() == "play"
    stopped = slider.input_value()
    page.wait_for_timeout(500)
    assert slider.input_value() == stopped


def test_the_cursor_follows_the_slider(page):
    ready(page, "three-views")
    places = []
    for value in (0, 30, 59):
        move_slider(page, "three-views", value)
        places.append(
            float(page.eval_on_selector("#three-views .fb-cursor", "c => parseFloat(c.style.left)"))
        )
    assert places == pytest.approx([100 * (v + 0.5) / 60 for v in (0, 30, 59)], abs=0.01)


def test_the_film_shows_brain_on_transparent_ground(page):
    ready(page, "flat-film")
    corner, brain = page.evaluate(
        "() => { const c = document.querySelector('#flat-film .fb-canvas'), k = c.getContext('2d');"
        "return [k.getImageData(1, 1, 1, 1).data[3], k.getImageData(c.width * 0.3, c.height / 2, 1, 1).data[3]] }"
    )
    assert (corner, brain) == (0, 255)


def test_the_viewer_loads_over_http_without_an_error(page):
    if importlib.util.find_spec("cortex") is None:
        pytest.skip("pycortex is not installed: the page has no viewer")
    frame = page.locator("#webgl-viewer iframe")
    frame.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('#webgl-viewer iframe').src.endsWith('webgl/index.html')")
    inside = frame.element_handle().content_frame()
    inside.wait_for_selector("canvas", timeout=60_000)
    inside.wait_for_function(
        "window.viewer && viewer.loaded && viewer.loaded.state() === 'resolved'", timeout=60_000
    )
    assert inside.evaluate("viewer.setMix()") == 0
    page.locator("#webgl-viewer button", has_text="flat").last.click()
    inside.wait_for_function("viewer.setMix() > 0.99", timeout=60_000)
    page.locator("#webgl-viewer button", has_text="folded").click()
    inside.wait_for_function("viewer.setMix() < 0.01", timeout=60_000)
    assert page.wrong == []


def test_from_a_file_the_viewer_says_what_it_needs(open_page):
    if importlib.util.find_spec("cortex") is None:
        pytest.skip("pycortex is not installed: the page has no viewer")
    page = open_page("02_flat_maps", over="file")
    note = page.locator("#webgl-viewer .fb-needs-http")
    note.scroll_into_view_if_needed()
    assert note.is_visible() and "make serve" in note.inner_text()
    assert not page.locator("#webgl-viewer iframe").is_visible()
    ready(page, "three-views")
    assert page.wrong == []


def test_on_a_phone_nothing_is_wider_than_the_page(open_page):
    page = open_page("02_flat_maps", viewport={"width": 390, "height": 844})
    for identity in ("flat-film", "three-views"):
        ready(page, identity)
        box = page.locator(f"#{identity}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_every_figure_has_a_caption_and_a_description(page):
    images = page.locator("main .cell_output img")
    assert images.count() >= 12
    for k in range(images.count()):
        assert len(images.nth(k).get_attribute("alt")) > 15
    assert page.locator("main p > em", has_text="Figure:").count() >= 14
