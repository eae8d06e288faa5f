"""Class-conditional generation: how often a classifier sees the class that was asked for.

    python benchmarks/class_accuracy.py [--steps N] [--per-class N] [--picture FILE] [--json FILE]
                                        [--dry-run]

Trains `nar-kernels train --data digits --labels data` (or takes --checkpoint), draws digits of each
class at several guidance scales, and without a class, and classifies them by a support vector
machine fitted to the real training digits. Guidance buys accuracy by variety: the variance of
pixels within a class, as a share of that of held-out real digits, is reported, too.

`--dry-run` trains for two steps; its figures are meaningless.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import begin, make_parser, print_table, write_json
from torch import Tensor

from nar_kernels import NonAutoregressiveWrapper, SamplingConfig, TrainConfig, load_model
from nar_kernels.data.sequence_spec import SequenceSpec
from nar_kernels.data.sources import Data, open_data
from nar_kernels.show import samples
from nar_kernels.train import train

SCALES = 1.0, 1.5, 2.0, 3.0
SHOWN = 10  # of each class in the picture


def windows_of(data: Data) -> tuple[Tensor, Tensor]:
    """Real digits to fit a classifier to, and those that are held out."""
    return (
        data.train.windows(range(len(data.train))),
        data.held_out.windows(data.held_out_windows),
    )


def variance_within(images: Tensor, classes: Tensor) -> float:
    """Variance of a pixel among the images of a class, mean over pixels and classes."""
    of_classes = [images[classes == c].double().var(0).mean() for c in classes.unique().tolist()]
    return torch.stack(of_classes).mean().item()


def trained(
    args: argparse.Namespace, record: dict[str, object]
) -> tuple[NonAutoregressiveWrapper, SequenceSpec]:
    few = {"steps": 2, "dim": 32, "depth": 1} if args.dry_run else {"steps": args.steps}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.for_data(
            "digits", labels="data", out=folder, quiet=True, device="cpu", **few
        )
        report = train(config)
        record["bits_per_token"] = report["bits_per_token"]
        record["training_seconds"] = report["seconds"]
        print(
            f"{report['steps']} steps: {report['bits_per_token']:.4f} bits per token, given the "
            "class\n"
        )
        return load_model(Path(folder) / "best.pt")


def main() -> None:
    parser = make_parser(__doc__, repeats=1)
    parser.set_defaults(threads=1)
    parser.add_argument("--checkpoint", help="instead of training")
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--per-class", type=int, default=100, help="digits of each class")
    parser.add_argument("--picture", type=Path, help="write digits at scale 2 here (.png)")
    args = parser.parse_args()
    from sklearn.svm import SVC

    _, _, record = begin(parser, args, on_cpu=True)
    if args.checkpoint is None:
        model, spec = trained(args, record)
    else:
        model, spec = load_model(args.checkpoint)
    data = open_data("digits", labels="data")
    assert isinstance(data, Data) and spec.num_classes is not None
    assert data.train_classes is not None and data.held_out_classes is not None
    real, held_out = windows_of(data)
    classifier = SVC().fit(real.numpy(), data.train_classes.numpy())

    def accuracy(images: Tensor, classes: Tensor) -> float:
        return float(np.mean(classifier.predict(images.numpy()) == classes.numpy()))

    real_variance = variance_within(held_out, data.held_out_classes)
    rows = [
        {
            "digits": "real, held out",
            "accuracy": accuracy(held_out, data.held_out_classes),
            "variance": 1.0,
            "seconds": None,
        }
    ]
    asked = torch.arange(spec.num_classes).repeat_interleave(2 if args.dry_run else args.per_class)
    settings = [("without a class", 1.0, torch.full_like(asked, spec.num_classes))]
    settings += [(f"guidance scale {scale:g}", scale, asked) for scale in SCALES]
    for name, scale, class_ids in settings:
        begins = time.perf_counter()
        config = SamplingConfig(guidance_scale=scale)
        images = model.sample(config, class_ids=class_ids, seed=0).last().ids
        rows.append(
            {
                "digits": name,
                "accuracy": accuracy(images, asked),
                "variance": variance_within(images, asked) / real_variance,
                "seconds": time.perf_counter() - begins,
            }
        )
        if scale == 2 and args.picture is not None:
            shown = images.unflatten(0, (spec.num_classes, -1))[:, :SHOWN].flatten(0, 1)
            samples.write(args.picture, shown, spec, num_rows=spec.num_classes)
    record |= {"num_digits": len(asked), "rows": rows}
    print_table(
        [
            {
                "digits": row["digits"],
                "recognised as the class asked for": f"{row['accuracy']:.1%}",
                "variance within a class": f"{row['variance']:.2f}",
            }
            for row in rows
        ]
    )
    write_json(args.json, record)


if __name__ == "__main__":
    main()
