"""Every policy keeps its promises for any length and k; each sees what it is for; the command shows it."""
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from little_videos import encode
from test_scores import clip, with_square

from vqlora import cli
from vqlora.frames import POLICIES, select_frames, selection
from vqlora.frames.scores import score_frames
from vqlora.frames.select import (
    coverage_of,
    cumulative,
    diverse,
    fewest,
    key_frames,
    low_bit_change,
    mmr,
    random_frames,
    segments,
    stretches,
    tell_apart,
    top_k,
    uniform,
)
from vqlora.frames.shots import interruptions, own_segments, shots


def every_policy(n, k, seed, kind):
    """(name, chosen) of all pure policies on random, constant or bursty material of n frames."""
    rng = np.random.default_rng(seed)
    score = {"random": rng.random(n), "still": np.zeros(n), "burst": (np.arange(n) == n // 2) * 5.0}[kind]
    rows = rng.integers(0, 16, (n, 6)).astype(np.uint8) if kind == "random" else np.zeros((n, 6), np.uint8)
    if kind == "burst":
        rows[n // 2:] = 9
    yield from {
        "random": random_frames(n, k, np.random.default_rng(seed)), "top": top_k(score, k),
        "keys": key_frames(rng.random(n) < 0.2, k), "cumulative": cumulative(score, k),
        "coverage": cumulative(score, k, 0.3), "diverse": diverse(rows, k), "mmr": mmr(rows, score, k),
        "lowbit": low_bit_change(rows, k), "encoder": tell_apart(rows.astype(np.float32), k, 0.5),
        "segments": segments(rows, k), "own segments": own_segments(rows, rows, k),
    }.items()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 30), st.integers(0, 9),
       st.sampled_from(["random", "still", "burst"]))
def test_as_many_sorted_distinct_frames_as_asked_for_and_the_same_again(n, k, seed, kind):
    again = dict(every_policy(n, k, seed, kind))
    for name, chosen in every_policy(n, k, seed, kind):
        assert chosen.dtype == np.int64 and len(chosen) == min(n, k), name
        assert (np.diff(chosen) > 0).all() and chosen[0] >= 0 and chosen[-1] < n, name
        assert np.array_equal(chosen, again[name]), name


def test_ties_go_to_the_earlier_frame():
    assert top_k(np.ones(9), 3).tolist() == [0, 1, 2]
    assert diverse(np.repeat([[0], [9], [5]], [4, 3, 3], axis=0), 3).tolist() == [0, 4, 7]
    assert mmr(np.zeros((5, 2)), np.array([0, 1, 1, 0, 1]), 2).tolist() == [1, 2]


def test_cumulative_goes_where_things_happen_and_covers_the_rest():
    score = np.zeros(100)
    score[40:60] = 1
    assert cumulative(score, 4).tolist() == [42, 47, 52, 57]
    assert cumulative(score, 4, 1.0).tolist() == uniform(100, 4).tolist() == cumulative(score * 0, 4).tolist()
    half = cumulative(score, 8, 0.5)
    assert half[0] < 40 and half[-1] >= 60 and ((half >= 40) & (half < 60)).sum() >= 4


def test_chosen_frames_are_equal_steps_of_what_is_reached(video):
    for policy in ("cumulative", "cumulative-coverage", "packets"):
        found = selection(video, 6, policy)
        levels = (2 * np.arange(6) + 1) / 12 * found.reached[-1]
        before = np.append(0, found.reached)[found.frames]
        assert (before <= levels).all() and (levels < found.reached[found.frames] + 1e-9).all(), policy
    assert selection(video, 6, "top-k").reached is None is selection(video, 6, "uniform").reached


def still(n, noise, seed=0):
    """A still, noisy picture `[n, 64, 64]` with something to see in it, in floats."""
    rng = np.random.default_rng(seed)
    ground = np.kron(rng.uniform(60, 160, (16, 16)), np.ones((4, 4)))
    return ground + rng.normal(0, noise, (n, 64, 64))


def put(frames, numbers, row, column, step):
    """Something of 8 x 8 pixels that starts at a place and goes right by `step` pixels a frame."""
    for count, t in enumerate(numbers):
        left = column + count * step
        frames[t, row:row + 8, left:left + 8] = 230


def moved(frames):
    return score_frames(np.clip(frames, 0, 255).astype(np.uint8), colour=False).moved


@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_stretches_are_where_something_small_moves_and_not_cuts_or_flicker(noise):
    frames = still(60, noise)
    put(frames, range(10, 17), 20, 4, 6)
    frames *= np.random.default_rng(1).uniform(0.8, 1.1, (60, 1, 1))  # flicker
    frames[45:] = 240 - frames[45:]  # a cut
    found = stretches(moved(frames))
    assert [(s.start, s.end) for s in found] == [(10, 18)]
    assert set(segments(moved(frames), 2).tolist()) == {14, 18}


def test_two_things_that_move_one_after_the_other_in_different_places_are_two_stretches():
    frames = still(40, 2.0)
    put(frames, range(10, 16), 4, 4, 6)
    put(frames, range(17, 23), 48, 8, 6)
    one, two = stretches(moved(frames))
    assert abs(one.end - 16) <= 1 and abs(two.start - 16) <= 1
    assert len(segments(moved(frames), 1)) == 1


def test_a_shaking_camera_is_not_what_moves():
    wide, rng = still(1, 0.0)[0], np.random.default_rng(2)
    frames = np.stack([np.roll(wide, tuple(rng.integers(-2, 3, 2)), (0, 1)) for _ in range(40)])
    frames += rng.normal(0, 2, frames.shape)
    put(frames, range(20, 27), 28, 8, 6)
    assert score_frames(frames.clip(0, 255).astype(np.uint8), colour=False).local.argmax() in range(20, 28)
    (found,) = stretches(moved(frames))
    assert found.start in (19, 20, 21) and found.end in (27, 28, 29)


def scored(frames):
    found = score_frames(np.clip(frames, 0, 255).astype(np.uint8), colour=False)
    return found.thumbs, found.moved


def test_what_breaks_into_a_scene_that_goes_on_is_an_interruption_wherever_it_shows():
    frames, other = still(60, 3.0), still(60, 3.0, seed=5)
    put(frames, range(30, 37), 20, 4, 6)
    inserted = [*range(3), *range(10, 14), *range(32, 35), *range(50, 55)]  # 0 to 2: known from the others
    frames[inserted] = other[inserted]
    thumbs, moved = scored(frames)
    assert shots(thumbs, moved).tolist() == [0, 3, 10, 14, 32, 35, 50, 55, 60]
    assert np.flatnonzero(interruptions(thumbs, moved)).tolist() == inserted
    for k in (1, 2, 4, 8, 40):
        assert not set(own_segments(thumbs, moved, k).tolist()) & set(inserted)
    assert set(segments(moved, 8).tolist()) & set(inserted)
    assert set(range(28, 37)) & set(own_segments(thumbs, moved, 2).tolist())  # it moves across the gap
    assert len(own_segments(thumbs, moved, 50)) == 50  # more than its own: filled up


def test_a_scene_that_never_comes_back_is_no_interruption_nor_is_the_longer_one():
    one, two = still(40, 2.0), still(40, 2.0, seed=7)
    once = np.concatenate([one[:25], two[:15]])
    assert shots(*scored(once)).tolist() == [0, 25, 40] and not interruptions(*scored(once)).any()
    longer = np.concatenate([one[:8], two[:24], one[8:16]])
    assert len(shots(*scored(longer))) == 4 and not interruptions(*scored(longer)).any()


@pytest.mark.parametrize("light", [0.7, 1.2])
def test_flicker_is_no_cut(light):
    frames = still(30, 2.0)
    frames[10:20] *= light
    assert shots(*scored(frames)).tolist() == [0, 30]


def test_one_frame_is_one_shot():
    thumbs, moved = np.zeros((1, 4), np.uint8), np.zeros((1, 4), np.float16)
    assert shots(thumbs, moved).tolist() == [0, 1] and own_segments(thumbs, moved, 3).tolist() == [0]


def test_nothing_that_moves_means_even_frames():
    assert segments(np.zeros((40, 256), np.float16), 5).tolist() == uniform(40, 5).tolist()
    assert segments(np.zeros((1, 4), np.float16), 5).tolist() == [0]


def test_a_hard_cut_takes_one_frame():
    score = np.full(100, 0.01)
    score[50] = 5.0
    for coverage in (0.0, 0.2):
        assert 1 <= sum(49 <= frame <= 51 for frame in cumulative(score, 8, coverage)) <= 2
    assert cumulative((np.arange(100) == 50) * 1.0, 1).tolist() == [50]


def test_key_frames_come_first_and_gaps_are_filled():
    key = np.zeros(100, bool)
    key[[0, 30, 60]] = True
    assert key_frames(key, 3).tolist() == [0, 30, 60]
    assert key_frames(key, 4).tolist() == [0, 30, 60, 99]
    assert set(key_frames(key, 2)) < {0, 30, 60}
    assert key_frames(np.zeros(8, bool), 2).tolist() == uniform(8, 2).tolist()


def test_diversity_takes_each_kind_of_frame_once_before_any_twice():
    kinds = np.repeat(np.eye(4) * 9, [40, 3, 50, 7], axis=0)
    assert sorted(kinds[diverse(kinds, 4)].argmax(1)) == [0, 1, 2, 3]
    assert sorted(kinds[mmr(kinds, np.ones(100), 4, 0.1)].argmax(1)) == [0, 1, 2, 3]


def test_low_bit_change_keeps_the_first_frame_of_each_state():
    states = np.repeat([[0, 0], [5, 0], [5, 5], [12, 5]], [20, 4, 30, 46], axis=0).astype(np.uint8)
    assert low_bit_change(states, 4).tolist()[:3] == [0, 20, 24]
    assert {0, 20, 24, 54} <= set(low_bit_change(states, 6))
    burst = np.zeros((100, 2), np.uint8)
    burst[50:58] = np.arange(8)[:, None] * 2
    assert np.diff(low_bit_change(burst, 8)).max() <= 2 * 100 / 8 + 1  # a burst does not take all


def test_an_encoder_that_cannot_tell_frames_apart_gets_them_spread_in_time():
    exact = np.repeat(np.array([[0.0, 0], [10, 0], [10, 1]]), [20, 20, 20], axis=0)
    coarse = np.round(exact / 4) * 4  # the third state looks like the second
    assert len(set(map(tuple, exact[tell_apart(exact, 3, 0.0)]))) == 3
    chosen = tell_apart(coarse, 3, exact)
    assert len(set(map(tuple, coarse[chosen]))) == 2 and len(chosen) == 3
    with pytest.raises(ValueError, match=r"\(60, 2\) quantized and \(60, 1\) not"):
        tell_apart(coarse, 3, exact[:, :1])


def test_as_few_as_needed():
    kinds = np.repeat(np.eye(5) * 9, 20, axis=0)
    chosen = fewest(100, 1.0, lambda k: diverse(kinds, k), kinds)
    assert len(chosen) == 5 and coverage_of(kinds, chosen) == 1.0
    assert len(fewest(100, 0.3, lambda k: diverse(kinds, k), kinds)) < 5
    still = np.zeros((30, 3))
    assert len(fewest(30, 1.0, lambda k: uniform(30, k), still)) == 1


def test_bad_requests_are_refused():
    for bad, said in ((lambda: top_k(np.array([1, np.nan]), 1), "frame 1 is not a number"),
                      (lambda: cumulative(np.array([1, -1.0]), 1), "at least 0"),
                      (lambda: cumulative(np.ones(4), 1, 2.0), "from 0 to 1"),
                      (lambda: uniform(4, 0), "at least 1"),
                      (lambda: diverse(np.zeros((0, 2)), 1), "at least 1")):
        with pytest.raises(ValueError, match=said):
            bad()


# --- files, arrays and the command


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    from vqlora.data.kinemoji.encode import write_video
    path = tmp_path_factory.mktemp("v") / "a.mp4"
    write_video(path, with_square(clip(48, noise=2.0), 20, 25))
    return path


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "encoder"])
def test_every_policy_works_on_a_file(video, policy):
    for k in (1, 4, 48):
        chosen = select_frames(video, k, policy)
        assert len(chosen) == k and (np.diff(chosen) > 0).all() and chosen[-1] < 48


