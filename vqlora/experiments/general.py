"""The study of how far what was learned reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from vqlora.config import Language, RunSettings, Settings
from vqlora.experiments.overrides import overridden

LANGUAGES = {"en": "English", "es": "Spanish", "de": "German", "fr": "French", "zh": "Chinese"}
Task = Literal["captions", "questions", "no-contrast"]
JOINT, ALL = "joint", "together"
TASKS = {  # what one run of each kind learns, as fields of RunSettings
    JOINT: {},
    "captions": {"question_share": 0.0, "contrastive_weight": 0.0},
    "questions": {"question_share": 1.0, "contrastive_weight": 0.0},
    "no-contrast": {"contrastive_weight": 0.0},
}


class GeneralSettings(Settings):
    """Notebook 11: adapters trained on one domain, task or language at one length, and read beyond it.

    Labels of the runs: "frozen"; a name of `TASKS`; a language that is learned alone; "together", all
    languages in one run. All have as many steps. `joint` learns all tasks in English, its model is read in
    every way.
    """

    domains: tuple[str, ...] = Field(min_length=1)           # a joint run on each, read on all of them
    also: tuple[str, ...] = ("source",)                      # and on these
    focus: str                                               # the domain of all other comparisons
    tasks: tuple[Task, ...] = ("captions", "questions", "no-contrast")    # beside all in one
    languages: tuple[Language, ...] = ("es", "de", "fr", "zh")    # beside English
    frames: tuple[int, ...] = (4, 16, 32)                    # read by models that were trained on others
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = Field(ge=1)
    train_clips: int = Field(ge=1)
    eval_clips: int = Field(ge=1)
    eval_part: Literal["val", "devtest", "test"] = "test"
    learning_rate: float = Field(1e-2, gt=0)                 # where no swept one is on file
    sweep: tuple[float, ...] = ()                            # rates to try on validation
    sweep_seed: int = Field(1000, ge=0)
    sweep_clips: int = Field(64, ge=1)
    overrides: dict[str, Any] = {}                           # fields of RunSettings for every run
    margin_nll: float = Field(0.05, gt=0)                    # nats a token that count as equal
    margin_frac: float = Field(0.05, gt=0)                   # of right answers, likewise

    @model_validator(mode="after")
    def _usable(self) -> GeneralSettings:
        if self.focus not in self.domains:
            raise ValueError(f"focus: {self.focus!r}; allowed: one of domains, {', '.join(self.domains)}")
        if "en" in self.languages:
            raise ValueError("languages: 'en' is always there; allowed: the others")
        if self.sweep and self.sweep_seed in self.seeds:
            raise ValueError(f"sweep_seed: {self.sweep_seed} is also in seeds")
        self.runs(), self.sweep_runs()                       # building them checks the overrides
        return self

    def runs(self, learning_rates: Mapping[str, float] | None = None, *,
             base: str = "released") -> tuple[RunSettings, ...]:
        """Settings of every run; `learning_rates` by domain replace the profile's."""
        rates, made = dict.fromkeys(self.domains, self.learning_rate) | dict(learning_rates or {}), []
        how = {"base": base, "eval_part": self.eval_part, "eval_clips": self.eval_clips}
        for seed in self.seeds:
            for domain in self.domains:
                read = {**how, "also_frames": self.frames}
                read |= {"also_domains": tuple(d for d in (*self.domains, *self.also) if d != domain)}
                read |= {"also_languages": self.languages} if domain == self.focus else {}
                made.append(self._run("frozen", domain, seed, 0.0, **read))
                made.append(self._run(JOINT, domain, seed, rates[domain], **read))
            rate = rates[self.focus]
            made += [self._run(task, self.focus, seed, rate, **how) for task in self.tasks]
            for label, learned in self._languages():
                read = {"languages": learned, "also_languages": self.languages}
                made.append(self._run(label, self.focus, seed, rate, **read, **how))
        return tuple(made)

    def sweep_runs(self, *, base: str = "released") -> tuple[RunSettings, ...]:
        """Settings of the sweep: a joint run on each domain at every rate."""
        how = {"base": base, "eval_part": "val", "eval_clips": self.sweep_clips}
        return tuple(self._run(JOINT, domain, self.sweep_seed, rate, **how)
                     for domain in self.domains for rate in self.sweep)

    def _languages(self) -> list[tuple[str, tuple[str, ...]]]:
        """(label, languages) of the runs that learn others than English alone."""
        if not self.languages:
            return []
        return [*((name, (name,)) for name in self.languages), (ALL, ("en", *self.languages))]

    def _run(self, label: str, domain: str, seed: int, rate: float, **chosen: Any) -> RunSettings:
        frozen = label == "frozen"
        chosen |= {"experiment": "11_generalization", "label": label, "arm": "frozen" if frozen else "qlora",
                   "bits": "nf4", "domain": domain, "seed": seed, "learning_rate": rate,
                   "steps": 0 if frozen else self.steps, "train_clips": self.train_clips}
        chosen |= TASKS.get(label, {})
        return overridden(chosen, self.overrides)
