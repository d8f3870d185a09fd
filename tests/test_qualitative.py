"""What is wrong with captions, where words look, which clips are shown; figures and tables of notebook 12."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from invented_cases import write_qualitative
from little_models import lively

from vqlora import metrics
from vqlora.config import RunSettings
from vqlora.data.cache import ArrayStore
from vqlora.data.clips import Clip, TrueEvent
from vqlora.data.kinemoji.domains import DOMAINS
from vqlora.data.kinemoji.language import captions as told_by
from vqlora.data.kinemoji.language import parse, truth
from vqlora.data.kinemoji.scenes import sample_scene
from vqlora.experiments import load_profile
from vqlora.qualitative import attention, captions, pictures
from vqlora.report.qualitative_plots import QUALITATIVE_FIGURES, caption_cases
from vqlora.report.qualitative_tables import QUALITATIVE_TABLES
from vqlora.store import StoredRun

ROOT = Path(__file__).resolve().parents[1]
CAT, DOG, OWL = ("cat", "left"), ("dog", "spin"), ("owl", "grow")


@pytest.mark.parametrize(("told", "true", "found"), [
    ([CAT, DOG], [CAT, DOG], {}),
    ([DOG, CAT], [CAT, DOG], {"order": 1}),
    ([CAT, OWL], [CAT, DOG, OWL], {"missing": 1}),
    ([CAT, DOG, OWL], [CAT, OWL], {"extra": 1}),
    ([], [CAT, DOG], {"missing": 2}),
    ([("cat", "spin"), ("owl", "spin")], [CAT, DOG], {"motion": 1, "object": 1}),
    ([OWL], [CAT], {"object": 1, "motion": 1}),
    ([("owl", "left")], [CAT, DOG], {"object": 1, "missing": 1}),
])  # fmt: skip
def test_faults_are_those_of_the_cheapest_alignment(told, true, found):
    assert captions.faults(told, true) == found


@pytest.mark.parametrize("domain", ["visual", "language", "cutaways"])
def test_every_reference_is_right_and_in_its_own_style_alone(domain):
    other = "visual" if domain == "language" else "language"
    for index in range(12):
        scene = sample_scene(DOMAINS[domain], "val", index, 0)
        for text in told_by(scene):
            assert not captions.faults(parse(text), truth(scene))
            assert captions.in_style(text, domain) and not captions.in_style(text, other)
            assert not captions.in_style(text + " then", domain) and not captions.in_style("", domain)


class Run(StoredRun):
    """A stored run of four captions, of which one is right and one a sentence of no style."""

    def examples(self) -> pd.DataFrame:
        said = ["cat moves left", "wolf moves left", "cat spins", "cat moves left moves"]
        rows = pd.DataFrame({"clip": ["c0", "c1", "c2", "c3"], "prediction": said, "task": "caption"})
        return rows.assign(reference="cat moves left", nll=[0.4, 0.3, 0.2, 0.1])


def runs() -> list[Run]:
    shape = {"experiment": "03", "arm": "qlora", "bits": "nf4", "domain": "visual", "learning_rate": 1e-2,
             "steps": 1, "train_clips": 1, "eval_clips": 4}  # fmt: skip
    return [Run(str(n), RunSettings(seed=n, **shape), {}, {}, {}, None) for n in (0, 1)]


def test_failures_are_shares_of_captions_and_agree_with_exact_accuracy():
    judged = captions.judged_captions(runs())
    table = captions.failure_table(judged).set_index("metric")
    shares = {name: table.loc[f"{name}_frac", "value"] for name in ("object", "motion", "style", "missing")}
    assert shares == {"object": 0.25, "motion": 0.25, "style": 0.25, "missing": 0.0}
    assert table.loc["right_frac", "count"] == table.loc["wrong_frac", "count"] == 4
    assert table.loc["right_frac", "low"] >= 0
    said = judged["caption"].tolist()
    exact = metrics.event_accuracy(said, [parse(text) for text in judged["reference"]], parse)["exact"]
    assert judged["right"].tolist() == exact.tolist()


def test_captions_are_chosen_by_quantiles_of_the_nll():
    chosen = captions.chosen_captions(captions.judged_captions(runs()), "qlora", (0.0, 1.0))
    assert chosen["clip"].tolist() == ["c3", "c0"] and chosen["picture"].tolist() == [0, 1]
    assert chosen["faults"].tolist() == ["style", "none"]
    assert pictures.at_quantiles({"b": 1.0, "a": 1.0, "c": 0.0}, (0, 0.5, 1)) == ["c", "a", "b"]


EVENTS = (TrueEvent("cat", "left", 1, 3), TrueEvent("dog", "left", 6, 8), TrueEvent("owl", "aside", 4, 6))


def test_words_are_tied_to_the_events_they_tell():
    clip = Clip("c", Path("c.mp4"), "test", {}, (), (), EVENTS)
    words = "first the cat moves left and then the dog goes left and meanwhile a shot of the owl".split()
    told = {words[place] + str(place): about for place, about in attention.told_words(words, clip).items()}
    assert told == {"cat2": ("object", 0), "moves3": ("motion", 0), "dog8": ("object", 1),
                    "goes9": ("motion", 1), "owl17": ("aside", 2)}  # fmt: skip


def test_frames_show_an_event_or_what_it_did_since_the_one_before():
    left = {"motion": "left", "start": 3, "end": 6}
    assert attention.shows(left, [0, 2, 7, 9]).tolist() == [False, False, True, False]
    assert attention.shows(left, [4, 5, 8]).tolist() == [True, True, True]
    aside = {"motion": "aside", "start": 1, "end": 9}
    assert attention.shows(aside, [1, 4, 8], inserted=[1, 8]).tolist() == [True, False, True]


def seen(clip: str, weights: np.ndarray) -> pd.DataFrame:
    """Attention [T, 4] of a name that tells the first event."""
    frames, cells = weights.shape
    shown, cell = np.repeat(np.arange(frames), cells), np.tile(np.arange(cells), frames)
    named = {"clip": clip, "place": 0, "word": "cat", "kind": "object", "event": 0, "layer": -1}
    table = pd.DataFrame({"shown": shown, "frame": 10 * shown, "cell": cell, "weight": weights.ravel()})
    return table.assign(**named)


def test_only_attention_to_the_own_event_beats_chance():
    events = {name: {"events": [{"name": "cat", "motion": "left", "start": 10 * t, "end": 10 * t + 1}],
                     "actors": [{"name": "cat", "cell": t}], "inserted": []}
              for t, name in enumerate("abcd")}  # fmt: skip
    early = np.zeros((4, 4))
    early[1, 1] = 1.0                                        # all look at frame 1, whatever happens
    same = attention.looks(pd.concat([seen(name, early) for name in "abcd"]), events)
    tests = attention.looks_tests(same)
    assert (tests["verdict"] != "supported").all() and tests["value"].abs().max() < 0.5
    own = pd.concat([seen(name, np.eye(4)[:, [t]] @ np.eye(4)[[t]]) for t, name in enumerate("abcd")])
    looks = attention.looks(own, events)
    assert (looks["share"] == 1).all() and (looks.query("what == 'cell'")["even"] == 0.25).all()
    found = attention.looks_table({"tuned": looks}).set_index(["what", "metric"])["value"]
    assert found["cell", "gain_frac"] == 1 and found["frames", "gain_frac"] > 0.6
    assert (attention.looks_tests(looks)["verdict"] == "supported").all()


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    events = (TrueEvent("cat", "left", 1, 3), TrueEvent("dog", "spin", 4, 6))
    texts = ("cat moves left then dog spins", "dog spins", "cat moves left")
    clips = [Clip(f"c{n}", Path("x.mp4"), "test", {"en": (text,)}, (), (), events)
             for n, text in enumerate(texts)]  # fmt: skip
    return clips, ArrayStore(clips, [rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8) for _ in clips])


def test_attention_is_shared_out_and_depends_on_no_other_clip(data):
    clips, store = data
    model, tokenizer = lively()
    read = attention.attend(model, tokenizer, clips, store, frames=3)
    sums = read.groupby(["clip", "place", "layer"])["weight"].sum()
    assert np.allclose(sums, 1, atol=1e-5) and read["weight"].min() >= 0 and read["weight"].std() > 0
    assert read.groupby("clip")["place"].nunique().to_dict() == {"c0": 6, "c1": 2, "c2": 3}
    alone = attention.attend(model, tokenizer, clips[1:2], store, frames=3)
    assert np.allclose(alone["weight"], read[read["clip"] == "c1"]["weight"], atol=1e-5)
    mean = read[(read["layer"] == -1) & (read["kind"] != "")].sort_values(["clip", "place", "shown", "cell"])
    layers = read[read["layer"] >= 0].groupby(["clip", "place", "shown", "cell"])["weight"].mean()
    assert np.allclose(mean["weight"], layers, atol=1e-6)


def test_retrieval_shows_the_right_clip_at_its_rank(data):
    clips, store = data
    found = pictures.retrievals(*lively(), clips, store, frames=3, quantiles=(0.0, 1.0))
    assert found["picture"].tolist() == list(range(6)) and found.groupby("clip")["right"].sum().eq(1).all()
    assert (found.loc[found["right"], "rank"] == found.loc[found["right"], "place"]).all()
    assert (found.loc[found["right"], "found"] == found.loc[found["right"], "clip"]).all()


def test_figures_and_tables_are_made_of_the_results(tmp_path):
    folder = tmp_path / "12_qualitative"
    folder.mkdir()
    write_qualitative(folder)
    for draw in QUALITATIVE_FIGURES.values():
        assert draw(tmp_path).axes or draw(tmp_path).subfigs
        plt.close("all")
    texts = [text.get_text() for panel in caption_cases(tmp_path).axes for text in panel.texts]
    plt.close("all")
    assert "a dog spins [object, style]" in texts and "a dog spins" in texts
    text = {name: build(tmp_path).markdown() for name, build in QUALITATIVE_TABLES.items()}
    assert "| Visual shift | Frozen | 20.0 |" in text["failures"] and "| 10 |" in text["failures"]
    assert "| Cell | Name of an object | 50.0 | 25.0 | 30.0 |" in text["looks"]


@pytest.mark.parametrize("name", ["smoke", "cpu", "full"])
def test_profiles_look_at_a_gated_model_of_rendered_clips(name):
    profile = load_profile(name, ROOT)
    run = profile.qualitative.run("there")
    assert run.gate == "rank" and run.save_to == "there" and run.eval_part == "test"
    assert profile.qualitative.arm in {arm.arm for arm in profile.main.arms}
