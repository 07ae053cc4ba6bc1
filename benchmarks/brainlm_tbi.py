"""BrainLM on real recordings: 60 sessions of 24 people (OpenNeuro ds000220, Schaefer-1000), pretrained and fine-tuned from
one end to the other, and asked who is who.

    python benchmarks/brainlm_tbi.py --data tbi_schaefer1000_60sessions.npz \\
        --coordinates Schaefer2018_1000Parcels_7Networks_order_FSLMNI152_2mm.Centroid_RAS.csv --table results/brainlm_tbi.csv

The file has one array (volumes, 1000 parcels) for each key such as TBI01_ses-2. For every seed, a quarter of the people is
held out from pretraining, from the scaler and from fine-tuning. Fingerprinting: each session looks for its nearest neighbour
among all sessions of all people but itself, and finds the right person or does not. Intervals: 95 %, bootstrap over people.
The rivals of pretraining see the same windows: straight lines, each parcel's autoregression of order one, and the linear rule
from the visible parcels of the same moment (covariance of the training people, ridge of a tenth of the mean variance).
The defaults take some four minutes of one idle core for each seed; masks are random only, because with every second sample
hidden as a forecast (--model forward_mask_prob=0.5) nothing was learned in as many steps, and these runs have no forecast in them.
The group (patients, controls) was processed separately from the other: that row measures processing as well as people."""

import argparse, csv, datetime, json, os, platform, re, sys, tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch

import fmri_book  # noqa: F401  (before transformers)
from fmri_book.brainlm import BrainLMForPretraining, draw_mask
from fmri_book.brainlm_training import connectivity_features, prediction_scores
from fmri_book.data import zscore
from fmri_book.splits import make_split
from fmri_book.storage import Layout, Record, Store, write_store
from fmri_book.training import make_config, train

MODEL = {
    "num_timepoints_per_voxel": 8,
    "timepoint_patching_size": 4,
    "hidden_size": 64,
    "num_hidden_layers": 2,
}
MODEL |= {"num_attention_heads": 2, "intermediate_size": 128, "mask_ratio": 0.5, "xyz_scale": 0.1}
MODEL |= {"forward_mask_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embedding_dropout_prob": 0.0}
LOOP = {"optimizer": "muon", "muon_lr": 0.02, "betas": [0.9, 0.98], "weight_decay": 0.05, "warmup": 0.1}
TR, WINDOWS = 2.0, 3  # seconds; evaluated windows of a session, at even distances


class Recordings(list):
    layout = Layout.of("schaefer1000")


def records(path: Path) -> Recordings:
    "Each parcel z-scored over its run, the group as phenotype."
    made = Recordings()
    with np.load(path, allow_pickle=False) as file:
        for key in sorted(file.files):
            group, number, session = re.fullmatch(r"([A-Z]+)(\d+)_ses-(\d+)", key).groups()
            meta = {"phenotypes": {"group": group}}
            made.append(Record(zscore(file[key]), TR, f"{group}{number}", session, "rest", meta=meta))
    return made


def nearest(features: np.ndarray, people: np.ndarray) -> np.ndarray:  # (sessions,) bool
    "Whether each session's nearest neighbour (correlation) among all others is of the same person."
    z = features - features.mean(1, keepdims=True)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    alike = z @ z.T
    np.fill_diagonal(alike, -np.inf)
    return people[alike.argmax(1)] == people


def interval(hits: np.ndarray, people: np.ndarray, n: int = 2000) -> tuple[float, float]:
    rng, own = np.random.default_rng(0), [hits[people == p] for p in np.unique(people)]
    draws = [np.concatenate([own[i] for i in rng.integers(0, len(own), len(own))]).mean() for _ in range(n)]
    return tuple(np.quantile(draws, [0.025, 0.975]))


