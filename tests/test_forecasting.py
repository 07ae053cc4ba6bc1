"Forecasts and their rivals: exactness, causality, units, and what the scores mean."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fmri_book
import torch
from fmri_book import forecasting as fc
from fmri_book.brainlm import BrainLMConfig, BrainLMForPretraining
from fmri_book.cohort import Cohort, Spectrum, coloured_noise
from fmri_book.data import Run, Space
from fmri_book.splits import Scaler
from fmri_book.storage import Layout, Record, write_store

FRAMES, WINDOW, PARCELS = 8, 5, 10
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(fmri_book.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def tiny(seed=0, parcels=PARCELS, **changes):
    torch.manual_seed(seed)
    fields = dict(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_timepoints_per_voxel=WINDOW * FRAMES,
        timepoint_patching_size=FRAMES,
        num_brain_voxels=parcels,
    )
    return BrainLMForPretraining(BrainLMConfig(**fields | changes)).eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


XYZ = 40 * noise(PARCELS, 3, seed=9)


def series(n_runs=4, parcels=6, frames=200, seed=0):
    "Runs of a stable process in which parcels lead one another."
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n_runs):
        x = np.zeros((frames, parcels))
        for t in range(2, frames):
            x[t] = 0.7 * x[t - 1] - 0.3 * x[t - 2] + 0.2 * np.roll(x[t - 1], 1) + rng.standard_normal(parcels)
        out.append((x.T + np.arange(parcels)[:, None]).astype(np.float32))
    return out


# ----------------------------------------------------------------------------------------------------------- rolling out


@pytest.mark.parametrize("context", [1, 3, WINDOW - 1])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_cache_changes_nothing(context, legacy):
    model, x = tiny(legacy_mask=legacy), noise(3, PARCELS, WINDOW * FRAMES)
    told = dict(xyz_vectors=XYZ, context=context)
    kept = fc.forecast(model, x, 7, **told)
    anew = fc.forecast(model, x, 7, cache=False, **told)
    assert kept.shape == (3, PARCELS, 7 * FRAMES)
    assert torch.allclose(kept, anew, atol=2e-6)
    assert kept.std() > 1e-3


def test_the_cache_changes_nothing_with_parcels_without_data():
    model, x = tiny(), noise(2, PARCELS, 3 * FRAMES)
    x[:, 4] = 0
    missing = torch.zeros(2, PARCELS, dtype=torch.bool)
    missing[:, 4] = True
    told = dict(xyz_vectors=XYZ, missing=missing)
    kept = fc.forecast(model, x, 4, **told)
    assert torch.allclose(kept, fc.forecast(model, x, 4, cache=False, **told), atol=2e-6)
    y = x.clone()
    y[:, 4] = 17.0  # what is marked as missing is never read
    assert torch.equal(fc.forecast(model, y, 4, **told), kept)
    with pytest.raises(ValueError, match="missing="):
        fc.forecast(model, x, 4, xyz_vectors=XYZ)


