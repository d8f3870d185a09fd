"""Invented results files in the form the notebooks write them, for tests of the report."""

from pathlib import Path

import numpy as np
import pandas as pd
from invented_bits import write_bits
from invented_cases import write_general, write_qualitative
from invented_scaling import write_placement, write_scaling
from invented_sound import write_sound
from PIL import Image

from vqlora import stats
from vqlora.cost import bench_tables, claims
from vqlora.experiments import CostModel
from vqlora.selection.gains import closed_gap, summary, with_chosen
from vqlora.store import write_csv
from vqlora.studies import method_study, rank_study
from vqlora.studies.gate_study import overall

DOMAINS = ("language", "visual")
ARMS = {"frozen": 4.2, "full": 0.68, "lora": 0.742, "qlora": 0.7475}
BYTES = {"frozen": 0.0, "full": 161.4e6, "lora": 122.25e6, "qlora": 119.5e6}
RATES = {"full": (3e-4, 1e-3, 3e-3), "lora": (3e-3, 1e-2, 3e-2), "qlora": (3e-3, 1e-2, 3e-2)}


def write_invented(results: Path) -> Path:
    """Write a small, complete results folder under `results` and return it."""
    for folder in ("01_data", "02_base", "03_main", "04_cost", "05_temporal", "06_ranks",
                   "07_frames", "08_bits", "09_rank_size_and_placement", "10_scaling",
                   "11_generalization", "12_qualitative", "13_architectures", "16_sound"):
        (results / folder).mkdir(parents=True, exist_ok=True)
    _main(results / "03_main")
    _methods(results / "03_main")
    _cost(results / "03_main")
    _data(results / "01_data")
    _gates(results / "05_temporal")
    _ranks(results / "06_ranks")
    _frames(results / "07_frames")
    write_bits(results / "08_bits")
    write_placement(results / "09_rank_size_and_placement")
    write_scaling(results)
    write_general(results / "11_generalization")
    write_qualitative(results / "12_qualitative")
    _architectures(results / "13_architectures")
    write_sound(results / "16_sound")
    _step_costs(results / "04_cost")
    pd.DataFrame(
        [
            ["uniform", 512, 0.81, 0.62, 0.96, 0.72, 0.7, 0.31],
            ["cover", 512, 0.89, 0.66, 0.97, 0.74, 0.72, 0.3],
            ["blind", 512, 0.11, 0.01, 0.5, 0.004, 0.3, 4.3],
        ],
        columns=["frames", "clips", "slot_frac", "exact_frac", "order_frac", "t2v_r1", "qa_frac", "nll"],
    ).to_csv(results / "02_base" / "validation.csv", index=False)
    _stock(results / "02_base")
    return results


def _stock(folder: Path) -> None:
    scores = {"slot_frac": 0.6, "exact_frac": 0.4, "order_frac": 0.9, "t2v_r1": 0.5, "qa_frac": 0.6}
    rows = [("stock", view, metric, value) for view in ("uniform", "cover", "blind")
            for metric, value in scores.items()]  # fmt: skip
    costs = {"train_cpu_s": 2000.0, "steps": 1000, "parameters": 3_200_000}
    rows += [(base, "training", *cost) for base in ("own", "stock") for cost in costs.items()]
    columns = ["base", "frames", "metric", "value"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "stock.csv", index=False)
    pd.DataFrame([("released", view, "slot_frac", 0.8) for view in ("uniform", "cover")],
                 columns=columns).to_csv(folder / "summary.csv", index=False)  # fmt: skip


