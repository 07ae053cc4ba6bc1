"""Chapter 4 as built: its figures, the measured defects, and who beats whom on people held out."""

import re

import pytest

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def page(make_page):
    page = make_page("04_brainlm")
    yield page
    page.context.close()


def printed(page):
    return "\n".join(page.locator("main .cell_output").all_inner_texts())


def rows(page, caption):
    "First column -> numbers of the table with that caption."
    table = page.locator("main table", has_text=caption)
    assert table.count() == 1
    lines = [line.split() for line in table.inner_text().splitlines()]
    numbers = {" ".join(x for x in line if not NUMBER.fullmatch(x)): [float(x) for x in line if NUMBER.fullmatch(x)] for line in lines}
    return {name: values for name, values in numbers.items() if len(values) == 3}


NUMBER = re.compile(r"-?\d+\.\d{3}")


def test_one_curve_for_all_parcels_of_the_original(page):
    found = re.search(r"'mended': '(\d+) different curves.*?'original': '(\d+) different curves, SD over parcels (\d\.\d+)", printed(page))
    assert found.groups() == ("100", "1", "0.000")


def test_the_leak_appears_with_the_second_layer_and_only_with_the_switch(page):
    found = re.findall(r"(\d) layers, open_cls=(\w+): earlier blocks change by up to (\S+)", printed(page))
    assert len(found) == 6
    for layers, leak, change in found:
        assert (float(change) > 0) == (leak == "True" and int(layers) > 1)


def test_ratios_gradients_and_answers_that_the_text_speaks_of(page):
    text = printed(page)
    ours, theirs = map(float, re.search(r"asked for 75 %: hidden (\d+\.\d+)%, in the original's way (\d+\.\d+)%", text).groups())
    assert abs(ours - 75) < 0.3 and theirs == 70
    gradients = dict(re.findall(r"open_cls=(\w+): largest gradient of the class token (\S+)", text))
    assert float(gradients["True"]) > 0 == float(gradients["False"])
    ages = {how: re.findall(r"\d+\.\d+", line) for how, line in re.findall(r"(hidden at random|nothing hidden): ages \[(.*)\]", text)}
    assert len(set(ages["nothing hidden"])) == 1 < len(set(ages["hidden at random"]))


def test_the_network_beats_persistence_and_autoregression_and_the_ridge_stands_beside_it(page):
    forecast = rows(page, "one block ahead, simulated people held out")
    by = {name.split()[0]: values for name, values in forecast.items()}
    assert set(by) == {"zero", "persistence", "AR", "ridge", "BrainLM"}
    assert all(low <= value <= high for value, low, high in by.values())
    assert by["BrainLM"][1] > by["persistence"][2] and by["BrainLM"][0] > by["AR"][0]
    masked = rows(page, "half of the blocks hidden at random, simulated people held out")
    assert masked["BrainLM"][1] > max(masked["persistence"][2], masked["AR"][2]) and "linear, same moment" in masked


def test_mending_shows_in_training(page):
    text = printed(page)
    theirs, ours = map(float, re.search(r"after \d+ steps: original (-?\d\.\d+), mended (-?\d\.\d+)", text).groups())
    bound = float(re.search(r"if it knew the future mean of the brain: (\d\.\d+)", text).group(1))
    assert theirs < ours and theirs < bound


def test_several_seeds_with_their_command(page):
    assert "python benchmarks/brainlm_ci_seeds.py" in printed(page)
    seeds = page.locator("main table", has_text="original's switches")
    assert seeds.count() == 1 and "seeds)" in seeds.inner_text()


def test_bad_input_is_refused_by_name(page):
    text = printed(page)
    for told in ("interquartile range 1", "NaN or infinity", "signals that move", "voxel numbers?", "a multiple of 8 frames", "knows its scaler", "TR of 0.72 s", "left over"):
        assert told in text, told


def test_every_figure_has_a_caption_and_a_description(page):
    images = page.locator("main .cell_output img")
    assert images.count() >= 8
    for k in range(images.count()):
        assert len(images.nth(k).get_attribute("alt")) > 40
    assert page.locator("main p > em", has_text="Figure:").count() == images.count()
    assert page.wrong == []


def test_on_a_phone_nothing_is_wider_than_the_page(open_page):
    page = open_page("04_brainlm", viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