def test_every_block_is_the_model_s_answer_to_the_blocks_before_it():
    "The rule itself, by full forward passes: at most window - 1 blocks, given or predicted, then one that is hidden."
    model, x = tiny(), noise(2, PARCELS, 3 * FRAMES)
    found = fc.forecast(model, x, 5, xyz_vectors=XYZ)
    known = x
    model.config.check_input = False
    for i in range(5):
        past = known[..., -(WINDOW - 1) * FRAMES :]
        longer = torch.cat([past, 99 * torch.ones(2, PARCELS, FRAMES)], -1)  # 99: hidden, so it cannot matter
        mask = torch.zeros(2, PARCELS, longer.shape[-1] // FRAMES, dtype=torch.bool)
        mask[..., -1] = True
        with torch.no_grad():
            block = model(longer, XYZ, mask).logits[:, :, -1]
        assert torch.allclose(found[..., i * FRAMES : (i + 1) * FRAMES], block, atol=2e-6)
        known = torch.cat([known, block], -1)


def test_longer_forecasts_begin_like_shorter_ones_and_batches_do_not_matter():
    model, x = tiny(), noise(5, PARCELS, 4 * FRAMES)
    long = fc.forecast(model, x, 6, xyz_vectors=XYZ)
    for blocks in (1, 3):
        assert torch.equal(fc.forecast(model, x, blocks, xyz_vectors=XYZ), long[..., : blocks * FRAMES])
    assert torch.allclose(fc.forecast(model, x, 6, xyz_vectors=XYZ, batch_size=2), long, atol=2e-6)
    assert torch.equal(fc.forecast(model, torch.cat([noise(5, PARCELS, 4 * FRAMES), x], -1), 6, xyz_vectors=XYZ), long)


def test_a_model_with_an_open_class_token_is_asked_anew_each_time():
    model, x = tiny(open_cls=True), noise(2, PARCELS, 3 * FRAMES)
    found = fc.forecast(model, x, 3, xyz_vectors=XYZ)
    assert torch.equal(found, fc.forecast(model, x, 3, xyz_vectors=XYZ, cache=False))


def test_the_model_is_given_back_as_it_was():
    model = tiny(attention_probs_dropout_prob=0.5).train()
    x = noise(2, PARCELS, 2 * FRAMES)
    a, b = (fc.forecast(model, x, 2, xyz_vectors=XYZ) for _ in range(2))
    assert torch.equal(a, b) and not a.requires_grad  # no dropout in a forecast
    assert model.training and model.config.check_input
    with pytest.raises(ValueError, match="finite"):
        fc.forecast(model, x * torch.nan, 2, xyz_vectors=XYZ)
    assert model.training and model.config.check_input


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (dict(blocks=0), "blocks from 1 up, found 0"),
        (dict(blocks=1.5), "found 1.5"),
        (dict(context=5), "context of 1 to 4 blocks"),
        (dict(context=0), "found 0"),
        (dict(signal=noise(2, PARCELS, 5)), "at least one block of 8 frames"),
        (dict(signal=noise(PARCELS, 16)), "batch, parcels, frames"),
        (dict(signal=1000 + noise(2, PARCELS, 32)), "splits.Scaler.fit"),
        (dict(xyz_vectors=XYZ[:4]), "for 10 parcels"),
        (dict(xyz_vectors=None), "found none, and none in the config"),
        (dict(xyz_vectors=XYZ.expand(3, -1, -1)), "for 2 samples or for all of them, found 3"),
        (dict(blocks=float("nan")), "blocks from 1 up, found nan"),
        (dict(context=float("inf")), "found inf"),
        (dict(batch_size=0), r"\(batch_size\) from 1 up, found 0"),
        (dict(batch_size=2.5), r"\(batch_size\) from 1 up, found 2.5"),
        (dict(missing=torch.zeros(PARCELS)), r"missing as \(2, 10\).*found \(10,\)"),
        (dict(signal=noise(0, PARCELS, 32)), "at least one"),
    ],
)
def test_calls_that_cannot_be_meant(told, says):
    told = dict(signal=noise(2, PARCELS, 32), blocks=2, xyz_vectors=XYZ) | told
    with pytest.raises(ValueError, match=says):
        fc.forecast(tiny(), told.pop("signal"), **told)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_everybody_keeps_their_own_coordinates_from_batch_to_batch(size):
    model, x, xyz = tiny(xyz_scale=0.1), noise(3, PARCELS, 2 * FRAMES), 40 * noise(3, PARCELS, 3, seed=3)
    found = fc.forecast(model, x, 2, xyz_vectors=xyz, batch_size=size)
    alone = [fc.forecast(model, x[i : i + 1], 2, xyz_vectors=xyz[i]) for i in range(3)]
    assert torch.allclose(found, torch.cat(alone), atol=2e-6)
    swapped = fc.forecast(model, x, 2, xyz_vectors=xyz.flip(0), batch_size=size)
    assert not torch.allclose(found, swapped, atol=1e-4)  # they do matter
    shared = fc.forecast(model, x, 2, xyz_vectors=xyz[:1], batch_size=size)
    assert torch.allclose(shared, fc.forecast(model, x, 2, xyz_vectors=xyz[0]), atol=2e-6)


@pytest.mark.parametrize("kind", ["int", "float", "numpy", "numpy float", "list"])
def test_parcels_without_data_may_be_marked_by_any_zeros_and_ones(kind):
    model, x = tiny(), noise(3, PARCELS, 2 * FRAMES)
    x[0, 4] = x[2, 1] = 0
    missing = x.std(-1) == 0
    expected = fc.forecast(model, x, 2, xyz_vectors=XYZ, missing=missing)
    other = {
        "int": missing.int(),
        "float": missing.float(),
        "numpy": missing.numpy(),
        "numpy float": missing.numpy().astype(float),
        "list": missing.tolist(),
    }[kind]
    found = fc.forecast(model, x, 2, xyz_vectors=XYZ, missing=other, batch_size=2)
    assert torch.allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("turn", [lambda x: x, lambda x: x[::-1]], ids=["as it lies", "backwards"])
