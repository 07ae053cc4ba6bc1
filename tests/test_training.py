"The training loop: schedule, groups, exact gradients, exact resume, files, several processes, the command line."

import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_toy import ToyRecipe  # registers its recipe

from fmri_book import mae
from fmri_book import training as T
from fmri_book.formats import write_shards
from fmri_book.storage import Layout, Record, write_store

pytestmark = pytest.mark.timeout(180)
HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "As in the processes that the tests start: with more threads, sums are rounded in another order."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recordings(list):
    pass


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    made = Recordings(
        Record(rng.standard_normal((n, 100)).astype(np.float16), 1.0, f"{i:02d}")
        for i, n in enumerate((60, 40, 50, 45))
    )
    made.layout = Layout.of("schaefer100")
    return made


@pytest.fixture(scope="module")
def store(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "store"
    write_store(source, folder, progress=False)
    return folder


FIGURE = T.MAERecipe.figure


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    "Drawing takes most of the time of a tiny run; the test that is about figures puts them back."
    monkeypatch.setattr(T.MAERecipe, "figure", lambda self, output, title: None)


SMALL = {
    "model": dict(size="mae_vit_small", embed_dim=16, depth=2, num_heads=2)
    | dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, patch_size=4, t_patch_size=8),
}


@pytest.fixture
def small(store, tmp_path):
    "Configurations of a tiny masked autoencoder."

    def make(name="run", *changes, **options):
        fixed = {
            "out": str(tmp_path / name),
            "device": "cpu",
            "progress": False,
            "steps": 10,
            "batch_size": 4,
        }
        fixed |= {"data": {"train": str(store), "frames": 16, "held_out": 0.25}, "eval_every": 5}
        patch = {"patch_size": [4, 1]}
        return T.make_config("mae", "ci", SMALL, {"model": patch}, fixed, options, *changes)

    return make


@pytest.fixture
def toy(store, tmp_path):
    def make(name="run", *changes, **options):
        fixed = {
            "out": str(tmp_path / name),
            "device": "cpu",
            "progress": False,
            "data": {"train": str(store)},
        }
        return T.make_config("toy", "ci", fixed, options, *changes)

    return make


def losses(result):
    return [row["loss"] for row in result.log]


# ------------------------------------------------------------------------------------------------ schedule and groups


def test_schedule_is_torchs_linear_and_cosine():
    steps, warmup, peak, floor = 50, 10, 0.3, 0.02
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, floor)
    for step in range(warmup, steps):
        assert T.learning_rate(step, peak, steps, warmup, floor) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        )
        optimizer.step()
        cosine.step()
    rising = [T.learning_rate(s, peak, steps, warmup, floor) for s in range(warmup)]
    assert np.allclose(rising, peak * np.arange(1, 11) / 10)


@given(st.integers(1, 500), st.floats(0, 1), st.floats(1e-6, 1))
def test_schedule_stays_between_its_limits(steps, share, peak):
    warmup = round(share * steps)
    rates = [T.learning_rate(s, peak, steps, warmup) for s in range(steps)]
    assert all(0 <= r <= peak * (1 + 1e-12) for r in rates)
    assert max(rates) == pytest.approx(peak)
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :]))


def a_mae(**options):
    return mae.mae_vit_small(
        **dict(
            img_size=(8, 12),
            patch_size=4,
            in_chans=1,
            num_frames=4,
            t_patch_size=2,
            embed_dim=12,
            num_heads=2,
        )
        | dict(decoder_embed_dim=12, decoder_num_heads=2, reg_tokens=2)
        | options
    )


