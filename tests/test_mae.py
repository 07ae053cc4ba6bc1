"""The masked autoencoder: the published numbers, timm's ViT, independent references, bad input, files."""

import inspect
import itertools
import json
import math
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import ndimage, stats

import published_mae as P
from fmri_book import mae as M
from fmri_book.clips import ClipDecoder
from fmri_book.mae import (
    Cubes,
    InputSpec,
    MaskedAutoencoderViT,
    MaskedViT,
    PatchGrid,
    PatchMask,
    as_images,
    choose_patches,
    from_timm,
    random_masks,
    sincos_grid,
)
from fmri_book.storage import Layout

pytestmark = pytest.mark.timeout(120)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
TINY = P.VIDEO | P.SMALL  # 2 × 2 × 3 patches of 2 × 4 × 4 pixels
quick = settings(max_examples=40, deadline=None, derandomize=True)


def make(cls=MaskedAutoencoderViT, seed=0, **options):
    "A tiny model whose every weight is random: biases, norms and tokens too."
    encoder = {k: v for k, v in TINY.items() if not k.startswith("decoder")}
    torch.manual_seed(seed)
    model = cls(**((encoder if cls is MaskedViT else TINY) | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model


def clips(batch=2, seed=0, shape=(1, 4, 8, 12)):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def near(found, expected, tolerance=1e-5):
    found, expected = (x.detach().float() if torch.is_tensor(x) else x for x in (found, expected))
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance)


# ---- the published numbers


@pytest.fixture(scope="module")
def recorded():
    with np.load(P.RECORDED) as file:
        return dict(file)


def same_arrays(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for key in expected:
        scale = max(1.0, float(np.abs(expected[key]).max())) if expected[key].size else 1.0
        near(found[key] / scale, expected[key] / scale, tolerance)


@pytest.mark.parametrize("name", P.CASES)
def test_recorded_numbers_of_the_published_code(name, recorded):
    "Loss, predictions, images, masks, ids, embeddings and the gradient of every parameter."
    model = P.our_model(P.config_of(name))
    model.load_state_dict(P.fill(model.state_dict(keep_vars=True)))
    found = P.run_ours(model, *P.inputs(P.config_of(name)))
    same_arrays(found, P.unpacked(recorded[name], found))


@pytest.fixture(scope="module")
def published():
    try:
        return P.published()
    except ImportError as error:
        pytest.skip(f"the published package cannot be imported: {error}")


@pytest.mark.parametrize("name", P.CASES)
def test_published_code_itself(name, published):
    "Weights at random, its state dict loaded strictly, options of forward."
    torch.manual_seed(1)
    theirs, ours = P.published_model(P.config_of(name)), P.our_model(P.config_of(name))
    for p in theirs.parameters():
        p.data.add_(0.1 * torch.randn_like(p) * p.requires_grad)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, inside, visible = P.inputs(P.config_of(name))
    x = torch.randn_like(x) * inside
    near_edge = {} if x.shape[-1] == 1 else {"pred_edge_pad": 1}  # of 5 parcels, none would be left
    for options in ({}, {"full_decoding": True}, near_edge, {"targets": x.flip(0) * inside}):
        for model in (theirs, ours):
            model.zero_grad()
        same_arrays(
            P.run_ours(ours, x, inside, visible, **options),
            P.run_published(theirs, x, inside, visible, **options),
        )


@pytest.mark.parametrize("pred", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_published_code_without_an_image_mask(published, masked, pred):
    theirs, ours = P.published_model(TINY), P.our_model(TINY)
    ours.load_state_dict(theirs.state_dict())
    x, inside, visible = P.inputs(TINY)
    asked = torch.zeros_like(visible)
    asked[:, :, :, :, 2:7] = 1
    options = {"pred_mask": asked} if pred else {}
    args = (x, inside if masked else None, visible)
    same_arrays(P.run_ours(ours, *args, **options), P.run_published(theirs, *args, **options))


SPACES = {
    "flat": ((224, 560), 16),
    "schaefer400": ((400, 1), 1),
    "mni_cortex": ((465, 512), (1, 512)),
}


@pytest.fixture
def without_memory(monkeypatch):
    "The published constructors read numbers from torch.linspace, which has none on the device meta."
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args: linspace(*args, device="cpu"))
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("size", [s for s in M.SIZES if s != "vit_small"])
@pytest.mark.parametrize("space", SPACES)
def test_named_sizes_have_the_published_weights(size, space, published, without_memory):
    "Names, order and shapes of every weight, without their memory."
    image, patch = SPACES[space]
    args = {"img_size": image, "patch_size": patch, "num_frames": 16, "t_patch_size": 4, "in_chans": 1}
    args |= {"decoder_depth": 4, "pos_embed": "sep", "t_pred_stride": 2}
    theirs, ours = getattr(published, size)(**args), M.SIZES[size](**args)
    shapes = lambda model: [(k, v.shape) for k, v in model.state_dict().items()]
    assert shapes(ours) == shapes(theirs)
    heads = lambda blocks, name: [getattr(b.attn, name) for b in blocks]
    assert heads(ours.encoder.blocks, "heads") == heads(theirs.encoder.blocks, "num_heads")
    assert heads(ours.decoder.blocks, "heads") == heads(theirs.decoder.blocks, "num_heads")


def test_vit_small_has_the_published_weights(published, without_memory):
    theirs, ours = published.vit_small(reg_tokens=2), M.vit_small(reg_tokens=2)
    shapes = lambda model: [(k, v.shape) for k, v in model.state_dict().items()]
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("space", SPACES)
def test_checkpoints_of_the_published_code(space, published, tmp_path):
    "A file as its training writes it, with its own class; the same embeddings and, under a tube mask, the same loss."
    image, patch = SPACES[space]
    args = {"img_size": list(image), "patch_size": patch if isinstance(patch, int) else list(patch)}
    args |= {"num_frames": 4, "t_patch_size": 2, "in_chans": 1}
    options = {"decoding": "attn", "pos_embed": "sep", "target_norm": None, "pca_norm_nc": 2}
    options |= {"t_pred_stride": 2, "no_decode_pos": True, "mask_drop_scale": False, "pred_edge_pad": 0}
    options |= {"gauss_sigma": None, "class_token": True, "reg_tokens": 0, "no_embed_class": True}
    options |= {"head_init_scale": 0.0, "decoder_depth": 4, "drop_path_rate": 0.0}
    torch.manual_seed(0)
    theirs = published.mae_vit_d3(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}, **options
    )
    assert not theirs.decoder.head.weight.any()
    torch.nn.init.normal_(theirs.decoder.head.weight, std=0.1)
    more = {"model": "mae_vit_d3", "model_kwargs": options, "input_space": space, "normalize": "frame"}
    more |= {"clip_vmax": 3.0, "masking": "tube", "mask_ratio": 0.9, "lr": 1e-3}
    torch.save({"args": args | more, "model": theirs.state_dict(), "epoch": 3}, tmp_path / "last.pth")
    ours = MaskedAutoencoderViT.from_pretrained(tmp_path / "last.pth")
    assert ours.input_spec == InputSpec(
        space, "published" * (space == "flat"), 4, 1.0, "frame", 3.0, True, ""
    )
    x = clips(1, shape=(1, 4, *image))
    visible = torch.zeros(image)
    visible[: 32 * (patch == 16) or 40] = 1
    theirs.eval()
    with torch.no_grad():
        loss, state = theirs(x, visible_mask=visible.expand_as(x), mask_ratio=None)
        out = ours(x, visible_mask=visible, mask_ratio=None)
        near(out.loss, loss)
        near(out.preds, state["preds"])
        encoder = MaskedViT.from_pretrained(tmp_path / "last.pth")
        near(encoder(x, visible).embeddings.patch, state["patch_embeds"])


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("mae_*.safetensors")), ids=lambda p: p.stem)
def test_golden_files(path):
    from safetensors import safe_open

    golden = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    part = lambda start: {k.removeprefix(start): v for k, v in golden.items() if k.startswith(start)}
    model = MaskedAutoencoderViT(**config).eval()
    model.load_state_dict(part("state_dict."))
    given_, expected = part("input."), part("output.")
    with torch.no_grad():
        out = model(given_["images"], given_["img_mask"], given_["visible_mask"], mask_ratio=None)
        embedded = model.embed({"image": given_["images"], "mask": given_["img_mask"][:, 0, 0]})
        encoded = model.encoder(given_["images"], given_["img_mask"])
    for name in ("preds", "pred_images", "loss"):
        near(getattr(out, name).reshape(expected[name].shape), expected[name])
    for name in ("pred_ids", "visible_ids", "pred_mask", "visible_mask"):
        assert torch.equal(getattr(out, name), expected[name]), name
    for one in (embedded, encoded.embeddings):
        for name, value in part("output.embed.").items():
            near(getattr(one, name), value)


def test_golden_files_are_there():
    if not GOLDEN.exists():
        pytest.skip(f"no {GOLDEN}: the golden values are not part of a clone; mae_published.npz is")
    assert len(list(GOLDEN.glob("mae_*.safetensors"))) == 4


# ---- positions

# golden/fmri_fm.json: width 8 on 2 × 3, rows 1 and 3; width 16 on 2 × 2 × 2, rows 1 and 4 (the last column is cut)
PICTURE_ROWS = {
    1: [0.0, 0.0, 1.0, 1.0, 0.8414709568023682, 0.009999833069741726, 0.5403022766113281, 0.9999499917030334],
    3: [0.8414709568023682, 0.009999833069741726, 0.5403022766113281, 0.9999499917030334, 0.0, 0.0, 1.0, 1.0],
}
ONE = [0.8414709568023682, 0.04639922454953194, 0.002154432935640216]
ONE += [0.5403022766113281, 0.9989230036735535, 0.9999976754188538]
ZERO = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
VIDEO_ROWS = {1: ZERO + ZERO + ONE[:4], 4: ONE + ZERO + ZERO[:4]}


@pytest.mark.parametrize("shape, width, rows", [((2, 3), 8, PICTURE_ROWS), ((2, 2, 2), 16, VIDEO_ROWS)])
def test_sine_cosine_positions_as_published(shape, width, rows):
    found = sincos_grid(shape, width)
    assert found.shape == (math.prod(shape), width)
    for row, expected in rows.items():
        near(found[row], expected, 1e-7)


def test_all_golden_sine_cosine_positions():
    if not (path := GOLDEN / "fmri_fm.json").exists():
        pytest.skip(f"no {path}")
    golden = json.loads(path.read_text())
    for key in ("sincos_2d", "sincos_3d"):
        near(sincos_grid(golden[key]["grid"], golden[key]["embed_dim"]), golden[key]["values"], 1e-7)