def _ranks(folder: Path) -> None:
    arms = {"uniform": 1.2, "vision-heavy": 1.3, "text-heavy": 1.1, "relative": 1.15}
    rows = [(domain, arm, *cell) for domain in DOMAINS for arm, nll in arms.items()
            for cell in (("nll", nll, nll - 0.03, nll + 0.03), ("trainable_parameters", 102_144, "", ""))]
    columns = ["domain", "arm", "metric", "value", "low", "high"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "summary.csv", index=False)
    spent = [(arm, *cell) for arm in arms for cell in (("calibration_cpu_s", 8.0), ("calibration_frac", 0.1))]
    pd.DataFrame(spent, columns=["arm", "metric", "value"]).to_csv(folder / "calibration.csv", index=False)
    regret = pd.DataFrame([(arm, nll - 1.1) for arm, nll in arms.items()], columns=["arm", "worst"])
    regret.to_csv(folder / "regret.csv", index=False)
    parts = ("vision", "fusion", "text")
    layers = [(domain, arm, seed, place, f"layer.{place}", part, 2 + place) for domain in DOMAINS
              for arm in arms for seed in (0, 1) for place, part in enumerate(parts)]  # fmt: skip
    columns = ["domain", "arm", "seed", "place", "layer", "modality", "rank"]
    pd.DataFrame(layers, columns=columns).to_csv(folder / "ranks.csv", index=False)
    claims = [(domain, f"relative_vs_{other}", "nll", arms[other] - 1.15, claim, verdict)
              for domain in DOMAINS for other, claim, verdict in (
                  ("uniform", "greater", "supported"), ("vision-heavy", "no_worse", "supported"),
                  ("text-heavy", "no_worse", "undecided"))]  # fmt: skip
    tests = pd.DataFrame(claims, columns=["domain", "comparison", "metric", "value", "claim", "verdict"])
    tests = tests.assign(low=tests["value"] - 0.02, high=tests["value"] + 0.02, p=0.01, p_holm=0.02)
    tests = tests.assign(margin=0.05, smallest_effect=0.04)
    shown = ["domain", "comparison", "metric", "value", "low", "high", "claim", "margin", "p", "p_holm",
             "smallest_effect", "verdict"]  # fmt: skip
    tests[shown].to_csv(folder / "tests.csv", index=False)
    told = [(budget, domain, arm, *cell) for budget in (51_072, 102_144) for arm, nll in arms.items()
            for domain, *cell in [(d, "nll", nll, nll - 0.03, nll + 0.03) for d in DOMAINS]
            + [("worst", "gap_nll", nll - 1.1, "", "")]]  # fmt: skip
    columns = ["budget", "domain", "arm", "metric", "value", "low", "high"]
    budgets = pd.DataFrame(told, columns=columns)
    budgets.to_csv(folder / "budgets.csv", index=False)
    rates = [(51_072, domain, arm, rate, rate > 0.01)
             for domain in DOMAINS for arm in arms for rate in (0.01, 0.02)]  # fmt: skip
    columns = ["budget", "domain", "arm", "learning_rate", "chosen"]
    pd.DataFrame(rates, columns=columns).to_csv(folder / "budget_rates.csv", index=False)
    rates = [(domain, arm, 0.01) for domain in DOMAINS for arm in arms]
    rates = pd.DataFrame(rates, columns=["domain", "arm", "learning_rate"])
    rates.to_csv(folder / "lr.csv", index=False)
    rank_study.over_budgets(budgets).to_csv(folder / "over_budgets.csv", index=False)


def _architectures(folder: Path) -> None:
    heads = ["class", "forward", "backward", "NF4", "reload", "merge", "gates", "audit"]
    rows = [["AForConditionalGeneration", *["yes"] * 7], ["B_Model", "no gradient: 5% & more", *["yes"] * 6]]
    pd.DataFrame(rows, columns=heads).to_csv(folder / "runs.csv", index=False)
    kinds = {"scalar": 3, "rank": 40}
    shares = [[model, gate, 8, 4000, n, n / 4000] for model in ("A", "B") for gate, n in kinds.items()]
    columns = ["model", "gate", "rank", "adapter_parameters", "gate_parameters", "gate_frac"]
    pd.DataFrame(shares, columns=columns).to_csv(folder / "gates.csv", index=False)


