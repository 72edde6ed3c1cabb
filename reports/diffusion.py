"""Measure the results in reports/d3hr.md: `python reports/diffusion.py [PART]...` (see PARTS).

Each part is stored in reports/d3hr.json with its commands, hardware and date; d3hr.md is then written from
all measured parts. Accuracies are `diffusion_table` and `diffusion_mnist` of regenerate.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reports.readme import HERE
from reports.regenerate import ddray, stamp
from reports.sections import commit, hardware


def sweeps() -> dict[str, Any]:
    """Run `ddray tune` over m, then over weights, at ipc 10; trials share one inversion (Tables A9-A11)."""
    searches = {}
    for name, space in {
        "m": "num_candidates: {choice: [1, 10, 100, 1000, 10000, 100000]}\n",
        "lambda": "lambda_skew: {choice: [0.0, 0.05, 0.5, 2.0]}\nlambda_std: {choice: [0.0, 1.0]}\n",
    }.items():
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "space.yaml"
            file.write_text(space)
            command = ("tune", "--method", "d3hr", "--dataset", "digits", "--ipc", "10", "--strategy", "grid")
            command += ("--final-sets", "1", "--set", "evaluate.epochs=100", "--set", "evaluate.val_seeds=3")
            result = ddray(*command, "--space", str(file), "--run-dir", f"{temporary}/run")
            rows = [json.loads(path.read_text()) for path in Path(temporary, "run", "ledger").glob("*.json")]
        trials = [
            {"params": row["result"]["params"], "val_accuracy": row["result"]["val_accuracy"]}
            for row in rows
            if row["kind"] == "trial"
        ]
        searches[name] = {
            "space": space,
            "trials": sorted(trials, key=lambda trial: json.dumps(trial["params"])),
            "best": result["best"]["config"],
            "command": f"ddray {' '.join(command)} --space FILE",
        }
    return searches


def selection(dim: int = 4096, ipc: int = 10, num: int = 2000) -> dict[str, Any]:
    """Measure which terms each form of the score selects by: rank correlation with the total, and share."""
    import torch
    from scipy.stats import spearmanr

    from ddray.methods.families.diffusion.groups import group_scores

    mean, std = torch.zeros(dim), torch.ones(dim)
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(100, ipc, dim, generator=generator) for _ in range(num // 100)]
    term_shares = {}
    for form, weights in (("paper", (1.0, 1.0, 0.5)), ("repo", (1.0, 1.0, 0.1))):

        def score(term_weights: tuple[float, ...], form: Any = form) -> Any:
            return torch.cat([group_scores(g, mean, std, weights=term_weights, form=form) for g in groups])  # type: ignore[arg-type]

        total = score(weights)
        for term_index, term in enumerate(("mean", "std", "skewness")):
            term_score = score(tuple(weight if i == term_index else 0.0 for i, weight in enumerate(weights)))
            term_shares[f"{form} {term}"] = {
                "rank_correlation": float(spearmanr(term_score, total).statistic),
                "share_of_total": float((term_score / total).mean()),
                "spread": float(term_score.std()),
            }
    return {"terms": term_shares, "dim": dim, "ipc": ipc, "num_candidates": num}


def inversion() -> dict[str, Any]:
    """Measure on the digits' generator: round trips by guidance and steps, normality, seconds per image."""
    import numpy as np
    import torch
    from scipy.stats import normaltest

    from ddray.data import open_dataset
    from ddray.methods.families.diffusion.model import Levels, open_pipeline

    folder = ddray("pool", "train", "--kind", "diffusion", "--dataset", "digits")["folder"]
    split = open_dataset("digits").train()
    model = open_pipeline(Path(folder))
    clean = model.encode(split.images.float() / 255, "mode")

    def rejected(latents: torch.Tensor) -> float:
        latents_by_class = [latents[split.labels == label].double().numpy() for label in range(10)]
        return float(
            np.mean([normaltest(class_latents, axis=0).pvalue < 0.05 for class_latents in latents_by_class])
        )

    rows = []
    for steps, guidance in ((20, 1.0), (20, 4.0), (50, 1.0), (50, 4.0), (200, 1.0)):
        levels = Levels(num_inference_steps=steps, num_steps=round(steps * 31 / 50), guidance=guidance)
        part, labels = clean[:256], split.labels[:256]
        begin = time.perf_counter()
        top = model.invert(part, labels, levels)
        seconds = (time.perf_counter() - begin) / len(part)
        back = model.sample(top, labels, levels)
        row = {
            "steps": levels.num_steps,
            "of": steps,
            "guidance": guidance,
            "relative_error": float((back - part).norm() / part.norm()),
            "seconds_per_image": seconds,
            "batch": len(part),
        }
        if steps <= 50:
            row["rejected"] = rejected(model.invert(clean, split.labels, levels))
        rows.append(row)
    return {"rows": rows, "rejected_clean": rejected(clean), "alpha": 0.05}


