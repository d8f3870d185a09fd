"""KineVLM's ear: the part that makes tokens of sound, and the clock that frames and sounds have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OCTAVES = 16


def clock(times: Tensor) -> Tensor:
    """Times ``[..]`` from 0 to 1 as float32 ``[.., 32]``, sines then cosines: half a turn to 32 turns over a
    clip."""
    octaves = torch.arange(OCTAVES, device=times.device, dtype=torch.float32)
    angle = times.float()[..., None] * torch.pi * 2.0 ** (octaves * 0.4)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class KineAudioTower(nn.Module):
    """Sound ``[B, S, bands]`` (log band energies of S windows, evenly over a clip) to tokens ``[B, S, D]``.

    Each token carries its window, its change since the last one, and its time. Windows never mix here: the
    decoder is the first place where sounds and frames meet. Raises ValueError for another number of bands.
    """

    def __init__(self, config):
        super().__init__()
        self.bands, width = config.audio_bands, config.text_config.hidden_size
        self.linear_1 = nn.Linear(2 * self.bands, config.audio_width)
        self.linear_2 = nn.Linear(config.audio_width, width)
        self.time = nn.Linear(2 * OCTAVES, width)

    def forward(self, sound: Tensor) -> Tensor:
        if sound.ndim != 3 or sound.shape[-1] != self.bands:
            raise ValueError(f"sound: shape {tuple(sound.shape)}; expected [B, S, {self.bands}]")
        change = torch.cat([torch.zeros_like(sound[:, :1]), sound[:, 1:] - sound[:, :-1]], dim=1)
        x = self.linear_2(F.gelu(self.linear_1(torch.cat([sound, change], dim=-1)), approximate="tanh"))
        x = F.layer_norm(x, x.shape[-1:])  # of unit size, as the projector's
        clips, windows = x.shape[:2]
        times = ((torch.arange(windows, device=x.device) + 0.5) / windows).expand(clips, windows)
        return x + self.time(clock(times).to(x.dtype))
