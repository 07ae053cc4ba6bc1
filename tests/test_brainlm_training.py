"BrainLM's recipes: data in, scaling, masks, exact resume, several processes, targets, baselines, atlases, the command line."

import csv
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fmri_book import brainlm_training as B
from fmri_book import cli
from fmri_book import training as T
from fmri_book.brainlm import BrainLMForFinetuning, BrainLMForPretraining
from fmri_book.data import Space
from fmri_book.formats import ArrowRuns, _Table, open_source, write_arrow
from fmri_book.splits import Split
from fmri_book.storage import Layout, Record, Store, write_store

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parent.parent
SHARED = next((p for p in (ROOT / "shared", ROOT.parent / "shared") if (p / "data").exists()), None)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PARCELS, LENGTH = 100, 40


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recordings(list):
    layout = Layout.of("schaefer100")


def recordings(people=6, sessions=2, seed=0, change=None):
    "Random walks that return, in units of their own, with an age that is their spread, a group, and a gap in the ages."
    rng, made = np.random.default_rng(seed), Recordings()
    for i in range(people):
        for s in range(sessions):
            x = rng.standard_normal((LENGTH, PARCELS)).astype(np.float32)
            for t in range(1, LENGTH):
                x[t] += 0.8 * x[t - 1]
            traits = {"age": 20.0 + 7 * i if i != 1 else None, "group": "AB"[i % 2], "site": 1.0 * (i % 3)}
            x = 100 + x * (1 + i) * np.linspace(1, 3, PARCELS, dtype=np.float32)
            made.append(Record(x, 2.0, f"{i:02d}", str(s + 1), "rest", meta={"phenotypes": traits}))
            if change:
                change(made[-1])
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brainlm") / "store"
    write_store(recordings(), folder, progress=False)
    return folder


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    "Drawing takes most of the time of a tiny run; the test that is about figures puts them back."
    monkeypatch.setattr(B.BrainLMRecipe, "figure", lambda self, output, title: None)


TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
TINY |= dict(num_timepoints_per_voxel=16, timepoint_patching_size=4)
FEW = {"device": "cpu", "progress": False, "steps": 4, "batch_size": 4, "eval_every": 4, "lr": 1e-2}


@pytest.fixture
def pretrain(store, tmp_path):
    def make(name="run", *changes, **options):
        fixed = FEW | {
            "out": str(tmp_path / name),
            "data": {"train": str(store), "held_out": 0.34},
            "model": TINY,
        }
        return T.make_config("brainlm", "ci", fixed, options, *changes)

    return make


@pytest.fixture(scope="module")
def pretrained(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("brainlm") / "pretrained"
    fixed = FEW | {
        "out": str(out),
        "data": {"train": str(store), "held_out": 0.34},
        "model": TINY | {"attention_probs_dropout_prob": 0.2},
    }
    return T.train(T.make_config("brainlm", "ci", fixed))


@pytest.fixture
def finetune(store, pretrained, tmp_path):
    def make(name="tuned", *changes, **options):
        fixed = FEW | {"out": str(tmp_path / name), "data": {"train": str(store), "held_out": 0.34}}
        fixed |= {"model": {"pretrained": str(pretrained.folder)}, "target": {"columns": ["age"]}}
        return T.make_config("brainlm-finetune", "ci", fixed, options, *changes)

    return make


def losses(result):
    return [row["loss"] for row in result.log]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def ready(config):
    "A recipe as the loop has it after its setup."
    made = T.find_recipe(config.recipe)(config)
    made.prepare()
    made.setup(torch.device("cpu"))
    return made


# ---------------------------------------------------------------------------------------------------------- pretraining


def test_the_scaler_is_of_the_training_people_and_travels_with_every_checkpoint(pretrained, store):
    runs = Store(store)
    ours = np.concatenate([r.values for r in runs if r.subject in ("00", "01", "02", "03")]).astype(
        np.float64
    )
    low, middle, high = np.quantile(ours, (0.25, 0.5, 0.75), axis=0)
    for folder in (pretrained.folder / "model", T.checkpoints(pretrained.folder)[-1]):
        config = BrainLMForPretraining.from_pretrained(folder).config
        assert np.allclose(config.scaler["centre"], middle, rtol=1e-6)
        assert np.allclose(config.scaler["scale"], high - low, rtol=1e-5)
        assert (config.scaler["n_subjects"], config.tr, config.space, config.zscore) == (
            4,
            2.0,
            "schaefer100",
            False,
        )
        assert np.allclose(config.coordinates, Space.named("schaefer100").coords, atol=1e-3)
    model = BrainLMForPretraining.from_pretrained(folder).eval()
    raw = torch.from_numpy(np.array(runs.read(0, 0, 16)))[None]
    scaled = ((raw - torch.tensor(middle)) / torch.tensor(high - low)).float().transpose(1, 2)
    assert torch.allclose(
        model.embed({"signal": raw}).patch, model.embed({"signal_vectors": scaled}).patch, atol=1e-4
    )


def test_sets_are_evaluated_under_both_masks(pretrained):
    assert [e["set"] for e in pretrained.evaluations] == [
        f"{s}, {m}" for s in ("held out", "train") for m in ("random", "forward")
    ]
    for e in pretrained.evaluations:
        assert e["loss"] == pytest.approx(e["mse"], rel=1e-5) and -5 < e["r2"] < 1 and e["mae"] > 0
    table = pd.read_csv(pretrained.folder / "recordings.csv", dtype=str)
    assert table.part.value_counts().to_dict() == {"train": 8, "held out": 4} and len(table) == 12


def test_measures_are_scikit_learns_over_hidden_frames_alone(pretrain):
    from sklearn.metrics import mean_absolute_error, r2_score

    recipe = ready(pretrain())
    recipe.model.eval()
    sums, truth, made, lines = recipe.blank("x"), [], [], []
    data = recipe.sets["held out, forward"]
    for numbers in ([0, 1, 2], [3, 4]):
        batch = data.__getitems__(numbers)
        with torch.no_grad():
            output = recipe.model(**recipe.inputs(batch, T.Draw((0, 2**32))))
        assert output.mask[..., -1].all() and not output.mask[..., :-1].any()
        sums += recipe.sums("x", output, batch)
        signal = recipe.shown["signal_vectors"]
        truth.append(signal[..., -4:].flatten()), made.append(output.logits[:, :, -1].flatten())
        lines.append(signal[..., -5:-4].expand(-1, -1, 4).flatten())  # persistence
    truth, made, lines = (torch.cat(x).numpy() for x in (truth, made, lines))
    found = recipe.measures("x", sums)
    assert found["r2"] == pytest.approx(r2_score(truth, made), rel=1e-5)
    assert found["r2_lines"] == pytest.approx(r2_score(truth, lines), rel=1e-5)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, made), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**31))