@quick
@given(st.lists(st.integers(1, 4), min_size=2, max_size=3), st.integers(1, 8))
def test_sine_cosine_positions_by_their_formula(shape, quarter):
    width = 4 * quarter
    share = width // 2 if len(shape) == 2 else 2 * math.ceil(width / 6)
    found = sincos_grid(tuple(shape), width)
    for row, place in enumerate(itertools.product(*map(range, shape))):
        for column in range(width):
            axis, k = divmod(column, share)
            i = k % (share // 2)
            angle = place[axis] / 10000 ** (2 * i / share)
            assert abs(found[row, column] - (math.sin if k < share // 2 else math.cos)(angle)) < 1e-12


@pytest.mark.parametrize("kind", ["abs", "sep", "sincos"])
def test_positions_of_some_patches_are_those_of_all(kind):
    positions = M.Positions(kind, (2, 2, 3), 12)
    for p in positions.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    ids = torch.tensor([[0, 5, 11], [1, 6, 7]])
    assert torch.equal(positions(ids), positions()[0][ids])
    if kind == "sep":
        both = positions.weight_temporal + positions.weight_spatial
        assert torch.equal(positions()[0], both.flatten(0, 1))


def test_sine_cosine_positions_stay_fixed():
    model = make(pos_embed="sincos").train()
    before = model.encoder.pos_embed.weight.clone()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(clips()).loss.backward()
    optimiser.step()
    assert torch.equal(model.encoder.pos_embed.weight, before)
    assert "encoder.pos_embed.weight" in model.state_dict()


# ---- timm


def timm_vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    small = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    vit = VisionTransformer(**small | {"num_classes": 0, "global_pool": ""} | options).eval()
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return vit


TIMM = {
    "plain": {},
    "no class token": {"class_token": False},
    "registers": {"reg_tokens": 3},
    "registers, no class token": {"reg_tokens": 3, "class_token": False},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
    "no qkv bias": {"qkv_bias": False},
    "no proj bias": {"proj_bias": False},
    "one channel, oblong patches": {"in_chans": 1, "img_size": (16, 60), "patch_size": (4, 12)},
    "mlp ratio": {"mlp_ratio": 2.5},
    "no last norm": {"final_norm": False},
    "average pooling": {"global_pool": "avg"},
}


@pytest.mark.parametrize("name", TIMM)
def test_same_as_timm(name):
    vit = timm_vit(**TIMM[name])
    config, state = from_timm(vit)
    ours = MaskedViT(**config).eval()
    ours.load_state_dict(state)
    x = clips(2, shape=(vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size))
    theirs_x, ours_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = vit.forward_features(theirs_x)
    found = ours.embed({"image": ours_x})
    near(torch.cat([part for part in found if part is not None], 1), expected)
    assert (found.cls is None) == (not config["class_token"])
    assert (0 if found.reg is None else found.reg.shape[1]) == config["reg_tokens"]
    wave = torch.sin(torch.arange(expected.numel())).view_as(expected)
    (wave * expected).sum().backward()
    (wave * torch.cat([part for part in found if part is not None], 1)).sum().backward()
    assert theirs_x.grad.abs().max() > 0.1
    near(ours_x.grad, theirs_x.grad)


@pytest.fixture
def hub_vit(tmp_path):
    "A ViT as the Hub has it."
    import timm

    args = {"img_size": 64, "depth": 2, "reg_tokens": 1}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7, **args).eval()
    facts = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "model_args": args | {"num_classes": 7},
    }
    facts["pretrained_cfg"] = {"input_size": [3, 224, 224], "mean": [0.5, 0.5, 0.5]}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    return vit, tmp_path


def test_timm_folder_of_the_hub(hub_vit):
    vit, folder = hub_vit
    model = MaskedViT.from_pretrained(folder)
    x = clips(1, shape=(3, 64, 64))
    with torch.no_grad():
        near(torch.cat(model.embed({"image": x}), 1), vit.forward_features(x))
    assert not model.training
    assert model.config["img_size"] == [64, 64]


def test_timm_folder_whose_size_is_in_pretrained_cfg(tmp_path):
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(32, 64), in_chans=1, depth=1)
    facts = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1}}
    facts["pretrained_cfg"] = {"input_size": [1, 32, 64]}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    assert MaskedViT.from_pretrained(tmp_path).config["img_size"] == [32, 64]


def test_an_autoencoder_takes_a_lone_encoder_only_if_told(hub_vit):
    _, folder = hub_vit
    with pytest.raises(ValueError, match=r"weights missing: decoder"):
        MaskedAutoencoderViT.from_pretrained(folder)
    model = MaskedAutoencoderViT.from_pretrained(folder, strict=False, decoder_depth=1)
    assert all(k.startswith("decoder.") for k in model.load_report["missing"])
    assert not model.load_report["left over"]
    encoder = MaskedViT.from_pretrained(folder)
    assert torch.equal(model.encoder.blocks[1].attn.k.weight, encoder.blocks[1].attn.k.weight)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"init_values": 0.1}, r"weights left over: blocks\.0\.ls1\.gamma"),
        ({"qk_norm": True}, r"weights left over: blocks\.0\.attn\.k_norm"),
        ({"pre_norm": True}, r"left over: norm_pre"),
        ({"pos_embed": "none"}, r"missing: .*pos_embed\.weight"),
    ],
)
def test_timm_parts_with_weights_of_their_own_are_refused(options, words, tmp_path):
    vit = timm_vit(**options)
    config, state = from_timm(vit)
    with pytest.raises(ValueError, match=words):
        M.load_strictly(MaskedViT(**config), state, "timm")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"act_layer": "quick_gelu"}, "exact GELUs, found.*QuickGELU"),
        ({"act_layer": "gelu_tanh"}, "exact GELUs, found"),
        ({"norm_layer": lambda dim, **_: torch.nn.LayerNorm(dim, eps=1e-5)}, "eps 1e-06.*found.*1e-05"),
    ],
)
def test_timm_parts_without_weights_of_their_own_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        from_timm(timm_vit(**options))


def test_other_timm_models_are_refused():
    import timm

    with pytest.raises(ValueError, match="expected a VisionTransformer, found a ResNet"):
        from_timm(timm.create_model("resnet10t"))


# ---- patches

GRIDS = st.tuples(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=3
    ),  # patches, and their size
    st.integers(1, 3),  # channels
    st.integers(1, 3),  # stride
    st.integers(1, 3),  # batch
)


def grid_of(drawn):
    axes, channels, stride, batch = drawn
    stride = stride if len(axes) == 3 else 1
    if len(axes) == 3:
        axes = [(axes[0][0], axes[0][1] * stride), *axes[1:]]
    grid = PatchGrid(tuple(n * p for n, p in axes), tuple(p for _, p in axes), channels, stride)
    return grid, clips(batch, shape=(channels, *grid.image))


def cut_by_einops(grid, x):
    sizes = dict(zip("uvw"[-len(grid.patch) :], grid.patch))
    if len(grid.image) == 2:
        return rearrange(x, "b c (h v) (k w) -> b (h k) (c v w)", **sizes)
    x = x[:, :, :: grid.stride]
    sizes["u"] //= grid.stride
    return rearrange(x, "b c (t u) (h v) (k w) -> b (t h k) (c u v w)", **sizes)


@quick
@given(GRIDS, st.randoms(use_true_random=False))
def test_cut_take_paste(drawn, random):
    grid, x = grid_of(drawn)
    expected = cut_by_einops(grid, x)
    assert torch.equal(grid.cut(x), expected)
    assert (grid.n_patches, grid.n_values) == tuple(expected.shape[1:])
    ids = torch.tensor([random.choices(range(grid.n_patches), k=3) for _ in x])
    assert torch.equal(grid.take(x, ids), expected.gather(1, ids[..., None].expand(-1, -1, grid.n_values)))
    frames = x[:, :, :: grid.stride].repeat_interleave(grid.stride, 2) if grid.stride > 1 else x
    assert torch.equal(grid.paste(expected), frames)
    assert torch.equal(grid.cut(x.transpose(-1, -2).contiguous().transpose(-1, -2)), expected)


@quick
@given(GRIDS)
def test_places_of_patches(drawn):
    grid, _ = grid_of(drawn)
    places = list(itertools.product(*map(range, grid.shape)))
    found = torch.stack(grid.places(torch.arange(grid.n_patches)), 1)
    assert found.tolist() == [list(place) for place in places]


@pytest.mark.parametrize(
    "image, patch, stride, words",
    [
        ((16, 50), (4, 16), 1, r"image size that patches of \(4, 16\) divide, found \(16, 50\)"),
        ((15, 8, 8), (4, 4, 4), 1, r"\(4, 4, 4\) divide, found \(15, 8, 8\)"),
        ((8, 8), (0, 4), 1, "divide"),
        ((8,), (4,), 1, "2 or 3 axes"),
        ((8, 8), (4, 4, 4), 1, "patch of as many"),
        ((8, 8, 8), (4, 4, 4), 3, "t_pred_stride to divide the 4 frames of a patch, found 3"),
        ((8, 8, 8), (4, 4, 4), 0, "t_pred_stride"),
        ((8, 8), (4, 4), 2, "the 1 frames of a patch, found 2"),
    ],
)
def test_grids_that_cannot_be(image, patch, stride, words):
    with pytest.raises(ValueError, match=words):
        PatchGrid(image, patch, 1, stride)


# ---- masks

GRID = PatchGrid((4, 8, 12), (2, 4, 4), 2, 1)


@quick
@given(st.tuples(*[st.booleans()] * 6), st.integers(0, 1000), st.sampled_from([1, 2]))
def test_masks_of_every_shape_that_broadcasts(full, seed, stride):
    "Against a float mask as large as the images."
    grid = PatchGrid(GRID.image, GRID.patch, GRID.channels, stride)
    sizes = (3, grid.channels, *grid.image)
    shape = tuple(n if whole else 1 for n, whole in zip(sizes, full))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    dense = mask.float().expand(sizes)
    cut = cut_by_einops(grid, dense)
    ids = torch.tensor([[0, 7], [11, 4], [3, 3]])
    for given_ in (mask, mask.float(), mask.double() * 2.5, mask.half()):
        found = PatchMask.of(grid, given_, images=dense)
        assert torch.equal(found.patches().expand(3, -1), cut.any(-1))
        assert torch.equal(found.count().expand(3, -1), cut.sum(-1).long())
        assert torch.equal(found.at(ids), cut.gather(1, ids[..., None].expand(-1, -1, grid.n_values)) > 0)
        assert torch.equal(found.image(3), grid.paste(cut) > 0)


@pytest.mark.parametrize("shape", [(8, 12), (8, 1), (12,), (4, 8, 12), (1, 4, 8, 12), (2, 1, 8, 12), (1, 1)])
def test_masks_with_fewer_axes(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    dense = mask.float().expand(1, 2, 4, 8, 12)
    assert torch.equal(PatchMask.of(GRID, mask).patches(), cut_by_einops(GRID, dense).any(-1))


def test_a_value_for_each_patch_is_a_mask_of_whole_patches():
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    found = PatchMask.of(GRID, mask)
    assert torch.equal(found.patches(), mask)
    assert torch.equal(found.count(), mask * GRID.n_values)
    assert torch.equal(
        GRID.cut(found.image(3).float()), mask[..., None].float().expand(-1, -1, GRID.n_values)
    )


@pytest.mark.parametrize(
    "shape", [(8, 11), (4, 4, 8, 12, 1), (5, 8, 12), (2, 3, 4, 8, 12), (7,), (3, 13), (1,) * 6]
)
def test_masks_that_do_not_broadcast(shape):
    with pytest.raises(
        ValueError, match=r"expected seen to broadcast to \(batch, 2, 4, 8, 12\) or as \(batch, 12\)"
    ):
        PatchMask.of(GRID, torch.ones(shape), "seen")


@pytest.mark.parametrize("name", ["img_mask", "visible_mask", "pred_mask"])
@pytest.mark.parametrize("shape", [(3, 12), (3, 1, 1, 8, 12)])
def test_masks_of_another_batch(name, shape):
    model = make()
    with pytest.raises(ValueError, match=f"expected {name} for 2 images, or one for all, found 3"):
        model(clips(), **{name: torch.ones(shape)})


def test_masks_that_could_be_pixels_or_patches():
    "As many patches as columns, as many samples as rows."
    grid = PatchGrid((4, 8, 12), (2, 4, 4))
    assert grid.n_patches == 12
    mask, x = torch.zeros(8, 12), clips(8)
    mask[:, :4] = 1
    with pytest.raises(ValueError, match=r"of a clear kind, found \(8, 12\), pixels or patches"):
        PatchMask.of(grid, mask, images=x)
    pixels = PatchMask.of(grid, mask[None], images=x).patches()
    assert torch.equal(pixels, cut_by_einops(grid, mask.expand(1, 1, 4, 8, 12)).any(-1))
    assert torch.equal(PatchMask.of_patches(grid, mask).patches(), mask > 0)
    assert torch.equal(PatchMask.of(grid, PatchMask.of_patches(grid, mask), images=x).patches(), mask > 0)
    assert torch.equal(PatchMask.of(grid, mask, images=x[:2]).patches(), pixels)
    one = PatchMask.of(grid, mask[:1], images=x)  # a row for all rows would be written (1, 1, 12)
    assert torch.equal(one.patches(), mask[:1] > 0)


CANDIDATES = st.integers(1, 4).flatmap(
    lambda batch: st.lists(
        st.lists(st.booleans(), min_size=9, max_size=9).filter(any), min_size=batch, max_size=batch
    )
)


@quick
@given(CANDIDATES, st.none() | st.integers(1, 12), st.booleans(), st.integers(0, 1000))
def test_chosen_patches(candidates, limit, shuffle, seed):
    candidates = torch.tensor(candidates)
    generator = torch.Generator().manual_seed(seed)
    ids = choose_patches(candidates, limit, shuffle, generator)
    n = min(int(candidates.sum(1).min()), limit or 99)
    assert ids.shape == (len(candidates), n)
    for chosen, there in zip(ids.tolist(), candidates):
        possible = there.nonzero()[:, 0].tolist()
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(possible)
        if not shuffle:
            assert chosen == possible[:n]
    again = choose_patches(candidates, limit, shuffle, torch.Generator().manual_seed(seed))
    assert torch.equal(ids, again)


def test_every_choice_is_equally_likely():
    candidates = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 0, 1]]).bool().expand(20_000, -1)
    ids = choose_patches(candidates, 3, True, torch.Generator().manual_seed(0))
    _, counts = np.unique(ids.numpy(), axis=0, return_counts=True)
    assert len(counts) == math.comb(7, 3)
    assert stats.chisquare(counts).pvalue > 0.01


