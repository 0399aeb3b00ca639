"""An evaluation whose every number is known: pictures as bright as their codes."""

import math

import torch
from comfyui_wplus.train import evaluate as module
from comfyui_wplus.train.evaluate import Method, Plan, evaluate
from comfyui_wplus.wplus_core.directions import Direction
from training import LAYERS, at_call, die

UNIT = Direction("brighter", torch.full((LAYERS, 512), 1.0))


def brightness(w, prompts, noise):
    """A picture as bright as its code's mean, 0.5 + mean / 10, with the noise's first numbers in a corner."""
    level = 0.5 + w.mean((1, 2)) / 10
    pictures = level[:, None, None, None].expand(-1, 3, 8, 8).clone()
    pictures[:, 0, 0, :4] = noise[:, 0, 0, :4].sigmoid()
    return pictures


def level(shown):
    return {"level": [float(s.picture.pixels[1].mean()) for s in shown]}


def corner(shown):
    return {"corner": [float(s.picture.pixels[0, 0, :4].mean()) for s in shown]}


def gained(shown):
    pairs = [(s.picture, s.before) for s in shown]
    return {"gained": [math.nan if b is None else float((a.pixels[1] - b.pixels[1]).mean()) for a, b in pairs]}


def plan(run, **changes):
    people = {"ann": torch.full((LAYERS, 512), 0.3), "bob": torch.full((LAYERS, 512), -0.2)}
    settings = dict(edits={"brighter": UNIT}, strengths=(-2.0, 1.0, 2.0), numbers=2, latent=(4, 4), batch=5)
    return Plan(run, people, ("a face", "A face, again"), **{**settings, **changes})


def methods(*names):
    return [Method(n, brightness, made_with={"weights": n}) for n in names]


def killed_evaluation(run, number):
    at_call(module, "write_whole", number, lambda *args: die())
    evaluate(plan(run), methods("one"), [level, gained])