def test_straight_lines_are_numpys_interpolation(n, seed):
    rng = np.random.default_rng(seed)
    x, hidden = rng.standard_normal(n).astype(np.float32), rng.random(n) < 0.6
    seen = np.flatnonzero(~hidden)
    expected = np.interp(np.arange(n), seen, x[seen]) if len(seen) else np.zeros(n)
    assert np.allclose(B.straight_lines(torch.from_numpy(x), torch.from_numpy(hidden)), expected, atol=1e-6)


def test_masks_belong_to_clips_whatever_batch_they_are_in(pretrain):
    recipe = ready(pretrain("masks", {"model": {"forward_mask_prob": 0.0}}))
    data, draw = recipe.train_data(), T.Draw((7, 0), (3, 0, 0))
    together = recipe.inputs(data.batch([5, 2, 9]), draw)["mask"]
    alone = [recipe.inputs(data.batch([i]), T.Draw((7, 0), (8, 1, 1)))["mask"][0] for i in (5, 2, 9)]
    assert torch.equal(together, torch.stack(alone)) and not torch.equal(together[0], together[1])


@pytest.mark.parametrize("kind", ["brainlm", "lora"])
def test_resumed_is_uninterrupted(pretrain, finetune, kind):
    options = {"ema": 0.9, "accumulate": 2, "batch_size": 2}
    make = pretrain if kind == "brainlm" else finetune
    chance = (
        {"model": {"attention_probs_dropout_prob": 0.2}}
        if kind == "brainlm"
        else {"model": {"method": "lora"}}
    )
    whole = T.train(make("whole", chance, options))
    trainer = T.Trainer(make("part", chance, options))
    trainer._open_folder()
    for _ in range(2):
        trainer._write("log.jsonl", [trainer.one_step()])
    trainer.save()
    torch.manual_seed(123)  # a new process has other states
    part = T.train(make("part", chance, options))
    assert losses(part) == losses(whole) and len(losses(whole)) == 4
    assert same(part.model.state_dict(), whole.model.state_dict())


def test_many_small_batches_are_one_large(pretrain):
    one, four = (
        T.train(pretrain(n, steps=2, batch_size=b, accumulate=a))
        for n, b, a in (("one", 4, 1), ("four", 1, 4))
    )
    assert np.allclose(losses(one), losses(four), rtol=1e-5)
    # Adam divides a gradient by its own size: weights may differ where it is only rounding, its length may not
    norms = ([row["grad_norm"] for row in r.log] for r in (one, four))
    assert np.allclose(*norms, rtol=1e-4)


def test_the_figure_shows_truth_and_prediction(pretrain, monkeypatch):
    monkeypatch.undo()
    done = T.train(pretrain("drawn", steps=1, eval_every=1))
    drawn = sorted(p.name for p in (done.folder / "figures").iterdir())
    assert (
        len(drawn) == 4
        and drawn[0].startswith("held-out-forward")
        and (done.folder / "figures" / drawn[0]).stat().st_size > 5000
    )


def test_simulated_and_example_data_train(tmp_path):
    for train, more in (("simulated", {"subjects": 3, "run_frames": 40, "tasks": ["rest"]}), ("example", {})):
        config = T.make_config(
            "brainlm",
            "ci",
            FEW
            | {
                "out": str(tmp_path / train),
                "steps": 1,
                "eval_clips": 2,
                "data": {"train": train} | more,
                "model": TINY,
            },
        )
        done = T.train(config)
        assert (
            done.finished
            and done.model.config.zscore == (train == "example")
            and done.model.config.num_brain_voxels == 100
        )
    made = B.simulated_people(2, 30, sessions=2, tr=0.7)
    assert (
        len(made) == 4
        and made[0].tr == 0.7
        and {"group", "score", "Vis–SomMot"} <= set(made[0].meta["phenotypes"])
    )