def test_no_patch_to_choose():
    candidates = torch.tensor([[True, True], [False, False], [True, False]])
    with pytest.raises(ValueError, match="a visible patch in every sample, found none in sample 1 of 3"):
        choose_patches(candidates)
    with pytest.raises(ValueError, match="leaves at least one visible patch of 2, found one that leaves 0"):
        choose_patches(candidates[:1], 0)


@pytest.mark.parametrize("kind", M.MASKINGS)
@pytest.mark.parametrize("of", ["image", "signal"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.8, 0.9])
def test_random_masks(kind, of, ratio):
    grid = PatchGrid((8, 40, 60), (2, 4, 4))
    signal = torch.zeros(40, 60)
    signal[6:35, 9:50] = 1
    there = PatchMask.of(grid, signal).patches()
    masks = random_masks(kind, ratio, grid, signal, 3, torch.Generator().manual_seed(1), of)
    assert masks.shape == (3, grid.n_patches)
    assert masks.dtype == torch.bool
    assert not (masks & ~there).any()
    t, whole = (1, there.sum()) if kind == "random" else (4, there.sum() / 4)
    whole = int(whole) if of == "signal" else grid.n_patches // t
    expected = min(int((1 - ratio) * whole), int(there.sum()) // t) * t
    assert masks.sum(1).tolist() == [expected] * 3
    if kind != "random":
        in_time = masks.unflatten(1, grid.shape)
        assert (in_time == in_time[:, :1]).all()
    if ratio:
        assert (masks[0] != masks[1]).any()
    again = random_masks(kind, ratio, grid, signal, 3, torch.Generator().manual_seed(1), of)
    assert torch.equal(masks, again)


def test_blocks_hold_together():
    "A visible patch of a block mask has more visible neighbours than one of a tube mask."
    grid, ratio = PatchGrid((2, 80, 80), (2, 4, 4)), 0.75
    neighbours = {}
    for kind in ("tube", "block"):
        masks = random_masks(kind, ratio, grid, batch=20, generator=torch.Generator().manual_seed(0))
        maps = masks.view(20, 20, 20).numpy()
        right = (maps[:, :, :-1] & maps[:, :, 1:]).sum() / maps[:, :, :-1].sum()
        neighbours[kind] = right
        assert maps.mean() == 0.25
    assert abs(neighbours["tube"] - 0.25) < 0.05
    assert neighbours["block"] > 0.6
    shown = random_masks("block", ratio, grid, batch=4000, generator=torch.Generator().manual_seed(0))
    assert shown.float().mean(0).sub(0.25).abs().max() < 0.05  # no place is preferred


def test_random_masks_of_many_samples_come_from_their_own_image_masks():
    grid = PatchGrid((4, 8, 12), (2, 4, 4))
    signal = torch.zeros(2, 1, 1, 8, 12)
    signal[0, ..., :8], signal[1, ..., 4:] = 1, 1
    for batch in (1, 2):
        masks = random_masks("tube", 0.5, grid, signal, batch, torch.Generator().manual_seed(0))
        assert masks.shape == (2, 12)
        assert not (masks & ~PatchMask.of(grid, signal).patches()).any()
    with pytest.raises(ValueError, match="img_mask for 3 samples, or one for all, found 2"):
        random_masks("tube", 0.5, grid, signal, 3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("cube", 0.5), "masking from random, tube, block, found 'cube'"),
        (("tube", 1.0), "mask ratio from 0 to below 1, found 1.0"),
        (("tube", -0.1), "mask ratio from 0 to below 1, found -0.1"),
        (("tube", 0.9), "leaves at least one visible patch of 6, found one that leaves 0"),
        (("block", 0.9), "leaves at least one visible patch of 6"),
        (("random", 0.5, torch.zeros(8, 12)), "a visible patch in every sample, found none"),
    ],
)
def test_random_masks_that_cannot_be(arguments, words):
    kind, ratio, *mask = arguments
    with pytest.raises(ValueError, match=words):
        random_masks(kind, ratio, PatchGrid((4, 8, 12), (2, 4, 4)), *mask)


def test_published_tubes_keep_as_many(published):
    "int((1 - ratio) · patches of a frame), over the whole frame."
    import importlib

    masking = importlib.import_module("cortex_mae.masking")
    mask = torch.zeros(32, 48)
    mask[3:30, 5:40] = 1
    for ratio in (0.5, 0.75, 0.9):
        theirs = masking.TubeMasking(ratio, (32, 48), 8)(mask)
        grid = PatchGrid((4, 32, 48), (2, 8, 8))
        ours = random_masks("tube", ratio, grid, mask)
        assert ours.sum() == 2 * PatchGrid((32, 48), (8, 8)).cut(theirs[None, None]).any(-1).sum()


# ---- the whole model against loops


def dense(mask, shape):
    "A mask as floats, as large as the images."
    mask = torch.ones(()) if mask is None else mask
    if mask.ndim == 2 and tuple(mask.shape) != tuple(shape[-2:]):
        grid = PatchGrid((4, 8, 12), (2, 4, 4))
        mask = grid.paste(mask.float()[..., None].expand(-1, -1, grid.n_values))
    return (mask > 0).double().expand(shape).numpy()


def patch_slices(grid):
    "Of each patch, row by row: where it is in (T, H, W)."
    for place in itertools.product(*map(range, grid.shape)):
        yield tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, grid.patch))


def visible_by_loops(grid, visible):
    "The first patches with anything visible, as many in each sample; and the pixels that remain."
    found = [
        [i for i, where in enumerate(patch_slices(grid)) if sample[(slice(None), *where)].any()]
        for sample in visible
    ]
    n = min(map(len, found))
    kept = np.zeros_like(visible)
    for sample, ids in enumerate(found):
        for i, where in enumerate(patch_slices(grid)):
            if i in ids[:n]:
                kept[(sample, slice(None), *where)] = visible[(sample, slice(None), *where)]
    return [ids[:n] for ids in found], kept


def hidden_by_loops(grid, inside, kept, asked, pad, full):
    "Pixels to predict, image-sized, and the patches that have any."
    if pad:
        square = np.ones((1, 1, 1, 2 * pad + 1, 2 * pad + 1))
        kept = ndimage.binary_dilation(kept > 0, square).astype(float)
    hidden = inside * asked * (1 if full else 1 - kept)
    frames = np.arange(hidden.shape[2]) % grid.stride == 0
    hidden = hidden * frames[:, None, None]
    found = [
        [i for i, where in enumerate(patch_slices(grid)) if sample[(slice(None), *where)].any()]
        for sample in hidden
    ]
    n = min(map(len, found))
    return hidden, [ids[:n] for ids in found]


def loss_by_loops(grid, preds, targets, hidden, pred_ids):
    total, n = 0.0, 0
    where = list(patch_slices(grid))
    for sample, ids in enumerate(pred_ids):
        for row, i in enumerate(ids):
            at = (slice(None), *where[i])
            pixels = targets[sample][at][:, :: grid.stride].ravel()
            mask = hidden[sample][at][:, :: grid.stride].ravel()
            total += float((mask * (preds[sample, row] - pixels) ** 2).sum())
            n += mask.sum()
    return total / n, n


SHAPES = [
    (8, 12),
    (2, 1, 1, 8, 12),
    (1, 1, 4, 8, 12),
    (2, 2, 4, 8, 12),
    (2, 2, 1, 1, 12),
    (2, 12),
    (1, 1, 4, 8, 1),
]
MASK = st.none() | st.tuples(st.sampled_from(SHAPES), st.floats(0.3, 0.95), st.integers(0, 10**6))


