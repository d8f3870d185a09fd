"""Notebook 16's settings, rates, claims, tables and figure, on invented runs."""

import matplotlib.pyplot as plt
import pytest
from invented_sound import NLL, PROFILE, ROOT, SOUND, run, write_sound

from vqlora.experiments import Profile, SoundSettings, load_profile
from vqlora.report.sound_plots import sound_kinds
from vqlora.report.sound_tables import ARMS, SOUND_TABLES
from vqlora.report.tables import TABLES
from vqlora.settings_file import ConfigError, parse
from vqlora.steps import needs
from vqlora.studies import rate_study, sound_study


def test_arms_differ_in_what_they_are_shown_and_in_nothing_else():
    made = {settings.method: settings for settings in SOUND.runs() if settings.seed == 0}
    apart = {"label", "sound", "modalities", "ranks", "gate", "gate_rate", "frames"}
    assert len({str(settings.model_dump(exclude=apart)) for settings in made.values()}) == 1
    heard = {arm: (settings.frames, settings.sound) for arm, settings in made.items()}
    assert heard == {"silent": (2, None), "sound": (2, "own"), "fixed": (2, "own"), "shuffled": (2, "other"),
                     "gated": (2, "own"), "silent-8": (8, None)}  # fmt: skip
    assert made["fixed"].ranks == {"audio": 0} and made["gated"].gate != "none"
    assert all("audio" in made[arm].modalities for arm in ("sound", "shuffled", "gated"))
    assert not {settings.seed for settings in SOUND.sweep_runs()} & set(SOUND.seeds)
    assert {settings.eval_part for settings in SOUND.sweep_runs()} == {"val"}


def test_arms_without_a_sweep_take_the_rate_of_the_arm_they_are_held_against(tmp_path):
    swept = [run(settings) for settings in SOUND.sweep_runs()]
    own, none = tmp_path / "own.csv", tmp_path / "none.csv"
    rates = rate_study.taken_from(rate_study.settle(SOUND, swept, own, none), SOUND.rates_of)
    origins = rates.set_index("arm")["origin"]
    assert (rates["learning_rate"] == 5e-3).all()
    assert origins["gated"] == "sweep of sound" and origins["silent"] == "sweep"
    asked = rate_study.rated(SOUND.runs(), rates)
    assert {settings.learning_rate for settings in asked} == {5e-3}


def test_claims_are_judged_by_family():
    runs = [run(settings) for settings in SOUND.runs()]
    tests = sound_study.judge(SOUND, runs)
    assert len(tests) == 10 and tests.groupby("family").size().to_dict() == {"sound": 6, "beside": 4}
    found = tests.set_index(["comparison", "metric"])["verdict"]
    assert found["sound_vs_silent", "nll"] == found["sound_vs_shuffled", "nll"] == "supported"
    assert found["sound_vs_silent", "qa_frac"] == "supported"
    assert found["sound_vs_fixed", "qa_frac"] == found["gated_vs_sound", "nll"] == "denied"
    assert found["sound_vs_silent-8", "nll"] == "denied"
    assert found["sound_vs_silent-8", "qa_frac"] == "supported"
    counts = sound_study.overall(tests).set_index(["of", "metric"])["value"]
    assert counts["sound", "claims_count"] == 6
    assert "sound against silent (questions)" in counts["sound", "supported_names"]
    kinds = sound_study.kinds(runs).set_index(["arm", "metric"])["value"]
    assert kinds["sound", "qa_heard_frac"] == kinds["sound", "qa_direction_frac"] == pytest.approx(0.9)
    assert kinds["silent", "qa_seen_frac"] == pytest.approx(0.4) and ("sound", "qa_when_frac") not in kinds


def test_tables_and_figure_are_made_of_the_results(tmp_path):
    assert all("not run" in build(tmp_path).latex() for build in SOUND_TABLES.values())
    assert set(SOUND_TABLES) <= set(TABLES)
    (tmp_path / "16_sound").mkdir()
    write_sound(tmp_path / "16_sound")
    arms, tests = (SOUND_TABLES[f"sound_{name}"](tmp_path) for name in ("arms", "tests"))
    assert [row[0] for row in arms.rows] == list(ARMS.values()) and set(ARMS) == set(NLL)
    assert tests.rows.index(None) == 6 and "Sound beats frames alone" in tests.markdown()
    assert "Sound is no worse than 8 frames" in tests.markdown()
    figure = sound_kinds(tmp_path)
    shown = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert shown == ["Which way", "Who does it", "Where"]
    plt.close("all")


def test_the_lesson_is_told_by_its_ends(tmp_path):
    (tmp_path / "losses.json").write_text(str([2.0] * 20 + [1.0] * 20))
    told = sound_study.lesson(tmp_path).set_index("metric")["value"]
    assert told.to_dict() == {"steps": 40, "first_nll": 2.0, "last_nll": 1.0}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"claims": [{"a": "sound", "b": "loud", "claim": "greater", "family": "sound"}]},
         "claims: 'loud' is no arm's label; allowed: silent, sound, fixed, shuffled, gated, silent-8"),
        ({"rates_of": {"loud": "sound"}}, "rates_of: 'loud' is no arm's label; allowed: silent, sound"),
        ({"rates_of": {"sound": "silent"}}, "rates_of: 'sound' takes the rate of 'silent'; allowed"),
        ({"listen": {"steps": 0}}, "listen.steps"),
        ({"claims": []}, "claims"),
    ],
)  # fmt: skip
def test_settings_name_what_is_wrong(change, words):
    with pytest.raises(ConfigError, match=words) as fault:
        parse(SoundSettings, SOUND.model_dump(mode="json") | change, "sound")
    assert len(str(fault.value).splitlines()) == 1


def test_tables_are_made_anew_with_the_results_where_a_profile_has_them():
    assert "16_sound" in needs("91_tables", PROFILE) and needs("16_sound", PROFILE) == ("01_data",)
    assert "16_sound" not in needs("91_tables", load_profile("cpu", ROOT))


def test_a_profile_whose_clips_have_no_sound_is_refused():
    values = {key: PROFILE.model_dump(mode="json")[key] for key in ("name", "data", "sound")}
    values["data"] |= {"audio": False}
    with pytest.raises(ConfigError, match="sound: data.audio is false"):
        parse(Profile, values, "full.yaml")
    values["data"] |= {"audio": True, "domains": {"source": {"val": 512}}}
    with pytest.raises(ConfigError, match="sound.domains: 'visual' is not in data.domains; allowed: source"):
        parse(Profile, values, "full.yaml")
