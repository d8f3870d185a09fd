"""Scores see what they claim to see, and the same in a file as in an array."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from little_videos import encode, pictures

from vqlora.frames.api import score_video
from vqlora.frames.reader import packets, read_frames
from vqlora.frames.scores import FEATURES, low_bit_codes, packet_score, scene_cuts, score_frames

CURVES = ("motion", "change", "content", "entropy_bits", "block_entropy_bits", "median_distance",
          "neighbour_difference")


def clip(frames=40, size=64, seed=0, noise=0.0):
    """A textured still, uint8 [T, H, W, 3], as a float array to paint on, with sensor noise."""
    rng = np.random.default_rng(seed)
    still = rng.uniform(60, 180, (size // 8, size // 8, 3)).repeat(8, 0).repeat(8, 1)
    return np.clip(still + rng.normal(0, noise or 1e-9, (frames, size, size, 3)), 0, 255).astype(np.uint8)


def with_square(frames, first, last, side=16):
    """A bright square that moves from frame `first` to `last`."""
    for t in range(len(frames)):
        x = 4 + 4 * (min(max(t, first), last) - first)
        frames[t, 8:8 + side, x:x + side] = 240
    return frames


def test_movement_is_seen_where_it_is_and_nowhere_else():
    scores = score_frames(with_square(clip(), 10, 15))
    for curve in (scores.motion, scores.change, scores.content):
        assert set(np.flatnonzero(curve > 1e-6)) == set(range(11, 16)), curve
    assert np.ptp(scores.entropy_bits[:10]) == 0


def test_low_bit_change_does_not_see_noise_that_motion_sees():
    noisy = score_frames(clip(noise=6.0))
    assert noisy.motion[1:].min() > 0.01 and noisy.change.max() == 0
    moving = score_frames(with_square(clip(noise=6.0), 10, 15))
    assert moving.change[11:16].min() > 0 and moving.change[[*range(10), *range(17, 40)]].max() == 0


def test_a_block_keeps_its_code_until_it_has_really_left_it():
    means = np.array([[31], [33], [30], [39], [41], [40], [30], [23], [22]], np.uint8)  # an edge at 32
    assert low_bit_codes(means, 4).ravel().tolist() == [1, 1, 1, 1, 2, 2, 2, 1, 1]
    still = np.full((9, 4), 200, np.uint8)
    assert (low_bit_codes(still, 4) == 12).all() and (low_bit_codes(still, 8) == 200).all()


def test_a_spliced_frame_stands_out_by_its_neighbours_and_the_median():
    frames = clip()
    frames[20] = clip(1, seed=5)[0]
    scores = score_frames(frames)
    assert scores.neighbour_difference.argmax() == 20 == scores.median_distance.argmax()
    assert scores.motion[20] == pytest.approx(scores.motion[21]) and scores.neighbour_difference[21] == 0


def test_entropy_of_flat_and_mixed_pictures():
    flat = score_frames(np.full((2, 32, 32, 3), 90, np.uint8))
    assert flat.entropy_bits.tolist() == [0, 0] == flat.block_entropy_bits.tolist()
    noise = score_frames(np.random.default_rng(0).integers(0, 256, (2, 64, 64), dtype=np.uint8))
    assert noise.entropy_bits.min() > 7 and noise.block_entropy_bits.min() > 3.5


def test_features_are_six_columns_of_moderate_size():
    features = score_frames(with_square(clip(noise=4.0), 3, 9), np.arange(40) ** 2.0).features()
    assert features.shape == (40, len(FEATURES)) and features.dtype == np.float32
    assert features.min() >= 0 and features.max() <= 1 and features[-1, 3] == 1
    assert features[20, 3] == pytest.approx((20 / 39) ** 2)


@pytest.mark.parametrize("shape", [(1, 40, 40, 3), (3, 1, 1, 3), (2, 5, 300), (2, 33, 47, 3), (70, 8, 9, 3)])
def test_any_size_and_length(shape):
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    scores = score_frames(frames)
    assert len(scores) == shape[0] and all(getattr(scores, name).shape == shape[:1] for name in CURVES)
    assert np.isfinite(scores.features()).all()
    if shape[0] == 1:
        assert [getattr(scores, name)[0] for name in CURVES if "entropy" not in name] == [0] * 5


def test_scores_do_not_depend_on_how_many_frames_are_scored_at_once(monkeypatch):
    frames = with_square(clip(50, noise=8.0), 5, 40)
    whole = score_frames(frames)
    monkeypatch.setattr("vqlora.frames.scores._CHUNK", 7)
    for name in (*CURVES, "codes"):
        assert np.allclose(getattr(score_frames(frames), name), getattr(whole, name), atol=1e-5), name


@pytest.mark.parametrize("height, width", [(64, 64), (48, 200), (130, 258)])
def test_a_file_gives_the_scores_of_its_frames(tmp_path, height, width):
    path = encode(tmp_path / "a.mp4", 30, height=height, width=width, noise=90)
    file, array = score_video(path), score_frames(read_frames(path))
    assert np.allclose(file.times_s, np.arange(30) / 8)
    for name, tolerance in {"motion": 2e-3, "content": 0.5, "median_distance": 3e-3}.items():
        assert np.abs(getattr(file, name) - getattr(array, name)).max() < tolerance, name
    light = score_video(path, colour=False)
    assert np.array_equal(light.motion, file.motion) and np.array_equal(light.codes, file.codes)
    assert np.isnan(light.content).all()


def test_bad_frames_are_refused():
    for frames, said in ((np.zeros((2, 4, 4, 3)), "float64"), (np.zeros((0, 4, 4, 3), np.uint8), "0, 4"),
                         (np.zeros((2, 4, 4, 4), np.uint8), "expected uint8")):
        with pytest.raises(ValueError, match=said):
            score_frames(frames)
    with pytest.raises(ValueError, match="3 times for 2 frames"):
        score_frames(np.zeros((2, 4, 4), np.uint8), np.arange(3))
    with pytest.raises(ValueError, match="bits is 9"):
        score_frames(np.zeros((2, 4, 4), np.uint8), bits=9)


# --- cuts


def test_cuts_follow_the_published_rule():
    """Expected by hand from PySceneDetect's ContentDetector: threshold 27, 15 frames, merging."""
    def cuts(*above):
        content = np.zeros(100)
        content[list(above)] = 30
        return scene_cuts(content).tolist()

    assert cuts(20, 60) == [20, 60]
    assert cuts(5, 60) == [60]  # too early, and nothing to merge with yet
    assert cuts(20, 30, 70) == [20, 70]  # 30 starts a merge, which goes on to 70
    assert cuts(20, 30, 90) == [20]  # and here past the end
    assert cuts(20, 25, 41) == [20, 41]
    assert cuts() == [] and scene_cuts(np.full(100, 26.9)).tolist() == []
    assert scene_cuts(np.eye(1, 9, 3)[0] * 50, min_frames=0).tolist() == [3]