def _methods(folder: Path) -> None:
    """More methods, DoRA better than QLoRA on one domain, prefix tuning worse, the rest undecided."""
    nll = {"full": 1.0, "lora": 1.2, "qlora": 1.21, "dora": 1.1, "houlsby": 1.25, "prefix": 1.8,
           "posttrain-nf4": 1.01, "posttrain-int8": 1.0}  # fmt: skip
    parameters = {"full": 3_218_064, "prefix": 12_288, "houlsby": 43_648}
    rows, claims = [], []
    for shift, domain in enumerate(DOMAINS):
        for arm, value in nll.items():
            value += shift / 2
            peak = 3e8 if arm == "dora" else 1.5e8
            scores = {"nll": value, "slot_frac": 0.9 - value / 8}
            rows += [(domain, arm, metric, x, x * 0.97, x * 1.03) for metric, x in scores.items()]
            counted = {"trainable_parameters": parameters.get(arm, 204_288), "step_peak_bytes": peak,
                       "train_bytes": peak + 7e6, "weight_bytes": 6.6e6}  # fmt: skip
            counted |= {"quantized_bytes": 2.3e6} if arm == "posttrain-nf4" else {}
            rows += [(domain, arm, metric, x, np.nan, np.nan) for metric, x in counted.items()]
        claims += [("methods", domain, f"{arm}_vs_qlora", nll["qlora"] - nll[arm], "greater")
                   for arm in ("full", "lora", "dora", "houlsby", "prefix")]  # fmt: skip
        claims += [("posttrain", domain, f"{arm}_vs_full", nll["full"] - nll[arm], "no_worse")
                   for arm in ("posttrain-nf4", "posttrain-int8")]  # fmt: skip
    columns = ["domain", "arm", "metric", "value", "low", "high"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "more.csv", index=False)
    tests = pd.DataFrame(claims, columns=["family", "domain", "comparison", "value", "claim"])
    tests = tests.assign(metric="nll", low=tests["value"] - 0.06, high=tests["value"] + 0.06, margin=0.05)
    tests = tests.assign(p=np.where(tests["low"] > 0, 0.001, 0.6), smallest_effect=0.04)
    tests["p_holm"] = tests.groupby("family")["p"].transform(stats.holm)
    judged = tests[["p_holm", "low", "high", "claim", "margin"]].itertuples(index=False)
    tests["verdict"] = [stats.verdict(*row) for row in judged]
    write_csv(folder / "more_tests.csv", tests[method_study.TESTS])
    method_study.overall(tests, DOMAINS).to_csv(folder / "more_overall.csv", index=False)
    times = [(arm, "train_cpu_s", 30.0 + len(arm)) for arm in nll]
    pd.DataFrame(times, columns=["arm", "metric", "value"]).to_csv(folder / "more_times.csv", index=False)
    swept = [(domain, arm, rate, "nll", value + rate, rate == 1e-2) for domain in DOMAINS
             for arm, value in nll.items() if "post" not in arm for rate in (5e-3, 1e-2)]  # fmt: skip
    columns = ["domain", "arm", "learning_rate", "metric", "value", "chosen"]
    pd.DataFrame(swept, columns=columns).to_csv(folder / "more_sweep.csv", index=False)