def drawn_mask(drawn):
    if drawn is None:
        return None
    shape, share, seed = drawn
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@settings(max_examples=60, deadline=None, derandomize=True)
@given(MASK, MASK, MASK, st.sampled_from([1, 2]), st.integers(0, 2), st.booleans())
def test_forward_against_loops(img, vis, pred, stride, pad, full):
    img, vis, pred = map(drawn_mask, (img, vis, pred))
    model = make(in_chans=2, t_pred_stride=stride, pos_embed="sep")
    grid, x = model.pred_grid, clips(shape=(2, 4, 8, 12))
    inside, visible, asked = (dense(m, x.shape) for m in (img, vis, pred))
    options = {"mask_ratio": None, "pred_edge_pad": pad, "full_decoding": full}
    visible = visible * inside
    enough = [s.any() for s in visible]
    if all(enough):
        ids, kept = visible_by_loops(grid, visible)
        hidden, pred_ids = hidden_by_loops(grid, inside, kept, asked, pad, full)
    if not all(enough) or not pred_ids[0]:
        with pytest.raises(ValueError, match="patch in every sample, found none in sample"):
            model(x, img, vis, pred, **options)
        return
    with torch.no_grad():
        out = model(x, img, vis, pred, **options)
    assert (list(range(12)) if out.visible_ids is None else out.visible_ids[0].tolist()) == ids[0]
    assert out.visible_ids is None or out.visible_ids.tolist() == ids
    assert out.pred_ids.tolist() == pred_ids
    expected, n = loss_by_loops(grid, out.preds.double().numpy(), x.double().numpy(), hidden, pred_ids)
    assert abs(out.loss.item() - expected) < 1e-5 * max(1, expected)
    assert out.n_pixels.item() == n
    assert np.array_equal(out.visible_mask.numpy(), kept)
    trimmed = np.zeros_like(hidden)
    images = np.zeros(x.shape)
    for sample, chosen in enumerate(pred_ids):
        for row, i in enumerate(chosen):
            at = (sample, slice(None), *list(patch_slices(grid))[i])
            trimmed[at] = hidden[at]
            values = out.preds[sample, row].numpy().reshape(2, 2 // stride, 4, 4)
            images[at] = np.repeat(values, stride, 1)
    assert np.array_equal(out.pred_mask.numpy()[:, :, ::stride], trimmed[:, :, ::stride])
    near(out.pred_images, images * inside)


def moments_by_numpy(kind, x, mask, grid):
    "Targets of one sample: (C, T, H, W) in, the same out."
    y, sd_of = np.zeros_like(x), np.ones_like(x)
    frames = slice(None, None, grid.stride)
    depth = grid.patch[0]
    if kind == "global":
        places = [(slice(None),) * 3]
    elif kind == "frame":
        places = [(slice(t, t + depth), slice(None), slice(None)) for t in range(0, grid.image[0], depth)]
    else:
        places = list(patch_slices(grid))
    for at in places:
        block, m = x[(slice(None), *at)][:, frames], mask[(slice(None), *at)][:, frames] > 0
        values = block[m]
        mean = values.mean() if values.size else 0.0
        sd = np.sqrt((values.var() if values.size else 0.0) + 1e-6)
        y[(slice(None), *at)][:, frames] = np.where(m, (block - mean) / sd, 0)
        sd_of[(slice(None), *at)] = sd
    return y, sd_of


@pytest.mark.parametrize("kind", ["global", "frame", "patch"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_target_norms_by_numpy(kind, stride, masked):
    grid = PatchGrid((4, 8, 12), (2, 4, 4), 2, stride)
    x = clips(shape=(2, 4, 8, 12)) * 3 + 1
    mask = torch.rand(2, 1, 4, 8, 12, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, :, :2, :4, :4] = False  # a patch without signal
    found, shift, scale = M.TargetNorm(kind, grid)(x, PatchMask.of(grid, mask) if masked else None)
    dense_mask = (mask if masked else torch.ones_like(mask)).expand(x.shape).double().numpy()
    for sample in range(2):
        y, sd = moments_by_numpy(kind, x[sample].double().numpy(), dense_mask[sample], grid)
        near(found[sample], cut_by_einops(grid, torch.tensor(y)[None])[0])
        near(scale[sample], cut_by_einops(grid, torch.tensor(sd)[None])[0])
    counts = PatchMask.of(grid, mask).at(torch.arange(12).expand(2, -1)) if masked else torch.ones_like(found)
    near((found * scale + shift) * counts, cut_by_einops(grid, x) * counts)


@pytest.mark.parametrize("kind", ["global", "frame", "patch", "pca"])
def test_predictions_come_back_in_the_units_of_the_images(kind):
    "If the decoder predicts the target exactly, its images are the input."
    model = make(target_norm=kind, t_pred_stride=2)
    if kind == "pca":
        model.target_norm.fit(clips(6))
    x, inside = clips(), torch.ones(8, 12)
    inside[:, :2] = 0
    x = x * inside
    visible = torch.zeros(1, 12)
    visible[:, 4:8] = 1
    grid = model.pred_grid
    target = model.target_norm(x, M._strided(PatchMask.of(model.grid, inside), grid))[0]
    model._decode = lambda encoded, ids: target.gather(1, ids[..., None].expand(-1, -1, grid.n_values))
    out = model(x, inside, visible, mask_ratio=None)
    assert out.loss.item() < 1e-10
    frames = x[:, :, ::2].repeat_interleave(2, 2)
    shown = out.pred_mask > 0
    assert shown.any()
    near(out.pred_images[shown], frames[shown])


def test_components_of_targets():
    "Those of scikit-learn's PCA, up to sign; what they leave is orthogonal to them."
    from sklearn.decomposition import PCA

    norm = M.TargetNorm("pca", PatchGrid((4, 8, 12), (2, 4, 4)), 3)
    x, inside = clips(10), torch.ones(8, 12)
    inside[:3] = 0
    norm.fit(x + 2, inside)
    frames = ((x + 2) * inside).flatten(0, 2).flatten(1).numpy()
    expected = PCA(3, svd_solver="full").fit(frames.astype(np.float64)).components_
    found = norm.components.flatten(1).numpy()
    near(np.abs((found * expected).sum(1)), np.ones(3), 1e-5)
    _, shift, scale = norm(x, PatchMask.of(norm.grid, inside))
    target = norm(x, PatchMask.of(norm.grid, inside))[0]
    images = norm.grid.paste(target)
    seen = inside.expand_as(images) > 0
    near(images[~seen], np.zeros(int((~seen).sum())))
    each = images[:, 0, :, 3:].flatten(2)
    near(each.mean(2), np.zeros((10, 4)))
    near(each.std(2, unbiased=False), np.ones((10, 4)), 1e-4)
    near(norm.grid.paste(target * scale + shift)[seen], x[seen])


def test_components_must_be_there():
    model = make(target_norm="pca")
    with pytest.raises(ValueError, match=r"expected components for target_norm pca, found none; call .*fit"):
        model(clips())
    with pytest.raises(ValueError, match="more frames than the 2 components of target_norm pca, found 2"):
        model.target_norm.fit(clips(1, shape=(1, 2, 8, 12)))
    with pytest.raises(ValueError, match="expected videos for target_norm pca"):
        make(img_size=[8, 12], num_frames=None, target_norm="pca")


@pytest.mark.parametrize("decoding", ["attn", "cross", "crossreg"])
def test_nobody_peeks(decoding):
    "What is hidden changes neither embeddings nor predictions, not even as NaN; what is visible changes both."
    model = make(decoding=decoding, reg_tokens=2, pos_embed="sep")
    x, inside, visible = P.inputs(TINY)
    seen = visible * inside > 0
    kept = {}
    for name, other in {
        "as it is": x,
        "other": torch.where(seen, x, x.flip(0) + 1),
        "huge": torch.where(seen, x, 1e30),
        "NaN": torch.where(seen, x, torch.nan),
        "seen changed": torch.where(seen, x + 0.1, x),
    }.items():
        with torch.no_grad():
            out = model(other, inside, visible, mask_ratio=None)
        kept[name] = (*(e for e in out.embeddings if e is not None), out.preds)
    for name in ("other", "huge", "NaN"):
        assert all(map(torch.equal, kept["as it is"], kept[name])), name
    assert not any(map(torch.equal, kept["as it is"], kept["seen changed"]))


@pytest.mark.parametrize("target_norm", [None, "global", "frame", "patch", "pca"])
def test_nan_outside_the_mask_is_harmless(target_norm):
    "Loss and gradients are those of zeros there; NaN inside stays NaN, for the loop to stop at."
    model = make(target_norm=target_norm)
    if target_norm == "pca":
        model.target_norm.fit(clips(6))
    x, inside, visible = P.inputs(TINY)
    x = x * inside
    found = []
    for other in (x, torch.where(inside > 0, x, torch.nan)):
        model.zero_grad()
        found.append(P.run_ours(model, other, inside, visible))
    assert np.isfinite(found[0]["loss"])
    same_arrays(found[1], found[0], 1e-6)
    x[0, 0, 0, 1, 2] = torch.nan
    assert inside[0, 0, 0, 1, 2]
    assert model(x, inside, visible, mask_ratio=None, full_decoding=True).loss.isnan()


@pytest.mark.parametrize(
    "options", [{}, {"no_embed_class": True}, {"class_token": False, "no_decode_pos": True}]
)
def test_last_decoder_block_for_predicted_tokens_only(options):
    "The same predictions and gradients as the whole sequence through every block."
    model = make(pos_embed="sep", **options)
    decoder, x = model.decoder, clips()
    visible = torch.zeros(1, 12)
    visible[:, :5] = 1
    out = model(x, visible_mask=visible, mask_ratio=None)
    out.loss.backward()
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    encoded = model.encoder(x, visible)
    shown = decoder.proj(encoded.embeddings.patch)
    shown = shown if model.no_decode_pos else shown + decoder.pos_embed(encoded.ids)
    tokens = [shown, decoder.mask_token + decoder.pos_embed(out.pred_ids)]
    if decoder.cls_token is not None:
        cls = decoder.cls_token + (0 if decoder.cls_token_pos is None else decoder.cls_token_pos)
        tokens.insert(0, cls.expand(2, -1, -1))
    y = torch.cat(tokens, 1)
    for block in decoder.blocks:
        y = block(y)
    preds = decoder.head(decoder.norm(y))[:, -7:]
    near(out.preds, preds, 1e-6)
    ((preds - model.grid.take(x, out.pred_ids)) ** 2).mean().backward()
    for name, p in model.named_parameters():
        near(found.get(name, torch.zeros_like(p)), p.grad if p.grad is not None else torch.zeros_like(p))


def test_attention_by_its_formula():
    attention = M.Attention(12, 3, context_dim=8)
    x, context = clips(shape=(5, 12)), clips(shape=(7, 8))
    q, k, v = (getattr(attention, n)(t) for n, t in (("q", x), ("k", context), ("v", context)))
    parts = []
    for head in range(3):
        at = slice(4 * head, 4 * head + 4)
        weights = torch.softmax(q[..., at] @ k[..., at].mT / 2, -1)
        parts.append(weights @ v[..., at])
    near(attention(x, context), attention.proj(torch.cat(parts, -1)), 1e-6)
    with pytest.raises(ValueError, match="a width that 5 heads divide, found 12"):
        M.Attention(12, 5)


# ---- randomness


def test_ratio_hides_as_many_as_it_says():
    model = make()
    for ratio in (0.0, 0.25, 0.5, 0.75, 0.9):
        encoded = model.encoder(clips(), mask_ratio=ratio)
        assert encoded.ids.shape == (2, int((1 - ratio) * 12))
    out = model(clips(), generator=torch.Generator().manual_seed(0))
    assert out.visible_ids.shape == (2, 3)
    assert out.pred_ids.shape == (2, 9)
    for seen, asked in zip(out.visible_ids.tolist(), out.pred_ids.tolist()):
        assert sorted(seen + asked) == list(range(12))
    assert (out.visible_mask + out.pred_mask == 1).all()


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_sparse_decoding(ratio):
    "int((1 - ratio) · all patches), at random, of those to predict."
    model, generator = make(), torch.Generator().manual_seed(0)
    chosen = {0: set(), 1: set()}
    for _ in range(40):
        out = model(clips(), mask_ratio=0.75, pred_mask_ratio=ratio, generator=generator)
        assert out.pred_ids.shape == (2, min(9, int((1 - ratio) * 12)))
        for sample in range(2):
            assert not set(out.pred_ids[sample].tolist()) & set(out.visible_ids[sample].tolist())
            chosen[sample] |= set(out.pred_ids[sample].tolist())
    assert chosen[0] == chosen[1] == set(range(12))
    assert torch.isclose(out.loss, ((out.preds - model.grid.take(clips(), out.pred_ids)) ** 2).mean())


@pytest.mark.parametrize("masked", [True, False])
def test_same_generator_same_numbers(masked):
    model = make(gauss_sigma=0.5).train()
    mask = torch.ones(8, 12) if masked else None
    runs = [
        model(clips(), mask, pred_mask_ratio=0.5, generator=torch.Generator().manual_seed(s))
        for s in (3, 3, 4)
    ]
    assert torch.equal(runs[0].loss, runs[1].loss)
    assert torch.equal(runs[0].visible_ids, runs[1].visible_ids)
    assert not torch.equal(runs[0].loss, runs[2].loss)


def test_drop_path():
    x = torch.ones(40_000, 2, 3)
    torch.manual_seed(0)
    drop = M.DropPath(0.3).train()
    y = drop(x)
    assert (y == y[:, :1, :1]).all()
    values, counts = y[:, 0, 0].unique(return_counts=True)
    near(values, [0, 1 / 0.7], 1e-6)
    assert abs(counts[0] / len(x) - 0.3) < 0.01
    assert abs(y.mean() - 1) < 0.01
    assert torch.equal(drop.eval()(x), x)
    rates = [b.drop_path.rate for b in make(drop_path_rate=0.2, depth=3).encoder.blocks]
    near(rates, [0, 0.1, 0.2], 1e-7)
    assert {b.drop_path.rate for b in make(drop_path_rate=0.2).decoder.blocks} == {0.0}


def test_input_noise():
    "(1 - t) · image + t · noise, t up to sigma: of an image of ones, mean 1 - t and SD t. Only in training; targets stay clean."
    model = make(gauss_sigma=0.4, img_size=[40, 40], num_frames=4)
    x = torch.ones(200, 1, 4, 40, 40)
    assert model._noisy(x, None, None) is x
    noisy = model.train()._noisy(x, None, torch.Generator().manual_seed(0)).flatten(1)
    t = 1 - noisy.mean(1)
    near(noisy.std(1), t, 0.05)
    assert t.min() > -0.02
    assert t.max() < 0.42
    assert stats.kstest(t.numpy() / 0.4, "uniform").pvalue > 0.01
    inside = torch.zeros(40, 40)
    inside[:, :20] = 1
    seen = model._noisy(x[:2], PatchMask.of(model.grid, inside), None)
    assert not seen[..., 20:].any()
    model.decoder.head.weight.data.zero_()
    model.decoder.head.bias.data.zero_()
    out = model(x[:2])
    assert out.loss.item() == 1.0  # zeros against clean ones
    assert out.targets is out.images
    for sigma in (None, 0.0):
        assert make(gauss_sigma=sigma).train()._noisy(x, None, None) is x
    for sigma in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"gauss_sigma from 0 to 1, found {sigma}"):
            make(gauss_sigma=sigma)


# ---- what comes in


def test_parcels():
    "(T, R, 1): the same numbers as the published shape of input, from a decoder's batch."
    n = 400
    model = make(img_size=[n, 1], patch_size=1, t_patch_size=4, num_frames=4, pos_embed="sep")
    assert model.grid.shape == (1, n, 1)
    x = clips(2, shape=(4, n))
    cortex = torch.arange(n) % 5 > 0
    found = model.embed({"signal": x, "mask": cortex})
    expected = model.encoder(x[:, None, :, :, None], cortex[:, None]).embeddings
    assert found.patch.shape == (2, int(cortex.sum()), 24)
    near(found.patch, expected.patch, 1e-6)
    each = model.embed({"signal": x, "mask": cortex.expand(2, -1)})
    near(each.patch, found.patch, 1e-6)
    tubes = random_masks("tube", 0.9, model.grid, cortex[:, None], 2)
    out = model(x[:, None, :, :, None], cortex[:, None], tubes, mask_ratio=None)
    shown = int((1 - 0.9) * n)  # 39, not 40, as published
    assert out.visible_ids.shape == (2, shown)
    assert out.pred_ids.shape == (2, int(cortex.sum()) - shown)


def cubes_by_loops(mask, volume, side, share):
    "Cubes in the order z, y, x, each flattened so: values and mask."
    shape = [math.ceil(n / side) * side for n in mask.shape]
    padded, inside = np.zeros(shape), np.zeros(shape, bool)
    at = tuple(map(slice, mask.shape))
    padded[at], inside[at] = volume * mask, mask
    values, masks = [], []
    for z, y, x in itertools.product(*(range(0, n, side) for n in reversed(shape))):
        cube = (slice(x, x + side), slice(y, y + side), slice(z, z + side))
        if inside[cube].mean() > share:
            values.append(padded[cube].transpose(2, 1, 0).ravel())
            masks.append(inside[cube].transpose(2, 1, 0).ravel())
    return np.array(values), np.array(masks)


@quick
@given(
    st.tuples(*[st.integers(3, 9)] * 3),
    st.integers(2, 4),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.integers(0, 99),
)
def test_cubes(shape, side, share, seed):
    random = np.random.default_rng(seed)
    mask = random.random(shape) < 0.7
    mask[0, 0, 0] = True
    values, masks = cubes_by_loops(mask, volume := random.normal(size=shape), side, share)
    if not len(values):
        with pytest.raises(
            ValueError, match=f"fills more than {share:.0%} of some cube of {side} voxels, found none"
        ):
            Cubes(mask, side, share)
        return
    cubes = Cubes(mask, side, share)
    assert np.array_equal(cubes.inside.numpy(), masks)
    x = torch.from_numpy(volume)[None, None, None].expand(2, 1, 3, *shape)
    cut = cubes.cut(x)
    assert cut.shape == (2, 1, 3, *values.shape)
    assert np.array_equal(cut[1, 0, 2].numpy(), values)
    pasted = cubes.paste(cut)
    assert pasted.shape == x.shape
    assert torch.equal(cubes.cut(pasted), cut)
    there = cubes.paste(cubes.inside.expand(1, 1, 1, *masks.shape).double())[0, 0, 0].numpy() > 0
    assert np.array_equal(pasted[0, 0, 0].numpy(), np.where(there, volume, 0))
    assert not (there & ~mask).any()
    assert share or np.array_equal(there, mask)


def test_volumes(tmp_path):
    mask = np.zeros((9, 10, 11), bool)
    mask[2:8, 1:9, 3:10] = True
    cubes = Cubes(mask, side=4)
    size = list(cubes.inside.shape)
    model = make(img_size=size, patch_size=[1, size[1]], pos_embed="sep")
    x = clips(2, shape=(1, 4, 9, 10, 11))
    with pytest.raises(ValueError, match=r"expected model\.cubes for a batch of volumes"):
        model.embed({"volume": x, "mask": torch.from_numpy(mask)})
    model.cubes = cubes
    found = model.embed({"volume": x, "mask": torch.from_numpy(mask)})
    assert found.patch.shape == (2, 2 * size[0], 24)
    for value in (100.0, torch.nan):
        outside = torch.where(torch.from_numpy(mask), x, value)
        assert torch.equal(model.embed({"volume": outside}).patch, found.patch)
    model.save_pretrained(tmp_path)
    for cls in (MaskedAutoencoderViT, MaskedViT):
        again = cls.from_pretrained(tmp_path)
        assert torch.equal(again.embed({"volume": x}).patch, found.patch)
        assert torch.equal(again.cubes.paste(again.cubes.cut(x)), cubes.paste(cubes.cut(x)))
    broken(tmp_path, "cubes.npz", lambda b: b[:50])
    with pytest.raises(ValueError, match=r"cubes\.npz: expected a Cubes, found a file that cannot be read"):
        MaskedViT.from_pretrained(tmp_path)
    assert not [k for k in model.state_dict() if "cubes" in k]
    with pytest.raises(ValueError, match=r"volumes of \(9, 10, 11\) voxels, found \(9, 10, 12\)"):
        cubes.cut(clips(1, shape=(1, 4, 9, 10, 12)))


@pytest.mark.parametrize("decoding", ["attn", "cross", "crossreg"])
def test_pictures(decoding):
    model = make(img_size=[8, 12], num_frames=None, in_chans=3, decoding=decoding, reg_tokens=1)
    x = clips(2, shape=(3, 8, 12))
    found = model.embed({"image": x})
    assert found.cls.shape == (2, 1, 24)
    assert found.reg.shape == (2, 1, 24)
    assert found.patch.shape == (2, 6, 24)
    out = model(x, torch.ones(8, 12), mask_ratio=0.5)
    assert out.pred_images.shape == out.pred_mask.shape == x.shape
    with pytest.raises(ValueError, match="expected videos for t_pred_stride 2"):
        make(img_size=[8, 12], num_frames=None, t_pred_stride=2)
    with pytest.raises(ValueError, match="expected videos for separable positions"):
        make(img_size=[8, 12], num_frames=None, pos_embed="sep")


def flat_layout():
    mask = np.zeros((8, 12), bool)
    mask[1:7, 2:11] = True
    return Layout.flat(mask, "fsaverage5")


@pytest.mark.parametrize("mask_from", ["layout", "first_frame"])
def test_batches_of_a_clip_decoder(mask_from):
    layout = flat_layout()
    decoder = ClipDecoder(layout, frames=4, mask_from=mask_from)
    packed = clips(2, shape=(4, layout.n_sites))
    if mask_from == "first_frame":
        packed[0, 0, :20] = 0
    batch = decoder(packed)
    model = make()
    images, mask = as_images(batch)
    assert images.shape == (2, 1, 4, 8, 12)
    dense_mask = batch["mask"] if mask_from == "layout" else batch["mask"][:, None, None]
    found = model.embed(batch)
    expected = model.encoder(images, dense_mask.expand(2, 1, 4, 8, 12)).embeddings
    assert torch.equal(found.patch, expected.patch)
    assert torch.equal(make(MaskedViT).embed(batch).cls[:, 0].isnan().any(), torch.tensor(False))
    out = model(images, mask)
    assert (out.pred_mask[0, 0, 0] <= dense_mask.expand(2, 1, 4, 8, 12)[0, 0, 0]).all()
    spec = InputSpec.of(layout, decoder, tr=2.0)
    assert spec == InputSpec("flat", "fsaverage5", 4, 2.0, "frame", 3.0, True, layout.digest)


def test_batches_of_another_kind():
    with pytest.raises(ValueError, match="a batch with image, signal or volume, found packed, mask"):
        make().embed({"packed": clips(), "mask": None})


# ---- what comes out


def test_image_sized_things_are_made_once_and_on_demand():
    out = make(target_norm="frame")(clips(), torch.ones(8, 12))
    lazy = ("pred_images", "pred_mask", "visible_mask")
    assert not set(lazy) & set(vars(out))
    for name in lazy:
        first = getattr(out, name)
        assert first.shape == (2, 1, 4, 8, 12)
        assert getattr(out, name) is first
        assert not first.requires_grad


def test_targets_of_ones_own():
    model, x = make(), clips()
    other = clips(seed=5)
    args = {"visible_mask": torch.eye(12)[:1], "mask_ratio": None}
    out = model(x, targets=other, **args)
    assert out.targets is other
    assert out.images is x
    near(out.loss, ((out.preds - model.grid.take(other, out.pred_ids)) ** 2).mean())
    assert torch.equal(out.preds, model(x, **args).preds)
    with pytest.raises(ValueError, match=r"images of shape \(batch, 1, 4, 8, 12\), found \(2, 1, 4, 8, 11\)"):
        model(x, targets=other[..., 1:], **args)


def test_state_dict_as_published():
    "The names of specs/fmri_fm.md; those of fixed positions are there, too."
    block = ["norm1", "attn.q", "attn.k", "attn.v", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    blocks = [f"blocks.{i}.{part}.{kind}" for i in range(2) for part in block for kind in ("weight", "bias")]
    both = ["cls_token", "cls_token_pos", "pos_embed.weight_spatial", "pos_embed.weight_temporal"]
    both += [*blocks, "norm.weight", "norm.bias"]
    encoder = [*both, "reg_token", "reg_token_pos", "patch_embed.weight", "patch_embed.bias"]
    decoder = [*both, "mask_token", "proj.weight", "proj.bias", "head.weight", "head.bias"]
    expected = {f"encoder.{k}" for k in encoder} | {f"decoder.{k}" for k in decoder}
    assert set(make(pos_embed="sep", reg_tokens=2).state_dict()) == expected
    cross = set(make(pos_embed="sincos", decoding="cross").state_dict())
    assert {"encoder.pos_embed.weight", "decoder.pos_embed.weight"} <= cross
    assert not cross & {"decoder.cls_token", "decoder.cls_token_pos", "decoder.proj.weight"}
    assert "target_norm.components" in make(target_norm="pca").state_dict()


def test_initial_weights():
    "Xavier-uniform matrices, biases 0, truncated normals of SD 0.02 for tokens and positions, the decoder's class token 0."
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**TINY | {"embed_dim": 240, "reg_tokens": 4, "pos_embed": "sep"})
    for name, p in model.named_parameters():
        if name == "decoder.cls_token":
            assert not p.any()
        elif "token" in name or "pos_embed" in name:
            assert abs(p.std() - 0.02) < 0.02 / math.sqrt(p.numel()) * 3, name
        elif "norm" in name:
            assert (p == float(name.endswith("weight"))).all()
        elif name.endswith("bias"):
            assert not p.any()
        else:
            bound = math.sqrt(6 / sum(p.shape))
            assert 0.9 * bound < p.abs().max() <= bound, name
            assert abs(p.std() - bound / math.sqrt(3)) < 0.1 * bound


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_head_init_scale(scale):
    torch.manual_seed(0)
    plain = MaskedAutoencoderViT(**TINY).decoder.head.weight
    torch.manual_seed(0)
    scaled = MaskedAutoencoderViT(**TINY, head_init_scale=scale).decoder.head.weight
    assert torch.equal(scaled, plain * scale)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("mae_vit_small", (384, 12, 6, 4, 512, 16)),
        ("mae_vit_base", (768, 12, 12, 4, 512, 16)),
        *((f"mae_vit_d{n}", (64 * n, n, n, n // 3, 128 * n // 3, 4 * n // 3)) for n in (3, 6, 9, 12, 15)),
    ],
)
def test_named_sizes(name, sizes):
    names = ["embed_dim", "depth", "num_heads", "decoder_depth", "decoder_embed_dim", "decoder_num_heads"]
    with torch.device("meta"):
        config = M.SIZES[name](**P.VIDEO).config
        assert config == M.SIZES[name](**P.VIDEO, decoder_depth=config["decoder_depth"]).config
    assert tuple(config[k] for k in names) == sizes
    if "_d" in name:
        with pytest.raises(ValueError, match="expected no embed_dim for a size that fixes them, found"):
            M.SIZES[name](**P.VIDEO, embed_dim=48)


# ---- numbers of other kinds


def tube():
    visible = torch.zeros(1, 12)
    visible[:, [0, 2, 6, 8]] = 1
    return {"visible_mask": visible, "mask_ratio": None}


@pytest.mark.parametrize("target_norm", [None, "pca"])
def test_bfloat16_and_autocast(target_norm):
    "The loss is computed in float32, and near that of float32."
    model = make(target_norm=target_norm)
    if target_norm:
        model.target_norm.fit(clips(6))
    exact = model(clips(), **tube()).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = model(clips(), **tube())
    assert out.loss.dtype == torch.float32
    assert abs(out.loss - exact) < 0.02 * exact
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if target_norm is None:
        low = model.to(torch.bfloat16)(clips(), **tube())
        assert low.preds.dtype == torch.bfloat16
        assert low.loss.dtype == torch.float32
        assert low.pred_images.dtype == torch.float32
        assert abs(low.loss - exact) < 0.03 * exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int16])
def test_images_of_other_types(dtype):
    "Read as they are; the numbers are those of the same values in float32."
    model = make()
    x = (clips() * 3).to(dtype)
    inside = torch.ones(8, 12)
    inside[:3, :3] = 0
    for mask in (inside, inside.bool(), inside.half(), inside.to(torch.uint8)):
        near(model(x, mask, **tube()).loss, model(x.float(), inside, **tube()).loss, 1e-6)


def test_images_that_are_not_contiguous():
    model, x = make(), clips()
    mask = torch.rand(12, 8, generator=torch.Generator().manual_seed(0)) < 0.8
    expected = model(x, mask.T.contiguous(), **tube())
    turned = x.permute(4, 0, 3, 2, 1).contiguous().permute(1, 4, 3, 2, 0)
    assert not turned.is_contiguous()
    found = model(turned, mask.T, **tube())
    near(found.preds, expected.preds, 1e-6)
    near(found.pred_images, expected.pred_images, 1e-6)
    half = torch.stack([x, x], -1)[..., 0]
    near(model(half, mask.T, **tube()).loss, expected.loss, 1e-6)
    everywhere = mask.T.expand(2, 1, 4, 8, 12)
    near(model(x, everywhere, **tube()).loss, expected.loss, 1e-6)
    wide = model(x[:1].expand(3, -1, -1, -1, -1), mask.T, **tube())
    near(wide.preds, expected.preds[:1].expand(3, -1, -1), 1e-6)


def test_one_sample_gives_what_it_gives_in_a_batch():
    model = make()
    both = model(clips(), torch.ones(8, 12), **tube())
    for i in range(2):
        near(model(clips()[i : i + 1], **tube()).preds, both.preds[i : i + 1])


def test_image_masks_that_differ_between_samples():
    "Each sample sees and predicts only inside its own; the batch has as many patches as its poorest sample."
    model = make()
    inside = torch.ones(2, 1, 1, 8, 12)
    inside[0, ..., :4], inside[1, ..., 4:] = 0, 0
    out = model(clips(), inside, mask_ratio=0.9)
    assert out.visible_ids.shape == (2, 1)
    assert out.pred_ids.shape == (2, 3)
    assert (out.visible_mask <= inside).all()
    assert (out.pred_mask <= inside).all()
    assert not (out.pred_images * (1 - inside)).any()


@pytest.mark.filterwarnings("ignore")
def test_compiled():
    model = make(t_pred_stride=2, pos_embed="sep", depth=1, decoder_depth=1)
    compiled = torch.compile(model, backend="aot_eager")
    mask = torch.ones(8, 12)
    mask[:, :3] = 0
    expected = model(clips(), mask, **tube())
    found = compiled(clips(), mask, **tube())
    near(found.loss, expected.loss, 1e-6)
    assert torch.equal(found.pred_ids, expected.pred_ids)
    near(found.pred_images, expected.pred_images, 1e-6)
    found.loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            near(grads[name], p.grad, 1e-5)


# ---- bad input


@pytest.mark.parametrize(
    "options, words",
    [
        ({"img_size": [8, 13]}, r"patches of \(2, 4, 4\) divide, found \(4, 8, 13\)"),
        ({"num_frames": 5}, r"divide, found \(5, 8, 12\)"),
        (
            {"t_patch_size": None},
            "expected t_patch_size and an img_size of two axes beside num_frames, found None",
        ),
        ({"img_size": [4, 8, 12]}, "an img_size of two axes beside num_frames"),
        ({"decoding": "crossreg"}, "expected reg_tokens from 1 up for decoding crossreg.*found 0"),
        ({"decoding": "both"}, "decoding from attn, cross, crossreg, found 'both'"),
        ({"pos_embed": "rope"}, "pos_embed from abs, sep, sincos, found 'rope'"),
        ({"target_norm": "pixel"}, "target_norm from none, global, frame, patch, pca, found 'pixel'"),
        ({"t_pred_stride": 3}, "t_pred_stride to divide the 2 frames of a patch, found 3"),
        ({"num_heads": 5}, "a width that 5 heads divide, found 24"),
        ({"decoder_num_heads": 5}, "a width that 5 heads divide, found 12"),
        ({"drop_path_rate": 1.0}, "drop_path_rate from 0 to below 1, found 1.0"),
        (
            {"img_size": [8, 12], "num_frames": None, "pos_embed": "sincos", "embed_dim": 18},
            "a width that 4 divides",
        ),
    ],
)
def test_models_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        MaskedAutoencoderViT(**TINY | options)


def test_unknown_arguments():
    with pytest.raises(TypeError, match="mask_rate"):
        MaskedAutoencoderViT(**TINY, mask_rate=0.5)


def hole(sample):
    mask = torch.ones(2, 1, 1, 8, 12)
    mask[sample] = 0
    return mask


@pytest.mark.parametrize(
    "options, words",
    [
        ({"img_mask": hole(1)}, "a visible patch in every sample, found none in sample 1 of 2"),
        ({"visible_mask": hole(0)}, "a visible patch in every sample, found none in sample 0 of 2"),
        ({"img_mask": hole(0), "visible_mask": hole(1)}, "a visible patch in every sample, found none"),
        (
            {"pred_mask": hole(1)},
            "a hidden and predictable patch in every sample, found none in sample 1 of 2",
        ),
        (
            {"visible_mask": torch.ones(8, 12), "mask_ratio": None},
            "hidden and predictable patch in every sample",
        ),
        ({"mask_ratio": 0.0}, "a hidden and predictable patch in every sample, found none in sample 0"),
        ({"mask_ratio": None}, "a hidden and predictable patch in every sample, found none in sample 0"),
        ({"mask_ratio": 1.0}, "mask ratio from 0 to below 1, found 1.0"),
        ({"mask_ratio": -0.5}, "mask ratio from 0 to below 1, found -0.5"),
        ({"mask_ratio": 0.95}, "leaves at least one visible patch of 12, found one that leaves 0"),
        (
            {"pred_mask_ratio": 0.95},
            "at least one hidden and predictable patch of 12, found one that leaves 0",
        ),
        ({"pred_mask_ratio": 1.5}, "mask ratio from 0 to below 1, found 1.5"),
        ({"pred_edge_pad": 20}, "a hidden and predictable patch in every sample, found none"),
    ],
)
def test_masks_that_leave_nothing(options, words):
    with pytest.raises(ValueError, match=words):
        make()(clips(), **options)


def test_everything_visible_and_everything_decoded():
    "For denoising: nothing hidden, all predicted; without masks and with."
    for options in (
        {"mask_ratio": None},
        {"mask_ratio": 0.0},
        {"mask_ratio": None, "img_mask": torch.ones(8, 12)},
    ):
        out = make()(clips(), full_decoding=True, **options)
        assert out.pred_ids.shape == (2, 12)
        assert (out.visible_mask == 1).all()
        assert (out.pred_mask == 1).all()


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 8, 12), (2, 1, 4, 8, 13), (2, 1, 5, 8, 12), (2, 4, 8, 12), (1, 4, 8, 12, 1, 1)]
)
def test_images_of_another_shape(shape):
    for options in ({}, {"mask_ratio": None, "full_decoding": True}, {"img_mask": torch.ones(8, 12)}):
        with pytest.raises(
            ValueError, match=r"images of shape \(batch, 1, 4, 8, 12\), found \(" + str(shape[0])
        ):
            make()(torch.zeros(shape), **options)


