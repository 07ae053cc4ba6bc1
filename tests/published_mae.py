"""Cases of the masked autoencoder, and how the published code (`cortex_mae`) and ours compute them.

`python tests/published_mae.py` (where `cortex_mae` 0.1.1 can be imported) writes tests/mae_published.npz, so that every
clone can compare with the published code without having it. Numbers only; weights and inputs are given by formulas.
"""

import importlib
import importlib.util
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import torch

import fmri_book  # noqa: F401, before timm: it repairs torchvision on CPU-only builds

RECORDED = Path(__file__).with_name("mae_published.npz")
VIDEO = {"img_size": [8, 12], "patch_size": 4, "in_chans": 1, "num_frames": 4, "t_patch_size": 2}
PICTURE = {"img_size": [8, 12], "patch_size": 4, "in_chans": 3}
SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2}
SMALL |= {"decoder_depth": 2, "decoder_embed_dim": 12, "decoder_num_heads": 3}
LONG = {"num_frames": 8, "t_patch_size": 4, "t_pred_stride": 2}

CASES = {
    f"{decoding}_{pos}": {"decoding": decoding, "pos_embed": pos, "reg_tokens": 2 * (decoding == "crossreg")}
    for decoding in ("attn", "cross", "crossreg")
    for pos in ("abs", "sep", "sincos")
}
CASES |= {
    "stride": {"t_pred_stride": 2, "pos_embed": "sep"},
    "stride_of_4": LONG | {"t_pred_stride": 4, "pos_embed": "sep"},
    "patch_norm": {"target_norm": "patch"},
    "patch_norm_stride": LONG | {"target_norm": "patch", "decoding": "cross"},
    "none_norm": {"target_norm": "none"},
    "pca_norm": {"target_norm": "pca", "pca_norm_nc": 2},
    "pca_norm_stride": {"target_norm": "pca", "pca_norm_nc": 3, "t_pred_stride": 2},
    "pca_norm_whole_time": {"target_norm": "pca", "t_patch_size": 4, "t_pred_stride": 2},
    "drop_scale": {"mask_drop_scale": True},
    "drop_scale_cross": {"mask_drop_scale": True, "decoding": "cross"},
    "no_decode_pos": {"no_decode_pos": True, "pos_embed": "sep"},
    "edge_pad": {"pred_edge_pad": 1},
    "edge_pad_stride": {"pred_edge_pad": 2, "t_pred_stride": 2},
    "registers": {"reg_tokens": 3},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 1},
    "no_class": {"class_token": False},
    "no_class_registers": {"class_token": False, "reg_tokens": 2, "decoding": "crossreg"},
    "no_bias": {"qkv_bias": False, "proj_bias": False},
    "decoder_as_encoder": {"decoder_embed_dim": None, "decoder_num_heads": None, "mlp_ratio": 2.5},
    "released": {"t_pred_stride": 2, "pos_embed": "sep", "no_decode_pos": True, "no_embed_class": True},
    "picture": PICTURE | {"num_frames": None, "t_patch_size": None},
    "picture_sincos": PICTURE | {"num_frames": None, "t_patch_size": None, "pos_embed": "sincos"},
    "parcels": {"img_size": [5, 1], "patch_size": 1, "pos_embed": "sep"},
    "cubes": {"img_size": [6, 8], "patch_size": [1, 8], "pos_embed": "sep"},
    "image_of_three": {
        "img_size": [4, 8, 12],
        "patch_size": [2, 4, 4],
        "num_frames": None,
        "t_patch_size": None,
    },
}


def config_of(name: str) -> dict:
    return VIDEO | SMALL | CASES[name]


def fill(state: dict[str, torch.Tensor], scale: float = 0.35) -> dict[str, torch.Tensor]:
    "Weights by a formula of their name and place: sines, shifted by 1 for the gains of norms."
    new = {}
    for name, value in state.items():
        phase = zlib.crc32(name.encode()) % 1000
        wave = np.sin(0.7 * np.arange(value.numel()) + phase) * scale
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        fixed = name.endswith("components") or ("pos_embed" in name and not value.requires_grad)
        new[name] = value if fixed else torch.tensor(wave + gain).to(value).view(value.shape)
    return new


def components(n: int, shape: tuple[int, int]) -> np.ndarray:
    "Orthonormal pictures."
    waves = np.sin(np.outer(np.arange(1, n + 1), np.arange(np.prod(shape)) + 0.5))
    return np.linalg.qr(waves.T)[0].T.reshape(n, *shape).astype(np.float32)