def generator(epochs: tuple[int, ...] = (100, 400), per_class: int = 100) -> dict[str, Any]:
    """Measure what the digits' generator makes: how many samples a classifier of real images gets right.

    Also the Frechet distance of their latents to those of real test images (FID with latents in place of
    Inception's features), and both for real test images that go through the autoencoder only.
    """
    import torch
    from sklearn.svm import SVC

    from ddray.data import open_dataset
    from ddray.methods.families.diffusion.model import Levels, open_pipeline

    data = open_dataset("digits")
    train, test = data.train(), data.test()
    classifier = SVC().fit(train.images.flatten(1) / 255, train.labels)
    labels = torch.arange(data.num_classes).repeat_interleave(per_class)
    rows = []
    for num in epochs:
        trained = ("pool", "train", "--kind", "diffusion", "--dataset", "digits", "--epochs", str(num))
        model = open_pipeline(Path(ddray(*trained)["folder"]))
        real = model.encode(test.images.float() / 255, "mode")

        def row(
            what: str, latents: torch.Tensor, classes: torch.Tensor, model: Any = model, real: Any = real
        ) -> dict[str, Any]:
            pixels = model.decode(latents, data.image_shape).flatten(1)
            return {
                "what": what,
                "accuracy": float(classifier.score(pixels, classes)),
                "frechet": frechet_distance(latents.double().numpy(), real.double().numpy()),
                "n": len(classes),
            }

        rows.append({"epochs": num, **row("real test images, encoded and decoded", real, test.labels)})
        others = model.encode(train.images.float() / 255, "mode")
        rows.append({"epochs": num, **row("real train images, encoded and decoded", others, train.labels)})
        for steps, guidance in ((20, 1.0), (20, 4.0), (50, 4.0)):
            levels = Levels(num_inference_steps=steps, num_steps=steps, guidance=guidance)
            drawn = torch.randn(len(labels), real.shape[1], generator=torch.Generator().manual_seed(0))
            latents = model.sample(drawn, labels, levels)
            rows.append(
                {"epochs": num, **row(f"samples, {steps} steps, guidance {guidance:g}", latents, labels)}
            )
    accuracy = float(classifier.score(test.images.flatten(1) / 255, test.labels))
    return {"rows": rows, "classifier": "scikit-learn's SVC on pixels of train", "accuracy": accuracy}


def frechet_distance(one: Any, other: Any) -> float:
    """Return the squared Frechet distance of normals fitted to rows [N, D] (Heusel et al. 2017)."""
    import numpy as np
    from scipy.linalg import sqrtm

    covariances = [np.cov(rows, rowvar=False) for rows in (one, other)]
    root = sqrtm(covariances[0] @ covariances[1])
    means = one.mean(0) - other.mean(0)
    return float(means @ means + np.trace(covariances[0] + covariances[1] - 2 * np.real(root)))


def speed() -> dict[str, Any]:
    """Time group sampling at ipc 10 against the floor of its normal draws."""
    import torch

    from ddray.methods.families.diffusion.groups import group_sample

    rows = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dim, num in ((256, 1_000_000), (4096, 1_000_000 if device.type == "cuda" else 50_000)):
        mean, std = torch.zeros(dim, device=device), torch.ones(dim, device=device)
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            group_sample(mean, std, ipc=10, num_candidates=num, generator=torch.Generator().manual_seed(0))
            seconds = time.perf_counter() - begin
        draws = num * 10 * dim
        rows.append(
            {"dim": dim, "num_candidates": num, "seconds": seconds, "ns_per_draw": 1e9 * seconds / draws}
        )
    return {"rows": rows, "device": str(device), "threads": torch.get_num_threads()}


PARTS = {f.__name__: f for f in (sweeps, selection, generator, inversion, speed)}