def test_a_hard_cut_is_found_and_a_slow_change_is_not():
    frames = np.concatenate([clip(30, seed=1), 255 - clip(30, seed=2)])
    assert scene_cuts(score_frames(frames).content).tolist() == [30]
    fade = (clip(60) * np.linspace(1, 0.3, 60)[:, None, None, None]).astype(np.uint8)
    assert scene_cuts(score_frames(fade).content).tolist() == []


# --- packets


def test_packet_sizes_show_where_something_moves(tmp_path):
    path = encode(tmp_path / "still.mp4", 4)
    frames = with_square(clip(48, noise=2.0), 20, 25)
    encode_frames(path, frames)
    table = packets(path)
    score = packet_score(table.bytes, table.key, table.bidirectional)
    assert len(score) == 48 and score[0] == 0
    assert score[20:27].mean() > 3 * np.delete(score, range(18, 29)).mean()


def test_an_early_key_frame_counts_as_a_cut(tmp_path):
    frames = np.concatenate([clip(30, seed=1), 255 - clip(34, seed=2)])
    encode_frames(path := tmp_path / "a.mp4", frames)
    table = packets(path)
    assert np.flatnonzero(table.key).tolist() == [0, 30]
    score = packet_score(table.bytes, table.key, table.bidirectional)
    assert score.argmax() == 30 or score[30] == score.max()
    regular = packet_score(np.full(64, 100), np.arange(64) % 16 == 0, np.zeros(64, bool))
    assert regular.max() == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_packet_scores_are_finite_and_not_negative(rows):
    sizes, key, both = (np.array(column) for column in zip(*rows, strict=True))
    score = packet_score(sizes, key, both)
    assert score.shape == sizes.shape and np.isfinite(score).all() and score.min() >= 0


def encode_frames(path, frames):
    from vqlora.data.kinemoji.encode import write_video
    write_video(path, frames)


def test_the_little_videos_are_what_the_tests_think():
    assert pictures(3).shape == (3, 32, 64, 3)