# ------------------------------------------------------------------------------------------------------------ bad input


def dead(record):
    if record.subject in ("01", "05") and record.session == "2":
        record.values[:, [3, 50]] = 7.0


def test_dead_parcels_are_named_or_hidden(tmp_path, pretrain):
    write_store(recordings(change=dead), tmp_path / "dead", progress=False)
    bad = {"data": {"train": str(tmp_path / "dead")}}
    with pytest.raises(
        ValueError,
        match=r"2 of 12 recordings.*sub-01_ses-2_task-rest: 2 parcels \(3 \(LH_Vis_4\), 50 \(RH_Vis_1\)\)",
    ):
        T.train(pretrain("refused", bad))
    with pytest.warns(UserWarning, match="2 have parcels without data"):
        recipe = ready(pretrain("missing", bad, {"data": {"bad_parcels": "missing"}}))
    table = pd.read_csv(Path(recipe.config.out) / "recordings.csv", dtype=str).set_index("key")
    assert table.parcels_without_data["sub-01_ses-2_task-rest"] == "2" and len(table) == 12
    data = recipe.train_data()
    i = next(i for i in range(len(data)) if data[i]["key"] == "sub-01_ses-2_task-rest")
    given, draw = recipe.inputs(data.batch([i]), T.Draw((0, 0))), T.Draw((0, 0))
    assert given["missing"].nonzero()[:, 1].tolist() == [3, 50]
    recipe.model.eval()
    with torch.no_grad():
        loss = recipe.model(**given).loss
        given["signal_vectors"][0, [3, 50]] = float("nan")
        assert torch.equal(recipe.model(**given).loss, loss)
    assert not torch.isfinite(recipe.inputs(data.batch([i]), draw)["signal_vectors"]).logical_not().any()


def test_a_parcel_that_is_dead_in_everybody_is_named(tmp_path, pretrain):
    def outside(record):
        record.values[:, 3] = 7.0

    write_store(recordings(change=outside), tmp_path / "outside", progress=False)
    data = {"train": str(tmp_path / "outside"), "bad_parcels": "missing"}
    with pytest.raises(ValueError, match=r"found none among 8; .*: 1 parcels \(3 \(LH_Vis_4\)\). Leave these out"):
        T.train(pretrain("outside", {"data": data}))


def test_recordings_that_cannot_be_used_are_named(tmp_path, pretrain, store):
    slow = recordings()
    slow[3].tr = 3.0
    write_store(slow, tmp_path / "mixed", progress=False)
    with pytest.raises(ValueError, match=r"TR of 2 s in every run, found 3 s in sub-01_ses-2"):
        T.train(pretrain("mixed", {"data": {"train": str(tmp_path / "mixed")}}))
    short = recordings()
    short[0].values = short[0].values[:10]
    write_store(short, tmp_path / "short", progress=False)
    with pytest.warns(UserWarning, match="1 recordings are shorter"):
        recipe = ready(pretrain("short", {"data": {"train": str(tmp_path / "short")}}))
    table = pd.read_csv(Path(recipe.config.out) / "recordings.csv", dtype=str).set_index("key")
    assert table.part["sub-00_ses-1_task-rest"] == "not used: 10 frames, fewer than a window of 16"
    with pytest.raises(ValueError, match="zscore=true"):
        T.train(pretrain("z", {"data": {"zscore": True}}))
    flat = Recordings(
        [Record(np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32), 1.0, "a")]
    )
    flat.layout = Layout.flat(np.ones((2, 3), bool))
    write_store(flat, tmp_path / "flat", progress=False)
    with pytest.raises(ValueError, match="expected parcels, found flat"):
        T.train(pretrain("flat", {"data": {"train": str(tmp_path / "flat")}}))