def render(parts: dict[str, Any]) -> str:
    """Return d3hr.md."""
    machines = " | ".join(sorted({hardware(part) for part in parts.values()}))
    lines = ["# D3HR, measured", "", "Written by `python reports/diffusion.py`; do not edit.", ""]
    lines += [
        f"Measured on {machines}. What was measured before 2026-12-01 is of a generator whose latents had the"
    ]
    lines += ["wrong scale ([why](../docs/anomalies.md)); the rows of the score are of normal draws.", ""]
    if part := parts.get("sweeps"):
        lines += ["## Candidates and weights on digits, ipc 10 (one inversion for all trials)", ""]
        lines += ["| setting | val % |", "|---|---|"]
        for name in ("m", "lambda"):
            for trial in part[name]["trials"]:
                setting = ", ".join(f"`{key}={value:g}`" for key, value in trial["params"].items())
                lines += [f"| {setting} | {100 * trial['val_accuracy']:.2f} |"]
        lines += ["", f"`{part['m']['command']}`. Measured at {commit(part)}.", ""]
    if part := parts.get("selection"):
        lines += [
            f"## What the score selects by (D={part['dim']}, ipc {part['ipc']}, m={part['num_candidates']})",
            "",
            "| form, term | rank correlation with the total | share of the total | spread |",
            "|---|---|---|---|",
        ]
        for name, term in part["terms"].items():
            numbers = f"{term['rank_correlation']:.4f} | {term['share_of_total']:.3f} | {term['spread']:.3g}"
            lines += [f"| {name} | {numbers} |"]
        lines += ["", f"Measured at {commit(part)}.", ""]
    if part := parts.get("generator"):
        lines += [
            "## What the digits' generator makes",
            "",
            f"Right: by {part['classifier']}, which gets {100 * part['accuracy']:.1f} % of test right.",
            "Distance: squared Frechet distance of latents to those of test.",
            "",
            "| epochs | images | right % | distance | n |",
            "|---|---|---|---|---|",
        ]
        for row in part["rows"]:
            numbers = f"{100 * row['accuracy']:.1f} | {row['frechet']:.2f} | {row['n']}"
            lines += [f"| {row['epochs']} | {row['what']} | {numbers} |"]
        lines += ["", f"Measured at {commit(part)}.", ""]
    if part := parts.get("inversion"):
        lines += [
            "## Inversion and back on the digits' generator",
            "",
            "Rejected: share of a class's dimensions that fail D'Agostino's normality test at 5%; "
            f"clean latents: {part['rejected_clean']:.3f}.",
            "",
            "| steps | guidance | relative error of the round trip | rejected | s per image (batch) |",
            "|---|---|---|---|---|",
        ]
        for row in part["rows"]:
            rejected = f"{row['rejected']:.3f}" if "rejected" in row else "-"
            seconds = f"{row['seconds_per_image']:.4f} ({row['batch']})"
            how = f"{row['steps']} of {row['of']} | {row['guidance']:g}"
            lines += [f"| {how} | {row['relative_error']:.4f} | {rejected} | {seconds} |"]
        lines += ["", f"Measured at {commit(part)}.", ""]
    if part := parts.get("speed"):
        lines += [f"## Group sampling, ipc 10, {part['device']}, {part['threads']} threads", ""]
        lines += ["| D | candidates | seconds | ns per normal draw |", "|---|---|---|---|"]
        for row in part["rows"]:
            numbers = f"{row['seconds']:.2f} | {row['ns_per_draw']:.2f}"
            lines += [f"| {row['dim']} | {row['num_candidates']:,} | {numbers} |"]
        lines += ["", f"Measured at {commit(part)}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Run the named parts (default: all), store them, and write d3hr.md."""
    wrong = [name for name in sys.argv[1:] if name not in (*PARTS, "render")]
    if wrong:
        raise SystemExit(f"a part must be one of {', '.join(PARTS)}, got {wrong[0]}")
    path = HERE / "d3hr.json"
    parts = json.loads(path.read_text()) if path.exists() else {}
    for name in sys.argv[1:] or list(PARTS):
        if name != "render":
            parts[name] = {**PARTS[name](), "environment": stamp()}
            parts[name]["environment"]["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            path.write_text(json.dumps(parts, indent=2) + "\n")
    (HERE / "d3hr.md").write_text(render(parts))


if __name__ == "__main__":
    main()