@pytest.mark.parametrize("policy", ["cumulative", "lowbit-cumulative", "packets", "top-k"])
def test_movement_gets_more_frames_than_uniform_gives(video, policy):
    def inside(frames):
        return sum(20 <= frame <= 26 for frame in frames)

    assert inside(select_frames(video, 6, policy)) >= 3 > inside(uniform(48, 6))


def test_a_file_and_its_frames_give_the_same_choice(video):
    from vqlora.frames.reader import read_frames
    frames = read_frames(video)
    for policy in ("uniform", "top-k", "cumulative-coverage", "lowbit-change"):
        assert np.abs(select_frames(video, 5, policy) - select_frames(frames, 5, policy)).max() <= 2, policy
    features = frames.reshape(48, -1)[:, ::97].astype(np.float32)
    chosen = select_frames(frames, 4, "encoder", features=features)
    assert np.array_equal(chosen, tell_apart(features, 4, 0.0))


def test_policies_that_need_no_pixels_decode_none(video, monkeypatch):
    monkeypatch.setattr("vqlora.frames.container.Video._decoded", None)
    for policy in ("uniform", "random", "keyframes", "packets"):
        assert len(select_frames(video, 8, policy)) == 8
    with pytest.raises(TypeError):
        select_frames(video, 8, "cumulative")