def test_a_split_decides_who_trains(tmp_path, pretrain, store):
    split = Split(
        {"train": ("00", "02"), "validation": ("05",), "test": ("01",)}, ("subject",), {"train": 1.0}, 0, "x"
    )
    split.save(tmp_path / "split.json")
    recipe = ready(pretrain("split", {"data": {"split": str(tmp_path / "split.json")}}))
    assert {r["subject"] for r in (recipe.train_data()[i] for i in range(len(recipe.train_data())))} == {
        "00",
        "02",
    }
    table = pd.read_csv(Path(recipe.config.out) / "recordings.csv", dtype=str)
    assert dict(zip(table.subject, table.part)) == {
        "00": "train", "02": "train", "05": "held out", "01": "not used: in the part 'test' of the split",
        "03": "not used: not in the split", "04": "not used: not in the split",
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- Arrow


def published(folder, values, ages, names=None, column="Voxelwise_RobustScaler_Normalized_Recording"):
    "Tables as BrainLM's: no TR, no session; phenotypes in columns."
    import pyarrow as pa

    tables = {}
    for i, (x, age) in enumerate(zip(values, ages)):
        where = "train" if i < len(values) - 2 else "val"
        if where not in tables:
            tables[where] = _Table(folder / where)
        table = tables[where]
        cell = pa.array([x.tolist()], pa.list_(pa.list_(pa.float32())))
        who = f"P{i}" if names is None else names[i]
        table.add({column: cell, "Patient ID": pa.array([who]), "Age.At.MHQ": pa.array([age], pa.float64())})
    tables["coords"] = _Table(folder / "coords")
    places = Space.named("schaefer100").coords
    tables["coords"].add({"Index": np.arange(1, 101)} | {a: places[:, i] for i, a in enumerate("XYZ")})
    for table in tables.values():
        table.finish()
    return folder


def test_published_tables_train_and_tune(tmp_path, pretrain, finetune):
    rng = np.random.default_rng(1)
    values = [rng.standard_normal((40, PARCELS)).astype(np.float32) for _ in range(6)]
    folder = published(tmp_path / "tables", values, [40.0, 50.0, None, 60.0, 55.0, 45.0])
    data = {"data": {"train": str(folder), "tr": 0.735}}
    done = T.train(pretrain("arrow", data, steps=1, eval_every=1))
    table = pd.read_csv(done.folder / "recordings.csv", dtype=str)
    assert table.part.tolist() == ["train"] * 4 + ["held out"] * 2 and done.model.config.tr == 0.735
    with pytest.raises(ValueError, match="TR|tr"):
        T.train(pretrain("no-tr", {"data": {"train": str(folder)}}))
    asked = {"target": {"columns": ["Age.At.MHQ"]}, "model": {"pretrained": str(done.folder)}}
    tuned = T.train(finetune("arrow-tuned", data, asked, steps=1, eval_every=1, batch_size=2))
    table = pd.read_csv(tuned.folder / "recordings.csv", dtype=str)
    assert table.part.tolist()[2] == "not used: no target" and tuned.model.config.target_centre == [50.0]
    both = published(tmp_path / "both", values, [1.0] * 6, names=["a", "b", "c", "d", "a", "e"])
    with pytest.raises(ValueError, match="every person in one table.*a"):
        T.train(pretrain("of-both", {"data": {"train": str(both), "tr": 0.735}}))
    values[1][3, [4, 9]] = np.nan
    broken = published(tmp_path / "broken", values, [1.0] * 6)
    with pytest.raises(ValueError, match=r"train, row 1: NaN or infinity in 2 parcels \(4, 9\)"):
        T.train(pretrain("of-broken", {"data": {"train": str(broken), "tr": 0.735}}))


def test_what_is_written_as_arrow_comes_back(tmp_path, store, pretrain):
    write_arrow(open_source(store), tmp_path / "out", split=lambda r: "val" if r.subject == "05" else "train")
    assert len(ArrowRuns(tmp_path / "out")) == 12
    recipe = ready(pretrain("back", {"data": {"train": str(tmp_path / "out")}}))
    assert recipe.part.count("held out") == 2 and recipe.model.config.tr == 2.0
    ours = np.concatenate([r.values for r in Store(store) if r.subject != "05"])
    assert np.allclose(recipe.model.config.scaler["centre"], np.median(ours, 0), rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------- targets


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=3, max_size=8, unique=True), st.sampled_from(B.SCALINGS))
def test_scaled_targets_come_back(values, how):
    from fmri_book.brainlm import BrainLMConfig

    column = np.array(values)[:, None]
    if np.nanstd(column) < 1e-3:
        return
    fields = B.scale_targets(np.vstack([column, [[np.nan]]]), how)
    model = BrainLMForFinetuning(BrainLMConfig(**TINY, num_brain_voxels=5, head="linear", **fields))
    labels = torch.tensor(column, dtype=torch.float64)
    centre, scale = (torch.tensor(fields[k]) for k in ("target_centre", "target_scale"))
    scaled = (model._transformed(labels) - centre) / scale
    assert torch.allclose(model._own_units(scaled * scale + centre), labels, rtol=1e-6, atol=1e-6)
    if how == "zscore":
        assert abs(scaled.mean()) < 1e-6 and abs(scaled.std(correction=0) - 1) < 1e-6
    if how.endswith("max"):
        assert abs(scaled.abs().max() - 1) < 1e-6


def index(*rows):
    return pd.DataFrame([(f"{s}-{v}", s, v) for s, v in rows], columns=["key", "subject", "session"])


def test_targets_come_from_tables_by_person_and_visit(tmp_path):
    path = tmp_path / "people.tsv"
    path.write_text(
        "participant_id\tses\tage\tsex\nsub-01\tses-1\t30\tF\nsub-01\tses-2\t31\tF\nsub-02\tses-1\tn/a\tM\n"
    )
    who = index(("01", "1"), ("01", "2"), ("02", "1"), ("03", "1"))
    found = B.targets_of(who, [], ["age"], table=str(path), session="ses")
    assert [found.values[k][0] for k in ("01-1", "01-2")] == [30, 31] and np.isnan(
        [found.values["02-1"], found.values["03-1"]]
    ).all()
    found = B.targets_of(who, [], ["sex"], "classification", table=str(path), session="ses")
    assert found.classes == ["F", "M"] and [found.values[k][0] for k in ("01-1", "02-1")] == [0, 1]
    with pytest.raises(ValueError, match="found two that differ in age"):
        B.targets_of(who, [], ["age"], table=str(path))
    with pytest.raises(ValueError, match="expected numbers in sex, found 'F'"):
        B.targets_of(who, [], ["sex"], table=str(path), session="ses")
    with pytest.raises(ValueError, match="expected the columns iq"):
        B.targets_of(who, [], ["iq"], table=str(path))
    with pytest.raises(ValueError, match="one of the classes of training, F, found 'M'"):
        B.targets_of(who, [], ["sex"], "classification", table=str(path), session="ses", classes=["F"])
    with pytest.raises(ValueError, match="phenotypes iq with the recordings, found age"):
        B.targets_of(who, [{"phenotypes": {"age": 3}}] * 4, ["iq"])