@pytest.mark.parametrize("positions", ["abs", "sep", "sincos"])
def test_only_matrices_decay(positions):
    model = a_mae(pos_embed=positions)
    groups = T.parameter_groups(model, 0.1)
    name_of = {id(p): n for n, p in model.named_parameters()}
    decayed = {name_of[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    free = {name_of[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    matrices = {
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }  # what a human would list: the weights of every linear layer, nothing else
    assert decayed == {f"{n}.weight" for n in matrices}
    assert decayed | free == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not decayed & free and {"encoder.cls_token", "encoder.reg_token_pos", "decoder.mask_token"} <= free
    assert sum(len(g["params"]) for g in groups) == len(decayed) + len(free)


def test_a_model_may_exempt_more():
    model = a_mae()
    model.no_weight_decay = lambda: {"decoder.head.weight"}
    groups = T.parameter_groups(model, 0.1)
    assert any(
        p is model.decoder.head.weight for p in next(g for g in groups if not g["weight_decay"])["params"]
    )


def test_layers_of_encoder_and_decoder():
    model = a_mae()  # 12 + 4 blocks
    layer = T.layers_of(model)
    assert (
        layer["encoder.patch_embed.weight"]
        == layer["encoder.cls_token"]
        == layer["encoder.pos_embed.weight"]
        == 0
    )
    assert [layer[f"encoder.blocks.{i}.mlp.fc1.bias"] for i in range(12)] == list(range(1, 13))
    assert layer["encoder.norm.weight"] == 12
    assert (
        layer["decoder.mask_token"]
        == layer["decoder.proj.weight"]
        == layer["decoder.blocks.0.norm1.bias"]
        == 13
    )
    assert [layer[f"decoder.blocks.{i}.attn.q.weight"] for i in range(4)] == [13, 14, 15, 16]
    assert layer["decoder.norm.weight"] == layer["decoder.head.weight"] == 17


def test_layer_decay_is_decay_to_the_distance_from_the_top():
    model = a_mae()
    layer = T.layers_of(model)
    scale = {id(p): g["lr_scale"] for g in T.parameter_groups(model, 0.05, 0.75) for p in g["params"]}
    for name, p in model.named_parameters():
        assert scale[id(p)] == pytest.approx(0.75 ** (17 - layer[name])), name
    alone = mae.vit_small(img_size=32, patch_size=16, embed_dim=12, num_heads=2)
    of = T.layers_of(alone)
    assert (
        of["patch_embed.weight"],
        of["blocks.0.norm1.weight"],
        of["blocks.11.norm1.weight"],
        of["norm.weight"],
    ) == (0, 1, 12, 13)
    assert {g["lr_scale"] for g in T.parameter_groups(alone, 0.05, 1.0)} == {1.0}


def test_a_model_may_say_its_layers():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model.layer_of = lambda name: 0 if name.startswith("a") else 1
    scale = {id(p): g["lr_scale"] for g in T.parameter_groups(model, 0, 0.5) for p in g["params"]}
    assert scale[id(model["a"].weight)] == 0.5 and scale[id(model["b"].weight)] == 1
    with pytest.raises(ValueError, match="layer_decay"):
        T.parameter_groups(model, 0, 0.0)


def test_layer_decay_reaches_the_optimiser(small):
    trainer = T.Trainer(small(layer_decay=0.5))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.one_step()
    lrs = {g["layer"]: g["lr"] for g in trainer.optimizer.param_groups}
    top = max(lrs)
    assert all(lr == pytest.approx(lrs[top] * 0.5 ** (top - n)) for n, lr in lrs.items())
    moved = (trainer.model.encoder.patch_embed.bias.detach() - before["encoder.patch_embed.bias"]).abs().max()
    assert float(moved) == pytest.approx(lrs[0], rel=1e-3)  # Adam's first step is the learning rate itself


# ------------------------------------------------------------------------------------------------------ configuration


def test_config_round_trip(small, tmp_path):
    from omegaconf import OmegaConf

    config = small()
    (tmp_path / "c.yaml").write_text(OmegaConf.to_yaml(config))
    again = T.make_config("mae", "ci", tmp_path / "c.yaml")
    assert OmegaConf.to_container(again) == OmegaConf.to_container(config)
    assert T.differences(config, again) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("layer_decy=0.5", "layer_decay"),
        ("mask.ration=0.5", "mask.ratio"),
        ("frames=8", "data.frames"),
        ("steps=ten", "steps"),
        ("batch_size=many", "batch_size as number"),
        ("compile=1", "true or false"),
        ("precision=fp8", "bf16-pure"),
        ("optimizer=sgd", "expected optimizer adamw or muon, found 'sgd'"),
        ("steps=0", "steps as a whole number"),
        ("nowhere.yaml", "key=value or a YAML file"),
        ({"data": 3}, "data"),
        ("device=tpu", "auto or cpu"),
        ("ema=1.5", "ema as a number from 0 to 1"),
        ("lr=fast", "lr as (a )?number"),
        ("save_every=ten", "save_every as a whole number from 1 up"),
        ("workers=-1", "workers as a whole number from 0 up"),
        ("clip_grad=0", "clip_grad above 0, or null"),
        ("weight_decay=-0.1", "weight_decay as a number from 0"),
        ("batch_size=null", "a value for batch_size"),
        ("betas=[0.9,1.5]", "two numbers"),
        ("preset=gpu", "--preset gpu"),
        ("track=mlflow", "tensorboard"),
        ("betas=0.9", "betas"),
    ],
)
def test_config_errors_name_what_is_wrong(change, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        T.make_config("mae", "ci", change)


def test_config_is_known_and_typed():
    config = T.make_config("mae", "paper", "lr=1e-3", "data.evaluate.nsd=/somewhere", "data.crop=[0.9,1]")
    assert (
        config.lr == 1e-3 and config.data.evaluate.nsd == "/somewhere" and list(config.data.crop) == [0.9, 1]
    )
    assert (config.epochs, config.clips_per_epoch, config.batch_size, config.base_lr) == (
        100,
        200_000,
        32,
        1e-3,
    )
    assert (config.mask.ratio, config.model.size, config.precision, config.clip_grad) == (
        0.9,
        "mae_vit_base",
        "fp16",
        1,
    )
    assert (tuple(config.betas), config.weight_decay, config.warmup) == ((0.9, 0.95), 0.05, 0.05)
    with pytest.raises(ValueError, match="preset"):
        T.make_config("mae", "huge")
    with pytest.raises(ValueError, match="recipe"):
        T.make_config("mea")


def test_differences_name_what_matters(small):
    changed = T.differences(small(), small("elsewhere", lr=0.5, workers=2, mask={"ratio": 0.5}))
    assert changed == ["lr was 0.001, is 0.5", "mask.ratio was 0.75, is 0.5"]


# ---------------------------------------------------------------------------------------------------- exact gradients


def gradients(config):
    trainer = T.Trainer(config)
    trainer.waited = 0.0
    sums = trainer._forward_backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}, sums


@pytest.mark.parametrize("family", ["toy", "small"])
def test_accumulation_is_a_bigger_batch(request, family):
    make = request.getfixturevalue(family)
    big, sums = gradients(make(batch_size=8))
    for n in (2, 4):
        parts, parts_sums = gradients(make(batch_size=8 // n, accumulate=n))
        assert torch.allclose(sums, parts_sums)
        for name, g in big.items():
            assert torch.allclose(parts[name], g, rtol=1e-4, atol=1e-7), (name, n)


def test_the_toys_terms_really_differ(toy):
    trainer = T.Trainer(toy(batch_size=2))
    counts = {
        float(trainer.recipe.inputs(next(trainer.batches), T.Draw((0, 0)))["counted"].sum()) for _ in range(4)
    }
    assert len(counts) == 4


def test_clipping_limits_the_norm_and_logs_the_one_before(toy):
    free = T.Trainer(toy("a", clip_grad=None))
    row = free.one_step()
    tight = T.Trainer(toy("b", clip_grad=0.01))
    tight.waited = 0.0
    tight._forward_backward()
    before = tight.accelerator.clip_grad_norm_(tight.model.parameters(), 0.01)
    norm = torch.stack([p.grad.norm() for p in tight.model.parameters()]).norm()
    assert row["grad_norm"] == pytest.approx(float(before)) and float(before) > 0.01
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_a_run_is_the_obvious_loop(small):
    "The same losses as a loop written out with torch alone."
    config = small(eval_every=100, weight_decay=0.1, clip_grad=0.5)
    found = losses(T.train(config))
    recipe = T.MAERecipe(config)
    torch.manual_seed(0)
    model = recipe.setup(torch.device("cpu")).train()
    decayed = [
        p
        for n, p in model.named_parameters()
        if p.requires_grad and p.ndim > 1 and "token" not in n and "pos" not in n
    ]
    free = [p for n, p in model.named_parameters() if p.requires_grad and not any(p is d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    loader = T.clip_loader(recipe.train_data(), 4, seed=0)
    epoch, expected = 0, []
    while len(expected) < 10:
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            step = len(expected)
            for g in optimizer.param_groups:
                g["lr"] = 1e-3 * (1 if step < 1 else (1 + math.cos(math.pi * (step - 1) / 9)) / 2)
            loss = model(**recipe.inputs(batch, T.Draw((0, epoch), (step, 0, 0)))).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            expected.append(loss.item())
            if len(expected) == 10:
                break
        epoch += 1
    assert np.allclose(found, expected, rtol=1e-5)


def test_muon_steps_matrices_inside_layers_and_adamw_the_rest():
    def fresh():
        torch.manual_seed(0)
        return torch.nn.ModuleDict(
            {
                "embed": torch.nn.Linear(4, 6),
                "layers": torch.nn.ModuleList([torch.nn.Linear(6, 12), torch.nn.Linear(12, 6)]),
                "head": torch.nn.Linear(6, 2),
            }
        )

    def backward(m, seed):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        m["head"](m["layers"][1](m["layers"][0](m["embed"](x)).relu())).square().sum().backward()

    model, other = fresh(), fresh()
    groups = T.parameter_groups(model, 0.1, muon=True)
    ours = T.AdamWMuon(groups, lr=0.01, betas=(0.9, 0.95))
    matrices = [other["layers"][i].weight for i in (0, 1)]
    rest = {n: p for n, p in other.named_parameters() if all(p is not m for m in matrices)}
    theirs = [
        torch.optim.Muon(matrices, 0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [p for n, p in rest.items() if n.endswith("bias")], 0.01, (0.9, 0.95), weight_decay=0
        ),
        torch.optim.AdamW(
            [p for n, p in rest.items() if not n.endswith("bias")], 0.01, (0.9, 0.95), weight_decay=0.1
        ),
    ]
    for step in range(4):
        for m, optimizers in ((model, [ours]), (other, theirs)):
            m.zero_grad()
            backward(m, step)
            for optimizer in optimizers:
                optimizer.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7), name
    with pytest.raises(ValueError, match="found none; use adamw"):
        T.AdamWMuon(T.parameter_groups(torch.nn.Linear(3, 3), muon=True), 0.1, (0.9, 0.95))


# ------------------------------------------------------------------------------------------------------- exact resume


def interrupt_after(monkeypatch, recipe, calls, evaluation=False):
    """SIGTERM to this very process while the given forward pass is under way, of the training or an evaluation; and to
    its workers, by somebody else, as a batch system would."""
    original, seen = recipe.inputs, []

    def inputs(self, batch, draw):
        asked = (len(draw.place) == 2) == evaluation
        seen.extend([draw] * asked)
        if asked and len(seen) == calls:
            if workers := [str(child.pid) for child in multiprocessing.active_children()]:
                subprocess.run(["kill", "-TERM", *workers], check=True)
                time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, draw)

    monkeypatch.setattr(recipe, "inputs", inputs)


def weights(result):
    return {k: v.clone() for k, v in result.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"drop_path_rate": 0.3, "gauss_sigma": 0.5}, "mask": {"pred_ratio": 0.5}},
        {"accumulate": 2, "ema": 0.9, "batch_size": 2},
        {"precision": "bf16", "layer_decay": 0.8},
        {"precision": "bf16-pure", "accumulate": 2, "batch_size": 2},
        {"optimizer": "muon", "ema": 0.9},
    ],
    ids=["chance", "accumulated-ema", "bf16", "pure", "muon"],
)
def test_resumed_is_uninterrupted(small, monkeypatch, options):
    "Stopped at two random steps; step 5 has an evaluation, which a stop leaves for later."
    whole = T.train(small("whole", options))
    for step in np.random.default_rng().choice(np.arange(1, 10), 2, replace=False).tolist():
        name = f"part{step}"
        with monkeypatch.context() as m:
            interrupt_after(m, T.MAERecipe, step * options.get("accumulate", 1))
            part = T.train(small(name, options))
        assert (part.step, part.finished, part.stopped) == (step, False, "SIGTERM")
        torch.manual_seed(99)
        np.random.seed(99)
        rest = T.train(small(name, options))
        assert rest.finished and losses(rest) == losses(whole)
        assert rest.evaluations == whole.evaluations and same(weights(rest), weights(whole))


@pytest.mark.parametrize(
    ("call", "step", "owed", "noted"),
    [(1, 5, True, []), (2, 5, False, [5, 5]), (3, 10, True, [5, 5])],
    ids=["between-sets", "at-its-end", "of-the-last-step"],
)
def test_a_signal_breaks_an_evaluation_off_and_it_is_made_up_for(small, monkeypatch, call, step, owed, noted):
    options = {"batch_size": 8, "save_every": 100, "eval_clips": 8}
    whole = T.train(small("whole", options))
    with monkeypatch.context() as m:
        interrupt_after(m, T.MAERecipe, call, evaluation=True)
        part = T.train(small("part", options))
    assert (part.step, part.finished, part.stopped) == (step, False, "SIGTERM")
    state = json.loads((T.checkpoints(part.folder)[-1] / "state.json").read_text())
    assert (state["step"], state["owed"]) == (step, owed)
    assert [r["step"] for r in part.evaluations] == noted and not (part.folder / "model").exists()
    rest = T.train(small("part", options))
    assert rest.finished and losses(rest) == losses(whole) and rest.evaluations == whole.evaluations
    assert rest.best == whole.best and same(weights(rest), weights(whole))


def test_workers_change_nothing(small, monkeypatch):
    alone = T.train(small("alone"))
    with monkeypatch.context() as m:
        interrupt_after(m, T.MAERecipe, 7)  # the two workers get the signal as well
        part = T.train(small("two", workers=2))
    assert (part.step, part.stopped) == (7, "SIGTERM")
    assert losses(T.train(small("two", workers=1))) == losses(alone)


def test_killed_at_any_moment(small, tmp_path):
    "SIGKILL at a random moment; the log is that of an uninterrupted run. And importing the module is light."
    from omegaconf import OmegaConf

    config = small("killed", save_every=1, keep=1, steps=14, eval_every=7)
    (tmp_path / "c.yaml").write_text(OmegaConf.to_yaml(config))
    code = f"""
import sys, fmri_book.training as T
heavy = "accelerate omegaconf matplotlib nilearn nibabel webdataset datasets plotly".split()
open({str(tmp_path / "heavy")!r}, "w").write(" ".join(sorted(set(sys.modules) & set(heavy))))
T.train(T.make_config("mae", "ci", {str(tmp_path / "c.yaml")!r}))
"""
    chance, log = np.random.default_rng(), tmp_path / "killed" / "log.jsonl"
    for until in (3,):
        child = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        while child.poll() is None and len(T.read_lines(log)) < until:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.03))
        child.kill()
        child.wait()
    assert (tmp_path / "heavy").read_text() == "" and len(T.read_lines(log)) >= 3
    done = T.train(config)
    whole = T.train(small("whole", save_every=1, keep=1, steps=14, eval_every=7))
    assert losses(done) == losses(whole) and same(weights(done), weights(whole))
    assert [row["step"] for row in done.log] == list(range(1, 15))


