"""Runs that are read beyond their own clips; captions in several languages; what is made of both."""

import dataclasses
from functools import cache, partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from invented_cases import write_general
from little_models import lively
from settings_like import settings_like

from vqlora import metrics, runs
from vqlora.base import tiny
from vqlora.data.batches import Collator, Item, Layout, pixels
from vqlora.data.cache import ArrayStore
from vqlora.data.clips import Clip, Question
from vqlora.data.kinemoji.language import vocabulary
from vqlora.data.kinemoji.write import write_domain
from vqlora.evaluate import evaluate
from vqlora.experiments import GeneralSettings, load_profile
from vqlora.general import run as general_run
from vqlora.general import study
from vqlora.general.languages import LanguageCollator, asking, read_languages
from vqlora.grid.task import module_of
from vqlora.report.general_plots import general_reach
from vqlora.report.general_tables import GENERAL_TABLES
from vqlora.store import StoredRun, run_key

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"domains": ["language", "visual"], "focus": "visual", "languages": ["es"], "frames": [4, 16],
         "seeds": [0, 1], "steps": 4, "train_clips": 9, "eval_clips": 9}  # fmt: skip
ENGLISH = ("cat moves left then dog spins", "dog spins", "then cat moves right")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    asked = (Question("what", "what spins", ("cat", "dog"), 0),)
    told = [{"en": (text, "one"), "es": ("two " + text, "dog")} for text in ENGLISH]
    clips = [Clip(f"c{n}", Path("x.mp4"), "test", texts, asked, (), ()) for n, texts in enumerate(told)]
    return clips, [rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8) for _ in clips]


# -- languages


def test_english_is_read_as_everywhere_else(data):
    clips, frames = data
    pair, store = lively(), ArrayStore(clips, frames)
    usual = evaluate(*pair, clips, store, frames=2, max_new_tokens=8, scorer=metrics.CaptionScorer("zh"),
                     parser=lambda text: []).examples.query("task == 'caption'")  # fmt: skip
    table = read_languages(*pair, clips, store, ("en", "es"), frames=2, max_new_tokens=8, batch_size=2)
    english = table[table["kind"] == "en"]
    for column in ("clip", "reference", "prediction"):
        assert english[column].tolist() == usual[column].tolist()
    assert np.allclose(english[["nll", "token_accuracy"]], usual[["nll", "token_accuracy"]], atol=1e-5)


def test_another_language_is_read_behind_its_own_word(data):
    clips, frames = data
    model, tokenizer = lively()
    table = read_languages(model, tokenizer, clips, ArrayStore(clips, frames), ("es",), frames=4)
    layout = Layout(tokenizer)
    given, want = asking(layout, "es"), clips[0].captions["es"][0]
    assert given[0] == layout.cap and len(given) > 1
    head, learned = layout.prefix(4) + given, layout.caption(want)[1]
    labels = torch.tensor([[-100] * len(head) + learned])
    with torch.no_grad():
        loss = model(torch.tensor([head + learned]), pixel_values=pixels([frames[0]]), labels=labels).loss
    second = table.assign(nll=0.0)
    only = [dataclasses.replace(clips[0], captions={"es": (want,)})]
    alone = read_languages(model, tokenizer, only, ArrayStore(only, frames[:1]), ("es",), frames=4)
    assert alone["nll"].iloc[0] == pytest.approx(float(loss), abs=1e-5) and len(second) == 3
    with pytest.raises(ValueError, match="clip 'c0' has no captions in language 'fr'; it has: en, es"):
        read_languages(model, tokenizer, clips, ArrayStore(clips, frames), ("fr",), frames=4)
    with pytest.raises(ValueError, match="language: 'it' is not known; allowed: en, es, de, fr, zh"):
        asking(layout, "it")