def _gates(folder: Path) -> None:
    claims = [("primary", domain, f"rank_vs_{b}", gain) for domain in ("inserts", "cutaways")
              for b, gain in (("plain", 0.2), ("constant", 0.19), ("shuffled", 0.01))]  # fmt: skip
    claims += [("arms", "cutaways", "shuffled_vs_plain", 0.19)]
    claims += [("arms", domain, pair, 0.02) for domain in ("inserts", "cutaways")
               for pair in ("segments_vs_rank", "rank+segments_vs_segments")]  # fmt: skip
    claims += [("arms", "inserts", pair, 0.03)
               for pair in ("rank-vision_vs_plain", "rank-text_vs_plain", "rank_vs_random")]  # fmt: skip
    claims += [("domains", "degraded", "rank_vs_plain", -0.01)]
    claims += [("beyond", "degraded", f"rank_vs_{b}", 0.01) for b in ("constant", "shuffled")]
    verdicts = ["supported" if gain > 0.1 else "undecided" for *_, gain in claims]
    tests = pd.DataFrame(claims, columns=["family", "domain", "comparison", "value"])
    tests = tests.assign(metric="nll", low=tests["value"] - 0.04, high=tests["value"] + 0.04, margin=0.05)
    tests = tests.assign(claim="greater", p=0.01, p_holm=0.03, smallest_effect=0.06, verdict=verdicts)
    shown = ["domain", "comparison", "metric", "value", "low", "high", "claim", "margin", "p", "p_holm",
             "smallest_effect", "verdict", "family"]  # fmt: skip
    tests[shown].to_csv(folder / "tests.csv", index=False)
    overall(tests).to_csv(folder / "overall.csv", index=False)
    nll = {"plain": 1.0, "rank": 0.8, "constant": 0.99, "shuffled": 0.81}
    count = ("trainable_parameters", 102_144, np.nan, np.nan)
    rows = [(domain, arm, *cell) for domain in ("inserts", "cutaways") for arm, value in nll.items()
            for cell in (("nll", value, value - 0.05, value + 0.05), count)]  # fmt: skip
    columns = ["domain", "arm", "metric", "value", "low", "high"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "summary.csv", index=False)
    gates = ([np.nan] * 3, [0.9, 1.0, 1.2])
    curves = [(domain, f"{domain}-{n}", t, 3 <= t < 6, t in (8, 9), 0.1, *gates[t % 2])
              for domain in ("inserts", "cutaways") for n in (0, 1) for t in range(12)]  # fmt: skip
    columns = ["domain", "clip", "frame", "moving", "odd", "motion", "vision", "fusion", "text"]
    pd.DataFrame(curves, columns=columns).to_csv(folder / "curves.csv", index=False)
    layers = [(domain, "rank", place, part, 0.1 * place, -0.05) for domain in ("inserts", "cutaways")
              for place, part in enumerate(("vision", "vision", "fusion", "text", "text"))]  # fmt: skip
    columns = ["domain", "arm", "place", "modality", "moving_gap", "odd_gap"]
    pd.DataFrame(layers, columns=columns).to_csv(folder / "gates.csv", index=False)


def _step_costs(folder: Path) -> None:
    """What notebook 04 makes of steps that are made up, by its own functions."""
    peaks = {"qlora": 9e7, "lora": 9e7, "full": 1.4e8, "vqlora": 9.2e7, "vqlora+lean": 4e7,
             "vqlora+lean+ckpt": 3e7}  # fmt: skip
    parts = {"weights_bytes": 1.6e8, "constants_bytes": 3e6, "adapters_bytes": 1e7, "optimizer_bytes": 2e7,
             "peak.gradients_bytes": 1e6, "peak.logits_bytes": 2e6, "peak.working_bytes": 0.0}  # fmt: skip
    cases = [("A", frames, 8) for frames in (2, 4, 8)] + [("A", 4, 2), ("A", 4, 32), ("B-1M", 4, 8)]
    steps = [{"model": model, "frames": frames, "rank": rank, "batch": 1, "arm": arm, "tokens": 9 * frames,
              "loss": 1.0, "trainable_parameters": 1000 * rank if arm != "full" else 400000, **parts,
              "peak_bytes": peak * frames + 2e5 * rank, "peak.activations_bytes": peak * frames - 4e6,
              "static_bytes": 1.73e8, "total_bytes": 1.93e8 + peak * frames + 2e5 * rank,
              "resident_bytes": 9e8, "flops": 1e9 * frames}
             for model, frames, rank in cases for arm, peak in peaks.items()]  # fmt: skip
    steps = pd.DataFrame(steps)
    named = steps[["model", "frames", "rank", "batch", "arm"]]
    times = pd.concat([named.assign(round=n, cpu_s=steps["peak_bytes"] / 1e8 + n / 10, wall_s=1.0)
                       for n in (1, 2, 3)])  # fmt: skip
    table, against = bench_tables.costs(steps, times), bench_tables.ratios(steps, times)
    along = {name: bench_tables.growth(table, name) for name in ("frames", "rank")}
    grown = pd.concat([fits.assign(along=name) for name, fits in along.items()])
    answers = pd.DataFrame([("B-1M", bits, merged, 4, 8, 0.5, 0.05, 1e8, 1e7, 1.1e8, 9e8)
                            for bits in ("nf4", "bf16") for merged in (False, True)],
                           columns=["model", "bits", "merged", "frames", "rank", "first_token_s",
                                    "next_token_s", "static_bytes", "peak_bytes", "total_bytes",
                                    "resident_bytes"])  # fmt: skip
    losses = claims.quality_losses(pd.read_csv(folder.parent / "03_main" / "runs.csv"))
    main = CostModel(model="B-1M", frames=(4,), at=4)
    aims = claims.judge_aims(against, "B-1M", 4, 8)
    written = {
        "runs": steps, "times": times, "ratios": against, "growth": grown, "answers": answers,
        "quality": losses, "claims": claims.judge_claims(table, against, losses),
        "aims": aims, "dtypes": pd.concat({"bf16": aims, "fp32": aims}, names=["dtype"]).reset_index("dtype"),
        "summary": bench_tables.cost_summary(main, table, against, along["frames"], answers),
        "gpu": pd.DataFrame([("a path & more", "CUDA", "as it is", "not run")],
                            columns=["path", "device", "what", "status"]),
    }  # fmt: skip
    for name, frame in written.items():
        frame.to_csv(folder / f"{name}.csv", index=False)


