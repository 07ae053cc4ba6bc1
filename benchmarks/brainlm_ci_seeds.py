"""Chapter 4's small training with several seeds, with and without the original's switches, each alone and both: runs the
chapter's own code up to the training, then repeats it.

    python benchmarks/brainlm_ci_seeds.py --seeds 3 --table results/brainlm_ci_seeds.csv

One thread, one to two minutes a training. Values are R² on all held-out simulated people of the chapter,
intervals come from drawing these people again. The table is written anew after each training."""

import __future__
import argparse, csv, datetime, json, os, platform, sys, types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent


def run_chapter(before: str) -> dict:
    "Names that the chapter's code cells define, up to the cell that contains `before`."
    import matplotlib

    matplotlib.use("Agg")
    book = json.loads((ROOT / "nbs" / "04_brainlm.ipynb").read_text())
    # transformers looks up annotations of its subclasses in the module they say they come from
    chapter = sys.modules["chapter04"] = types.ModuleType("chapter04")
    for cell in book["cells"]:
        code = "".join(cell["source"])
        if cell["cell_type"] != "code" or "colab" in cell["metadata"].get("tags", []):
            continue
        if before in code:
            return vars(chapter)
        as_in_jupyter = __future__.annotations.compiler_flag  # stays switched on from cell to cell
        code = compile(code, f"04_brainlm:{cell['id']}", "exec", flags=as_in_jupyter, dont_inherit=True)
        exec(code, vars(chapter))  # noqa: S102
    raise SystemExit(f"expected a cell of nbs/04_brainlm.ipynb with {before!r}, found none")


def write(path: Path, rows: list[dict], same: dict) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *same])
        writer.writeheader()
        writer.writerows(row | same for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    names = run_chapter("model, curve = train(config")
    exam, r_squared = names["exam"], names["r_squared"]
    rows = []

    def add(model, seed, what, errors):
        value, low, high = (round(float(x), 4) for x in r_squared(errors))
        rows.append({"model": model, "seed": seed, "what": what, "value": value, "low": low, "high": high})
        print(rows[-1], flush=True)

    for name, predict in names["rivals"].items():
        add(name, "", "forecast", names["forecast_errors"](predict, exam))
    same = {
        "preset": names["PRESET"],
        "device": f"{platform.machine()} CPU, one thread",
        "date": str(datetime.date.today()),
        "command": "python " + " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
    }
    switches = {
        "BrainLM": {},
        "original's switches": dict(legacy_mask=True, open_cls=True),
        "legacy_mask alone": dict(legacy_mask=True),
        "open_cls alone": dict(open_cls=True),
    }
    plan = [
        (name, names["BrainLMConfig"](**names["config"].to_dict() | switch), seed)
        for seed in range(asked.seeds)
        for name, switch in switches.items()
    ]
    for name, config, seed in plan:
        model, _ = names["train"](config, seed=seed)
        for what, errors in names["scores"](model, exam).items():
            add(name, seed, what, errors)
        if asked.table:
            write(asked.table, rows, same)


if __name__ == "__main__":
    main()