def test_nothing_of_held_out_people_reaches_the_model(tmp_path, finetune):
    def other(record):
        if record.subject in ("04", "05"):
            record.meta["phenotypes"] |= {"age": 900.0}
            record.values[:] = record.values * 5 - 300

    write_store(recordings(change=other), tmp_path / "other", progress=False)
    scratch = {"model": {"pretrained": None} | TINY}
    a = T.train(finetune("a", scratch))
    b = T.train(finetune("b", scratch, {"data": {"train": str(tmp_path / "other")}}))
    assert a.model.config.to_dict() == b.model.config.to_dict() and same(
        a.model.state_dict(), b.model.state_dict()
    )
    assert a.model.config.target_centre == [pytest.approx(np.mean([20, 34, 41]))]  # 01 has no age
    assert a.evaluations[0]["mae/age"] != b.evaluations[0]["mae/age"]


def test_predictions_are_means_over_windows_in_years(finetune, store):
    done = T.train(finetune("tuned", {"target": {"columns": ["age", "site"]}}, precision="fp32"))
    model, runs = BrainLMForFinetuning.from_pretrained(done.folder / "model").eval(), Store(store)
    table = pd.read_csv(done.folder / "predictions" / "held-out.csv", dtype={"subject": str})
    assert set(table.subject) == {"04", "05"} and set(table.windows) == {3}
    for row, key in enumerate(runs.index["key"]):
        if (mine := table[table.key == key]).empty:
            continue
        clips = torch.from_numpy(np.stack([runs.read(row, s, 16) for s in (0, 12, 24)]))
        with torch.no_grad():
            made = model(**model.scaled({"signal": clips})).predictions.mean(0)
        assert np.allclose(mine.model, made, rtol=1e-4)
        assert mine.truth.tolist() == [20 + 7 * int(mine.subject.iloc[0]), int(mine.subject.iloc[0]) % 3]
        assert mine.trivial.tolist() == pytest.approx([np.mean([20, 34, 41]), np.mean([0, 1, 2, 0])])
    last, trainer = (
        done.evaluations[0],
        T.Trainer(finetune("tuned", {"target": {"columns": ["age", "site"]}})),
    )
    trainer.load(T.checkpoints(done.folder)[-1])
    again = trainer.evaluate()
    assert again["held out"] == last["loss"] and trainer.measured["held out"]["mae/age"] == last["mae/age"]
    own = table[table.target == "age"]
    assert last["mae/age"] == pytest.approx((own.model - own.truth).abs().mean())
    scores = B.prediction_scores(done.folder / "predictions" / "held-out.csv", 20).set_index(
        ["target", "rival", "score"]
    )
    assert scores.value["age", "model", "mae"] == pytest.approx(last["mae/age"]) and scores.people.eq(2).all()


def test_probe_lora_and_full(finetune, pretrained):
    before = load_file(pretrained.folder / "model" / "model.safetensors")
    moved = {}
    for method in ("probe", "lora", "full"):
        done = T.train(finetune(method, {"model": {"method": method, "pooling": "both"}}))
        after = load_file(done.folder / "model" / "model.safetensors")
        assert not any("lora" in k or "base_layer" in k for k in after)
        body = [k for k in after if k.startswith("model.")]
        moved[method] = {k.split(".", 1)[1] for k in body if not torch.equal(before[k], after[k])}
        alone = BrainLMForFinetuning.from_pretrained(done.folder / "model").eval()
        x = torch.randn(2, PARCELS, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.allclose(alone(x).predictions, done.model(x).predictions, rtol=1e-4, atol=1e-3)
    assert moved["probe"] == set()
    assert moved["lora"] == {f"layers.0.attention.{m}.weight" for m in ("query", "value")}
    assert len(moved["full"]) > 10 and "embeddings.mask_token" not in moved["full"]


def test_classes_are_weighed_and_scored(finetune):
    done = T.train(
        finetune(
            "classes",
            {"target": {"columns": ["group"], "kind": "classification"}},
            batch_size=2,
            accumulate=2,
        )
    )
    config, row = done.model.config, done.evaluations[0]
    assert config.target_names == ["A", "B"] and config.class_weights == [1.0, 1.0]
    table = pd.read_csv(done.folder / "predictions" / "held-out.csv")
    assert (
        np.allclose(table.groupby("key").model.sum(), 1, atol=1e-5)
        and table.groupby("key").truth.sum().eq(1).all()
    )
    assert row["balanced_accuracy_trivial"] == 0.5 and {"auc", "auc_connectivity"} <= row.keys()
    with pytest.raises(ValueError, match="two or more classes"):
        T.train(
            finetune(
                "one", {"target": {"columns": ["group"], "kind": "classification"}, "data": {"held_out": 0.8}}
            )
        )


def test_scores_are_scikit_learns():
    from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score

    rng = np.random.default_rng(0)
    truth, made = rng.standard_normal(30), rng.standard_normal(30)
    assert (
        B.regression_scores(truth, made)["r2"] == pytest.approx(r2_score(truth, made))
        and r2_score(truth, made) < 0
    )
    classes, chances = rng.integers(0, 3, 40), rng.dirichlet(np.ones(3), 40)
    found = B.class_scores(classes.astype(float), chances)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(classes, chances.argmax(1)))
    areas = [roc_auc_score(classes == c, chances[:, c]) for c in range(3)]
    assert found["auc"] == pytest.approx(np.mean(areas))