def test_signals_may_be_numpy_arrays(turn):
    model, x = tiny(), turn(noise(2, PARCELS, 2 * FRAMES).numpy())
    found = fc.forecast(model, x, 2, xyz_vectors=XYZ.numpy())
    assert torch.equal(found, fc.forecast(model, torch.from_numpy(x.copy()), 2, xyz_vectors=XYZ))


def test_a_window_of_one_block_has_no_room_for_a_context():
    model = tiny(num_timepoints_per_voxel=FRAMES)
    with pytest.raises(ValueError, match="window of at least two blocks.*found one block of 8 frames"):
        fc.forecast(model, noise(2, PARCELS, 32), xyz_vectors=XYZ)


def test_signals_take_no_settings_of_recordings():
    with pytest.raises(TypeError, match="found until, tr: .*forecast_run"):
        fc.forecast(tiny(), noise(2, PARCELS, 32), xyz_vectors=XYZ, until=10.0, tr=0.72)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(TypeError, match="expected a BrainLMForPretraining"):
        fc.forecast(tiny().model, noise(2, PARCELS, 32), xyz_vectors=XYZ)


# ------------------------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("order", [1, 3, 6])
def test_autoregression_of_a_parcel_is_least_squares(order):
    runs = series()
    model = fc.AutoRegression(order, "parcel").fit(runs)
    for v in range(6):
        rows, answers = [], []
        for run in runs:
            for t in range(order, run.shape[1]):
                rows.append([*run[v, t - order : t].astype(float), 1.0])
                answers.append(float(run[v, t]))
        expected = np.linalg.lstsq(np.array(rows), np.array(answers), rcond=None)[0]
        np.testing.assert_allclose(model.weights[v], expected, atol=1e-8)


def test_autoregression_of_all_parcels_is_least_squares_over_all():
    runs, order = series(), 4
    rows = np.concatenate([r[v, t - order : t + 1][None] for r in runs for v in range(6) for t in range(order, r.shape[1])])
    x = np.c_[rows[:, :-1], np.ones(len(rows))].astype(float)
    expected = np.linalg.lstsq(x, rows[:, -1].astype(float), rcond=None)[0]
    np.testing.assert_allclose(fc.AutoRegression(order).fit(runs).weights[0], expected, atol=1e-8)


def test_autoregression_rolls_out_as_its_equation_says():
    model = fc.AutoRegression(2, "parcel")
    model.weights = np.array([[-0.3, 0.7, 0.5], [0.0, 0.9, 0.0]])  # oldest first, then the constant
    context = np.array([[[9.0, 1.0, 2.0], [9.0, 5.0, 1.0]]])
    a, b, expected = 1.0, 2.0, []
    for _ in range(5):
        a, b = b, 0.7 * b - 0.3 * a + 0.5
        expected.append(b)
    found = model.predict(context, 5)
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(found[0, 1], 0.9 ** np.arange(1, 6), rtol=1e-12)


def test_one_autoregression_with_collinear_past_does_not_explode():
    t = np.arange(300)
    run = np.stack([np.sin(0.3 * t + p) for p in range(6)]).astype(np.float32)  # order 2 is enough: 10 is singular
    found = fc.AutoRegression(10).fit([run]).predict(run[None, :, :100], 50)
    np.testing.assert_allclose(found[0], run[:, 100:150], atol=1e-3)


def test_ridge_is_penalised_least_squares_of_what_is_left():
    runs, horizon, lags, k, alpha = series(), 3, 4, 2, 0.5
    model = fc.RidgeForecast(fc.AutoRegression(2), horizon, lags, k, alpha, every=1).fit(runs)
    values, vectors = np.linalg.eigh(sum(r.astype(float) @ r.T for r in runs))
    basis = vectors[:, np.argsort(values)[::-1][:k]]
    np.testing.assert_allclose(np.abs(basis.T @ model.basis), np.eye(k), atol=1e-6)
    x, y = [], []
    for run in runs:
        z = model.basis.T @ run
        for t in range(lags, run.shape[1] - horizon + 1):
            x.append(z[:, t - lags : t].ravel())
            ahead = fc.AutoRegression(2).fit(runs).predict(run[None, :, :t], horizon)[0]
            y.append((z[:, t : t + horizon] - model.basis.T @ ahead).ravel())
    x, y = np.array(x), np.array(y)
    penalty = np.sqrt(alpha * np.square(x).sum() / x.shape[1])
    expected = np.linalg.lstsq(
        np.r_[x, penalty * np.eye(x.shape[1])], np.r_[y, np.zeros((x.shape[1], y.shape[1]))], rcond=None
    )[0]
    np.testing.assert_allclose(model.weights, expected, atol=1e-6)
    context = runs[0][None, :, :50]
    by_hand = fc.AutoRegression(2).fit(runs).predict(context, horizon)
    by_hand = by_hand + model.basis @ ((model.basis.T @ context[0, :, -lags:]).ravel() @ expected).reshape(k, horizon)
    np.testing.assert_allclose(model.predict(context, horizon), by_hand, atol=1e-5)
    np.testing.assert_allclose(model.predict(context, 2), by_hand[..., :2], atol=1e-5)