def test_fewer_frames_than_asked_for_are_given_and_said(tmp_path):
    path = encode(tmp_path / "a.mp4", 5)
    for source in (path, np.zeros((5, 8, 8, 3), np.uint8)):
        with pytest.warns(UserWarning, match="has 5 frames, fewer than the 9 asked for"):
            assert select_frames(source, 9).tolist() == [0, 1, 2, 3, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(select_frames(path, 5)) == 5


def test_bad_arguments_name_what_is_allowed(video):
    frames = np.zeros((5, 8, 8, 3), np.uint8)
    for arguments, said in ((dict(k=2, policy="best"), "'best' is not one of uniform, random"),
                            (dict(), "either k or coverage"), (dict(k=0), "at least 1"),
                            (dict(k=2, policy="packets"), "needs a video file"),
                            (dict(k=2, policy="encoder"), "features are for the policy 'encoder'"),
                            (dict(k=2, policy="encoder", features=np.zeros((3, 2))), "of 3 frames for a")):
        with pytest.raises(ValueError, match=said):
            select_frames(frames, **arguments)
    assert selection(video, coverage=0.5, policy="diverse").n_frames == 48


def test_the_command_prints_frames_and_draws_a_sheet(video, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sheet = tmp_path / "a.png"
    for extra in (["-k", "3", "--sheet", str(sheet)], ["--policy", "uniform"], ["--coverage", "0.5"]):
        assert cli.main(["select", str(video), *extra]) == 0
        rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert rows and [float(time) for _, time in rows] == [int(frame) / 8 for frame, _ in rows]
    assert sheet.stat().st_size > 10_000
    for arguments, said in ((["gone.mp4"], "gone.mp4: no such file"), ([str(video), "-k", "0"], "at least 1"),
                            ([str(video), "--policy", "best"], "is not one of"),
                            ([str(video), "--sheet", str(tmp_path / "no" / "a.png")], "a.png: ")):
        assert cli.main(["select", *arguments]) == 1
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1