def _frames(folder: Path) -> None:
    gains = {"uniform": 0.0, "packets": 0.1, "cumulative-coverage": 0.2, "segments": 0.25, "top-k": -0.1,
             "oracle": 0.3}  # fmt: skip
    rows = [(domain, frames, policy, 96, 1.5 - gain / frames**0.5, 0.5, 0.4, 0.8 + gain / 5, gain, 0.03)
            for domain in ("language", "bursts", "inserts-twin") for frames in (1, 4, 8)
            for policy, gain in gains.items()]  # fmt: skip
    columns = ["domain", "frames", "policy", "clips", "nll", "slot", "exact", "seen", "gain", "gain_se"]
    table = pd.DataFrame(rows, columns=columns)
    table.to_csv(folder / "validation.csv", index=False)
    table = with_chosen(table, table)
    table.to_csv(folder / "policies.csv", index=False)
    summary(table, closed_gap(table), "segments").to_csv(folder / "summary.csv", index=False)
    outcomes = ["error", "harmless", "silent", "hang", "crash"]
    rows = [("sha256", 9, 1, 0, 0, 0), ("nothing", 7, 1, 2, 0, 0)]
    damaged = pd.DataFrame(rows, columns=["known", *outcomes])
    damaged.to_csv(folder / "fuzz.csv", index=False)
    trained = [("visual", k, policy, 3, 1.2 - k / 50, 0.6, 0.01 * k, 0.004)
               for k in (4, 8) for policy in ("uniform", "packets")]  # fmt: skip
    heads = ["domain", "frames", "policy", "seeds", "nll", "slot", "gain", "gain_se"]
    pd.DataFrame(trained, columns=heads).to_csv(folder / "per_policy.csv", index=False)