def test_ridge_uses_the_other_parcels_and_a_large_penalty_leaves_the_autoregression():
    runs = series(8, frames=400)
    cuts = fc.cut(runs[6:], 20, 2, 2)
    error = lambda m: np.square(m.fit(runs[:6]).predict(cuts.context, 2) - cuts.truth).mean()
    alone = error(fc.AutoRegression(2))
    assert error(fc.RidgeForecast(fc.AutoRegression(2), 2, 4, 6, 1e-3, 1)) < 0.97 * alone
    assert abs(error(fc.RidgeForecast(fc.AutoRegression(2), 2, 4, 6, 1e9)) / alone - 1) < 1e-4


def test_simple_rivals():
    runs = series()
    context = np.stack([r[:, :30] for r in runs])
    mean = fc.MeanForecast().fit(runs).predict(context, 3)
    np.testing.assert_allclose(mean, np.broadcast_to(np.concatenate(runs, 1).mean(1)[:, None], mean.shape), atol=1e-4)
    still = fc.Persistence().fit(runs).predict(context, 3)
    assert (still == context[..., -1:]).all() and still.shape == mean.shape == (4, 6, 3)


def test_settings_are_chosen_without_the_people_they_are_judged_on():
    runs, names = series(6, frames=300), ["a", "a", "b", "b", "c", "c"]
    best, errors = fc.choose(fc.AutoRegression, [1, 2, 5], runs, names, 20, 2)
    fitted, judged = [runs[i] for i in (0, 1, 4, 5)], fc.cut([runs[2], runs[3]], 20, 2, 2)
    for order in (1, 2, 5):
        guess = fc.AutoRegression(order).fit(fitted).predict(judged.context, 2)
        assert errors[order] == pytest.approx(np.square(guess - judged.truth).mean())
    assert best == min(errors, key=errors.get) != 1
    with pytest.raises(ValueError, match="at least 2 training subjects"):
        fc.choose(fc.AutoRegression, [1], runs[:2], ["a", "a"], 20, 2)


def test_the_ceiling_of_a_known_process():
    phi, h = 0.8, np.arange(1, 9)
    np.testing.assert_allclose(fc.linear_ceiling(phi ** np.arange(40), 16, 8), phi ** (2 * h), rtol=1e-8)
    runs = [coloured_noise(np.random.default_rng(i), 400, 400, 1.4, Spectrum()).T for i in range(8)]
    cuts = fc.cut(runs[4:], 40, 8, 8)
    guess = fc.AutoRegression(16).fit(runs[:4]).predict(cuts.context, 8)
    found = fc.forecast_table(cuts.truth, {"ar": guess}, cuts.run, 1.4)
    power = np.fft.irfft(Spectrum().power(4096, 1.4))
    np.testing.assert_allclose(found.r2, fc.linear_ceiling(power, 40, 8), atol=0.012)
    with pytest.raises(ValueError, match="expected 48 lags, found 20"):
        fc.linear_ceiling(power[:20], 40, 8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: fc.AutoRegression(300).fit(r), "runs of more than 300 frames, found 200"),
        (lambda r: fc.AutoRegression(4).fit(r).predict(r[0][None, :, :3], 2), "context of at least 4 frames, found 3"),
        (lambda r: fc.RidgeForecast(fc.AutoRegression(2), 3, 4, 2).fit(r).predict(r[0][None], 4), "horizon of up to 3"),
        (lambda r: fc.cut(r, 190, 20, 5), "at least 210 frames, found 200 in run 0"),
    ],
)
def test_rivals_refuse_what_they_cannot_do(call, says):
    with pytest.raises(ValueError, match=says):
        call(series())


# ---------------------------------------------------------------------------------------------------------------- scores


