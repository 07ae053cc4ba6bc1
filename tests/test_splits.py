"""Splits and scalers against NumPy, scikit-learn and brute force; leaks, damage and refusals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.preprocessing import RobustScaler, StandardScaler

from fmri_book import splits
from fmri_book.splits import Scaler, Split, make_split
from fmri_book.storage import Layout, Record

LAYOUT = Layout.flat(np.ones((4, 5), bool))


class Source:
    "A source as the formats are: a layout, and records made anew at each reading."

    def __init__(self, records, layout=LAYOUT):
        self.records, self.layout, self.read = records, layout, 0

    def __iter__(self):
        for record in self.records:
            self.read += 1
            yield record


def make_records(n=12, sites=20, seed=0, dtype=np.float32, subjects=4):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-3, 4, n)
    return [
        Record(
            (rng.standard_normal((int(rng.integers(1, 90)), sites)) * scales[i] - 2).astype(dtype),
            tr=1.0,
            subject=f"{i % subjects:02d}",
            session=str(i // subjects),
        )
        for i in range(n)
    ]


def people(n=200, seed=0, families=80):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {"subject": [f"sub-{i:04d}" for i in range(n)], "family": rng.integers(0, families, n).astype(float)}
    )
    table["site"] = rng.choice(["A", "B", "C"], n)
    table["patient"] = rng.random(n) < 0.25
    return table


# ---------------------------------------------------------------- groups and splits


def brute_components(table, columns):
    "Groups by spreading labels until nothing changes."
    label = list(range(len(table)))
    changed = True
    while changed:
        changed = False
        for i in range(len(table)):
            for j in range(i):
                tied = any(table[c].iloc[i] == table[c].iloc[j] != "" for c in columns)
                if tied and label[i] != label[j]:
                    label[i] = label[j] = min(label[i], label[j])
                    changed = True
    return label


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdef"), st.sampled_from(["", "1", "2", "3"]), st.sampled_from(["", "x", "y"])
        ),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=80, deadline=None)
def test_groups_are_the_connected_components(rows):
    table = pd.DataFrame(rows, columns=["subject", "family", "house"])
    columns = ("subject", "family", "house")
    found, want = splits.connected_groups(table, columns), brute_components(table, columns)
    assert [[a == b for b in found] for a in found] == [[a == b for b in want] for a in want]


@given(st.integers(0, 10_000), st.integers(3, 60), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_no_group_is_torn_apart_and_nobody_is_lost(seed, n, families):
    table = people(n, seed, families)
    n_groups = table.family.nunique()
    if n_groups < 3:
        with pytest.raises(ValueError, match=f"at least 3 groups.*found {n_groups}"):
            make_split(table, seed=seed)
        return
    split = make_split(table, seed=seed)
    everyone = [s for part in split.parts.values() for s in part]
    assert sorted(everyone) == sorted(table.subject.str.removeprefix("sub-"))
    assert all(split.parts.values())
    part = table.subject.map(split.of)
    assert (part.groupby(table.family).nunique() == 1).all()
    split.check(table)


def test_same_split_for_any_order_of_rows_and_another_for_another_seed():
    table = people()
    split = make_split(table, seed=5, stratify="patient")
    assert make_split(table.iloc[::-1], seed=5, stratify="patient") == split
    assert (
        make_split(table.sample(frac=1, random_state=3).reset_index(drop=True), seed=5, stratify="patient")
        == split
    )
    assert make_split(table, seed=6, stratify="patient").parts != split.parts


def test_same_split_in_another_process(tmp_path):
    people().to_csv(tmp_path / "people.csv", index=False)
    code = (
        f"import pandas as pd; from fmri_book.splits import make_split; "
        f"make_split(pd.read_csv({str(tmp_path / 'people.csv')!r}), seed=4).save({str(tmp_path / 'split.json')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "77", "PATH": ""})
    assert Split.load(tmp_path / "split.json") == make_split(people(), seed=4)


@pytest.mark.parametrize("seed", range(5))
def test_fractions_and_strata_as_close_as_scikit_learn(seed):
    table = people(400, seed, 200)
    ours = make_split(table, {"train": 0.8, "test": 0.2}, stratify="patient", seed=seed)
    part = table.subject.map(ours.of)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(table, table.patient, table.family)
    theirs = max(abs(table.patient.iloc[test].mean() - table.patient.mean()) for _, test in folds)
    assert abs(table.patient[part == "test"].mean() - table.patient.mean()) <= theirs + 0.02
    assert abs((part == "test").mean() - 0.2) < 0.02
    _, fold = next(iter(GroupKFold(5).split(table, groups=table.family)))
    assert abs((part == "test").mean() - len(fold) / len(table)) < 0.02


def test_fractions_count_recordings_when_rows_are_recordings():
    rows = [("a", s) for s in range(50)] + [(f"s{i}", 0) for i in range(50)]
    table = pd.DataFrame(rows, columns=["subject", "session"])
    split = make_split(table, {"train": 0.5, "test": 0.5}, seed=1)
    assert abs(split.table.recordings["train"] - 50) <= 5  # by subjects it would be 25 or 75
    assert min(split.table.subjects) <= 5 and sum(split.table.subjects) == 51


def test_each_part_gets_someone_even_if_there_are_few():
    for n in range(3, 15):
        sizes = make_split(pd.DataFrame({"subject": range(n)}), seed=n).table.subjects
        assert min(sizes) >= 1 and sum(sizes) == n
        assert sizes["train"] == max(sizes) and abs(sizes["train"] - 0.8 * n) < 1.5


def test_unknown_families_are_families_of_their_own_and_are_counted():
    table = pd.DataFrame({"subject": list("abcdefgh"), "family": [1, 1, None, None, "n/a", "", 2, np.nan]})
    split = make_split(table, {"train": 0.5, "test": 0.5})
    assert "5 subjects without a known family" in split.notes[0]
    assert split.of("a") == split.of("b")
    assert sum(split.table.groups) == 7


def test_a_missing_family_column_is_noted_or_refused():
    table = people().drop(columns="family")
    assert "no column 'family'" in make_split(table).notes[0]
    with pytest.raises(ValueError, match="expected the column 'family', found subject, site, patient"):
        make_split(table, groups=("subject", "family"))


def test_families_written_as_whole_or_broken_numbers_are_the_same():
    table = people()
    whole = table.assign(family=table.family.astype(int))
    text = table.assign(family=whole.family.astype(str))
    assert make_split(table) == make_split(whole) == make_split(text)


def test_a_person_in_two_families_ties_them_together():
    rows = [("a", 1, "f1"), ("a", 2, "f2"), ("b", 1, "f1"), ("c", 1, "f2"), ("d", 1, "f3"), ("e", 1, "f4")]
    split = make_split(
        pd.DataFrame(rows, columns=["subject", "session", "family"]), {"train": 0.5, "test": 0.5}
    )
    assert split.of("a") == split.of("b") == split.of("c")


def test_held_out_sites_are_the_test_part_with_their_relatives():
    table = people()
    split = make_split(table, hold_out={"site": ["B"]}, groups=("subject",))
    assert split == make_split(table, hold_out={"site": "B"}, groups=("subject",))
    assert set(table.site[table.subject.map(split.of) == "test"]) == {"B"}
    assert "B" not in set(table.site[table.subject.map(split.of) != "test"])
    tied = make_split(table, hold_out={"site": ["B"]})
    relatives = table[(table.subject.map(tied.of) == "test") & (table.site != "B")]
    assert len(relatives) and f"{len(relatives)} subjects outside the held-out site" in " ".join(tied.notes)
    assert set(relatives.family) <= set(table.family[table.site == "B"])
    tied.check(table)
    sizes = make_split(table, hold_out={"site": ["B"]}, groups=("subject",)).table.subjects
    assert abs(sizes["train"] / (sizes["train"] + sizes["validation"]) - 8 / 9) < 0.02


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda t: t.assign(subject=np.where(t.index == 3, "sub-0001", t.subject)),
            {},
            "one row a subject, found subject '0001' more than once",
        ),
        (
            lambda t: t.assign(subject=np.where(t.index == 3, None, t.subject)),
            {},
            "expected a subject in every row, found none in row 3",
        ),
        (lambda t: t.rename(columns={"subject": "eid"}), {}, "expected the column 'subject', found eid"),
        (lambda t: t.iloc[:0], {}, "at least one row"),
        (lambda t: t, {"stratify": "age"}, "expected the column 'age'"),
        (lambda t: t.assign(age=np.arange(200.0)), {"stratify": "age"}, "few levels, found 200 in 'age'"),
        (lambda t: t, {"fractions": {"train": 0.8, "test": 0.1}}, "add up to 1"),
        (lambda t: t, {"fractions": {"train": 1.0, "test": 0.0}}, "positive"),
        (lambda t: t, {"hold_out": {"site": ["Z"]}}, r"values of 'site' \(A, B, C\), found 'Z'"),
        (
            lambda t: t.assign(site=t.site.where(t.index > 0)),
            {"hold_out": {"site": ["B"]}},
            "a known site for every subject, found none for '0000'",
        ),
        (
            lambda t: t,
            {"hold_out": {"site": ["B"]}, "fractions": {"train": 0.5, "validation": 0.5}},
            "a part called 'test'",
        ),
        (lambda t: t, {"hold_out": {"site": ["A", "B", "C"]}}, "at least 2 groups.*found 0"),
    ],
)
def test_what_would_make_a_split_silently_wrong_is_refused(change, options, message):
    with pytest.raises(ValueError, match=message):
        make_split(change(people()), **options)


def test_a_table_that_is_no_table():
    with pytest.raises(TypeError, match="pandas DataFrame, found list"):
        make_split(["a", "b"])


def test_a_split_is_written_once(tmp_path):
    split = make_split(people(), seed=1, hold_out={"site": ["A"]}, stratify="patient")
    path = split.save(tmp_path / "deep" / "split.json")
    before = path.read_bytes()
    split.save(path)
    assert Split.load(path) == split and Split.load(path).subjects("train") == split.subjects("train")
    with pytest.raises(FileExistsError, match="different: parts, seed"):
        make_split(people(), seed=2, hold_out={"site": ["A"]}, stratify="patient").save(path)
    with pytest.raises(FileExistsError, match="different: parts, digest, counts"):
        make_split(people().assign(patient=True), seed=1, hold_out={"site": ["A"]}, stratify="patient").save(
            path
        )
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["split.json"]
    assert "date" not in json.loads(before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: "{", "expected JSON"),
        (lambda f: json.dumps([1]), "expected the format.*found 'list'"),
        (lambda f: json.dumps({**f, "format": "x"}), "found 'x'"),
        (lambda f: json.dumps({k: v for k, v in f.items() if k != "seed"}), "expected the field 'seed'"),
        (
            lambda f: json.dumps({**f, "parts": {"train": ["a"], "test": ["a"]}}),
            "subject 'a': expected in one part, found in 'train' and 'test'",
        ),
    ],
)
def test_damaged_split_files(tmp_path, damage, message):
    path = make_split(people()).save(tmp_path / "split.json")
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message):
        Split.load(path)


SPELLINGS = [
    ("Cl\u00e9a", "Cle\u0301a", "more than once"),  # one letter, or a letter and an accent
    ("a b", "a\u00a0b", "more than once"),  # a space that does not break
    ("sub-01", "01", "more than once"),
    (3, 3.0, "more than once"),
    ("01", "1", "one spelling for each subject, found '01' and '1'"),
    ("1.0", "1", "one spelling for each subject, found '1' and '1.0'"),
    ("S1", "s1", "one spelling for each subject, found 'S1' and 's1'"),
    ("01_ses-1", "01_ses-2", "a person as subject, and a column 'session'.*found '01_ses-1'"),
]


@pytest.mark.parametrize(("one", "other", "message"), SPELLINGS)
def test_one_person_under_two_spellings_is_never_on_two_sides(one, other, message):
    table = pd.DataFrame({"subject": [one, other, *"ghijkl"]})
    with pytest.raises(ValueError, match=message):
        make_split(table, {"train": 0.5, "test": 0.5})
    if "_ses-" not in str(one):
        with pytest.raises(ValueError, match="expected in one part"):
            splits.Split({"train": (one,), "test": (other,)}, ("subject",), {}, 0, "")


def test_numbers_inside_a_name_count():
    "100 is not 10, and CC0110 is CC110 but not CC011."
    assert splits.look_alike("CC0110") == splits.look_alike("CC110") != splits.look_alike("CC011")
    assert splits.look_alike("100") != splits.look_alike("10") != splits.look_alike("1")
    assert splits.look_alike("0") == splits.look_alike("00") != splits.look_alike("")


def test_a_split_made_by_hand_keeps_a_subject_off_the_scaler():
    "A prefix in a file that somebody edited: the names are made plain before they are compared."
    split = splits.Split({"train": ("sub-00", "01"), "test": ("sub-02",)}, ("subject",), {}, 0, "")
    assert split.subjects("train") == ("00", "01") and split.of("02") == "test" == split.of("sub-02")


def test_held_out_values_need_no_list_and_no_prefix():
    table = pd.DataFrame({"subject": list("abcdef"), "site": [1, 1, 2, 2, 3, 3]})
    assert make_split(table, hold_out={"site": 1}).subjects("test") == ("a", "b")
    assert make_split(table, hold_out={"subject": ["sub-c"]}).subjects("test") == ("c",)


def test_a_code_for_unknown_that_ties_half_of_the_study_is_told():
    table = people(40, families=1000).assign(family=lambda t: np.where(np.arange(40) < 18, 0, t.family + 1))
    split = make_split(table)
    assert any("ties 18 of 40 subjects together" in note for note in split.notes), split.notes
    assert len({split.of(s) for s in table.subject[:18]}) == 1
    assert not any("ties" in note for note in make_split(people(families=10**6)).notes)


def test_check_names_the_leak():
    table = people()
    split = make_split(table, seed=2)
    train, test = split.subjects("train")[0], split.subjects("test")[0]
    with pytest.raises(
        ValueError,
        match=rf"family 'secret' \(({train} in train, {test} in test|{test} in test, {train} in train)\)",
    ):
        split.check(
            table.assign(
                family=table.family.astype(object).where(
                    ~table.subject.isin([f"sub-{train}", f"sub-{test}"]), "secret"
                )
            )
        )
    with pytest.raises(ValueError, match="found 1 others: stranger"):
        split.check(pd.concat([table, pd.DataFrame({"subject": ["stranger"], "family": [5.0]})]))
    with pytest.raises(ValueError, match="expected the column 'family'"):
        split.check(table.drop(columns="family"))
    held = make_split(table, hold_out={"site": ["A"]})
    moved = table.assign(site=np.where(table.subject == f"sub-{held.subjects('train')[0]}", "A", table.site))
    with pytest.raises(ValueError, match=f"{held.subjects('train')[0]} of the held-out site is in train"):
        held.check(moved)
    with pytest.raises(ValueError, match="unknown part 'dev'"):
        split.subjects("dev")
    with pytest.raises(KeyError, match="stranger"):
        split.of("stranger")
    assert split.of(f"sub-{train}") == split.of(train) == "train"


def test_unicode_subjects(tmp_path):
    table = pd.DataFrame({"subject": ["Zoë", "Łukasz", "明", "a"]})
    assert Split.load(make_split(table).save(tmp_path / "é.json")).parts == make_split(table).parts


# ---------------------------------------------------------------- order statistics


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(floats, min_size=1, max_size=60), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_quantiles_equal_numpy_bit_for_bit(values, cuts):
    x = np.array(values, np.float32)[:, None]
    at = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
    blocks = [b for b in np.array_split(x, cuts) if len(b)]
    ours = splits.exact_quantiles(lambda: iter(blocks), 1, len(x), at)
    assert np.array_equal(ours, np.quantile(x.astype(np.float64), at, axis=0))


@given(st.lists(floats, min_size=2, max_size=40))
@settings(max_examples=100, deadline=None)
def test_ordered_bits_keep_the_order(values):
    x = np.array(values, np.float32)
    keys = splits.ordered_bits(x)
    assert np.array_equal(x[np.argsort(keys, kind="stable")], np.sort(x))
    assert np.array_equal(splits.from_ordered_bits(keys), x)


HARD = {
    "subnormal": np.array([6e-8, -6e-8, 0.0, -0.0, 1.2e-7], np.float16),
    "zeros": np.array([0.0, -0.0, -0.0, 0.0], np.float16),
    "ends": np.array([65504, -65504, 65504, 1, -1], np.float16),
    "one frame": np.array([-3.5], np.float16),
    "constant": np.full(9, 0.1, np.float16),
    "huge offset": (np.arange(50) % 7 * 8 + 10_000).astype(np.float16),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_quantiles_of_hard_numbers_in_half_and_single_precision(name, dtype):
    x, at = HARD[name].astype(dtype)[:, None], (0, 0.25, 0.5, 0.75, 1)
    ours = splits.exact_quantiles(lambda: iter(np.array_split(x, min(3, len(x)))), 1, len(x), at, dtype=dtype)
    assert np.array_equal(ours, np.quantile(x.astype(np.float64), at, axis=0))


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_half_precision_numbers_take_two_passes(bits):
    x = np.array(bits, np.uint16).view(np.float16)
    x = np.where(np.isfinite(x), x, np.float16(0))[:, None]
    passes = []

    def blocks():
        passes.append(1)
        return iter(np.array_split(x, min(4, len(x))))

    ours = splits.exact_quantiles(blocks, 1, len(x), dtype=np.float16)
    assert np.array_equal(ours, np.quantile(x.astype(np.float64), (0.25, 0.5, 0.75), axis=0))
    assert len(passes) == 2
    assert np.array_equal(splits.from_ordered_bits(splits.ordered_bits(x)), x)


def test_runs_of_both_precisions_together():
    records = make_records()
    for r in records[::2]:
        r.values = (r.values / 1000).astype(np.float16)
    scaler = Scaler.fit(Source(records), "robust", subjects="all")
    low, middle, high = np.quantile(stacked(records), (0.25, 0.5, 0.75), axis=0)
    assert np.array_equal(scaler.centre, middle.astype(np.float32))
    assert np.array_equal(scaler.scale, (high - low).astype(np.float32))


def test_spreads_beyond_single_precision_are_refused():
    x = np.array([-3e38] * 3 + [3e38] * 3, np.float32)[:, None].repeat(20, 1)
    with pytest.raises(ValueError, match=r"spreads that float32 can hold, found 6e\+38"):
        Scaler.fit(Source([Record(x, 1.0, "a")]), "robust", subjects="all")


def test_blocks_of_sites_give_the_same_quantiles():
    x = np.random.default_rng(0).standard_normal((101, 3000)).astype(np.float32)
    one = splits.exact_quantiles(lambda: iter([x]), 3000, 101)
    many = splits.exact_quantiles(lambda: iter(np.array_split(x, 7)), 3000, 101, memory=1024 * 8 * 700)
    assert np.array_equal(one, many) and np.array_equal(
        one, np.quantile(x.astype(float), (0.25, 0.5, 0.75), axis=0)
    )


# ---------------------------------------------------------------- the scaler


def stacked(records, subjects=None):
    return np.concatenate([r.values for r in records if subjects is None or r.subject in subjects]).astype(
        np.float64
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("per", ["site", "all"])
def test_robust_equals_numpy_and_scikit_learn(dtype, per):
    records = make_records(dtype=np.float32)
    if dtype == np.float16:
        records = [Record((r.values / 100).astype(dtype), 1.0, r.subject, session=r.session) for r in records]
    x = stacked(records, ("00", "02"))
    x = x if per == "site" else x.reshape(-1, 1)
    scaler = Scaler.fit(Source(records), "robust", per, subjects=["sub-00", "02"])
    low, middle, high = np.quantile(x, (0.25, 0.5, 0.75), axis=0)
    assert np.array_equal(scaler.centre, middle.astype(np.float32))
    assert np.array_equal(scaler.scale, (high - low).astype(np.float32))
    theirs = RobustScaler().fit(x)
    assert np.allclose(scaler.centre, theirs.center_, rtol=2e-7) and np.allclose(
        scaler.scale, theirs.scale_, rtol=2e-7
    )
    assert (scaler.n_subjects, scaler.n_frames) == (2, len(stacked(records, ("00", "02"))))


@pytest.mark.parametrize("per", ["site", "all"])
def test_z_equals_scikit_learn_also_far_from_zero(per):
    records = [
        Record((r.values / 1e3 + 10_000).astype(np.float32), 1.0, r.subject, session=r.session)
        for r in make_records()
    ]
    x = stacked(records) if per == "site" else stacked(records).reshape(-1, 1)
    scaler, theirs = Scaler.fit(Source(records), "z", per, subjects="all"), StandardScaler().fit(x)
    assert np.allclose(scaler.centre, theirs.mean_, rtol=1e-7) and np.allclose(
        scaler.scale, x.std(0), rtol=1e-6
    )


@pytest.mark.parametrize(("kind", "per"), [(k, p) for k in ("robust", "z") for p in ("site", "all")])
def test_of_run_means_as_fmri_lm_computes_them(kind, per):
    records = make_records()
    means = np.stack([r.values.mean(0, dtype=np.float64).astype(np.float32) for r in records]).astype(
        np.float64
    )
    x = means if per == "site" else means.reshape(-1, 1)
    scaler = Scaler.fit(Source(records), kind, per, of="run means", subjects="all")
    want = (
        (np.median(x, 0), np.subtract(*np.percentile(x, (75, 25), 0)))
        if kind == "robust"
        else (x.mean(0), x.std(0))
    )
    assert np.allclose(scaler.centre, want[0], rtol=1e-6) and np.allclose(scaler.scale, want[1], rtol=1e-6)
    assert scaler.n_frames == len(records)


def test_test_subjects_say_nothing():
    records = make_records()
    spoiled = [
        r if r.subject != "03" else Record(r.values * 1e6, 1.0, r.subject, session=r.session) for r in records
    ]
    for kind in ("robust", "z"):
        subjects = ["00", "01", "02"]
        assert Scaler.fit(Source(records), kind, subjects=subjects) == Scaler.fit(
            Source(spoiled), kind, subjects=subjects
        )


def test_sites_without_spread_are_counted_and_only_shifted():
    records = make_records()
    for r in records:
        r.values[:, 4] = 7
        r.values[:, 6] = np.arange(len(r.values)) == 0  # spread, but none between the quartiles
    scaler = Scaler.fit(Source(records), "robust", subjects="all")
    assert scaler.no_spread >= 1 and scaler.scale[4] == 1 and scaler.centre[4] == 7
    assert "without spread" in repr(scaler)
    assert (scaler.transform(records[0].values)[:, 4] == 0).all()
    assert Scaler.fit(Source(records), "z", subjects="all").no_spread == 1


def test_memory_does_not_grow_with_the_number_of_runs():
    import tracemalloc

    class Endless(Source):
        def __init__(self, n):
            self.n, self.layout = n, LAYOUT

        def __iter__(self):
            for i in range(self.n):
                values = np.random.default_rng(i).standard_normal((200, 20)).astype(np.float32)
                yield Record(values, 1.0, f"{i}")

    peaks = []
    for n in (20, 200):
        tracemalloc.start()
        Scaler.fit(Endless(n), "robust", subjects="all")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 100_000


def test_a_store_is_asked_only_for_the_training_subjects():
    records = make_records()

    class Shelf:
        layout, index, asked = LAYOUT, pd.DataFrame({"subject": [f"sub-{r.subject}" for r in records]}), []

        def record(self, i):
            self.asked.append(records[i].subject)
            return records[i]

        def __iter__(self):
            raise AssertionError("expected only the wanted records to be read")

    assert Scaler.fit(Shelf(), "robust", subjects=["01"]) == Scaler.fit(
        Source(records), "robust", subjects=["01"]
    )
    assert set(Shelf.asked) == {"01"}


def test_a_real_store_gives_the_same_scaler(tmp_path):
    from fmri_book.storage import write_store

    records = make_records()
    store = write_store(Source(records), tmp_path / "store", progress=False)
    for kind in ("robust", "z"):
        assert Scaler.fit(store, kind, subjects=["00", "03"]) == Scaler.fit(
            Source(records), kind, subjects=["00", "03"]
        )


def test_long_runs_are_read_in_pieces():
    rng = np.random.default_rng(0)
    wide = Layout.flat(np.ones((200, 200), bool))
    records = [Record(rng.standard_normal((450, 40_000), dtype=np.float32), 1.0, "a")]  # three pieces
    assert len(list(splits._Reader(records, None, 40_000, "site", "frames")())) == 3
    scaler = Scaler.fit(Source(records, wide), "robust", "all", subjects="all")
    assert scaler.centre[0] == np.float32(np.median(records[0].values.astype(np.float64)))
    assert scaler.n_frames == 450


def test_absent_subjects_are_noted():
    scaler = Scaler.fit(Source(make_records()), "z", subjects=["00", "77", "78"])
    assert scaler.notes == ("2 of 3 subjects have no recording in the source",) and scaler.n_subjects == 1


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            Source(make_records()),
            {"subjects": ["zz"]},
            "recordings of the 1 subjects in the source, found none",
        ),
        (Source([]), {"subjects": "all"}, "any recording in the source, found none"),
        (make_records(), {"subjects": "all"}, "knows its layout, or layout=…, found a list"),
        (
            Source(make_records(sites=19)),
            {"subjects": "all"},
            r"expected values of shape \(time, 20\), found \(\d+, 19\)",
        ),
        (Source(make_records()), {"subjects": "train"}, "a list of subjects or 'all', found 'train'"),
        (Source(make_records()), {"subjects": "all", "kind": "minmax"}, "kind: expected one of robust, z"),
        (Source(make_records()), {"subjects": "all", "kind": "frame", "per": "all"}, "not fitted"),
        (iter(make_records()), {"subjects": "all", "layout": LAYOUT}, "read several times"),
    ],
)
def test_sources_that_cannot_be_fitted(source, options, message):
    with pytest.raises(ValueError, match=message):
        Scaler.fit(source, **options)


def test_nan_is_refused_and_named():
    records = make_records()
    records[5].values[0, 3] = np.nan
    with pytest.raises(
        ValueError, match=f"{records[5].key}: expected finite numbers, found NaN or infinity at 1 sites"
    ):
        Scaler.fit(Source(records), "robust", subjects="all")


def test_subjects_must_be_said():
    with pytest.raises(TypeError, match="subjects"):
        Scaler.fit(Source(make_records()), "robust")


@pytest.mark.parametrize("kind", ["robust", "z", "global", "frame", "none"])
def test_numpy_and_torch_agree_and_inverse_undoes(kind):
    records = make_records(4)
    scaler = Scaler.fit(Source(records), kind, subjects="all")
    x = 10_000 + np.random.default_rng(3).standard_normal((2, 30, 20)).astype(np.float32)
    ours, theirs = scaler.transform(x), scaler.transform(torch.from_numpy(x))
    assert ours.dtype == np.float32 and theirs.dtype == torch.float32
    assert np.allclose(ours, theirs.numpy(), rtol=1e-5, atol=2e-3)
    stats = scaler.stats(x)
    assert np.allclose(scaler.inverse(scaler.transform(x, stats), stats), x, rtol=1e-5)
    stats = scaler.stats(torch.from_numpy(x))
    assert torch.allclose(scaler.inverse(theirs, stats), torch.from_numpy(x), rtol=1e-5)
    half = x[0] / 100
    assert scaler.transform(half.astype(np.float16)).dtype == np.float32
    assert scaler.transform(torch.from_numpy(half).half()).dtype == torch.float32
    assert scaler.transform(half.astype(np.float64)).dtype == np.float64


def test_own_statistics_have_mean_0_and_unbiased_sd_1():
    x = (10_000 + 100 * np.random.default_rng(0).standard_normal((50, 20))).astype(np.float32)
    records = [Record(x, 1.0, "a")]
    y = Scaler.fit(Source(records), "frame", subjects="all").transform(x)
    assert np.allclose(y.mean(1), 0, atol=1e-5) and np.allclose(y.std(1, ddof=1), 1, rtol=1e-4)
    y = Scaler.fit(Source(records), "global", subjects="all").transform(x)
    assert abs(y.mean()) < 1e-5 and abs(y.std(ddof=1) - 1) < 1e-5
    assert (Scaler.fit(Source(records), "frame", subjects="all").transform(np.full((3, 20), 5.0)) == 0).all()


def test_own_statistics_need_to_be_passed_to_undo_them():
    scaler = Scaler.fit(Source(make_records()), "global", subjects="all")
    with pytest.raises(ValueError, match="stats=scaler.stats"):
        scaler.inverse(np.zeros((3, 20)))
    with pytest.raises(ValueError, match=r"shape \(…, time, sites\)"):
        scaler.transform(np.zeros(20, np.float32))


def test_other_data_is_refused():
    scaler = Scaler.fit(Source(make_records()), "robust", subjects="all")
    with pytest.raises(ValueError, match=r"20 sites in the last axis, found shape \(5, 19\)"):
        scaler.transform(np.zeros((5, 19)))
    with pytest.raises(ValueError, match=r"20 sites in the last axis, found shape \(20, 5\)"):
        scaler.inverse(np.zeros((20, 5)))
    with pytest.raises(TypeError, match="numpy array or a torch tensor, found list"):
        scaler.transform([[0.0] * 20])
    other = Layout.flat(np.ones((5, 4), bool))
    with pytest.raises(ValueError, match=f"layout {LAYOUT.digest}.*found the layout {other.digest}"):
        scaler.transform(np.zeros((5, 20)), layout=other)
    scaler.check(LAYOUT)


@pytest.mark.parametrize("kind", ["robust", "z", "global", "none"])
def test_json_keeps_every_bit(tmp_path, kind):
    scaler = Scaler.fit(
        Source(make_records()), kind, subjects=["00", "99"] if kind in ("robust", "z") else "all"
    )
    again = Scaler.load(scaler.save(tmp_path / "scaler.json"))
    assert again == scaler
    assert (
        again.centre.tobytes() == scaler.centre.tobytes() and again.scale.tobytes() == scaler.scale.tobytes()
    )
    assert (again.layout, again.n_subjects, again.subjects) == (
        LAYOUT.digest,
        scaler.n_subjects,
        scaler.subjects,
    )
    scaler.save(tmp_path / "scaler.json")
    with pytest.raises(FileExistsError, match="this very scaler"):
        Scaler.fit(Source(make_records(seed=9)), "robust", subjects=["01"]).save(tmp_path / "scaler.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "y"}, "expected the format"),
        ({"scale": [0.0] * 20}, "positive numbers in 'scale', found 0"),
        ({"centre": [0.0] * 19}, r"20 finite numbers in 'centre', found shape \(19,\)"),
        ({"centre": [float("nan")] * 20}, "20 finite numbers"),
        ({"kind": "max"}, "kind: expected one of"),
    ],
)
def test_damaged_scaler_files(tmp_path, change, message):
    path = Scaler.fit(Source(make_records()), "robust", subjects="all").save(tmp_path / "s.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        Scaler.load(path)


def test_normalisation_files_of_fmri_lm(tmp_path):
    "Keys and shapes as specs/fmri_lm.md states them, values by hand."
    means = np.random.default_rng(0).standard_normal((9, 20)) * 3000 + 10_000
    path = tmp_path / "normalization.npz"
    np.savez(
        path,
        medians_roi=np.median(means, 0), iqrs_roi=np.subtract(*np.percentile(means, (75, 25), 0)), mean_roi=means.mean(0), std_roi=means.std(0),
        medians=np.median(means), iqrs=np.full((1, 1, 1), 4000.0), mean=means.mean(), std=means.std(),
    )  # fmt: skip
    scaler = splits.from_normalization_npz(path, LAYOUT)
    x = (means + 5).astype(np.float32)
    assert np.allclose(scaler.transform(x), (x - np.median(means)) / 4000, rtol=1e-4, atol=1e-6)
    by_site = splits.from_normalization_npz(path, LAYOUT, "z", "site")
    assert np.allclose(by_site.transform(x), (x - means.mean(0)) / means.std(0), atol=1e-3)
    four = [
        splits.from_normalization_npz(path, LAYOUT, k, p) for k in ("robust", "z") for p in ("site", "all")
    ]
    splits.to_normalization_npz(tmp_path / "again.npz", *four)
    with np.load(path) as one, np.load(tmp_path / "again.npz") as two:
        assert set(one.files) == set(two.files)
        assert all(np.allclose(np.ravel(one[k]), np.ravel(two[k]), rtol=1e-6) for k in one.files)
        assert two["medians"].shape == () and two["medians_roi"].shape == (20,)
    short = _npz(tmp_path, medians_roi=np.ones(19), iqrs_roi=np.ones(19))
    with pytest.raises(ValueError, match=r"20 finite numbers in 'centre', found shape \(19,\)"):
        splits.from_normalization_npz(short, LAYOUT, per="site")
    with pytest.raises(ValueError, match="expected an array 'medians', found mean"):
        splits.from_normalization_npz(_npz(tmp_path, mean=1.0), LAYOUT)
    with pytest.raises(ValueError, match="scalers of run means"):
        splits.to_normalization_npz(
            tmp_path / "x.npz", Scaler.fit(Source(make_records()), "z", subjects="all")
        )
    with pytest.raises(ValueError, match="found two that give 'medians'"):
        splits.to_normalization_npz(tmp_path / "x.npz", scaler, scaler)
    assert not (tmp_path / "x.npz").exists()


def _npz(folder: Path, **arrays) -> Path:
    np.savez(folder / "part.npz", **arrays)
    return folder / "part.npz"


def test_a_store_in_patches_takes_the_scaler_of_the_same_columns():
    patches = Layout.flat(np.ones((4, 5), bool), patch=(2, 5))
    assert patches.digest != LAYOUT.digest
    scaler = Scaler.fit(Source(make_records()), "z", subjects="all")
    scaler.check(patches)
    assert Scaler.fit(Source(make_records(), patches), "z", subjects="all") == scaler


def test_import_is_light():
    code = "import sys, fmri_book.splits; print([m for m in ('torch', 'pandas', 'sklearn', 'nibabel') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert "torch" not in found and "sklearn" not in found and "nibabel" not in found
