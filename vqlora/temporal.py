"""Frame features and what gates make of them: pure functions on tensors.

    f = pixel_features(frames, clip)              # [F, 6] from frames [F, 3, H, W]; clip [F]
    f = standardise(f, mean, std)                 # with constants of the training set, never of the batch
    f = with_clip_means(f, clip, clips)           # [F + B, 6]: rows F + b for what shows no frame
    gate_values("rank", head(tanh(trunk(f))), r)  # [F + B, r], 2·sigmoid: 1 where the head gives 0

Windows of sound have features of the same names: `window_features`.

Glossary: F frames of all clips together, clip by clip in the order of time; B clips; W windows of sound,
likewise; n features; r rank.
A frame's features depend on its own clip alone, not on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

GATES = ("none", "scalar", "rank", "mixture", "selective")
CONTROLS = (None, "constant", "shuffled", "random")

# name -> (mean, standard deviation) over clips of everyday motion; `calibrate_features` measures your own
PIXEL_FEATURES = {
    "motion": (0.03, 0.04),  # mean |difference to the previous frame| of luma; 0 for the first
    "entropy": (0.5, 0.25),  # of 4-bit luma, mean over 4 x 4 blocks, 1 = all 16 levels alike
    "scene": (0.1, 0.15),  # total variation between the 4-bit histograms of this and the previous frame
    "time": (0.5, 0.33),  # place between the first (0) and the last (1) frame
    "median_distance": (0.05, 0.06),  # mean |difference to the clip's median frame|
    "neighbour_distance": (0.03, 0.04),  # smaller mean |difference| to the previous and the next frame
}
# the same questions asked of windows of sound: (mean, standard deviation) over clips with an event or three
SOUND_FEATURES = {
    "motion": (0.065, 0.12),  # mean |difference to the previous window| of band energies, bels
    "entropy": (0.1, 0.18),  # of how the energies share out over the bands, 1 = all alike, 0 in silence
    "scene": (0.13, 0.2),  # total variation between these shares and the previous window's
    "time": (0.5, 0.3),  # place between the first (0) and the last (1) window
    "median_distance": (0.05, 0.12),  # mean |difference to the clip's median window|; its loudness, mostly
    "neighbour_distance": (0.03, 0.07),  # smaller mean |difference| to the previous and the next window
}
_SIDE, _BLOCKS, _LEVELS = 32, 4, 16  # frames are averaged down to 32 x 32 first
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def pixel_features(
    frames: Tensor,
    clip: Tensor,
    times: Tensor | None = None,
    pixel_range: tuple[float, float] = (-1.0, 1.0),
    names: Sequence[str] = tuple(PIXEL_FEATURES),
) -> Tensor:
    """Features [F, len(names)] in float32 of frames [F, 3, H, W], as in `PIXEL_FEATURES`.

    clip: [F] clip of each frame, ascending. times: [F] in any unit, where frames are not evenly spaced.
    pixel_range: the values of black and white; what lies outside is clipped.
    Raises ValueError for clips that are not in order, and for shapes and names that do not fit.
    """
    check_features(names)
    if frames.ndim != 4 or frames.shape[1] != 3 or len(clip) != len(frames):
        raise ValueError(
            f"frames: shape {tuple(frames.shape)} with {len(clip)} clip numbers; expected [F, 3, H, W], [F]"
        )
    if bool((clip[1:] < clip[:-1]).any()):
        raise ValueError(f"clip: {clip.tolist()} is not ascending; frames come clip by clip")
    if not len(frames):
        return torch.zeros(0, len(names), device=frames.device)
    with torch.no_grad(), torch.autocast(frames.device.type, enabled=False):
        black, white = pixel_range
        luma = frames[:, 0].float() * _LUMA[0]
        for colour in (1, 2):
            luma.add_(frames[:, colour], alpha=_LUMA[colour])
        luma = ((_average(luma[:, None])[:, 0] - black) / (white - black)).clamp(0, 1)  # [F, 32, 32]
        counts = _block_counts((luma * _LEVELS).long().clamp(max=_LEVELS - 1))
        share = counts / (_SIDE // _BLOCKS) ** 2
        bits = -torch.special.xlogy(share, share).sum(-1).mean(-1) / math.log(_LEVELS)
        shades = share.mean(dim=1)
        before = _to_previous(luma.flatten(1), clip)
        found = {
            "motion": before,
            "entropy": bits,
            "scene": _to_previous(shades, clip) * _LEVELS / 2,
            "time": _relative_time(clip, times),
            # a quarter of the sorting
            "median_distance": _to_median(F.avg_pool2d(luma[:, None], 2).flatten(1), clip),
            "neighbour_distance": _to_nearest(before, clip),
        }
        return torch.stack([found[name].to(luma.dtype) for name in names], dim=1)


def window_features(
    energies: Tensor, clip: Tensor, names: Sequence[str] = tuple(SOUND_FEATURES)
) -> Tensor:
    """Features [W, len(names)] in float32 of windows of sound [W, bands], as in `SOUND_FEATURES`.

    energies: logarithmic, 0 in silence. clip: [W] clip of each window, ascending.
    Raises ValueError for names that are no such features.
    """
    check_features(names)
    with torch.no_grad(), torch.autocast(energies.device.type, enabled=False):
        energies = energies.float()
        share = energies / energies.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        before = _to_previous(energies, clip)
        found = {
            "motion": before,
            "entropy": -torch.special.xlogy(share, share).sum(-1) / math.log(max(energies.shape[-1], 2)),
            "scene": _to_previous(share, clip) * energies.shape[-1] / 2,
            "time": _relative_time(clip, None),
            "median_distance": _to_median(energies, clip),
            "neighbour_distance": _to_nearest(before, clip),
        }
        return torch.stack([found[name].to(energies.dtype) for name in names], dim=1)


def check_features(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is no pixel feature."""
    for name in names:
        if name not in PIXEL_FEATURES:
            raise ValueError(
                f"feature_names: {name!r} is no pixel feature; allowed: {', '.join(PIXEL_FEATURES)}"
            )