def _main(folder: Path) -> None:
    scored = ("token_accuracy_frac", "slot_frac", "cider", "qa_frac")
    pd.DataFrame(
        [(domain, arm, bits, seed, *[level + seed / 50] * 4) for domain in DOMAINS
         for arm, bits, level in (("full", "bf16", 0.6), ("qlora", "nf4", 0.55)) for seed in (0, 1, 2)],
        columns=["domain", "arm", "bits", "seed", *scored],
    ).to_csv(folder / "runs.csv", index=False)  # fmt: skip
    rows, sweep, tests = [], [], []
    for shift, domain in enumerate(DOMAINS):
        for arm, nll in ARMS.items():
            nll += 0.4 * shift
            values = {
                "nll": nll,
                "slot_frac": 0.9 - nll / 8,
                "cider": 2.4 - nll / 3,
                "meteor": 0.5 - nll / 20,
                "t2v_r1": 0.4 - nll / 20,
                "qa_frac": 0.8 - nll / 20,
            }
            rows += [
                (domain, arm, metric, value, value * 0.97, value * 1.03) for metric, value in values.items()
            ]
            rows += [
                (domain, arm, "train_bytes", BYTES[arm] or np.nan, np.nan, np.nan),
                (domain, arm, "weight_bytes", 6.6e6 if arm != "qlora" else 2.3e6, np.nan, np.nan),
                (domain, arm, "step_flops", 2.4e11 if BYTES[arm] else np.nan, np.nan, np.nan),
                (domain, arm, "trainable_frac", {"frozen": 0, "full": 1}.get(arm, 0.057), np.nan, np.nan),
            ]
            for rate in RATES.get(arm, ()):
                loss = nll + abs(np.log10(rate) + (2 if arm != "full" else 3)) / 5
                sweep.append((domain, arm, rate, "nll", loss, rate == RATES[arm][1]))
        for a, b, claim, margin, gain, verdict in (
            ("qlora", "lora", "equivalent", 0.03, -0.0055, ("supported", "undecided")[shift]),
            ("lora", "frozen", "greater", np.nan, 3.458, "supported"),
            ("qlora", "frozen", "greater", np.nan, 3.4525, "supported"),
        ):
            tests.append(
                (
                    domain,
                    f"{a}_vs_{b}",
                    "nll",
                    gain,
                    gain - 0.01,
                    gain + 0.01,
                    claim,
                    margin,
                    0.004,
                    0.0004,
                    verdict,
                )
            )
    pd.DataFrame(rows, columns=["domain", "arm", "metric", "value", "low", "high"]).to_csv(
        folder / "summary.csv", index=False
    )
    pd.DataFrame(sweep, columns=["domain", "arm", "learning_rate", "metric", "value", "chosen"]).to_csv(
        folder / "sweep.csv", index=False
    )
    pd.DataFrame(
        tests,
        columns=[
            "domain",
            "comparison",
            "metric",
            "value",
            "low",
            "high",
            "claim",
            "margin",
            "p",
            "p_holm",
            "verdict",
        ],
    ).to_csv(folder / "tests.csv", index=False)
    rates = [(domain, *rate, "sweep" if rate[2] else "profile") for domain in DOMAINS for rate in (
        ("frozen", "bf16", 0.0), ("full", "bf16", 1e-3), ("lora", "bf16", 1e-2), ("qlora", "nf4", 1e-2))]
    columns = ["domain", "arm", "bits", "learning_rate", "origin"]
    pd.DataFrame(rates, columns=columns).to_csv(folder / "lr.csv", index=False)
    pd.DataFrame(
        [
            ("seeds", 3),
            ("rank", 8),
            ("alpha", 16),
            ("steps", 60),
            ("batch_size", 32),
            ("frames", 8),
            ("select", "uniform"),
            ("weight_decay", 0.0),
            ("contrastive_weight", 0.25),
        ],
        columns=["metric", "value"],
    ).to_csv(folder / "settings.csv", index=False)


def _cost(folder: Path) -> None:
    rows = [(f"{n:016x}", 60.0 + n, 20.0, 1.5e9) for n in (1, 1, 2)]
    columns = ["key", "train_cpu_s", "eval_cpu_s", "resident_peak_bytes"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "cost.csv", index=False)


def _data(folder: Path) -> None:
    names = ("source", "language", "visual", "bursts", "degraded", "degraded-twin", "inserts", "inserts-twin")
    names += ("cutaways", "cutaways-twin", "distractor")
    pd.DataFrame(
        [(name, 40, 5.0, 1200, 256, 256, 256, 1.9, 25, 5.1) for name in names],
        columns=[
            "domain",
            "frames",
            "duration_s",
            "train_clips",
            "val_clips",
            "devtest_clips",
            "test_clips",
            "events_mean",
            "captions_per_clip",
            "questions_per_clip",
        ],
    ).to_csv(folder / "domains.csv", index=False)
    pd.DataFrame(
        [(name, kind, 300, 0.25, 0.262, 0.025) for name in names for kind in ("what", "order", "all")],
        columns=["domain", "kind", "questions", "chance_frac", "guess_frac", "error_frac"],
    ).to_csv(folder / "textonly.csv", index=False)
    pd.DataFrame(
        [
            (
                name,
                f"{name}-val-00000",
                "2 7 12 17 22 27 32 37",
                "a dog moves left , then a cup grows , and then the small red car bounces twice",
            )
            for name in names
        ],
        columns=["domain", "clip", "frames", "caption"],
    ).to_csv(folder / "samples.csv", index=False)
    ramp = np.linspace(0, 255, 64 * 8).astype("uint8")
    sheet = np.stack([np.tile(ramp, (64 * len(names), 1))] * 3, axis=-1)
    sheet[::7] = 40
    Image.fromarray(sheet).save(folder / "samples.png")