# ---- files


def same_model(found, expected):
    assert type(found) is type(expected)
    assert found.config == expected.config
    assert found.input_spec == expected.input_spec
    assert found.layout == expected.layout
    digest = lambda model: None if model.cubes is None else model.cubes.digest
    assert digest(found) == digest(expected)
    assert not found.training
    state = expected.state_dict()
    assert list(found.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in found.state_dict().items())


EVERY_OPTION = [
    {},
    {"decoding": "crossreg", "reg_tokens": 3, "pos_embed": "sep", "t_pred_stride": 2, "head_init_scale": 0.1},
    {"decoding": "cross", "pos_embed": "sincos", "target_norm": "pca", "pca_norm_nc": 3, "gauss_sigma": 0.2},
    {"class_token": False, "qkv_bias": False, "proj_bias": False, "mlp_ratio": 2.5, "mask_drop_scale": True},
    {"no_embed_class": True, "drop_path_rate": 0.1, "pred_edge_pad": 2, "no_decode_pos": True},
    {"target_norm": "frame", "decoder_embed_dim": None, "decoder_num_heads": None},
    {"img_size": 12, "in_chans": 3, "num_frames": None, "t_patch_size": None},
    {"img_size": (4, 8, 12), "patch_size": (2, 4, 4), "num_frames": None, "t_patch_size": None},
]