def test_cuts_show_the_same_past_and_ask_for_the_same_future():
    run = np.arange(100, dtype=np.float32)[None] + np.zeros((3, 1), np.float32)
    cuts = fc.cut([run, run[:, :50]], 16, 8, 8)
    assert cuts.context.shape[1:] == (3, 16) and cuts.truth.shape[1:] == (3, 8)
    assert (cuts.truth[:, :, 0] == cuts.start[:, None]).all()
    assert (cuts.context[:, :, -1] == cuts.start[:, None] - 1).all()
    assert cuts.start[cuts.run == 0].tolist() == list(range(16, 93, 8))
    assert cuts.start[cuts.run == 1].tolist() == [16, 24, 32, 40]


def test_r2_is_the_plain_definition_and_is_not_clipped():
    rng = np.random.default_rng(0)
    truth, guess = rng.standard_normal((7, 3, 4)), 3 * rng.standard_normal((7, 3, 4))
    mean, group = rng.standard_normal(3), np.array([0, 0, 1, 1, 2, 2, 2])
    table = fc.forecast_table(truth, {"bad": guess, "mean": np.broadcast_to(mean[:, None], truth.shape)}, group, 1.4, mean)
    for h in range(4):
        away = sum((truth[i, v, h] - mean[v]) ** 2 for i in range(7) for v in range(3))
        off = sum((truth[i, v, h] - guess[i, v, h]) ** 2 for i in range(7) for v in range(3))
        row = table[(table.predictor == "bad") & (table.frame == h + 1)].iloc[0]
        assert row.r2 == pytest.approx(1 - off / away) and row.mse == pytest.approx(off / 21)
        assert row.seconds == pytest.approx(1.4 * (h + 1)) and row.r2 < -1
        assert row.low <= row.r2 <= row.high and row.n_groups == 3
    assert np.abs(table[table.predictor == "mean"].r2).max() < 1e-12


def test_rows_of_several_frames_pool_errors_and_drop_what_is_left():
    rng = np.random.default_rng(1)
    truth, guess = rng.standard_normal((2, 6, 3, 10))
    table = fc.forecast_table(truth, {"a": guess}, np.arange(6), 2.0, per=4)
    assert table.frame.tolist() == [4, 8] and table.seconds.tolist() == [8.0, 16.0]
    assert table.mse[0] == pytest.approx(np.square(truth - guess)[..., :4].mean())
    assert table.r2[1] == pytest.approx(1 - np.square(truth - guess)[..., 4:8].sum() / np.square(truth[..., 4:8]).sum())


def test_intervals_are_over_groups_and_gains_are_paired():
    rng = np.random.default_rng(2)
    truth = rng.standard_normal((40, 3, 2))
    group = np.repeat(np.arange(20), 2)
    size = np.repeat(rng.uniform(0.1, 1.5, 20), 2)[:, None, None]  # some people are harder
    one, other = truth + size, truth + size * 1.05
    table = fc.forecast_table(truth, {"one": one, "other": other}, group, 1.0, against="one", draws=2000)
    own, rival = table[table.predictor == "one"].iloc[0], table[table.predictor == "other"].iloc[0]
    assert own.gain == own.gain_low == own.gain_high == 0
    assert rival.gain == pytest.approx(own.r2 - rival.r2) and rival.gain_low > 0
    assert rival.gain_high - rival.gain_low < 0.3 * (own.high - own.low)  # paired: what both find hard cancels
    again = np.random.default_rng(5).integers(20, size=(4000, 20))  # the same by drawing people one by one
    off = np.square(truth - one)[..., 0].sum(1).reshape(20, 2).sum(1)
    away = np.square(truth)[..., 0].sum(1).reshape(20, 2).sum(1)
    low, high = np.quantile(1 - off[again].sum(1) / away[again].sum(1), (0.025, 0.975))
    assert own.low == pytest.approx(low, abs=0.03) and own.high == pytest.approx(high, abs=0.03)
    doubled = fc.forecast_table(np.repeat(truth, 3, 0), {"one": np.repeat(one, 3, 0)}, np.repeat(group, 3), 1.0)
    single = fc.forecast_table(truth, {"one": one}, group, 1.0)
    np.testing.assert_allclose(doubled.low, single.low)  # more cuts of the same people are not more people


def test_tables_refuse_what_does_not_fit():
    truth = np.zeros((4, 3, 2))
    with pytest.raises(ValueError, match=r"expected a as \(4, 3, 2\) and 4 groups"):
        fc.forecast_table(truth, {"a": truth[:3]}, np.arange(4), 1.0)
    with pytest.raises(ValueError, match="found per=3"):
        fc.forecast_table(truth, {"a": truth}, np.arange(4), 1.0, per=3)


# ------------------------------------------------------------------------------------------------------------ recordings


