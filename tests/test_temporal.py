"""Frame features and gate values: what they are on clips one can follow by eye."""

import pytest
import torch

from vqlora.temporal import (
    PIXEL_FEATURES,
    effective_rank,
    frame_numbers,
    gate_values,
    pixel_features,
    random_features,
    shuffled,
    standardise,
    with_clip_means,
)

NAMES = tuple(PIXEL_FEATURES)


def grey(*levels):
    """Frames [F, 3, 64, 64] of even brightness, 0 black to 1 white, in the model's range."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 64, 64) * 2 - 1


def column(found, name):
    return found[:, NAMES.index(name)]


def test_differences_are_of_luma_between_neighbours_of_one_clip():
    found = pixel_features(grey(0.0, 0.5, 0.5, 1.0, 0.2), torch.tensor([0, 0, 0, 1, 1]))
    assert column(found, "motion").tolist() == pytest.approx([0, 0.5, 0, 0, 0.8], abs=1e-6)
    assert column(found, "neighbour_distance").tolist() == pytest.approx([0.5, 0, 0, 0.8, 0.8], abs=1e-6)
    # the median of three is 0.5, of two the lower one
    assert column(found, "median_distance").tolist() == pytest.approx([0.5, 0, 0, 0.8, 0], abs=1e-6)
    assert column(found, "scene").tolist() == pytest.approx([0, 1, 0, 0, 1])


def test_luma_weighs_the_colours():
    frames = torch.full((2, 3, 32, 32), -1.0)
    frames[1, 1] = 1.0  # green
    found = pixel_features(frames, torch.tensor([0, 0]))
    assert float(column(found, "motion")[1]) == pytest.approx(0.587, abs=1e-5)


def test_an_insert_stands_out_from_both_neighbours_and_the_median():
    found = pixel_features(grey(0.1, 0.1, 0.9, 0.1, 0.1), torch.zeros(5, dtype=torch.long))
    for name in ("neighbour_distance", "median_distance"):
        assert int(column(found, name).argmax()) == 2
        assert float(column(found, name)[2]) == pytest.approx(0.8, abs=1e-6)


def test_entropy_is_zero_on_black_and_high_on_noise():
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = pixel_features(torch.cat([grey(0.0)[..., :32, :32], noise]), torch.tensor([0, 1]))
    black, noisy = column(found, "entropy").tolist()
    assert black == 0 and 0.7 < noisy <= 1


def test_time_follows_the_given_times_and_else_the_frame_numbers():
    clip = torch.tensor([0, 0, 0, 1])
    even = pixel_features(grey(0, 0, 0, 0), clip)
    uneven = pixel_features(grey(0, 0, 0, 0), clip, times=torch.tensor([2.0, 3.0, 6.0, 9.0]))
    assert column(even, "time").tolist() == [0, 0.5, 1, 0]
    assert column(uneven, "time").tolist() == [0, 0.25, 1, 0]


@pytest.mark.parametrize("frames", [grey(0.0), grey(0.0, 0.0), grey(), torch.zeros(3, 3, 7, 200)])
def test_any_number_and_size_of_frames_gives_finite_features(frames):
    found = pixel_features(frames, torch.zeros(len(frames), dtype=torch.long))
    assert found.shape == (len(frames), len(NAMES)) and bool(found.isfinite().all())


def test_a_clip_has_the_same_features_alone_and_in_company():
    rng = torch.Generator().manual_seed(1)
    a, b = (torch.rand(n, 3, 48, 40, generator=rng) * 2 - 1 for n in (3, 5))
    together = pixel_features(torch.cat([a, b]), torch.tensor([0] * 3 + [1] * 5))
    alone = [pixel_features(x, torch.zeros(len(x), dtype=torch.long)) for x in (a, b)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


def test_a_choice_of_features_comes_in_the_order_asked_for():
    frames, clip = grey(0.0, 0.5), torch.zeros(2, dtype=torch.long)
    whole = pixel_features(frames, clip)
    assert torch.equal(pixel_features(frames, clip, names=("time", "motion")), whole[:, [3, 0]])


def test_bad_frames_are_told():
    with pytest.raises(ValueError, match="colour.*allowed: motion"):
        pixel_features(grey(0.0), torch.tensor([0]), names=("colour",))
    with pytest.raises(ValueError, match="not ascending"):
        pixel_features(grey(0.0, 0.0), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="2 clip numbers"):
        pixel_features(grey(0.0), torch.tensor([0, 0]))


def test_standardised_features_have_the_constants_taken_out():
    assert standardise(torch.tensor([[3.0, 5.0]]), (1, 5), (2, 1)).tolist() == [[1, 0]]


def test_clips_get_the_mean_of_their_frames_and_empty_ones_zero():
    f = torch.tensor([[1.0], [3.0], [8.0]])
    assert with_clip_means(f, torch.tensor([0, 0, 2]), 3).flatten().tolist() == [1, 3, 8, 2, 0, 8]
    assert frame_numbers(torch.tensor([0, 0, 2, 2, 2])).tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("kind, size", [("scalar", 1), ("rank", 5), ("mixture", 1)])
def test_every_gate_is_exactly_open_at_zero(kind, size):
    for dtype in (torch.float32, torch.bfloat16):
        gates = gate_values(kind, torch.zeros(4, size, dtype=dtype), 5)
        assert bool((gates == 1).all())


def test_the_experts_of_a_mixture_share_a_weight_of_two():
    gates = gate_values("mixture", torch.tensor([[1.5]]), 5)
    assert gates.shape == (1, 5)
    assert float(gates[0, 2] + gates[0, 3]) == pytest.approx(2) and float(gates[0, 0]) > 1
    assert gate_values("mixture", torch.tensor([[1.5]]), 1).shape == (1, 1)


def test_effective_rank_counts_open_ranks():
    gates = torch.tensor([[1.0, 1, 1, 1], [2, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    assert effective_rank(gates, 4).tolist() == [4, 1, 0, 2]
    assert effective_rank(torch.tensor([[0.3]]), 6).tolist() == pytest.approx([6])


def test_shuffling_keeps_a_clips_features_in_the_clip_and_repeats():
    f, clip = torch.arange(8.0)[:, None], torch.tensor([0] * 5 + [1] * 3)
    once = shuffled(f, clip, seed=3)
    assert torch.equal(once, shuffled(f, clip, seed=3)) and not torch.equal(once, f)
    assert sorted(once[:5].flatten().tolist()) == [0, 1, 2, 3, 4]
    assert any(not torch.equal(once, shuffled(f, clip, seed=s)) for s in range(4, 8))


def test_random_features_depend_on_the_frame_number_and_seed_alone():
    f = random_features(torch.tensor([0, 0, 1, 1, 1]), 3, seed=1)
    assert torch.equal(f[:2], f[2:4]) and not torch.equal(f[0], f[1])
    assert not torch.equal(f, random_features(torch.tensor([0, 0, 1, 1, 1]), 3, seed=2))