def test_the_linear_baseline_finds_what_is_there_and_keeps_people_together():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    x, people = rng.standard_normal((60, 300)).astype(np.float32), [f"p{i // 2}" for i in range(60)]
    y = 3 * x[:, :100].mean(1) * 10 + 5
    made = B.linear_baseline(x[:40], y[:40], people[:40], x[40:])
    # the same as some ridge on the features themselves: the inner products hold all of it
    c = x[:40] - x[:40].mean(0)
    unit = np.sqrt(np.linalg.eigvalsh(c @ c.T)[1:].mean())
    some = [
        Ridge(a).fit(c / unit, y[:40]).predict((x[40:] - x[:40].mean(0)) / unit)
        for a in np.logspace(-3, 3, 13)
    ]
    assert min(np.abs(made - s).max() for s in some) < 1e-2
    group = (y > np.median(y)).astype(float)
    chances = B.linear_baseline(x[:40], group[:40], people[:40], x[40:], "classification", 2)
    assert np.allclose(chances.sum(1), 1) and B.class_scores(group[40:], chances)["auc"] > 0.5


def test_a_model_of_other_recordings_is_refused(tmp_path, finetune, store):
    bigger = recordings()
    bigger.layout = Layout.of("schaefer200")
    for record in bigger:
        record.values = np.repeat(record.values, 2, 1)
    write_store(bigger, tmp_path / "bigger", progress=False)
    with pytest.raises(ValueError, match="recordings on schaefer100, as in pretraining, found schaefer200"):
        T.train(finetune("bigger", {"data": {"train": str(tmp_path / "bigger")}}))
    faster = recordings()
    for record in faster:
        record.tr = 1.0
    write_store(faster, tmp_path / "faster", progress=False)
    with pytest.raises(ValueError, match="TR of 2 s"):
        T.train(finetune("faster", {"data": {"train": str(tmp_path / "faster")}}))
    with pytest.raises(FileNotFoundError, match="expected a folder with config.json"):
        T.train(finetune("nowhere", {"model": {"pretrained": str(tmp_path / "nowhere")}}))
    with pytest.raises(ValueError, match="probe, full, lora"):
        T.train(finetune("method", {"model": {"method": "magic"}}))


# --------------------------------------------------------------------- several sets, whose recordings have the same names


def other_place(record):
    "The same names as at home, another person behind each: ten times as old, and parcel 9 is dead in the first session."
    record.meta["phenotypes"] |= {"age": 900.0, "group": "B"}
    if record.session == "1":
        record.values[:, 9] = 5.0


@pytest.mark.filterwarnings("ignore:.*names of training people")
def test_sets_with_the_same_names_do_not_mix(tmp_path, finetune, store):
    write_store(recordings(seed=1, change=other_place), tmp_path / "there", progress=False)
    there = {"data": {"evaluate": {"there": str(tmp_path / "there")}, "bad_parcels": "missing"}}
    recipe = ready(finetune("two", there))
    draw, home = T.Draw((0, 0)), recipe.train_data()
    i = next(i for i in range(len(home)) if home[i]["key"] == "sub-00_ses-1_task-rest")
    given = recipe.inputs(home.batch([i]), draw)
    assert given["labels"].tolist() == [[20.0]] and "missing" not in given
    given = recipe.inputs(recipe.eval_data()["there"].__getitems__([0]), draw)
    assert given["labels"].tolist() == [[900.0]] and given["missing"].nonzero().tolist() == [[0, 9]]
    done = T.train(finetune("run", there))
    alone = T.train(finetune("alone", {"data": {"bad_parcels": "missing"}}))
    assert same(done.model.state_dict(), alone.model.state_dict())
    by_set = {e["set"]: e for e in done.evaluations}
    table = pd.read_csv(done.folder / "predictions" / "there.csv")
    assert by_set["there"]["mae/age"] == pytest.approx((900 - table.model).mean()) and len(table) == 12
    assert by_set["held out"]["mae/age"] == alone.evaluations[0]["mae/age"]


@pytest.mark.filterwarnings("ignore:.*names of training people", "ignore:.*evaluation set 'there' is nan")
def test_a_further_set_needs_no_targets(tmp_path, finetune):
    def nameless(record):
        record.meta.pop("phenotypes")

    write_store(recordings(seed=1, change=nameless), tmp_path / "there", progress=False)
    done = T.train(finetune("run", {"data": {"evaluate": {"there": str(tmp_path / "there")}}}))
    table = pd.read_csv(done.folder / "predictions" / "there.csv")
    assert len(table) == 12 and table.truth.isna().all() and table.model.notna().all()
    losses_of = {e["set"]: e["loss"] for e in done.evaluations}
    assert losses_of["there"] is None and np.isfinite(losses_of["held out"])  # no loss, rather than a perfect one