@pytest.fixture(scope="module")
def people():
    return Cohort(n_subjects=3, n_sessions=1, n_frames=120, tr=1.4, tasks=("rest",), space="schaefer100")


class Source(list):
    layout = Layout.of("schaefer100")


@pytest.fixture(scope="module")
def scaler(people):
    return Scaler.fit(Source(Record.from_run(r) for r in people), "robust", subjects="all")


def known(scaler, **changes):
    "A model that knows its recordings."
    config = BrainLMConfig.for_data("schaefer100", 1.4, scaler)
    facts = {k: getattr(config, k) for k in ("space", "layout", "tr", "scaler", "coordinates")}
    return tiny(parcels=100, xyz_scale=0.02, **facts | changes)


def test_a_forecast_comes_back_in_the_units_of_the_run(people, scaler):
    model, run = known(scaler), people[0]
    found = fc.forecast_run(model, run, 2)
    assert found.prediction.shape == (2 * FRAMES, 100)
    np.testing.assert_allclose(found.seconds, 1.4 * np.arange(120, 120 + 2 * FRAMES))
    np.testing.assert_allclose(found.context, run.bold[-(WINDOW - 1) * FRAMES :])
    np.testing.assert_allclose(found.prediction, scaler.inverse(found.scaled), rtol=1e-5)
    scaled = torch.from_numpy(scaler.transform(run.bold).T[None])
    expected = fc.forecast(model, scaled[..., -(WINDOW - 1) * FRAMES :], 2)
    np.testing.assert_allclose(found.scaled, expected[0].T.numpy(), atol=1e-5)
    assert isinstance(fc.forecast(model, run, 2), fc.RunForecast)


@pytest.mark.parametrize(
    "told", [dict(xyz_vectors=noise(100, 3)), dict(missing=torch.zeros(1, 100)), dict(batch_size=0)]
)
def test_what_a_recording_cannot_take_is_refused(people, scaler, told):
    with pytest.raises((TypeError, ValueError), match=f"expected .*{next(iter(told))}"):
        fc.forecast(known(scaler), people[0], **told)


def test_the_way_back_knows_the_model_s_last_word(people, scaler):
    "A head that always says 1.5 must come back as centre + 1.5 scale, in units that were z-scored before as well."
    run = people[0]
    for zscore in (False, True):
        model = known(scaler, zscore=zscore)
        if zscore:
            model.config.scaler = dict(scaler.to_dict(), centre=[0.25] * 100, scale=[2.0] * 100)
        with torch.no_grad():
            model.pred_head[2].weight.zero_()
            model.pred_head[2].bias.fill_(1.5)
        found = fc.forecast_run(model, run)
        if zscore:
            expected = run.bold.mean(0) + run.bold.std(0) * (0.25 + 2 * 1.5)
        else:
            expected = scaler.centre + 1.5 * scaler.scale
        np.testing.assert_allclose(found.prediction, np.broadcast_to(expected, found.prediction.shape), rtol=1e-4)


@pytest.mark.parametrize("changes", [dict(), dict(zscore=True), dict(tr=0.8), dict(tr=2.1, zscore=True)])
def test_nothing_that_comes_later_reaches_a_forecast(people, scaler, changes):
    run, until = people[1], 80 * 1.4
    model = known(scaler, **changes)
    if changes.get("zscore"):
        model.config.scaler = dict(scaler.to_dict(), centre=[0.0] * 100, scale=[1.3] * 100)
    other = run.bold.copy()
    other[80:] = 100 + 7 * np.random.default_rng(0).standard_normal(other[80:].shape)
    one, two = (fc.forecast_run(model, run.replace(bold=b), 3, until=until) for b in (run.bold, other))
    assert np.array_equal(one.prediction, two.prediction)
    assert one.seconds[0] == pytest.approx(until, abs=model.config.tr)
    earlier = run.bold.copy()
    earlier[70:80] += 0.5 * np.random.default_rng(1).standard_normal(earlier[70:80].shape).astype(np.float32)
    three = fc.forecast_run(model, run.replace(bold=earlier), 3, until=until)
    assert not np.array_equal(one.prediction, three.prediction)


def test_a_parcel_without_data_is_said_and_nan(people, scaler):
    bold = people[0].bold.copy()
    bold[:, 7] = 0
    found = fc.forecast_run(known(scaler), people[0].replace(bold=bold, allow_constant=1))
    assert np.isnan(found.prediction[:, 7]).all() and np.isfinite(np.delete(found.prediction, 7, 1)).all()
    assert "1 parcels without data" in found.about["notes"]


