"""Which modules of a video-language model are vision, fusion and text, by full module path.

    describe(model).of("model.vision_tower.layers.0.mlp.fc1")            # "vision"
    describe(model).layout("model.vision_tower.layers.0.mlp.fc1")        # "frames": rows are frames
    target_modules(model, ("vision", "text"), "attention")               # full names for peft's LoraConfig
    register_modalities("my_type", vision=("model.eyes",), fusion=("model.bridge",), text=("model.decoder",))

Names are full paths, never endings: `q_proj` occurs in the vision tower and in the decoder alike, and an
ending given to peft would put adapters on both. The known ones are in `modalities.architectures`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from vqlora.modalities.rows import FrameSource

MODALITIES = ("vision", "fusion", "text", "audio")
# How the first axes of a layer's input are laid out; x is that input, D its width.
LAYOUTS = {
    "frames": "x [F, N, D] or [F, D]: one row of the batch is one frame, clip by clip",
    "flat": "x [sum of N_f, D]: the rows of a frame are neighbours, frames clip by clip",
    "tokens": "x [B, L, D]: placeholder tokens show frames, the other tokens none",
    "cross": "x [B, T*K, D]: all frames of a clip side by side, K rows each",
    "text": "x [R, L, D]: rows of text, none shows a frame",
    "clips": "x [V, N, D]: rows of whole clips, none shows a single frame",
    "sound": "x [sum of A_b, D] or [B, S, D]: the rows of a clip's sound are neighbours, none shows a frame",
}
_DEFAULT_LAYOUT = {"vision": "frames", "fusion": "frames", "text": "tokens", "audio": "sound"}
_ATTENTION = r"\.(\w*attn|\w*attention)\."


@dataclass(frozen=True)
class Modalities:
    """Where the parts of one architecture are.

    Each part is a tuple of module paths from the top-level class; everything below a path belongs to it.
    `heads` are output layers, `keep` other linear layers (by path) that stay in 16-bit and carry no adapters,
    as the heads do. `attention` is a regular expression that finds attention layers in a full name.

    layouts: path -> one of `LAYOUTS`, for the layers below it; the longest path wins. Unnamed layers of
        vision and fusion are "frames", of text "tokens", of audio "sound".
    mixes: paths below which a layer's *output* row depends on several frames, `unmixed` the exceptions (the
        first projections of a decoder, say, which work row by row on tokens that still are of one frame).
    never: path -> reason, of linear layers that never get a gradient; they carry no adapters.
    rows: finds the frames in a forward's inputs (`modalities.sources`); None where nobody described it.
    refine: from (this, model) to a description that depends on the model's configuration.

    Paths in `keep`, `layouts`, `mixes`, `unmixed` and `never` may hold `*` and `[..]` (fnmatch).
    """

    model_type: str
    vision: tuple[str, ...] = ()
    fusion: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    audio: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("lm_head",)
    keep: tuple[str, ...] = ()
    attention: str = _ATTENTION
    layouts: Mapping[str, str] = field(default_factory=dict)
    mixes: tuple[str, ...] = ()
    unmixed: tuple[str, ...] = ()
    never: Mapping[str, str] = field(default_factory=dict)
    rows: FrameSource | None = None
    refine: Callable[[Modalities, nn.Module], Modalities] | None = None

    def of(self, name: str) -> str | None:
        """Modality of a module or parameter by its full name, wrapped by peft or not; None if in no part."""
        name = plain_name(name)
        for modality in MODALITIES:
            if any(is_under(name, path) for path in getattr(self, modality)):
                return modality
        return None

    def layout(self, name: str) -> str:
        """How the input of the layer `name` is laid out: one of `LAYOUTS`. ValueError outside every part."""
        name = plain_name(name)
        fits = [path for path in self.layouts if matches(name, path)]
        if fits:
            return self.layouts[max(fits, key=len)]
        modality = self.of(name)
        if modality is None:
            raise ValueError(f"{name!r} lies in no part of {self.model_type}: its rows cannot be told apart")
        return _DEFAULT_LAYOUT[modality]

    def mixed(self, name: str) -> bool:
        """Whether an output row of the layer `name` depends on more than one frame."""
        name = plain_name(name)
        return any(matches(name, path) for path in self.mixes) and not any(
            matches(name, path) for path in self.unmixed
        )

    def why_never(self, name: str) -> str | None:
        """Why the layer `name` never gets a gradient; None if it does."""
        name = plain_name(name)
        return next((reason for path, reason in self.never.items() if matches(name, path)), None)


_KNOWN: dict[str, Modalities] = {}


def register_modalities(
    model_type: str,
    *,
    vision: Iterable[str] = (),
    fusion: Iterable[str] = (),
    text: Iterable[str] = (),
    audio: Iterable[str] = (),
    heads: Iterable[str] = ("lm_head",),
    keep: Iterable[str] = (),
    attention: str = _ATTENTION,
    layouts: Mapping[str, str] | None = None,
    mixes: Iterable[str] = (),
    unmixed: Iterable[str] = (),
    never: Mapping[str, str] | None = None,
    rows: FrameSource | None = None,
    refine: Callable[[Modalities, nn.Module], Modalities] | None = None,
) -> Modalities:
    """Describe an architecture (`model.config.model_type`) for this process; the last description counts.

    Raises ValueError if nothing is described, one path lies inside another part's path, or a layout is
    unknown.

    >>> from vqlora.modalities.sources import Clips
    >>> known = register_modalities(
    ...     "my_type", vision=("model.eyes",), fusion=("model.bridge",), text=("model.decoder",),
    ...     rows=Clips(arg="pixel_values", token="image_token_id"))   # clips [B, T, 3, H, W]
    >>> known.layout("model.eyes.0.fc"), known.layout("model.decoder.0.fc")
    ('frames', 'tokens')
    """
    parts = {"vision": tuple(vision), "fusion": tuple(fusion), "text": tuple(text), "audio": tuple(audio)}
    paths = [(path, modality) for modality, group in parts.items() for path in group]
    if not paths:
        raise ValueError(f"model type {model_type!r}: no part given; allowed: {', '.join(MODALITIES)}")
    for path, modality in paths:
        for other, other_modality in paths:
            if modality != other_modality and is_under(path, other):
                raise ValueError(
                    f"model type {model_type!r}: {modality} {path!r} lies inside {other_modality} {other!r}"
                )
    for path, layout in (layouts or {}).items():
        if layout not in LAYOUTS:
            raise ValueError(
                f"model type {model_type!r}: layout {layout!r} of {path!r} is not known; allowed: "
                + "; ".join(f"{name} ({what})" for name, what in LAYOUTS.items())
            )
    _load_table()  # else the table would overwrite this description later
    _KNOWN[model_type] = Modalities(
        model_type,
        **parts,
        heads=tuple(heads),
        keep=tuple(keep),
        attention=attention,
        layouts=dict(layouts or {}),
        mixes=tuple(mixes),
        unmixed=tuple(unmixed),
        never=dict(never or {}),
        rows=rows,
        refine=refine,
    )
    return _KNOWN[model_type]


def describe(model: nn.Module) -> Modalities:
    """The description of `model`'s architecture. Raises KeyError that shows how to write a missing one."""
    found = find_description(model)
    if found is None:
        model_type = _model_type(model)
        tops = [f"{a}.{b}" for a, child in model.named_children() for b, _ in child.named_children()]
        tops = (tops or [name for name, _ in model.named_children()])[:12]
        raise KeyError(
            f"model type {model_type!r} has no description of its modalities; known: "
            f"{', '.join(sorted(_KNOWN))}. Describe it by full module paths, for example: "
            f"vqlora.modalities.register_modalities({model_type!r}, "
            f"vision=('model.vision_tower',), fusion=('model.multi_modal_projector',), "
            f"text=('model.language_model',), heads=('lm_head',), rows=vqlora.modalities.sources.Clips(arg="
            f"'pixel_values', token='image_token_id')); this model has: {', '.join(tops)}"
        )
    return found