def standardise(features: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(features - mean) / std over the last axis [.., n], in float32."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=features.device) for v in (mean, std))
    return (features.float() - mean) / std


def with_clip_means(features: Tensor, clip: Tensor, clips: int) -> Tensor:
    """[F, n] -> [F + B, n]: the mean of each clip's frames is appended, 0 for a clip without frames."""
    sums = features.new_zeros(clips, features.shape[1]).index_add_(0, clip, features)
    counts = torch.bincount(clip, minlength=clips).clamp(min=1)
    return torch.cat([features, sums / counts[:, None]])


def frame_numbers(clip: Tensor) -> Tensor:
    """[F] number of each frame within its clip, from 0: [0, 0, 0, 2, 2] -> [0, 1, 2, 0, 1]."""
    places = torch.arange(len(clip), device=clip.device)
    return places - torch.searchsorted(clip.contiguous(), clip.contiguous())


def gate_values(kind: str, u: Tensor, rank: int) -> Tensor:
    """Gates from a head's output: u [.., r] (rank) or [.., 1] (scalar, mixture) -> [.., r] or [.., 1].

    2·sigmoid(u), so that 0 gives exactly 1. "mixture": the first half of the ranks, rounded up, gets
    2·sigmoid(u), the other half 2·sigmoid(-u): two experts of half the rank whose weights sum to 2.
    """
    if kind == "mixture":
        first = (rank + 1) // 2
        u = torch.cat([u.expand(*u.shape[:-1], first), -u.expand(*u.shape[:-1], rank - first)], dim=-1)
    return 2 * torch.sigmoid(u)


def head_size(kind: str, rank: int) -> int:
    """Outputs of the head of a gate; 0 for kinds without parameters."""
    return {"none": 0, "selective": 0, "scalar": 1, "mixture": 1, "rank": rank}[kind]


def effective_rank(gates: Tensor, rank: int) -> Tensor:
    """How many ranks act in each frame: (Σ g)² / Σ g² of gates [F, r] or [F, 1] -> [F]; 0 where all are 0.

    r where all gates are alike, 1 where a single one is open (participation ratio).
    """
    gates = gates.expand(*gates.shape[:-1], rank).float()
    squares = gates.square().sum(-1)
    return torch.where(squares > 0, gates.sum(-1).square() / squares.clamp(min=1e-30), squares)


def shuffled(features: Tensor, clip: Tensor, seed: int) -> Tensor:
    """Features [F, n] permuted over the frames of each clip; clips of one length are permuted alike."""
    out = features.clone()
    for b in clip.unique().tolist():
        where = (clip == b).nonzero()[:, 0]
        order = torch.randperm(len(where), generator=torch.Generator().manual_seed(seed))
        out[where] = features[where[order.to(where.device)]]
    return out


def random_features(clip: Tensor, count: int, seed: int) -> Tensor:
    """[F, count] standard normal, fixed by the frame's number in its clip and the seed."""
    numbers = frame_numbers(clip).tolist()
    table = [
        torch.randn(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + t))
        for t in range(max(numbers, default=-1) + 1)
    ]
    rows = [table[t] for t in numbers]
    return (torch.stack(rows) if rows else torch.zeros(0, count)).to(clip.device)


