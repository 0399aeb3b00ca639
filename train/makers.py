"""From loaded pictures, or from numbers, to samples of a data set: what the frozen networks do."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wplus_core.background import WITHOUT_PARSER, resize
from ..wplus_core.checkpoints import load_encoder, load_generator, load_parser
from ..wplus_core.encode import CROP, codes
from ..wplus_core.files import sha256
from ..wplus_core.stylegan2 import truncate
from .base import digest, latents, load_text_encoder, load_vae
from .blip2 import Blip2
from .data import Sample
from .draws import VIEWS, Z, normal, stream
from .recipes import BESIDE, NEUTRAL, Aligned, Faces, Settings, Synthetic, Wild
from .sources import Loaded
from .views import corners, scaling, to_jpeg

log = logging.getLogger(__name__)

MASK = 128  # side of the masks that are kept of a face's crop
Made = list[tuple[Sample, dict[str, Any]]]  # samples, and what the shard says about them


class Maker:
    """VAE and text encoder. `prompts`: what the data set offers to pictures without captions, and "" first."""

    prompts: tuple[str, ...] = NEUTRAL

    def __init__(self, s: Settings, device: torch.device, dtype: torch.dtype):
        self.settings, self.device = s, device
        self.vae = load_vae(s.vae or s.base, dtype).to(device)
        self.text = load_text_encoder(s.base, dtype, s.tokenizer)
        self.text.model.to(device)

    def networks(self) -> dict[str, nn.Module]:
        return {"vae": self.vae, "text": self.text.model}

    def made_with(self) -> dict[str, str]:
        """Hashes of all that the samples depend on."""
        return {k: digest(m) for k, m in self.networks().items()}

    def latents(self, pictures: Tensor) -> Tensor:
        """[N, 3, S, S] in 0..1 -> mean and standard deviation [N, 8, S/8, S/8], float16 on the CPU."""
        return half(latents(self.vae, resize(pictures, self.settings.size), self.settings.batch))


class FaceMaker(Maker):
    def __init__(self, s: Faces, device: torch.device, dtype: torch.dtype):
        super().__init__(s, device, dtype)
        self.encoder = load_encoder(s.encoder).to(device, dtype).eval()
        self.parser = load_parser(s.parser).to(device, dtype).eval() if s.parser else None
        if self.parser is None:
            log.warning(WITHOUT_PARSER)

    def networks(self) -> dict[str, nn.Module]:
        parser = {"parser": self.parser} if self.parser else {}
        return super().networks() | {"encoder": self.encoder} | parser


class AlignedMaker(FaceMaker):
    """The training picture is the crop with its background; only the code is made without."""

    settings: Aligned

    def __call__(self, some: list[Loaded]) -> Made:
        crops = torch.stack([x.crop for x in some]).to(self.device)
        w, _, _ = codes(crops, self.encoder, self.parser)
        abouts = [{"name": x.name, "side": round(x.side)} for x in some]
        samples = [{"latents": z[None], "w": c} for z, c in zip(self.latents(crops), half(w), strict=True)]
        return list(zip(samples, abouts, strict=True))


class WildMaker(FaceMaker):
    settings: Wild
    prompts = ("",)

    def __init__(self, s: Wild, device: torch.device, dtype: torch.dtype):
        super().__init__(s, device, dtype)
        self.blip = Blip2.load(s.captions, device, dtype) if s.captions.is_dir() else None

    def made_with(self) -> dict[str, str]:
        s = self.settings
        captions = digest(self.blip.model) if self.blip else "" if s.captions == BESIDE else sha256(s.captions)
        return super().made_with() | {"captions": captions}

    def __call__(self, some: list[Loaded]) -> Made:
        w, _, regions = codes(torch.stack([x.crop for x in some]).to(self.device), self.encoder, self.parser)
        masks = regions.mask("head") if self.settings.mask == "head" else torch.ones(len(some), 1, CROP, CROP)
        masks = F.interpolate(masks, (MASK, MASK), mode="area").mul(255).round().byte().cpu()
        captions = self.blip([x.photo / 255 for x in some]) if self.blip else [x.caption for x in some]
        made = []
        for x, code, mask, caption, text in zip(some, half(w), masks, captions, half(self.text(captions)), strict=True):
            about = {"name": x.name, "caption": caption, "side": round(x.side)}
            made.append((self.pictures(x, mask) | {"w": code, "text": text}, about))
        return made

    def pictures(self, x: Loaded, mask: Tensor) -> Sample:
        """The variants' latents and faces, or what is needed to draw them later."""
        to_mask = scaling(MASK / CROP, MASK / CROP) @ x.to_crop
        if self.settings.online_vae:
            return {"picture": to_jpeg(x.photo), "mask": mask, "to_mask": to_mask}
        rngs = (stream(self.settings.seed, VIEWS, x.number, k) for k in range(self.settings.variants))
        photo, mask, views = x.photo.to(self.device) / 255, mask.to(self.device) / 255, self.settings.views
        face = corners(to_mask, MASK)
        drawn = [views.render(views.draw(rng, photo.shape[1:], face), photo, mask, to_mask) for rng in rngs]
        pictures, faces = (torch.stack(x) for x in zip(*drawn, strict=True))
        z = self.latents(pictures)
        return {"latents": z, "face": half(F.interpolate(faces, z.shape[-2:], mode="area"))}


class SyntheticMaker(Maker):
    settings: Synthetic

    def __init__(self, s: Synthetic, device: torch.device, dtype: torch.dtype):
        super().__init__(s, device, dtype)
        self.generator = load_generator(s.files[0]).to(device, dtype).eval()
        self.mean = self.generator.mean_w()

    def networks(self) -> dict[str, nn.Module]:
        return super().networks() | {"generator": self.generator}

    @torch.no_grad()
    def __call__(self, numbers: list[int]) -> Made:
        dims = (self.generator.config.w_dim,)
        z = torch.stack([normal(stream(self.settings.seed, Z, n), dims) for n in numbers]).to(self.mean)
        w = truncate(self.generator.mapping(z), self.mean, self.settings.truncation)
        pictures = (self.generator(w).float() / 2 + 0.5).clamp(0, 1)
        w = half(w[:, None].expand(-1, self.generator.config.layers, -1))
        samples = [{"latents": z[None], "w": c} for z, c in zip(self.latents(pictures), w, strict=True)]
        return [(x, {"name": f"sample {n}"}) for x, n in zip(samples, numbers, strict=True)]


def half(x: Tensor) -> Tensor:
    return x.half().cpu().contiguous()
