"""Chapter 3's small training with several seeds: runs the chapter's own code up to the training, then repeats it.

    python benchmarks/mae_ci_seeds.py --seeds 5 --table results/mae_ci_seeds.csv

One thread, about a minute a seed. Errors are squared errors per hidden pixel of the held-out minutes of the real
recording, on the masks that all rivals of the chapter share."""

import __future__
import argparse, csv, datetime, json, os, platform, sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent


def run_chapter(before: str) -> dict:
    "Names that the chapter's code cells define, up to the cell that contains `before`."
    import matplotlib

    matplotlib.use("Agg")
    book = json.loads((ROOT / "nbs" / "03_mae.ipynb").read_text())
    names = {"__name__": "__main__"}
    for cell in book["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or "colab" in cell["metadata"].get("tags", []):
            continue
        if before in code:
            return names
        as_in_jupyter = __future__.annotations.compiler_flag  # stays switched on from cell to cell
        exec(compile(code, f"03_mae:{cell['id']}", "exec", flags=as_in_jupyter), names)  # noqa: S102
    raise SystemExit(f"expected a cell of nbs/03_mae.ipynb with {before!r}, found none")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    names = run_chapter("mae, losses = train(preset, [training])")
    # classes of the notebook would be pickled under this module's name; nothing here needs that
    train, exams, rivals = names["train"], names["exams"], names["rivals"]
    rows = []
    for name, weigh in rivals.items():
        for ratio, exam in exams.items():
            errors = names["by_weights"](weigh, *exam).sum(0)
            rows.append({"model": name, "seed": "", "hidden": ratio, "loss": round(errors[0] / errors[1], 5)})
    for seed in range(asked.seeds):
        model, _ = train(names["preset"], [names["training"]], seed=seed, say=f"seed {seed}")
        for ratio, exam in exams.items():
            errors = names["errors_of"](model, *exam).sum(0)
            rows.append(
                {"model": "MAE", "seed": seed, "hidden": ratio, "loss": round(errors[0] / errors[1], 5)}
            )
            print(rows[-1], flush=True)
    command = "python " + " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
    same = {
        "preset": "ci",
        "device": f"{platform.machine()} CPU, one thread",
        "date": str(datetime.date.today()),
        "command": command,
    }
    if asked.table:
        with open(asked.table, "w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *same])
            writer.writeheader()
            writer.writerows(row | same for row in rows)


if __name__ == "__main__":
    main()