def _average(x: Tensor) -> Tensor:
    """[F, 1, H, W] averaged down (or repeated up) to [F, 1, 32, 32]."""
    height, width = x.shape[-2:]
    if height % _SIDE or width % _SIDE:
        return F.adaptive_avg_pool2d(x, _SIDE)
    return F.avg_pool2d(x, (height // _SIDE, width // _SIDE))  # the same, and faster


def _block_counts(codes: Tensor) -> Tensor:
    """How often each level occurs in each block: codes [F, 32, 32] -> [F, 16 blocks, 16 levels]."""
    place = torch.arange(_SIDE, device=codes.device) // (_SIDE // _BLOCKS)
    block = place[:, None] * _BLOCKS + place
    frame = torch.arange(len(codes), device=codes.device)[:, None, None] * _BLOCKS**2
    bins = len(codes) * _BLOCKS**2 * _LEVELS
    counts = torch.bincount(((frame + block) * _LEVELS + codes).flatten(), minlength=bins)
    return counts.view(len(codes), _BLOCKS**2, _LEVELS).float()


def _to_previous(x: Tensor, clip: Tensor) -> Tensor:
    """[F] mean |x_t - x_(t-1)| of x [F, d], 0 at the first frame of a clip."""
    difference = (x[1:] - x[:-1]).abs().mean(dim=-1)
    return torch.cat([x.new_zeros(1), difference * (clip[1:] == clip[:-1])])[: len(x)]


def _to_nearest(before: Tensor, clip: Tensor) -> Tensor:
    """[F] the smaller of the differences to the previous frame and to the next, of those to the previous."""
    after = torch.cat([before[1:], before.new_zeros(1)])  # to the next frame
    first, last = _ends(clip)
    return torch.minimum(torch.where(first, after, before), torch.where(last, before, after))


def _ends(clip: Tensor) -> tuple[Tensor, Tensor]:
    """([F] first frame of its clip, [F] last frame of its clip)."""
    change, end = clip[1:] != clip[:-1], torch.ones(min(len(clip), 1), dtype=torch.bool, device=clip.device)
    return torch.cat([end, change]), torch.cat([change, end])


def _relative_time(clip: Tensor, times: Tensor | None) -> Tensor:
    times = frame_numbers(clip).double() if times is None else times.double()
    clips = int(clip[-1]) + 1
    first = times.new_full((clips,), math.inf).scatter_reduce_(0, clip, times, "amin")[clip]
    last = times.new_full((clips,), -math.inf).scatter_reduce_(0, clip, times, "amax")[clip]
    return (times - first) / torch.where(last > first, last - first, 1)


def _to_median(coarse: Tensor, clip: Tensor) -> Tensor:
    """[F] mean |x - median over the clip's frames| of x [F, d]; of an even number, the lower middle one."""
    lengths = torch.unique_consecutive(clip, return_counts=True)[1].tolist()
    if len(set(lengths)) == 1:  # all clips at once
        lengths = [(len(lengths), lengths[0])]
    else:
        lengths = [(1, length) for length in lengths]
    found = []
    for own, shape in zip(coarse.split([n * t for n, t in lengths]), lengths, strict=True):
        own = own.view(*shape, -1)
        middle = own.transpose(1, 2).contiguous().sort(dim=-1).values[..., (shape[1] - 1) // 2]
        found.append((own - middle[:, None]).abs().mean(dim=-1).flatten())
    return torch.cat(found)