@torch.inference_mode()
def embeddings(model: BrainLMForPretraining, store: Store) -> dict[str, np.ndarray]:
    """Of each session: class token and mean of the others, over windows that cover it; the same centred over the sessions; and
    how the tokens of one parcel vary with those of another, a connectivity of tokens instead of signals."""
    cls, mean, together, frames = [], [], [], model.config.num_timepoints_per_voxel
    for record in store:
        starts = np.linspace(0, record.n_frames - frames, -(-record.n_frames // frames)).round().astype(int)
        signal = torch.from_numpy(
            np.stack([record.values[s : s + frames] for s in starts]).astype(np.float32)
        )
        found = model.embed({"signal": signal})
        cls.append(found.cls.mean((0, 1)).numpy())
        # one mean for each parcel: the mean over all parcels would forget where
        tokens = found.patch.unflatten(1, (-1, signal.shape[2])).flatten(0, 1)  # (blocks of all windows, parcels, width)
        mean.append(tokens.mean(0).flatten().numpy())
        moves = (tokens - tokens.mean(0)).transpose(0, 1).flatten(1)
        r = torch.corrcoef(moves).numpy()[np.triu_indices(len(moves), 1)]
        together.append(np.arctanh(np.clip(r, -0.999999, 0.999999)))
    per_parcel = np.stack(mean)
    mean = per_parcel.reshape(len(per_parcel), signal.shape[2], -1).mean(1)
    found = {"CLS": np.stack(cls), "mean of tokens": mean, "tokens, parcel by parcel": per_parcel}
    found = {f"{k}{c}": x - x.mean(0) * (c != "") for k, x in found.items() for c in ("", ", centred")}
    return found | {"connectivity of tokens": np.stack(together)}


@torch.inference_mode()
def linear_rivals(model: BrainLMForPretraining, store: Store, apart: np.ndarray, seed: int) -> list[dict]:
    "R² of what knows the training people's covariances and nothing else, over hidden frames of held-out people."

    def scaled(x: np.ndarray) -> np.ndarray:  # (T, parcels)
        given = model.scaled({"signal": torch.from_numpy(np.asarray(x, np.float32))[None]})
        return given["signal_vectors"][0].T.double().numpy()

    known = [scaled(r.values) for r, held in zip(store, apart) if not held]
    every, frames, patch = (
        np.concatenate(known),
        MODEL["num_timepoints_per_voxel"],
        MODEL["timepoint_patching_size"],
    )
    cov = every.T @ every / len(every)
    ridge = 0.1 * np.trace(cov) / len(cov) * np.eye(len(cov))
    decay = sum((x[1:] * x[:-1]).sum(0) for x in known) / sum((x[:-1] ** 2).sum(0) for x in known)
    truth, made = {"random": [], "forward": []}, {"random": [], "forward": []}
    chance = torch.Generator().manual_seed(seed)
    for record in (r for r, held in zip(store, apart) if held):
        for start in np.linspace(0, record.n_frames - frames, WINDOWS).round().astype(int):
            x = scaled(record.values[start : start + frames])
            future = x[-patch - 1] * decay ** np.arange(1, patch + 1)[:, None]
            truth["forward"].append(x[-patch:].ravel())
            made["forward"].append(future.ravel())
            shape = 1, len(cov), frames // patch
            for n, hidden in enumerate(
                draw_mask(*shape, ratio=MODEL["mask_ratio"], generator=chance)[0].T.numpy()
            ):
                block, seen = x[n * patch : (n + 1) * patch], ~hidden
                weights = np.linalg.solve((cov + ridge)[np.ix_(seen, seen)], cov[np.ix_(seen, hidden)])
                truth["random"].append(block[:, hidden].ravel())
                made["random"].append((block[:, seen] @ weights).ravel())
    rows = []
    for kind, name in (
        ("random", "linear rule from visible parcels"),
        ("forward", "autoregression of order 1"),
    ):
        x, y = np.concatenate(truth[kind]), np.concatenate(made[kind])
        r2 = 1 - ((x - y) ** 2).sum() / ((x - x.mean()) ** 2).sum()
        rows.append(dict(what=f"R², held out, {kind}", rival=name, value=r2, n=int(apart.sum())))
    return rows


def one_seed(
    store: Store, coordinates: Path, work: Path, seed: int, steps: int, tuned: int, batch: int, lr: float
) -> list[dict]:
    people = store.index["subject"].to_numpy(str)
    table = store.index[["subject", "session"]].assign(group=[p.rstrip("0123456789") for p in people])
    split = make_split(table, {"train": 0.75, "validation": 0.25}, stratify="group", seed=seed)
    split.save(work / f"split{seed}.json")
    data = {
        "train": str(store.path),
        "split": str(work / f"split{seed}.json"),
        "oversample": 8.0,
        "windows": WINDOWS,
        "coordinates": str(coordinates),
    }
    same = {"seed": seed, "progress": False, "batch_size": batch, "device": "cpu", "eval_clips": None}
    options = {"out": str(work / f"pretrained{seed}"), "steps": steps, "eval_every": steps, "lr": lr}
    run = train(make_config("brainlm", "ci", {"data": data, "model": MODEL}, same, LOOP, options))
    apart, rows = np.isin(people, split.subjects("validation")), []
    for e in run.evaluations:
        for what in ("r2", "r2_lines"):
            who = {"r2": "BrainLM", "r2_lines": "straight lines"}[what]
            rows.append(
                dict(
                    what=f"R², {e['set']}",
                    rival=who,
                    value=e[what],
                    n=int(apart.sum() if "held" in e["set"] else (~apart).sum()),
                )
            )
    rows += linear_rivals(run.model, store, apart, seed)
    rivals = {"connectivity": connectivity_features(store, range(len(store)))}
    for name, x in (rivals | embeddings(run.model, store)).items():
        hits = nearest(x, people)
        for where, mine in (("all people", np.ones_like(apart)), ("held-out people", apart)):
            low, high = interval(hits[mine], people[mine])
            rows.append(
                dict(
                    what=f"fingerprint, {where}",
                    rival=name,
                    value=hits[mine].mean(),
                    low=low,
                    high=high,
                    n=int(mine.sum()),
                )
            )
    target = {"columns": ["group"], "kind": "classification"}
    for method in ("probe", "full"):
        asked = {
            "pretrained": str(run.folder),
            "method": method,
            "head": "linear" if method == "probe" else "mlp",
        }
        options = {"out": str(work / f"{method}{seed}"), "steps": tuned, "eval_every": tuned, "lr": 1e-3}
        done = train(
            make_config(
                "brainlm-finetune",
                "ci",
                {"data": data, "model": asked, "target": target},
                same,
                {"optimizer": "adamw"},
                options,
            )
        )
        found = prediction_scores(done.folder / "predictions" / "held-out.csv", classify=True)
        for r in found.itertuples():
            if r.rival == "model" or method == "probe":
                rival = f"BrainLM, {method}" if r.rival == "model" else r.rival
                rows.append(
                    dict(
                        what=f"group, held-out people, {r.score}",
                        rival=rival,
                        value=r.value,
                        low=r.low,
                        high=r.high,
                        n=r.recordings,
                    )
                )
    return [{"seed": seed} | r for r in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="tbi_schaefer1000_60sessions.npz")
    parser.add_argument("--coordinates", type=Path, required=True, help="centroids of the 1000 parcels (CSV)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tuned", type=int, default=60, help="steps of fine-tuning")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--model", nargs="*", default=[], metavar="KEY=VALUE", help="other fields of the model"
    )
    parser.add_argument(
        "--lr", type=float, default=5e-3, help="peak of pretraining, for all that Muon does not step"
    )
    parser.add_argument("--work", type=Path, help="where the runs stay; a temporary folder if not given")
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    MODEL.update((k, json.loads(v)) for k, v in (word.split("=") for word in asked.model))
    same = dict(
        preset=f"{MODEL['num_hidden_layers']} layers of {MODEL['hidden_size']}, {MODEL['num_timepoints_per_voxel']} frames in blocks of {MODEL['timepoint_patching_size']}",
        steps=asked.steps,
        device=f"{platform.machine()} CPU, one thread",
    )
    same |= dict(
        date=str(datetime.date.today()),
        command="python " + " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
    )
    names = ("what", "rival", "seed", "value", "low", "high", "n")
    made = []
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        store = write_store(records(asked.data), Path(work) / "store", dtype="float16", progress=False)
        for seed in asked.seeds:
            made += one_seed(
                store, asked.coordinates, Path(work), seed, asked.steps, asked.tuned, asked.batch, asked.lr
            )
            for row in (r for r in made if r["seed"] == seed):
                print(row, flush=True)
            if asked.table:
                with open(asked.table, "w", newline="") as file:
                    writer = csv.DictWriter(file, [*names, *same])
                    writer.writeheader()
                    for row in made:
                        told = {
                            k: round(float(row[k]), 4)
                            if k in ("value", "low", "high") and k in row
                            else row.get(k, "")
                            for k in names
                        }
                        writer.writerow(told | same)


if __name__ == "__main__":
    main()