@pytest.mark.parametrize(
    ("change", "told", "says"),
    [
        (dict(scaler=None), {}, "splits.Scaler.fit"),
        (dict(space="", layout=""), {}, "input_spec"),
        ({}, dict(until=1000.0), "within the run's 168 s"),
        ({}, dict(until=float("nan")), "until= as a number of seconds, found nan"),
        ({}, dict(until=float("inf")), "until= as a number of seconds, found inf"),
        ({}, dict(blocks=-1), "blocks from 1 up"),
        ({}, dict(context=9), "context of 1 to 4"),
    ],
)
def test_recordings_that_cannot_become_what_the_model_takes(people, scaler, change, told, says):
    model = known(scaler)
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises((ValueError, TypeError), match=says):
        fc.forecast_run(model, people[0], **told)


def test_other_atlases_are_refused(people, scaler):
    other = Run(np.random.default_rng(0).standard_normal((60, 200)), 1.4, "schaefer200")
    with pytest.raises(ValueError, match="schaefer100"):
        fc.forecast_run(known(scaler), other)


def test_results_come_back_as_they_were_saved(people, scaler, tmp_path):
    found = fc.forecast_run(known(scaler), people[0])
    for name in ("a.npz", "a.safetensors"):
        again = fc.RunForecast.load(found.save(tmp_path / name))
        assert np.array_equal(again.prediction, found.prediction) and again.about["key"] == found.about["key"]
    lines = found.save(tmp_path / "a.csv").read_text().splitlines()
    assert lines[0].split(",")[:2] == ["seconds", str(Space.named("schaefer100").names[0])] and len(lines) == 9
    assert float(lines[1].split(",")[3]) == pytest.approx(found.prediction[0, 2], rel=1e-5)
    with pytest.raises(ValueError, match=r"ends in \.npz, \.safetensors or \.csv, found '\.txt'"):
        found.save(tmp_path / "a.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.npz", "a.safetensors"]


# -------------------------------------------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("blocks", [1, 5, 8])
def test_masks_cover_every_token(ratio, blocks):
    masks = fc.covering_masks(7, blocks, ratio, rounds=2, seed=3)
    count = max(1, round(ratio * blocks))
    assert (masks.sum(2) == count).all()  # the same for every parcel in every pass
    assert (masks.sum(0) >= 2).all() and len(masks) == 2 * -(-blocks // count)
    assert np.array_equal(masks, fc.covering_masks(7, blocks, ratio, rounds=2, seed=3))
    if 1 < blocks > count:
        assert not np.array_equal(masks, fc.covering_masks(7, blocks, ratio, rounds=2, seed=4))
        assert not np.array_equal(masks, fc.covering_masks(7, blocks, ratio, rounds=2, seed=3, window=40))


def test_masks_refuse_nonsense():
    for told in (dict(ratio=0.0), dict(ratio=1.2), dict(rounds=0), dict(rounds=1.5)):
        with pytest.raises(ValueError, match="covering_masks"):
            fc.covering_masks(3, 4, **told)


@pytest.mark.parametrize("how", ["mean", "first"])
def test_no_value_is_seen_by_its_own_prediction(people, scaler, how):
    model, run = known(scaler), people[2]
    told = dict(how=how, rounds=2, seed=1, progress=False)
    before = fc.reconstruct_recording(model, run, **told)
    assert (before.count >= (1 if how == "first" else 2)).all() and np.isfinite(before.prediction).all()
    bold, at = run.bold.copy(), slice(2 * FRAMES, 3 * FRAMES)
    bold[at, 11] += 3 * np.sin(np.arange(FRAMES))
    after = fc.reconstruct_recording(model, run.replace(bold=bold), **told)
    assert np.array_equal(before.prediction[at, 11], after.prediction[at, 11])
    assert not np.array_equal(before.prediction, after.prediction)  # others did see it


def test_reconstruction_is_the_mean_over_passes_by_hand(people, scaler):
    model, run = known(scaler), people[2]
    found = fc.reconstruct_recording(model, run, 0.4, seed=5, progress=False)
    span = WINDOW * FRAMES
    x = torch.from_numpy(scaler.transform(run.bold).T[None])
    np.testing.assert_allclose(found.target, x[0].T, atol=1e-5)
    window = x[..., span : 2 * span]
    total, count = torch.zeros(100, span), torch.zeros(100, span)
    for mask in torch.from_numpy(fc.covering_masks(100, WINDOW, 0.4, seed=5, window=span)):
        with torch.no_grad():
            guess = model(window, mask=mask[None]).logits[0].flatten(1)
        at = mask.repeat_interleave(FRAMES, 1)
        total, count = total + guess * at, count + at
    np.testing.assert_allclose(found.prediction[span : 2 * span], (total / count).T, atol=1e-5)
    np.testing.assert_array_equal(found.count[span : 2 * span], count.T)
    spread = np.square(found.target - found.target.mean(0))
    expected = 1 - np.square(found.target - found.prediction).sum() / spread.sum()
    assert found.total_r2 == pytest.approx(expected, abs=1e-5)
    v = 31
    assert found.r2[v] == pytest.approx(1 - np.square(found.target - found.prediction)[:, v].sum() / spread[:, v].sum(), abs=1e-5)


def test_batches_do_not_matter_and_seeds_do(people, scaler):
    model, run = known(scaler), people[0]
    one, two, three = (
        fc.reconstruct_recording(model, run, seed=s, batch_size=b, progress=False) for s, b in ((0, 8), (0, 1), (1, 8))
    )
    np.testing.assert_allclose(one.prediction, two.prediction, atol=2e-6)
    assert not np.allclose(one.prediction, three.prediction, atol=1e-4)
    with pytest.raises(ValueError, match="how='mean' or 'first', found 'last'"):
        fc.reconstruct_recording(model, run, how="last")


def test_parcels_without_data_are_not_made_up(people, scaler):
    bold = people[0].bold.copy()
    bold[:, 7] = 0
    found = fc.reconstruct_recording(known(scaler), people[0].replace(bold=bold, allow_constant=1), progress=False)
    assert np.isnan(found.prediction[:, 7]).all() and (found.count[:, 7] == 0).all()
    assert np.isfinite(np.delete(found.prediction, 7, 1)).all() and np.isfinite(found.total_r2)


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def desk(tmp_path_factory, people, scaler):
    folder = tmp_path_factory.mktemp("forecast")
    known(scaler).save_pretrained(folder / "model")
    write_store(Source(Record.from_run(r) for r in people), folder / "store", progress=False)
    return folder


def program(desk, *words):
    command = [sys.executable, "-m", "fmri_book.cli", "forecast", *words]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=desk, timeout=120, check=False)