@pytest.mark.parametrize("options", EVERY_OPTION, ids=lambda o: ",".join(o) or "default")
def test_saved_and_read(options, tmp_path):
    model = make(**options)
    if model.config["target_norm"] == "pca":
        model.target_norm.fit(clips(6))
    model.input_spec = InputSpec("flat", "fsaverage5", 4, 2.0, "global", None, False, flat_layout().digest)
    model.layout = flat_layout()
    assert model.save_pretrained(tmp_path / "deep" / "model") == tmp_path / "deep" / "model"
    found = MaskedAutoencoderViT.from_pretrained(tmp_path / "deep" / "model")
    same_model(found, model)
    config = json.loads((tmp_path / "deep" / "model" / "config.json").read_text())
    arguments = inspect.signature(MaskedAutoencoderViT).parameters
    assert list(config) == list(arguments)
    as_given = P.VIDEO | P.SMALL | options
    for name, value in config.items():
        expected = as_given.get(name, arguments[name].default)
        assert value == (list(expected) if isinstance(expected, tuple) else expected), name
    encoder = MaskedViT.from_pretrained(tmp_path / "deep" / "model")
    assert all(torch.equal(v, model.encoder.state_dict()[k]) for k, v in encoder.state_dict().items())
    assert encoder.input_spec == model.input_spec
    shape = (model.grid.channels, *model.grid.image)
    near(
        encoder.embed({"image": clips(shape=shape)}).patch,
        model.embed({"image": clips(shape=shape)}).patch,
        0,
    )