def test_batches_draw_a_language_for_each_row_and_leave_questions_alone(data):
    clips, frames = data
    _, tokenizer = tiny()
    items = [Item(clips[n % 3], frames[n % 3], np.zeros(4, np.float32), n % 3, n // 3) for n in range(60)]
    options = {"seed": 3, "question_share": 0.4}
    plain, english = Collator(tokenizer, **options), LanguageCollator(tokenizer, ("en",), **options)
    assert [plain.draw(item) for item in items] == [english.draw(item) for item in items]
    both = LanguageCollator(tokenizer, ("en", "es"), **options)
    spanish, layout = 0, plain.layout
    for item in items:
        (given, learned, text), usual = both.draw(item), plain.draw(item)
        if usual[0][0] == layout.qst:
            assert (given, learned) == usual[:2]
        elif given != [layout.cap]:
            spanish += 1
            told = item.clip.captions["es"]
            assert given == asking(layout, "es") and learned in [layout.caption(one)[1] for one in told]
            assert text in [layout.text(one) for one in told]
        else:
            assert (given, learned, text) == usual
    captions = sum(plain.draw(item)[0][0] == layout.cap for item in items)
    assert 0.25 * captions < spanish < 0.75 * captions


# -- a run


@pytest.fixture
def rendered(tmp_path, monkeypatch) -> Path:
    for domain, counts in (("visual", {"train": 4, "test": 3}), ("source", {"test": 3})):
        write_domain(tmp_path, domain, counts, 0, 1, progress=False, languages=("en", "es"), audio=False)
    monkeypatch.setattr(general_run, "load_base", lambda name: tiny(words=vocabulary()))
    quick = partial(evaluate, scorer=metrics.CaptionScorer("zh"), max_new_tokens=4)
    monkeypatch.setattr(general_run, "evaluate", quick)
    return tmp_path


def test_a_run_is_read_in_every_way_that_is_asked_for(rendered):
    asked = settings_like("qlora", "nf4", domain="visual", eval_part="test", eval_clips=3, steps=1)
    read = {"also_domains": ("source",), "also_frames": (4,), "also_languages": ("es",)}
    far = asked.model_copy(update=read)
    result = general_run.execute(far, rendered, rendered / "work")
    rows = result.examples
    assert set(rows["reading"]) == {"own", "domain.source", "frames.4", "language.en", "language.es"}
    assert all(name.startswith("source") == (reading == "domain.source")
               for name, reading in zip(rows["clip"], rows["reading"], strict=True))  # fmt: skip
    means = rows[rows["task"] == "caption"].groupby("reading")["nll"].mean()
    assert result.metrics["domain.source.nll"] == pytest.approx(means["domain.source"])
    assert result.metrics["nll"] == pytest.approx(result.metrics["language.en.nll"], abs=1e-4)
    assert result.metrics["frames.4.nll"] != result.metrics["nll"]
    told = asked.model_copy(update={"languages": ("es",)})
    spanish = general_run.execute(told, rendered, rendered / "other")
    assert set(spanish.examples["reading"]) == {"language.en", "language.es"}
    assert spanish.metrics["nll"] == spanish.metrics["language.es.nll"]
    assert spanish.metrics["train_loss"] != result.metrics["train_loss"]


def test_identity_sees_further_readings_only_where_there_are_some(rendered):
    plain = settings_like("qlora", "nf4", domain="visual")
    key = run_key(plain, "data", "base", "code")
    keys = {key}
    for more in ({"languages": ("es",)}, {"also_frames": (4,)}, {"also_domains": ("source",)}):
        other = plain.model_copy(update=more)
        keys.add(run_key(other, "data", "base", "code"))
        assert other.generalizes and module_of(other) == "vqlora.general.run"
    assert len(keys) == 4 and module_of(plain) == "vqlora.train"
    before = runs._keys([plain.model_copy(update={"also_domains": ("source",)}), plain], rendered, ["c", "c"])
    (rendered / "source" / "annotations" / "truth.jsonl").write_text("changed\n")
    after = runs._keys([plain.model_copy(update={"also_domains": ("source",)}), plain], rendered, ["c", "c"])
    assert before[0] != after[0] and before[1] == after[1], "a run depends on every domain that it reads"
    with pytest.raises(ValueError, match="judge: .* does not go with languages"):
        settings_like("qlora", "nf4", judge=("uniform",), judge_frames=(4,), also_frames=(4,))


# -- the study


def test_settings_name_what_is_wrong():
    asked = GeneralSettings(**SHAPE)
    labels = {(run.domain, run.method) for run in asked.runs()}
    assert ("visual", "together") in labels and ("language", "together") not in labels
    assert {run.also_domains for run in asked.runs() if run.domain == "language"} == {("visual", "source")}
    with pytest.raises(ValueError, match="focus: 'bursts'; allowed: one of domains, language, visual"):
        GeneralSettings(**{**SHAPE, "focus": "bursts"})
    with pytest.raises(ValueError, match="languages: 'en' is always there"):
        GeneralSettings(**{**SHAPE, "languages": ["en"]})
    with pytest.raises(ValueError, match="overrides: 'seed' is set by the experiment itself"):
        GeneralSettings(**SHAPE, overrides={"seed": 1})


@pytest.mark.parametrize("name", ["smoke", "cpu", "full"])
def test_profiles_hold_a_claim_of_every_family(name):
    asked = load_profile(name, ROOT).general
    assert {claim["family"] for claim in study.claims(asked)} == {"domains", "languages", "tasks", "frames"}
    assert len({run.steps for run in asked.runs() if run.arm != "frozen"}) == 1


NLL = {  # what readings of invented runs come to; 1.0 where nothing is said
    ("language", "joint", "domain.source"): 2.0,
    ("visual", "joint", "language.es"): 4.0, ("visual", "frozen", "language.es"): 4.5,
    ("visual", "together", "language.es"): 1.2, ("visual", "joint", "frames.16"): 1.01,
}  # fmt: skip


class Run(StoredRun):
    """A stored run with every reading that its settings ask for, of 30 clips."""

    def examples(self) -> pd.DataFrame:
        return _rows(self.settings)


@cache
def _rows(own) -> pd.DataFrame:
    rng = np.random.default_rng(own.seed)
    named = [] if own.languages else ["own"]
    named += [f"domain.{name}" for name in own.also_domains] + [f"frames.{n}" for n in own.also_frames]
    told = ("en", *own.languages, *own.also_languages) if own.languages or own.also_languages else ()
    named += [f"language.{name}" for name in dict.fromkeys(told)]
    tables = []
    for reading in named:
        shape = {"clip": [f"c{i}" for i in range(30)], "kind": "", "reading": reading}
        level = NLL.get((own.domain, own.method, reading), 1.0)
        rows = pd.DataFrame(shape).assign(task="caption", nll=level + rng.normal(0, 0.01, 30))
        tables.append(rows.assign(slot=0.5, exact=0.0, correct=np.nan, rank=np.nan))
        if not reading.startswith("language"):
            right = 0.9 if own.method == "questions" else 0.5
            tables.append(rows.assign(task="question", correct=right, nll=np.nan))
            rank = 5 if own.method == "no-contrast" else 1
            tables.append(rows.assign(task="retrieval", kind="t2v", rank=rank, nll=np.nan))
    rows = pd.concat(tables, ignore_index=True)
    return rows.drop(columns=["correct", "rank"]) if own.languages else rows


def invented() -> list[Run]:
    asked = GeneralSettings(**SHAPE).runs()
    return [Run(str(n), run, {"nll": 1.0}, {}, {}, None) for n, run in enumerate(asked)]


def test_claims_are_judged_on_their_own_readings():
    asked = GeneralSettings(**SHAPE)
    runs_made = invented()
    tests = study.judge(asked, runs_made)
    verdicts = tests.set_index(["family", "on", "comparison", "metric"])["verdict"]
    assert verdicts["domains", "language to source", "tuned_vs_frozen", "nll"] == "denied"
    assert verdicts["domains", "visual to source", "tuned_vs_frozen", "nll"] == "supported"
    assert verdicts["languages", "es", "en_vs_frozen", "nll"] == "supported"
    assert verdicts["languages", "es", "together_vs_alone", "nll"] == "denied"
    assert verdicts["languages", "en", "together_vs_alone", "nll"] == "supported"
    assert verdicts["tasks", "visual", "joint_vs_questions", "qa_frac"] == "denied"
    assert verdicts["tasks", "visual", "joint_vs_no-contrast", "t2v_r1"] == "supported"
    assert verdicts["frames", "visual", "16_vs_8", "nll"] == "supported" and len(tests) == 4 + 3 + 4 + 2
    counts = study.overall(tests).set_index(["of", "metric"])["value"]
    assert counts["domains", "denied_names"] == "language to source"
    assert counts["domains", "claims_count"] == "4"
    assert float(counts["domains", "smallest_nll"]) == pytest.approx(-1, abs=0.01)
    assert counts["frames", "supported_names"] == "16 frames (language), 16 frames (visual)"
    assert "joint against questions (questions)" in counts["tasks", "denied_names"]
    table = study.summarise(runs_made[:8], ("nll",)).set_index([*study.NAMED, "metric"])["value"]
    assert table["visual", "joint", "language.es", "nll"] == pytest.approx(4, abs=0.01)
    assert ("visual", "together", "own", "nll") not in table.index


def test_each_domain_has_the_best_rate_of_its_sweep(tmp_path):
    asked = GeneralSettings(**SHAPE, sweep=[5e-3, 1e-2])
    best = {"language": 1e-2, "visual": 5e-3}
    sweep = [Run("x", run, {"nll": abs(run.learning_rate - best[run.domain])}, {}, {}, None)
             for run in asked.sweep_runs()]  # fmt: skip
    assert {run.settings.seed for run in sweep} == {1000} and len(sweep) == 4
    rates = study.settle_rates(asked, sweep, tmp_path / "own.csv", tmp_path / "none.csv")
    assert study.by_domain(rates) == best and set(rates["origin"]) == {"sweep"}
    later = study.settle_rates(asked, [], tmp_path / "other.csv", tmp_path / "own.csv")
    assert study.by_domain(later) == best and set(later["origin"]) == {"committed sweep"}
    trained = [run for run in asked.runs(study.by_domain(later)) if run.arm != "frozen"]
    assert {(run.domain, run.learning_rate) for run in trained} == set(best.items())
    plain = study.settle_rates(asked, [], tmp_path / "a", tmp_path / "b")
    assert set(plain["origin"]) == {"profile"}
    assert set(plain["learning_rate"]) == {asked.learning_rate}


def test_figure_and_tables_are_made_of_the_results(tmp_path):
    folder = tmp_path / "11_generalization"
    folder.mkdir()
    write_general(folder)
    text = {name: build(tmp_path).markdown() for name, build in GENERAL_TABLES.items()}
    spanish = "| Spanish | 5.000 / 50.0 | 4.000 / 50.0 | 0.700 / 50.0 | 0.900 / 50.0 |"
    assert spanish in text["general_languages"]
    assert "With contrastive loss beats without" in text["general_tests"]
    assert "| Captions alone | 0.700" in text["general_tasks"]
    assert "Questions alone" not in text["general_tasks"]
    figure = general_reach(tmp_path)
    assert [panel.get_title(loc="left") or panel.get_title() for panel in figure.axes][0] == "Other domains"
    plt.close("all")