def test_a_finished_run_is_left_alone(small):
    first = T.train(small())
    again = T.train(small())
    assert again.finished and again.step == 10 and losses(again) == losses(first) and len(again.log) == 10


def test_other_settings_are_refused_and_named(small):
    T.train(small(steps=3))
    with pytest.raises(T.Changed, match=r"lr was 0.001, is 0.5"):
        T.train(small(steps=3, lr=0.5))
    assert T.train(small(steps=5, workers=0), allow_changes=True).step == 5
    with pytest.raises(FileExistsError, match="without a run"):
        T.train(small(steps=5), resume=False)
    assert T.train(small(steps=2), overwrite=True).step == 2
    assert len(T.checkpoints(small().out)) == 1


def test_a_position_of_another_world_is_refused(small):
    trainer = T.Trainer(small())
    state = trainer.batches.state_dict() | {"world": 2}
    with pytest.raises(ValueError, match="world"):
        trainer.batches.load_state_dict(state)


def test_a_stream_resumes_by_epoch_only(small, source, tmp_path, monkeypatch):
    write_shards(source, tmp_path / "shards", runs_per_shard=2)
    indexed = T.train(small("indexed", data={"train": str(tmp_path / "shards")}))
    assert indexed.finished
    monkeypatch.setattr(
        "fmri_book.formats.ShardIndex", lambda urls: (_ for _ in ()).throw(ValueError("remote"))
    )
    options = dict(data={"train": str(tmp_path / "shards")}, clips_per_epoch=20, steps=8)
    with pytest.raises(ValueError, match="clips_per_epoch"):
        T.Trainer(small("s", options, "clips_per_epoch=null"))
    with monkeypatch.context() as m:
        interrupt_after(m, T.MAERecipe, 3)
        T.train(small("s", options))
    with pytest.warns(UserWarning, match="by epoch only"):
        assert T.train(small("s", options)).finished


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_kept_are_the_last_and_the_best(toy):
    falling = iter([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    trainer = T.Trainer(toy(keep=2, eval_every=2))
    trainer.evaluate = lambda: {"all": next(falling)}
    trainer._open_folder()
    result = trainer.run()
    assert result.best == {"set": "all", "step": 4, "loss": 1.0}
    assert [p.name for p in T.checkpoints(result.folder)] == [
        "step_00000004",
        "step_00000010",
        "step_00000012",
    ]


def test_a_checkpoint_that_fails_leaves_the_one_before(toy, monkeypatch):
    import safetensors.torch

    original = safetensors.torch.save_file

    def broken(state, path, *rest):
        if "exp_avg:norm.weight" in state and int(state["step:norm.weight"]) >= 8:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return original(state, path, *rest)

    whole = T.train(toy("whole", save_every=4))
    with monkeypatch.context() as m:
        m.setattr(safetensors.torch, "save_file", broken)
        with pytest.raises(OSError):
            T.train(toy("part", save_every=4))
    part = Path(toy("part").out)
    assert [p.name for p in T.checkpoints(part)] == ["step_00000004"]
    assert losses(T.train(toy("part", save_every=4))) == losses(whole)


def test_a_folder_of_a_killed_writer_is_no_checkpoint(toy):
    result = T.train(toy())
    (result.folder / "checkpoints" / ".tmp-0123-step_00000099").mkdir()
    assert [p.name for p in T.checkpoints(result.folder)][-1] == "step_00000012"


def test_a_damaged_checkpoint_is_named(toy):
    result = T.train(toy())
    file = T.checkpoints(result.folder)[-1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a file of a checkpoint"):
        T.train(toy(steps=14), allow_changes=True)


def test_checkpoints_hold_no_pickle(small):
    result = T.train(small())
    files = [p for p in result.folder.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jsonl", ".yaml", ".png", ".npz"}
    stored = load_file(T.checkpoints(result.folder)[-1] / "model.safetensors")
    assert same(stored, weights(result))


def test_the_weights_are_usable_at_once(small):
    result = T.train(small())
    again = mae.MaskedAutoencoderViT.from_pretrained(result.folder / "model")
    assert same(weights(result), again.state_dict())
    assert again.input_spec.space == "schaefer100" and again.input_spec.frames == 16


# ---------------------------------------------------------------------------------------------- what a run leaves, says


def test_log_evaluations_and_figures(small, monkeypatch):
    monkeypatch.setattr(T.MAERecipe, "figure", FIGURE)
    result = T.train(small())
    names = {"step", "epoch", "loss", "lr", "grad_norm", "data_seconds", "step_seconds", "clips_per_second"}
    assert all(set(row) == names for row in result.log) and len(result.log) == 10
    assert all(0 <= row["data_seconds"] <= row["step_seconds"] for row in result.log)
    assert 0 <= result.data_share <= 1
    assert [(r["step"], r["set"]) for r in result.evaluations] == [
        (s, n) for s in (5, 10) for n in ("held out", "train")
    ]
    assert {p.name for p in (result.folder / "figures").iterdir()} >= {
        "held-out_00000005.png",
        "train_00000010.png",
    }
    facts = json.loads((result.folder / "run.json").read_text())
    assert facts["steps"] == 10 and facts["clips_a_step"] == 4 and facts["processes"] == 1


def test_evaluation_is_repeatable_and_moves_no_chance(small):
    trainer = T.Trainer(small(batch_size=5))
    before = torch.get_rng_state()
    first = trainer.evaluate()
    assert torch.equal(before, torch.get_rng_state()) and trainer.evaluate() == first
    other = T.Trainer(small(batch_size=3)).evaluate()
    assert other == pytest.approx(first, rel=1e-5)  # neither masks nor weights depend on the batches
    assert trainer.worker.training


def test_not_finite_stops_and_saves_the_batch(small, monkeypatch):
    original = T.MAERecipe.inputs

    def inputs(self, batch, draw):
        made = original(self, batch, draw)
        if draw.place[0] == 3:
            made["images"][1, 0, 2, 5, 0] = float("nan")
        return made

    monkeypatch.setattr(T.MAERecipe, "inputs", inputs)
    with pytest.raises(
        T.NonFinite, match=r"step 4: .*loss nan.*inputs\.images.*nonfinite_step_4_rank_0\.safetensors"
    ) as error:
        T.train(small(save_every=1, eval_every=100))
    assert T.read_lines(Path(small().out) / "log.jsonl")[-1]["step"] == 3  # the row of step 4 would be next
    file = Path(small().out) / "nonfinite_step_4_rank_0.safetensors"
    saved = load_file(file)
    assert saved["batch.packed"].shape == (4, 16, 100) and saved["inputs.images"].isnan().sum() == 1
    words = json.loads(file.with_suffix(".json").read_text())["words"]
    assert words["key"][0] in str(error.value) and len(words["key"]) == 4
    good = load_file(T.checkpoints(small().out)[-1] / "model.safetensors")
    assert all(torch.isfinite(v).all() for v in good.values())


def test_of_several_micro_batches_the_guilty_one_is_saved(toy, monkeypatch):
    original, given = ToyRecipe.inputs, []

    def inputs(self, batch, draw):
        made = original(self, batch, draw)
        if draw.place[:2] == (2, 1):
            made["x"][3, 7] = math.inf
            given.append(batch["index"])
        return made

    monkeypatch.setattr(ToyRecipe, "inputs", inputs)
    with pytest.raises(T.NonFinite, match="step 3"):
        T.train(toy(accumulate=3, batch_size=4))
    saved = load_file(Path(toy().out) / "nonfinite_step_3_rank_0.safetensors")
    assert torch.equal(saved["batch.index"], given[0]) and saved["inputs.x"][3, 7] == math.inf


def test_infinity_is_null_in_the_log(toy):
    trainer = T.Trainer(toy())
    trainer._open_folder()
    trainer._write("log.jsonl", [{"step": 1, "grad_norm": math.inf, "loss": float("nan"), "lr": 0.5}])
    text = (trainer.folder / "log.jsonl").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found == {"step": 1, "grad_norm": None, "loss": None, "lr": 0.5}


def test_half_precision_on_a_processor_is_refused_with_the_remedy(toy):
    with pytest.raises(ValueError, match="a GPU for precision=fp16, found a CPU; precision=bf16"):
        T.train(toy(precision="fp16"))


def test_an_overflow_is_skipped_until_the_factor_is_used_up(toy):
    "Accelerate has no fp16 on processors, torch's scaler has: factors above 1 may skip, 1 may not."
    trainer = T.Trainer(toy())
    assert not trainer._may_skip()
    for scale, may in ((65536.0, True), (2.0, True), (1.0, False)):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.accelerator.scaler.scale(torch.ones(1))  # the factor becomes a tensor at first use
        assert trainer._may_skip() is may


def test_overwrite_removes_what_a_run_left_and_nothing_else(toy):
    result = T.train(toy(steps=3))
    for name in ("nonfinite_step_2_rank_0.safetensors", "deepspeed/step_00000001/x", "mine.txt", "data/x"):
        (result.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (result.folder / name).write_text("x")
    T.Trainer(toy()).forget()
    assert sorted(p.name for p in result.folder.iterdir()) == ["data", "mine.txt"]


def test_pure_bfloat16_adds_micro_batches_up_in_float32(toy):
    one = T.Trainer(toy(precision="bf16-pure", batch_size=4, accumulate=6))
    one.waited = 0.0
    one._forward_backward()
    parts = []
    again = T.Trainer(toy(precision="bf16-pure", batch_size=4, accumulate=6))
    draws = [(next(again.batches), T.Draw((0, 0), (0, micro, 0))) for micro in range(6)]
    for batch, draw in draws:
        inputs = again.recipe.inputs(batch, draw)
        output = again.worker(**inputs)
        again.worker.zero_grad()
        (output.loss * output.terms).backward()
        parts.append([p.grad.float() for p in again.inner.parameters()])
    n = sum(float(again.recipe.inputs(*d)["counted"].sum()) for d in draws)
    for i, p in enumerate(one.model.parameters()):
        expected = sum(g[i] for g in parts) / n
        assert p.grad.dtype == torch.float32
        assert torch.allclose(p.grad, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
    bits = [p.grad.ravel() for p in one.model.parameters()]
    assert any(
        not torch.equal(g, g.bfloat16().float()) for g in bits
    )  # finer than a sum in bfloat16 could be


def test_evaluation_in_pure_bfloat16_neither_crops_nor_draws(small):
    trainer = T.Trainer(small(precision="bf16-pure"))
    with trainer._evaluated_weights():
        assert not trainer.model.training and not trainer.worker.training
    assert trainer.model.training and trainer.worker.training


def test_targets_without_principal_components_are_fitted_on_training_clips(small, monkeypatch):
    options = {"target_norm": "pca", "pca_norm_nc": 3}
    trainer = T.Trainer(small(model=options))
    recipe, found = trainer.recipe, trainer.model.target_norm.components
    everyone = recipe.training.table.subject if hasattr(recipe.training.table, "subject") else None
    frames = []
    numbers = np.linspace(0, len(recipe.training) - 1, min(64, len(recipe.training))).round().astype(int)
    for n in numbers:
        values = recipe.decoder.eval().decode(recipe.training.batch([int(n)]))["signal"]
        frames.append(values[0, ::4])
    frames = torch.cat(frames).double()
    values, pictures = torch.linalg.eigh((frames - frames.mean(0)).T @ (frames - frames.mean(0)))
    cosines = (found.flatten(1).double() @ pictures[:, -3:]).norm(dim=1)  # in the span of the leading ones
    assert torch.allclose(cosines, torch.ones(3, dtype=torch.float64), atol=1e-4), everyone
    held_out = recipe.sets["held out"]
    monkeypatch.setattr(
        type(held_out), "batch", lambda self, i: pytest.fail("read") if self is held_out else None
    )
    with pytest.raises((TypeError, KeyError, AttributeError)):
        recipe._fit_target_norm()  # asks the training clips, which answer nothing here
    monkeypatch.undo()
    result = T.train(small("run2", model=options | {"pca_norm_nc": 3}, precision="bf16-pure"))
    again = mae.MaskedAutoencoderViT.from_pretrained(result.folder / "model")
    assert torch.equal(again.target_norm.components, found)  # in full precision beside bfloat16 weights
    assert all(math.isfinite(x) for x in losses(result))


def test_moving_average_by_hand(toy):
    trainer = T.Trainer(toy(ema=0.9))
    expected = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    for step in range(5):
        trainer.one_step()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {k: decay * expected[k] + (1 - decay) * v for k, v in trainer.model.state_dict().items()}
    assert all(torch.allclose(trainer.ema[k], v, atol=1e-6) for k, v in expected.items())
    kept = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with trainer._evaluated_weights():
        assert same(trainer.model.state_dict(), trainer.ema)
    assert same(trainer.model.state_dict(), kept)


def test_bfloat16_follows_float32(small):
    exact = T.train(small("a", steps=30, eval_every=30))
    for precision in ("bf16", "bf16-pure"):
        found = T.train(small(precision, steps=30, eval_every=30, precision=precision))
        assert np.allclose(losses(found), losses(exact), rtol=0.02), precision
        assert all(v.dtype == torch.float32 for v in found.model.state_dict().values())
        assert found.best["loss"] == pytest.approx(exact.best["loss"], rel=0.02)


def test_a_tracker_that_is_not_installed_is_named(toy):
    import importlib.util

    for name in ("tensorboard", "wandb"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(ValueError, match=f"pip install {name}"):
                T.train(toy(name, track=name))


def test_the_example_and_a_flat_cohort_make_stores(tmp_path):
    pytest.importorskip("brainspace")
    made = T.example_records()
    assert [r.run for r in made] == ["train", "heldout"] and made[0].n_frames + made[1].n_frames + 20 == 652
    assert all(abs(float(r.values.astype(np.float32).std(0).mean()) - 1) < 0.15 for r in made)


# -------------------------------------------------------------------------------------------------- several processes


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_two_processes(program, *arguments):
    "Through Accelerate; --multi_gpu is its name for one process per device by torchrun, device=cpu makes them processors."
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    command = [sys.executable, "-m", *launch, *map(str, program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_have_the_gradients_of_one(toy, small, store, tmp_path):
    """Terms that differ between clips, processes and micro-batches; and the masked autoencoder; then whole runs.
    At the end, in the same two processes: weights spread over them (FSDP2) are saved and loaded as named tensors, and
    the program `fmri-book train` makes a run, in which only the first process speaks."""
    from omegaconf import OmegaConf

    halves = {}
    for name, make in (("toy", toy), ("mae", small)):
        config = make(f"two_{name}", batch_size=2, accumulate=2)
        halves[name] = str(tmp_path / f"{name}.yaml")
        Path(halves[name]).write_text(OmegaConf.to_yaml(config))
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import torch, training_toy
from safetensors.torch import save_file
from fmri_book import training as T
for name, file in {halves!r}.items():
    trainer = T.Trainer(T.make_config(name, "ci", file))
    trainer.waited = 0.0
    trainer._forward_backward()
    save_file({{n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}},
              f"{tmp_path}/{{name}}_{{trainer.rank}}.safetensors")
    T.train(T.make_config(name, "ci", file))

import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from fmri_book import training as T
mesh = init_device_mesh("cpu", (2,))
def make(seed, sharded):
    torch.manual_seed(seed)
    model = nn.Sequential(torch.nn.Linear(6, 8), nn.Tanh(), torch.nn.Linear(8, 2))
    if sharded:
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(T.parameter_groups(model), lr=0.1)
def step(model, optimizer, seed):
    torch.manual_seed(seed)
    loss = model(torch.randn(4, 6)).square().mean()
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    return float(loss)
plain, sharded = make(0, False), make(0, True)
for s in range(3):
    assert abs(step(*plain, s) - step(*sharded, s)) < 1e-6
weights, memory = T.sharded_states(*sharded)
if dist.get_rank() == 0:
    T.write_checkpoint(__import__("pathlib").Path({str(tmp_path / "step")!r}), dict(zip(("w", "m"), (weights, memory))), {{}})
    named = T.optimizer_tensors(*plain)
    assert memory.keys() == named.keys() and weights.keys() == plain[0].state_dict().keys()
    assert all(torch.allclose(memory[k], v, atol=1e-6) for k, v in named.items())
dist.barrier()
again = make(1, True)
T.load_sharded_states(*again, *(T.read_checkpoint_file(__import__("pathlib").Path({str(tmp_path / "step")!r}) / f) for f in "wm"))
for s in range(3, 6):
    assert step(*again, s) == step(*sharded, s)
import sys
from fmri_book import cli
status = cli.main(sys.argv[1:])
dist.destroy_process_group()
sys.exit(status)
"""
    )
    model = [f"model.{k}={v}" for k, v in SMALL["model"].items() if k != "patch_size"]
    asked = [f"data.train={store}", "data.held_out=0.25", "steps=6", "batch_size=4", *model]
    asked += ["model.patch_size=[4,1]", "eval_every=3", "device=cpu", "--out", tmp_path / "told"]
    said = in_two_processes([program], "train", "mae", *asked)
    for name, make in (("toy", toy), ("mae", small)):
        config = make(f"one_{name}", batch_size=8)
        expected, _ = gradients(config)
        for rank in (0, 1):
            found = load_file(tmp_path / f"{name}_{rank}.safetensors")
            assert found.keys() == expected.keys()
            for key, g in expected.items():
                assert torch.allclose(found[key], g, rtol=1e-4, atol=1e-7), (name, rank, key)
        one = T.train(config)
        two = T.TrainResult(tmp_path / f"two_{name}", 0, True)
        assert np.allclose(losses(two), losses(one), rtol=1e-4), name
        pairs = zip(two.evaluations, one.evaluations, strict=True)
        assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-3) for a, b in pairs), name
    assert said.count("told: 6 steps") == 1, said
    assert json.loads((tmp_path / "told" / "run.json").read_text())["processes"] == 2
    one = T.train(small("one", steps=6, batch_size=8, eval_every=3))
    assert np.allclose(losses(T.TrainResult(tmp_path / "told", 6, True)), losses(one), rtol=1e-4)
    with pytest.raises(ValueError, match="world"):
        T.train(toy("two_toy", batch_size=2, accumulate=2, steps=14), allow_changes=True)


# --------------------------------------------------------------------------------------------------- the command line


def test_command_line_runs_resumes_and_refuses(store, tmp_path, capsys, monkeypatch):
    from fmri_book import cli

    model = [f"model.{k}={v}" for k, v in SMALL["model"].items() if k != "patch_size"]
    same_ = [
        "train",
        "mae",
        f"data.train={store}",
        "data.held_out=0.25",
        "steps=6",
        "batch_size=4",
        *model,
        "device=cpu",
    ]
    same_ += ["eval_every=3", "progress=false"]
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        with monkeypatch.context() as m:
            interrupt_after(m, T.MAERecipe, 2)
            assert cli.main([*same_, "--out", str(tmp_path / "a")]) == 130
        said = capsys.readouterr()
        assert "2 steps" in said.out and "stopped by SIGTERM; the same command goes on" in said.err
        assert cli.main([*same_, "--out", str(tmp_path / "a"), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["finished"] and told["step"] == 6 and told["best"]["set"] == "held out"
        assert cli.main([*same_, "lr=0.5", "--out", str(tmp_path / "a")]) == 2
        assert "lr was 0.001, is 0.5" in (err := capsys.readouterr().err) and "--allow-changes" in err
        mixed = ["train", "mae", "lr=0.5", "--preset", "gpu", "mask.ratio=0.8", "--show", "model.depth=3"]
        assert cli.main(mixed) == 0  # settings before, between and after options
        shown = capsys.readouterr().out
        assert (
            "lr: 0.5" in shown and "ratio: 0.8" in shown and "depth: 3" in shown and "batch_size: 64" in shown
        )
        with pytest.raises(SystemExit):
            cli.main(["train", "mae", "--no-such-option"])
        assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err
        assert cli.main(["train", "mae", "stepz=4"]) == 2 and "steps" in capsys.readouterr().err
        assert cli.main(["train", "mae", "--preset", "paper", "--show"]) == 0
        assert "mae_vit_base" in capsys.readouterr().out
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