def find_description(model: nn.Module) -> Modalities | None:
    """Like `describe`, but None for an unknown architecture."""
    _load_table()
    found = _KNOWN.get(_model_type(model))
    return found.refine(found, model) if found is not None and found.refine is not None else found


def _load_table() -> None:
    import vqlora.modalities.architectures  # noqa: F401  registers on import; it imports this module


def target_modules(
    model: nn.Module,
    modalities: Iterable[str] = ("vision", "fusion", "text"),
    layers: str | Iterable[str] = "attention+mlp",
) -> list[str]:
    """Full names of the linear layers that get adapters, in the model's order.

    layers: "attention", "attention+mlp" (every linear layer of the part), or one or more patterns of full
        names with `*` ("model.language_model.*.q_proj"), which choose among the named modalities' layers.
    Raises ValueError for an unknown modality, a part without a matching layer, and a pattern that matches
    nothing.
    """
    known, modalities = describe(model), tuple(modalities)
    for modality in modalities:
        if modality not in MODALITIES or not getattr(known, modality):
            allowed = [m for m in MODALITIES if getattr(known, m)]
            raise ValueError(
                f"modalities: {modality!r} is not a part of {known.model_type}; allowed: "
                + ", ".join(allowed)
            )
    apart = (*known.heads, *known.keep, *known.never)
    linear = [
        name
        for name, module in linear_layers(model)
        if known.of(name) in modalities and not any(matches(name, path) for path in apart)
    ]
    if layers == "attention+mlp":
        chosen = linear
    elif layers == "attention":
        chosen = [name for name in linear if re.search(known.attention, name)]
    else:
        patterns = (layers,) if isinstance(layers, str) else tuple(layers)
        chosen = match_names(linear, patterns, f"layers (in {', '.join(modalities)} of {known.model_type})")
        return chosen
    for modality in modalities:
        if not any(known.of(name) == modality for name in chosen):
            have = [name for name in linear if known.of(name) == modality][:4]
            raise ValueError(
                f"layers: {layers!r} matches no layer of {modality} in {known.model_type}, which has "
                f"{', '.join(have) or 'no linear layer'}; choose other layers or leave {modality!r} out"
            )
    return chosen


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Full names and modules of all linear layers, bitsandbytes' included, an adapter's own left out."""
    return [
        (plain_name(name), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    ]


def match_names(names: Iterable[str], patterns: Iterable[str], what: str) -> list[str]:
    """The names, in order, that fit one of the patterns (`*` is any text) or lie under a path that does.

    Raises ValueError, beginning with `what`, for a pattern that fits nothing.
    """
    names, patterns = list(names), tuple(patterns)
    above = {name: [name[:i] for i, letter in enumerate(name + ".") if letter == "."] for name in names}
    hits = {
        pattern: {name for name in names if any(fnmatch.fnmatchcase(path, pattern) for path in above[name])}
        for pattern in patterns
    }
    for pattern, found in hits.items():
        if not found:
            paths = sorted({path for name in names for path in above[name]})
            close = [path for path in paths if path.endswith("." + pattern)][:3]
            close = close or difflib.get_close_matches(pattern, paths, 3, 0.5)
            raise ValueError(
                f"{what}: {pattern!r} matches no layer; names are full paths, `*` stands for any text"
                + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")
            )
    return [name for name in names if any(name in found for found in hits.values())]


def is_under(name: str, path: str) -> bool:
    """Whether the dotted `name` is `path` or below it: `a.b` is under `a`, `ab` is not."""
    return name == path or name.startswith(path + ".")


def matches(name: str, pattern: str) -> bool:
    """Whether the dotted `name`, or a path above it, fits `pattern` (fnmatch: `*` is any text)."""
    if is_under(name, pattern):
        return True
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def plain_name(name: str) -> str:
    """A module's name as it was before peft wrapped the model."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer", "")


def _model_type(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "model_type", None) or type(model).__name__)