@pytest.mark.filterwarnings("ignore:.*names of training people")
def test_one_tr_in_all_sets(tmp_path, pretrain, finetune):
    def slow(record):
        record.tr = 1.0

    def partly(record):
        record.tr = 1.0 if record.subject == "05" else 2.0

    write_store(recordings(change=slow), tmp_path / "slow", progress=False)
    write_store(recordings(change=partly), tmp_path / "partly", progress=False)
    for make in (pretrain, finetune):
        for data in ({"evaluate": {"there": str(tmp_path / "slow")}}, {"train": str(tmp_path / "partly")}):
            with pytest.raises(ValueError, match=r"TR of 2 s in every run, found 1 s"):
                T.train(make("run", {"data": data}))
    with pytest.raises(ValueError, match=r"expected a TR of 2 s, as in pretraining, found data.tr=1"):
        T.train(finetune("run", {"data": {"tr": 1.0}}))


def test_recordings_without_an_evaluated_window_have_no_prediction(finetune):
    done = T.train(finetune("few", eval_clips=2))
    path = done.folder / "predictions" / "held-out.csv"
    table, row = pd.read_csv(path), done.evaluations[0]
    assert 0 < (table.windows == 0).sum() < len(table) == 4
    assert table.model.isna().tolist() == (table.windows == 0).tolist()
    seen = table[table.windows > 0]
    assert row["mae/age"] == pytest.approx((seen.model - seen.truth).abs().mean())
    assert row["mae_trivial/age"] == pytest.approx((seen.trivial - seen.truth).abs().mean())
    assert B.prediction_scores(path, 0).recordings.eq(len(seen)).all()


def test_a_head_that_was_trained_before_starts_anew(finetune):
    first = T.train(finetune("first", steps=6))
    again = {"model": {"pretrained": str(first.folder)}, "target": {"columns": ["site"]}}
    recipe = ready(finetune("second", again))
    head, old = recipe.model.mlp_pred_head.state_dict(), first.model.mlp_pred_head.state_dict()
    assert not any(torch.equal(head[k], old[k]) for k in head if "weight" in k)
    assert not any(head[k].any() for k in head if "bias" in k)
    assert torch.equal(recipe.model.model.layernorm.weight, first.model.model.layernorm.weight)
    assert recipe.model.config.target_names == ["site"]


def test_held_out_people_of_the_pretraining_are_named(tmp_path, finetune, recwarn):
    ready(finetune("same people"))
    assert not [w for w in recwarn if "held-out people" in str(w.message)]
    parts = {"train": ("01", "02", "03", "05"), "validation": ("00", "04")}
    Split(parts, ("subject",), {"train": 1.0}, 0, "x").save(tmp_path / "other.json")
    with pytest.warns(UserWarning, match=r"1 of 2 held-out people have names of people trained on in .*pretrained \(00\)"):
        ready(finetune("others", {"data": {"split": str(tmp_path / "other.json")}}))


def test_targets_that_cannot_be_meant_are_refused(tmp_path, finetune):
    def table(**cells):
        ages = {f"{i:02d}": 30 + i for i in range(6)} | cells
        (tmp_path / "people.csv").write_text("subject,age\n" + "".join(f"{k},{v}\n" for k, v in ages.items()))
        return {"target": {"table": str(tmp_path / "people.csv")}}

    with pytest.raises(ValueError, match="finite numbers in age, found .*inf.* for sub-02"):
        ready(finetune("inf", table(**{"02": "inf"})))
    with pytest.raises(ValueError, match="above -1 for log1p, found others for 2 recordings: sub-05"):
        ready(finetune("log", table(**{"05": -3}), {"target": {"scale": "log1p"}}))
    with pytest.raises(FileNotFoundError, match="expected a table of people, found no file at nowhere.csv"):
        ready(finetune("none", {"target": {"table": "nowhere.csv"}}))


def test_a_class_that_only_unused_people_have_is_none(tmp_path, finetune):
    rows = "".join(f"{i:02d},{'AB'[i % 2] if i != 3 else 'C'}\n" for i in range(6))
    (tmp_path / "people.csv").write_text("subject,kind\n" + rows)
    parts = {"train": ("00", "01", "02"), "validation": ("04", "05"), "test": ("03",)}
    Split(parts, ("subject",), {"train": 1.0}, 0, "x").save(tmp_path / "split.json")
    target = {"table": str(tmp_path / "people.csv"), "columns": ["kind"], "kind": "classification"}
    recipe = ready(finetune("kinds", {"target": target, "data": {"split": str(tmp_path / "split.json")}}))
    assert recipe.targets.classes == ["A", "B"] and "sub-03_ses-1_task-rest" not in recipe.targets.values


def test_the_part_test_is_evaluated_when_asked(tmp_path, pretrain, finetune):
    parts = {"train": ("00", "02", "03"), "validation": ("04",), "test": ("05",)}
    Split(parts, ("subject",), {"train": 1.0}, 0, "x").save(tmp_path / "split.json")
    split = {"data": {"split": str(tmp_path / "split.json")}}
    for make, name in ((pretrain, "one"), (finetune, "two")):
        without = T.train(make(f"{name}-without", split))
        asked = T.train(make(f"{name}-asked", split, {"data": {"test": True}}))
        assert not [e for e in without.evaluations if "test" in e["set"]]
        assert [e["set"] for e in asked.evaluations if e["set"].startswith("test")]
        assert same(without.model.state_dict(), asked.model.state_dict())
    table = pd.read_csv(tmp_path / "two-asked" / "predictions" / "test.csv", dtype=str)
    assert set(table.subject) == {"05"} and table.model.notna().all()
    with pytest.raises(ValueError, match="expected data.split, whose part test"):
        T.train(pretrain("none", {"data": {"test": True}}))