@pytest.mark.parametrize("options", [{}, {"final_norm": False}, {"class_token": False, "reg_tokens": 2}])
def test_encoder_saved_and_read(options, tmp_path):
    model = make(MaskedViT, **options)
    model.save_pretrained(tmp_path)
    same_model(MaskedViT.from_pretrained(tmp_path), model)
    words = "last norm" if "final_norm" in options else "weights missing: decoder"
    with pytest.raises(ValueError, match=words):
        MaskedAutoencoderViT.from_pretrained(tmp_path)


def test_saved_from_other_states(tmp_path):
    "From bfloat16, from weights that are not contiguous, and a path as text; training mode is not kept."
    model = make().to(torch.bfloat16).train()
    model.encoder.patch_embed.weight.data = model.encoder.patch_embed.weight.data.T.contiguous().T
    model.save_pretrained(str(tmp_path))
    found = MaskedAutoencoderViT.from_pretrained(str(tmp_path))
    for name, value in found.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].float())
    assert model.training


def test_overrides(tmp_path):
    make().save_pretrained(tmp_path)
    model = MaskedAutoencoderViT.from_pretrained(tmp_path, drop_path_rate=0.2, pred_edge_pad=1)
    assert model.config["drop_path_rate"] == 0.2
    assert model.pred_edge_pad == 1
    with pytest.raises(ValueError, match="expected arguments of MaskedAutoencoderViT, found also mask_rate"):
        MaskedAutoencoderViT.from_pretrained(tmp_path, mask_rate=1)
    with pytest.raises(ValueError, match="expected arguments of MaskedViT, found also decoder_depth"):
        MaskedViT.from_pretrained(tmp_path, decoder_depth=1)


def test_folder_of_the_hub_without_our_notes(tmp_path):
    "As fm-MAE's own code writes it: no metadata but the format, fewer arguments than there are now."
    model = make(pos_embed="sep")
    later = ("head_init_scale", "pca_norm_nc", "gauss_sigma")
    config = {k: v for k, v in model.config.items() if k not in later}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    same_model(MaskedAutoencoderViT.from_pretrained(tmp_path), model)


def test_an_older_model_leaves_nothing_behind(tmp_path):
    model = make()
    model.input_spec, model.layout, model.cubes = InputSpec(), flat_layout(), Cubes(np.ones((4, 4, 4)), 2)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    other = make(depth=1)
    other.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    same_model(MaskedAutoencoderViT.from_pretrained(tmp_path), other)


def two_models():
    "Told apart by every weight, the configuration, the input and the layout."
    models = []
    for i, depth in enumerate((1, 2)):
        model = make(depth=depth)
        for p in model.parameters():
            p.data.fill_(i + 1.0)
        mask = np.ones((8, 12), bool)
        mask[0, : i + 1] = False
        model.layout = Layout.flat(mask)
        model.input_spec = InputSpec(tr=i + 1.0, mask_digest=model.layout.digest)
        model.cubes = Cubes(np.ones((i + 4, 4, 4), bool), 2)
        models.append(model)
    models[1].layout = models[1].cubes = None
    return models


def check_whole(folder, models):
    "One of the models; its layout may be missing, but is not the other's."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = MaskedAutoencoderViT.from_pretrained(folder)
    value = found.encoder.norm.bias[0].item()
    expected = models[int(value) - 1]
    assert found.config == expected.config
    assert found.input_spec == expected.input_spec
    assert found.layout in (None, expected.layout)
    assert found.cubes is None or (expected.cubes and found.cubes.digest == expected.cubes.digest)
    assert all((v == value).all() for v in found.state_dict().values())
    return int(value) - 1


def forked(work):
    "Runs it in a process of its own; the process is there to be killed."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads
        pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("step", range(9))
def test_killed_at_every_step_of_saving(first, step, tmp_path, monkeypatch):
    "Before each change in the folder: a file put in place, or taken away."
    models = two_models()
    models[first].save_pretrained(tmp_path)
    count = itertools.count()

    def counted(real):
        def call(*args, **options):
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    def work():
        monkeypatch.setattr(os, "replace", counted(os.replace))
        monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
        models[1 - first].save_pretrained(tmp_path)
        os._exit(0)

    os.waitpid(forked(work), 0)
    found = check_whole(tmp_path, models)
    assert step > 0 or found == first
    models[1 - first].save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_model(MaskedAutoencoderViT.from_pretrained(tmp_path), models[1 - first])


