"""Networks in attention with several seeds of the training: runs the code of chapter 4d up to its training, repeats it,
and asks for the networks of parcels on simulated people whom the chapter never looks at.

    python benchmarks/brainlm_networks_seeds.py --seeds 3 --table results/brainlm_networks_seeds.csv

One thread, about 40 seconds a training on a quiet core. Intervals come from drawing people, not parcels, again. Rows say how
many neighbours voted (k), by which rule, from which layer, and whether the model was shown the signals or had all of them hidden.
The table is written anew after each training."""

import argparse, csv, datetime, json, os, platform, sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
PEOPLE, SEED = 24, 7  # strangers of a cohort that the chapter does not use


def chapter_names() -> dict:
    "What the chapter's code cells define: all up to the training, and later ones that only define."
    import matplotlib

    matplotlib.use("Agg")
    book, names, trained = (
        json.loads((ROOT / "nbs" / "04d_readouts.ipynb").read_text()),
        {"__name__": "chapter04d"},
        False,
    )
    for cell in book["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or "colab" in cell["metadata"].get("tags", []):
            continue
        wanted = not trained or any(t in code for t in ("def mean_profile", "def over_subjects", "#| export"))
        if "steps = trained(seed=0)" in code:
            trained = True
        if wanted:
            # what is defined there is wanted, what is computed from the page's own model is not
            for end in ("\nsteps = trained(seed=0)", "\nprofiles = mean_profile", "\ncurve = {"):
                code = code.split(end)[0]
            exec(compile(code, f"04d_readouts:{cell['id']}", "exec"), names)  # noqa: S102
    if not trained:
        raise SystemExit(
            "expected a cell of nbs/04d_readouts.ipynb with 'steps = trained(seed=0)', found none"
        )
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    names = chapter_names()
    import numpy as np
    import torch

    from fmri_book.cohort import Cohort
    from fmri_book.data import Space, connectivity, parcel_networks

    labels = names["labels"] = parcel_networks(100)
    rules = {rule: names["voters"]("schaefer100", rule) for rule in ("parcel", "hemisphere", "apart")}
    cohort = Cohort(n_subjects=PEOPLE, seed=SEED, effects=names["effects"], **names["world"])
    x = names["signals"]([cohort.run(s) for s in cohort.participants.subject])
    rows = []
    same = {
        "preset": names["PRESET"],
        "people": PEOPLE,
        "device": f"{platform.machine()} CPU, one thread",
        "date": str(datetime.date.today()),
        "command": "python " + " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
    }

    def add(what, values, seed="", step="", layer="", shown="signals", k=5):
        for rule, allowed in rules.items():
            found = names["network_knn"](values.mean(0), labels, k, allowed).accuracy
            low, high = names["over_subjects"](values, allowed) if k == 5 else ("", "")
            told = dict(what=what, seed=seed, step=step, layer=layer, shown=shown, k=k, rule=rule)
            rows.append(
                told
                | {
                    n: v if v == "" else round(v, 4)
                    for n, v in zip(("value", "low", "high"), (found, low, high))
                }
            )
            print(*rows[-1].values(), flush=True)

    add(
        "connectivity, same frames", np.stack([connectivity(r) for r in x[:, :, :96].transpose(1, 2).numpy()])
    )
    places = Space.named("schaefer100").coords * [1, 1, 1.0]
    places[:, 0] = np.abs(places[:, 0])
    for rule, allowed in rules.items():
        value = names["network_knn"](places, labels, 5, allowed, "euclidean").accuracy
        rows.append(
            dict(
                what="place, left and right folded",
                seed="",
                step="",
                layer="",
                shown="",
                k=5,
                rule=rule,
                value=value,
                low="",
                high="",
            )
        )
    for seed in range(asked.seeds):
        copies = names["trained"](seed)
        for step, model in copies.items():
            add("attention", names["mean_profile"](model, x), seed, step, -1)
        for k in (1, 3, 9, 15):
            add("attention", names["mean_profile"](model, x), seed, step, -1, k=k)
        add("attention", names["mean_profile"](model, x, layer=0), seed, step, 0)
        blind = names["mean_profile"](model, x, mask=torch.ones(PEOPLE, 100, 4, dtype=torch.bool))
        assert (blind == blind[:1]).all()  # nothing of a person is left
        add("attention", blind, seed, step, -1, "nothing")
        if asked.table:
            with open(asked.table, "w", newline="") as file:
                writer = csv.DictWriter(file, [*rows[0], *same])
                writer.writeheader()
                writer.writerows(row | same for row in rows)


if __name__ == "__main__":
    main()