def test_runs_shorter_than_a_window_count_nowhere(tmp_path, finetune):
    def short(record):
        if record.subject == "00" and record.session == "1":
            record.values = 1000 * record.values[:10]
            record.meta["phenotypes"] |= {"age": 90.0}

    write_store(recordings(change=short), tmp_path / "short", progress=False)
    scratch = {"model": {"pretrained": None} | TINY, "data": {"train": str(tmp_path / "short")}}
    with pytest.warns(UserWarning, match="1 recordings are shorter"):
        recipe = ready(finetune("short", scratch))
    assert recipe.model.config.target_centre == [pytest.approx(np.mean([20, 34, 34, 41, 41]))]
    assert max(recipe.model.config.scaler["centre"]) < 200
    assert recipe.part[0] == "not used: 10 frames, fewer than a window of 16"


def test_people_who_may_be_known_are_named(tmp_path, store, finetune):
    with pytest.warns(UserWarning, match=r"here: 3 people have names of training people \(00, 02, 03\)"):
        ready(finetune("run", {"data": {"evaluate": {"here": str(store)}}}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bad_parcels": "mising"}, "bad_parcels refuse or missing, found 'mising'"),
        ({"held_out": -1}, "held_out from 0, below 1, found -1"),
        ({"windows": 0}, "windows of at least 1, or null, found 0"),
        ({"split": "nowhere.json"}, "data.split as a file, found none at nowhere.json"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(pretrain, wrong, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        T.train(pretrain("wrong", {"data": wrong}))


# ----------------------------------------------------------------------------------- several processes, the command line


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_are_one(pretrain, finetune, tmp_path):
    from omegaconf import OmegaConf

    calm = {"model": {"attention_probs_dropout_prob": 0.0}}  # dropout is each process's own
    alone = [T.train(pretrain("one", steps=2)), T.train(finetune("one-tuned", calm, steps=2))]
    for name, config in (
        ("brainlm", pretrain("two", steps=2, batch_size=2)),
        ("brainlm-finetune", finetune("two-tuned", calm, steps=2, batch_size=2)),
    ):
        (tmp_path / f"{name}.yaml").write_text(OmegaConf.to_yaml(config))
    code = "import torch; torch.set_num_threads(1)\nimport fmri_book.training as T\n"
    code += "".join(
        f"T.train(T.make_config({n!r}, 'ci', {str(tmp_path / n) + '.yaml'!r}))\n"
        for n in ("brainlm", "brainlm-finetune")
    )
    (tmp_path / "both.py").write_text(code)
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command = [sys.executable, "-m", *launch, str(tmp_path / "both.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    for one, name in zip(alone, ("two", "two-tuned")):
        two = T.TrainResult(tmp_path / name, 2, True)
        assert np.allclose(losses(one), losses(two), rtol=1e-4)
        assert json.loads((tmp_path / name / "run.json").read_text())["processes"] == 2
        for a, b in zip(one.evaluations, two.evaluations):
            assert a["set"] == b["set"] and all(
                a[k] == pytest.approx(b[k], rel=2e-2, abs=2e-3) for k in a if k != "set"
            )


def test_the_command_line_from_recordings_to_predictions(store, tmp_path, pretrain, capsys):
    "Trained, killed, resumed; fine-tuned from its folder to a table of people."
    tiny = [f"model.{k}={v}" for k, v in TINY.items()]
    same_ = [f"{k}={str(v).lower()}" for k, v in (FEW | {"save_every": 1, "steps": 12}).items()]
    data = [f"data.train={store}", "data.held_out=0.34"]
    call = [sys.executable, "-m", "fmri_book.cli"]
    command = [*call, "train", "brainlm", "--out", str(tmp_path / "run"), *tiny, *same_, *data]
    child = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and len(T.read_lines(tmp_path / "run" / "log.jsonl")) < 3:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not (tmp_path / "run" / "model").exists()
    assert cli.main(command[3:]) == 0 and "12 steps" in capsys.readouterr().out
    whole = T.train(pretrain("whole", save_every=1, steps=12))
    assert [r["loss"] for r in T.read_lines(tmp_path / "run" / "log.jsonl")] == losses(whole)
    with open(tmp_path / "people.csv", "w", newline="") as file:
        csv.writer(file).writerows([("subject", "age"), *((f"sub-{i:02d}", 30 + i) for i in range(6))])
    command = [
        *call,
        "finetune",
        "brainlm",
        "--model",
        str(tmp_path / "run"),
        "--targets",
        str(tmp_path / "people.csv"),
    ]
    command += [
        "--columns",
        "age",
        "--method",
        "probe",
        "--out",
        str(tmp_path / "tuned"),
        "--json",
        *data,
        "steps=2",
        "device=cpu",
    ]
    assert cli.main(command[len(call) :]) == 0
    told = capsys.readouterr().out
    assert json.loads(told[told.index("{") :])["finished"]
    table = pd.read_csv(tmp_path / "tuned" / "predictions" / "held-out.csv")
    assert (
        table.truth.tolist() == [34, 34, 35, 35]
        and table.model.notna().all()
        and table.connectivity.notna().all()
    )