def inputs(config: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "Two samples, an image mask that cuts into patches and leaves one out, and tubes: as many patches in both samples."
    image, patch = tuple(config["img_size"]), config["patch_size"]
    patch = (patch,) * len(image) if isinstance(patch, int) else tuple(patch)
    if config["num_frames"]:
        image = (config["num_frames"], *image)
    shape = (2, config["in_chans"], *image)
    x = np.sin(1.3 * np.arange(np.prod(shape)) + 0.1 * np.arange(np.prod(shape)) ** 1.5).reshape(shape) * 1.7
    high, wide = (n // p for n, p in zip(image[-2:], patch[-2:]))
    number = (np.arange(image[-2])[:, None] // patch[-2]) * wide + np.arange(image[-1]) // patch[-1]
    inside = np.ones((2, *image[-2:]), np.float32)
    if patch[-1] > 1:
        inside[:, ::3, ::2] = 0
        inside[0, 1, 1] = 0
    visible = np.zeros_like(inside)
    for sample in range(2):
        inside[sample][number == (3 * sample + 1) % (high * wide)] = 0
        for shown in (0, 2):
            visible[sample][number == (shown + 3 * sample) % (high * wide)] = 1
    axes = (slice(None), *[None] * (len(shape) - 3))
    inside, visible = (torch.from_numpy(m)[axes].expand(shape).contiguous() for m in (inside, visible))
    x = torch.tensor(x, dtype=torch.float32) * (inside if config.get("target_norm") == "pca" else 1)
    return x, inside, visible


def projections(model: torch.nn.Module) -> dict[str, np.ndarray]:
    "Of every gradient: its norm and its sum along a fixed wave."
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            g = torch.zeros_like(p) if p.grad is None else p.grad
            g = g.double().flatten().numpy()
            found[f"grad.{name}"] = np.array([np.linalg.norm(g), g @ np.cos(1.1 * np.arange(g.size))])
    return found


def as_arrays(model, loss, preds, pred_images, visible_mask, pred_mask, embeddings) -> dict[str, np.ndarray]:
    loss.backward()
    found = {"loss": loss, "preds": preds, "pred_images": pred_images}
    found |= {"visible_mask": visible_mask > 0, "pred_mask": pred_mask > 0}
    found |= {f"embed.{k}": v for k, v in zip(("cls", "reg", "patch"), embeddings) if v is not None}
    return {k: v.detach().numpy() for k, v in found.items()} | projections(model)


def published() -> types.ModuleType:
    "models_mae of the published package, without the imports of its command line; ImportError if it is not there."
    spec = importlib.util.find_spec("cortex_mae")
    if spec is None:
        raise ImportError("cortex_mae is not installed")
    if "cortex_mae" not in sys.modules:
        package = types.ModuleType("cortex_mae")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
        sys.modules["cortex_mae"] = package
    return importlib.import_module("cortex_mae.models_mae")


def published_model(config: dict):
    "A model of the published class; pca with our small components, since the package has only those of full size."
    module = published()
    cut = lambda n, size, patch: module.PCANormalize(components(n, size[1:]), size, patch)
    kept, module.flat_pca_normalize = module.flat_pca_normalize, cut
    try:
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return module.MaskedAutoencoderViT(**config).eval()
    finally:
        module.flat_pca_normalize = kept


def run_published(model, images, img_mask, visible_mask, **options) -> dict[str, np.ndarray]:
    options = {"mask_ratio": None, **options}
    loss, out = model(images, img_mask=img_mask, visible_mask=visible_mask, **options)
    embeddings = (out["cls_embeds"], out["reg_embeds"], out["patch_embeds"])
    arrays = as_arrays(
        model, loss, *(out[k] for k in ("preds", "pred_images", "visible_mask", "pred_mask")), embeddings
    )
    return arrays | {"visible_ids": out["visible_ids"].numpy(), "pred_ids": out["pred_ids"].numpy()}


def our_model(config: dict):
    from fmri_book.mae import MaskedAutoencoderViT

    model = MaskedAutoencoderViT(**config).eval()
    if config.get("target_norm") == "pca":
        n, *shape = model.target_norm.components.shape
        model.target_norm.components.copy_(torch.from_numpy(components(n, tuple(shape))))
    return model


def run_ours(model, images, img_mask, visible_mask, **options) -> dict[str, np.ndarray]:
    out = model(images, img_mask, visible_mask, **{"mask_ratio": None, **options})
    arrays = as_arrays(
        model, out.loss, out.preds, out.pred_images, out.visible_mask, out.pred_mask, out.embeddings
    )
    return arrays | {"visible_ids": out.visible_ids.numpy(), "pred_ids": out.pred_ids.numpy()}


def packed(arrays: dict[str, np.ndarray]) -> np.ndarray:
    "Everything in one array, by name: a small file."
    return np.concatenate([arrays[k].astype(np.float32).ravel() for k in sorted(arrays)])


def unpacked(flat: np.ndarray, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    sizes = [like[k].size for k in sorted(like)]
    assert len(flat) == sum(sizes), f"expected {sum(sizes)} recorded numbers, found {len(flat)}"
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {k: part.reshape(like[k].shape) for k, part in zip(sorted(like), parts)}


def record() -> None:
    found = {}
    for name in CASES:
        model = published_model(config_of(name))
        model.load_state_dict(fill(model.state_dict(keep_vars=True)))
        found[name] = packed(run_published(model, *inputs(config_of(name))))
    np.savez_compressed(RECORDED, **found)
    print(f"{len(CASES)} cases, {RECORDED.stat().st_size:,} bytes")


if __name__ == "__main__":
    record()