def test_killed_at_a_random_moment(tmp_path):
    models, random = two_models(), np.random.default_rng(0)
    models[0].save_pretrained(tmp_path)

    def work():
        for i in itertools.count():
            models[i % 2].save_pretrained(tmp_path)

    seen = set()
    for _ in range(12):
        pid = forked(work)
        time.sleep(float(random.uniform(0.01, 0.12)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.add(check_whole(tmp_path, models))
    assert seen <= {0, 1}


def test_places_of_other_weights_are_left_out(tmp_path):
    model = make()
    model.layout, model.cubes = flat_layout(), Cubes(np.ones((4, 4, 4)), 2)
    model.save_pretrained(tmp_path)
    Layout.flat(np.ones((8, 12), bool)).save(tmp_path / "layout.npz")
    (tmp_path / "cubes.npz").unlink()
    with pytest.warns(UserWarning) as caught:
        found = MaskedAutoencoderViT.from_pretrained(tmp_path)
    assert found.layout is found.cubes is None
    texts = [str(w.message) for w in caught]
    assert any("layout.npz: expected the Layout that the weights were saved with" in t for t in texts)
    assert any("cubes.npz: expected the Cubes that the weights were saved with" in t for t in texts)
    assert len(texts) == 2


def test_a_config_edited_by_hand_is_told(tmp_path):
    make().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"pred_edge_pad": 0', '"pred_edge_pad": 3'))
    with pytest.warns(
        UserWarning, match=r"config\.json: expected what the weights were saved with, found something else"
    ):
        model = MaskedAutoencoderViT.from_pretrained(tmp_path)
    assert model.pred_edge_pad == 0
    (tmp_path / "config.json").write_text(text.replace("  ", "\t"))  # other spaces say the same
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MaskedAutoencoderViT.from_pretrained(tmp_path)


def broken(folder, name, change):
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def resaved(change):
    def call(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return call


def of_config(**changes):
    def call(folder):
        resaved(lambda state: None)(folder)  # without our notes, config.json alone says what the model is
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return call


def text_of_config(text):
    def call(folder):
        resaved(lambda state: None)(folder)
        (folder / "config.json").write_text(text)

    return call


@pytest.mark.parametrize(
    "damage, error, words",
    [
        (
            resaved(lambda s: s.pop("encoder.norm.bias")),
            ValueError,
            r"1 weights missing: encoder\.norm\.bias",
        ),
        (resaved(lambda s: s.update(more=torch.ones(2))), ValueError, "1 weights left over: more"),
        (
            resaved(lambda s: s.update({"encoder.norm.bias": torch.ones(25)})),
            ValueError,
            r"1 weights of another size: encoder\.norm\.bias expected \(24,\), found \(25,\)",
        ),
        (of_config(embed_dim=36), ValueError, r"weights of another size: .*expected \(.*36.*, found \(.*24"),
        (of_config(depth=3), ValueError, r"16 weights missing: encoder\.blocks\.2\.attn\.k\.bias, .* …"),
        (of_config(depth=1), ValueError, r"16 weights left over: encoder\.blocks\.1"),
        (
            of_config(pos_embed="sep"),
            ValueError,
            r"missing: .*pos_embed\.weight_spatial.*left over: .*pos_embed\.weight",
        ),
        (
            of_config(mask_rate=0.5),
            ValueError,
            "expected arguments of MaskedAutoencoderViT, found also mask_rate",
        ),
        (of_config(patch_size=5), ValueError, r"patches of \(2, 5, 5\) divide, found \(4, 8, 12\)"),
        (text_of_config("{"), ValueError, r"config\.json: expected names and values as JSON, found none"),
        (text_of_config("[1]"), ValueError, r"config\.json: expected names and values as JSON, found none"),
        (
            lambda f: (f / "config.json").unlink(),
            FileNotFoundError,
            r"expected config\.json, found model\.safetensors",
        ),
        (
            lambda f: (f / "model.safetensors").unlink(),
            FileNotFoundError,
            r"expected model\.safetensors, found config",
        ),
        (
            lambda f: broken(f, "model.safetensors", lambda b: b[:-100]),
            ValueError,
            r"model\.safetensors: expected a whole safetensors file, found one that cannot be read \(\d+ bytes\)",
        ),
        (
            lambda f: broken(f, "model.safetensors", lambda b: b""),
            ValueError,
            r"a whole safetensors file.*\(0 bytes\)",
        ),
        (
            lambda f: broken(f, "model.safetensors", lambda b: b"x" * 900),
            ValueError,
            "a whole safetensors file",
        ),
    ],
)
def test_damaged_folders(damage, error, words, tmp_path):
    make().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=words) as caught:
        MaskedAutoencoderViT.from_pretrained(tmp_path)
    if "divide" not in words:
        assert str(tmp_path) in str(caught.value)


def test_input_json_with_other_fields(tmp_path):
    make().save_pretrained(tmp_path)
    resaved(lambda state: None)(tmp_path)
    (tmp_path / "input.json").write_text('{"tr": 2.0}')
    assert MaskedAutoencoderViT.from_pretrained(tmp_path).input_spec == InputSpec(tr=2.0)
    (tmp_path / "input.json").write_text('{"tr": 2.0, "smooth": 6}')
    with pytest.raises(ValueError, match=r"input\.json: expected the fields .*tr.*, found also smooth"):
        MaskedAutoencoderViT.from_pretrained(tmp_path)


def test_not_strict_tells_what_it_did(tmp_path):
    make().save_pretrained(tmp_path)

    def change(state):
        state["more"] = torch.ones(1)
        del state["encoder.norm.bias"]

    resaved(change)(tmp_path)
    model = MaskedAutoencoderViT.from_pretrained(tmp_path, strict=False)
    assert model.load_report == {"missing": ["encoder.norm.bias"], "left over": ["more"]}
    assert not model.encoder.norm.bias.any()
    resaved(lambda s: s.update({"encoder.norm.weight": torch.ones(7)}))(tmp_path)
    with pytest.raises(ValueError, match="of another size"):  # never let pass
        MaskedAutoencoderViT.from_pretrained(tmp_path, strict=False)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil",))


@pytest.mark.parametrize(
    "content, words",
    [
        (Evil(), "expected a torch file of plain tensors and numbers, found one that cannot be read so"),
        ({"args": Evil(), "model": {}}, "plain tensors and numbers"),
        ([1, 2], "expected a checkpoint with args and model, found list"),
        ({"model": {}, "epoch": 1}, "expected a checkpoint with args and model, found model, epoch"),
        (
            {"args": {"model": "mae_vit_huge"}, "model": {}},
            "a model from .*mae_vit_base.*, found 'mae_vit_huge'",
        ),
        ({"args": {}, "model": {}}, "a model from .*, found None"),
        (
            {"args": [1], "model": {}},
            "args and model as names with values and with tensors, found list and dict",
        ),
        ({"args": {}, "model": {"epoch": 3}}, "args and model as names with values and with tensors"),
        (
            {"args": {"model": "mae_vit_d3", "model_kwargs": {"rope": 1}, "patch_size": 16}, "model": {}},
            "expected model_kwargs of a MaskedAutoencoderViT, found also rope",
        ),
        (
            {"args": {"model": "mae_vit_d3", "input_space": "moon"}, "model": {}},
            "expected img_size and patch_size in args, or an input_space from flat, .*, found 'moon'",
        ),
    ],
)
def test_torch_files_that_are_not_read(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "last.pth")
    with pytest.raises(ValueError, match=words) as caught:
        MaskedAutoencoderViT.from_pretrained("last.pth")
    assert "last.pth" in str(caught.value)
    assert not Path("evil").exists()


def test_torch_file_that_ends_early(tmp_path):
    torch.save({"args": {}, "model": {}}, tmp_path / "last.pth")
    broken(tmp_path, "last.pth", lambda b: b[: len(b) // 2])
    with pytest.raises(ValueError, match="expected a torch file of plain tensors and numbers"):
        MaskedAutoencoderViT.from_pretrained(tmp_path / "last.pth")


def test_checkpoint_with_the_sizes_of_its_space(tmp_path):
    "Where args give no img_size, the input space does; a number stands for height and width."
    args = {"model": "mae_vit_d3", "num_frames": 4, "t_patch_size": 2, "in_chans": 1, "model_kwargs": None}
    torch.save(
        {
            "args": args | {"input_space": "a424"},
            "model": M.mae_vit_d3(
                img_size=(424, 1), patch_size=1, num_frames=4, t_patch_size=2, in_chans=1
            ).state_dict(),
        },
        tmp_path / "a.pth",
    )
    model = MaskedAutoencoderViT.from_pretrained(tmp_path / "a.pth")
    assert model.grid.image == (4, 424, 1)
    assert model.input_spec == InputSpec("a424", "", 4, 1.0, "none", None)
    square = {"img_size": 16, "patch_size": 8}
    small = M.mae_vit_d3(**square, num_frames=4, t_patch_size=2, in_chans=1)
    torch.save({"args": args | square, "model": small.state_dict()}, tmp_path / "b.pth")
    assert MaskedAutoencoderViT.from_pretrained(tmp_path / "b.pth").grid.image == (4, 16, 16)


@pytest.mark.parametrize("name", ["nowhere", "no/where/at/all", "/no/such/folder", "./org/name", "../up"])
def test_names_that_are_nothing(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="or org/name on the Hub, found no"):
        MaskedAutoencoderViT.from_pretrained(name)


def test_names_of_the_hub(tmp_path, monkeypatch):
    model, asked = make(), []
    model.save_pretrained(tmp_path)

    def snapshot(name, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    same_model(MaskedAutoencoderViT.from_pretrained("medarc/fm_mae_vit_base_patch16-16.hcp"), model)
    files = ["config.json", "cubes.npz", "input.json", "layout.npz", "model.safetensors"]
    assert asked == [("medarc/fm_mae_vit_base_patch16-16.hcp", files)]


def test_files_of_the_hub(tmp_path, monkeypatch):
    small = M.mae_vit_d3(img_size=16, patch_size=8, in_chans=1)
    args = {"model": "mae_vit_d3", "img_size": 16, "patch_size": 8, "in_chans": 1}
    torch.save({"args": args, "model": small.state_dict()}, tmp_path / "last.pth")
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        return str(tmp_path / "last.pth")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = MaskedAutoencoderViT.from_pretrained("hf://medarc/CortexMAE/input_space_v3/flat/last.pth")
    assert asked == [("medarc/CortexMAE", "input_space_v3/flat/last.pth")]
    assert torch.equal(model.decoder.head.weight, small.decoder.head.weight)


def test_what_the_hub_lacks_is_told(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no such repository")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    for name in ("runs/best", "hf://org/name/last.pth"):
        with pytest.raises(
            FileNotFoundError, match=f"found no {name} on the disk, and from the Hub: no such repository"
        ):
            MaskedAutoencoderViT.from_pretrained(name)


def test_a_folder_on_the_disk_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    model = make()
    model.save_pretrained("runs/best")
    same_model(MaskedAutoencoderViT.from_pretrained("runs/best"), model)


def test_input_spec_as_text():
    spec = InputSpec("schaefer400", "", 32, 0.72, "none", None, True, "abc")
    assert InputSpec.from_json(spec.to_json()) == spec


# ---- attention in bfloat16 on the CPU


@pytest.mark.parametrize("n", [6, 4])
def test_attention_head_by_head_and_its_gradient(n):
    "Keys from the n-th on are filling: nobody listens to them."
    q, k, v = x = [torch.randn(2, m, 3, dtype=torch.float64, requires_grad=True) for m in (4, 6, 6)]
    assert torch.autograd.gradcheck(lambda *inputs: M.HeadByHead.apply(*inputs, n), x)
    near(M.HeadByHead.apply(*x, n), torch.softmax(q @ k[:, :n].mT, -1) @ v[:, :n], 1e-12)


@pytest.mark.parametrize("keys", [513, 600, 640])
def test_attention_in_bfloat16_is_as_exact_as_torch(keys):
    "Within a factor of three of the error of torch's own, against float64; with queries fewer than keys."
    torch.manual_seed(0)
    x = [torch.randn(2, 3, n, 16, dtype=torch.float64) * 1.5 for n in (200, keys, keys)]
    wave = torch.sin(torch.arange(2 * 3 * 200 * 16.0)).view(2, 3, 200, 16)

    def numbers(attend, dtype):
        inputs = [t.detach().clone().to(dtype).requires_grad_() for t in x]
        y = attend(*inputs)
        assert y.dtype == dtype
        y.backward(wave.to(dtype))
        return [t.detach().double() for t in (y, *(t.grad for t in inputs))]

    exact = numbers(torch.nn.functional.scaled_dot_product_attention, torch.float64)
    torchs = numbers(torch.nn.functional.scaled_dot_product_attention, torch.bfloat16)
    ours = numbers(M.attend, torch.bfloat16)
    for expected, usual, found in zip(exact, torchs, ours):
        assert (found - expected).norm() < 3 * (usual - expected).norm()
        assert (found - expected).norm() < 0.03 * expected.norm()


def test_copies():
    "A model can be copied and pickled (for processes of a loader, EMA), with all that belongs to it."
    import copy
    import pickle

    model = make(target_norm="frame", t_pred_stride=2)
    model.layout, model.input_spec = flat_layout(), InputSpec()
    expected = model(clips(), **tube())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same_model(other, model)
        assert torch.equal(other(clips(), **tube()).loss, expected.loss)


# ---- what else users do


def test_subclasses(tmp_path):
    "With an argument of their own; the weights are read by either."

    class Mine(MaskedAutoencoderViT):
        def __init__(self, extra=1, **options):
            super().__init__(**options)
            self.extra = extra

    torch.manual_seed(0)
    model = Mine(extra=2, **TINY)
    assert model.config == MaskedAutoencoderViT(**TINY).config
    model.save_pretrained(tmp_path)
    for cls in (Mine, MaskedAutoencoderViT):
        found = cls.from_pretrained(tmp_path)
        assert type(found) is cls
        near(found(clips(), **tube()).loss, model.eval()(clips(), **tube()).loss, 0)
    assert Mine.from_pretrained(tmp_path, extra=5).extra == 5


def test_arguments_that_come_from_arrays(tmp_path):
    "NumPy's numbers, sizes and OmegaConf's lists are saved as numbers and lists."
    from omegaconf import OmegaConf

    options = {"img_size": tuple(np.array([8, 12])), "depth": np.int64(2)}
    options |= {"drop_path_rate": np.float32(0.5), "class_token": np.bool_(True), "patch_size": np.int64(4)}
    model = make(**options)
    model.save_pretrained(tmp_path)
    same_model(MaskedAutoencoderViT.from_pretrained(tmp_path), model)
    assert json.loads((tmp_path / "config.json").read_text())["img_size"] == [8, 12]
    listed = OmegaConf.create({"img_size": [8, 12], "patch_size": [4, 4]})
    assert (
        make(img_size=listed.img_size, patch_size=listed.patch_size).config == make(patch_size=[4, 4]).config
    )


@pytest.mark.parametrize("decoding", ["attn", "cross", "crossreg"])
@pytest.mark.parametrize("pos_embed", ["abs", "sep", "sincos"])
def test_every_weight_learns(decoding, pos_embed):
    "None without a gradient: DistributedDataParallel would stop at it."
    model = make(decoding=decoding, pos_embed=pos_embed, reg_tokens=2)
    model(clips(), **tube()).loss.backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("pos_embed" not in name or pos_embed != "sincos")
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0 or name.endswith("attn.k.bias"), name


def test_no_blocks():
    "Patch embeddings alone are a baseline of the probes."
    model = make(MaskedViT, depth=0, final_norm=False)
    found = model.embed({"image": clips()})
    embedded = model.patch_embed(model.grid.cut(clips())) + model.pos_embed.weight
    near(found.patch, embedded, 1e-6)
    assert make(depth=0)(clips()).loss.isfinite()
    with pytest.raises(ValueError, match="decoder_depth from 1 up, found 0"):
        make(decoder_depth=0)


def test_edges_of_negative_width():
    with pytest.raises(ValueError, match="pred_edge_pad from 0 up, found -1"):
        make()(clips(), pred_edge_pad=-1)


def test_masks_go_to_the_device_of_the_images():
    "On a device without memory, since there may be no other."
    grid, images = PatchGrid((4, 8, 12), (2, 4, 4)), torch.empty(2, 1, 4, 8, 12, device="meta")
    for mask in (torch.ones(8, 12), torch.ones(2, 12), torch.ones(2, 1, 1, 8, 12)):
        assert PatchMask.of(grid, mask, images=images).blocks.device == images.device
    drawn = M._uniform((3, 4), torch.Generator().manual_seed(0), images.device)
    assert drawn.device == images.device


def test_samples_with_masks_of_their_own_are_embedded_as_many():
    model = make()
    inside = torch.ones(2, 8, 12)
    inside[1, :4] = 0
    found = model.embed({"image": clips(), "mask": inside})
    assert found.patch.shape == (2, 6, 24)
    alone = model.embed({"image": clips()[1:], "mask": inside[1:]})
    near(found.patch[1:], alone.patch, 1e-6)


def test_the_ratio_counts_the_background():
    "Of all 12 patches, as published: with signal in 5, a ratio of a half hides none of them, one of 0.75 hides 2."
    model = make()
    signal = torch.zeros(1, 12)
    signal[:, [1, 3, 4, 8, 10]] = 1
    for ratio, n in ((0.5, 5), (0.6, 4), (0.75, 3), (0.9, 1)):
        ids = model.encoder(clips(), signal, ratio).ids
        assert ids.shape == (2, n)
        assert set(ids.flatten().tolist()) <= {1, 3, 4, 8, 10}
    with pytest.raises(ValueError, match="a hidden and predictable patch in every sample, found none"):
        model(clips(), signal, mask_ratio=0.5)
    out = model(clips(), signal, mask_ratio=0.75)
    assert out.pred_ids.shape == (2, 2)


def test_import_is_light():
    "Models are used where scans are not: none of the packages that read or draw them, nor the larger ones."
    import subprocess
    import sys

    heavy = (
        "nilearn nibabel cortex plotly webdataset datasets matplotlib accelerate omegaconf timm transformers"
    )
    script = f"import sys, fmri_book.mae; print(*(set({heavy.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_masks_that_change_in_time_on_the_frames_that_are_predicted(stride):
    model = make(num_frames=8, t_patch_size=4, t_pred_stride=stride)
    x = clips(shape=(1, 8, 8, 12))
    inside = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    visible = torch.zeros(2, 1, 1, 8, 12)
    visible[..., :4] = 1
    out = model(x, inside, visible, mask_ratio=None)
    dense = cut_by_einops(model.pred_grid, (inside & (visible == 0)).float())
    shown = dense.gather(1, out.pred_ids[..., None].expand(-1, -1, dense.shape[-1]))
    target = model.pred_grid.take(x, out.pred_ids)
    near(out.loss, ((out.preds - target) ** 2 * shown).sum() / shown.sum())
    assert out.n_pixels == shown.sum()
    norm = M.TargetNorm("frame", model.pred_grid)
    found = norm(x, M._strided(PatchMask.of(model.grid, inside), model.pred_grid))[0]
    counts = cut_by_einops(model.pred_grid, inside.float())
    assert torch.equal(found != 0, counts > 0)


def test_targets_are_float32_also_under_autocast():
    norm = M.TargetNorm("pca", PatchGrid((4, 8, 12), (2, 4, 4)))
    norm.fit(clips(6))
    exact = norm(clips())
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(clips())
    assert all(map(torch.equal, found, exact))