def test_the_program_forecasts_and_does_not_overwrite(desk, people, scaler):
    key = next(k for k in _keys(desk) if "0002" in k)
    line = ("model", "store", "--key", key, "--blocks", "2", "--until", "112", "-o", "next.npz", "--json")
    done = program(desk, *line)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["frames"] == 2 * FRAMES and told["parcels"] == 100 and told["from"] == pytest.approx(112)
    found = fc.RunForecast.load(desk / "next.npz")
    expected = fc.forecast_run(known(scaler), people.run("sim-0002"), 2, until=112)
    np.testing.assert_allclose(found.prediction, expected.prediction, rtol=1e-4)
    before = (desk / "next.npz").read_bytes()
    again = program(desk, *line)
    assert again.returncode == 2 and "--overwrite" in again.stderr and (desk / "next.npz").read_bytes() == before


def _keys(desk):
    from fmri_book.storage import Store

    return list(Store(desk / "store").index["key"])


def test_the_program_says_what_is_wrong(desk, capsys):
    from fmri_book import cli

    def call(*words):
        status = cli.main(["forecast", *map(str, words)])
        return status, capsys.readouterr().err

    model, store, key = desk / "model", desk / "store", _keys(desk)[0]
    other = desk / "other"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text('{"model_type": "vit"}')
    for words, says in (
        ((model, store, "-o", desk / "x.csv"), "--key"),
        ((model, store, "--key", key, "-o", desk / "x.txt"), ".csv"),
        ((model, desk / "nothing.nii.gz", "-o", desk / "x.csv"), "nothing"),
        ((other, store, "--key", key, "-o", desk / "x.csv"), "expected a BrainLM (model_type 'brainlm'), found vit"),
        ((desk, store, "--key", key, "-o", desk / "x.csv"), "config.json"),
        ((model, store, "--key", key, "--blocks", "0", "-o", desk / "x.csv"), "blocks from 1 up"),
        ((model, store, "--key", key, "--until", "9999", "-o", desk / "x.csv"), "--until"),
        ((model, store, "--key", key, "--until", "nan", "-o", desk / "x.csv"), "expected --until as a number"),
        ((model, store, "--key", key, "--until", "inf", "-o", desk / "x.csv"), "expected --until as a number"),
    ):
        status, err = call(*words)
        assert status == 2 and says in err, (words, err)
    assert not list(desk.glob("x.*")) and not list(desk.glob(".*x*"))
