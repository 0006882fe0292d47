"""Should I freeze? Probe a small ResNet, fine-tune it in fourteen ways, and compare.

The network first learns scikit-learn's handwritten digits. Then the images change: they are faded
and noisy, or, with `--shift inverted`, negatives. `bnfreeze.probe` says from 400 unlabelled images
whether the stored statistics still fit. Then the network is fine-tuned in batches of two, where
batch norm works badly: once with nothing frozen, once with each of five recipes that people often
copy, with each of five policies of bnfreeze, and with statistics that were recalibrated first. All
runs start from the same weights and see the same batches.

Whether the advice was right is for the table to say.

    pip install "bnfreeze[examples]"
    python examples/finetune_digits.py [--quick] [--seed N] [--shift NAME] [--svg FILE] [--json]
"""

from __future__ import annotations

import argparse
import copy
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the customary name
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

import bnfreeze

SHIFTS = {"faded": (0.5, 0.25), "inverted": (-1.0, 1.0)}  # contrast, and what black becomes
BATCH = 2  # as in detection and segmentation, where the images are large

# What each way should leave unchanged. For a recipe: what people mean by a frozen layer. It stays
# as it was, and it is the same function in both modes. For a policy: what its name promises.
STATISTICS, AFFINE, SAME = {"statistics", "count"}, {"affine"}, {"train = eval"}
RECIPES = {
    "requires_grad=False on buffers": {"statistics"} | SAME,
    "track_running_stats=False": {"statistics"} | SAME,
    "momentum=0, affine fixed": {"statistics"} | AFFINE | SAME,
    "bn.eval() before the loop": {"statistics"} | SAME,
    "optimizer gets the head only": {"statistics"} | AFFINE | SAME,
}
POLICIES = {
    "stats": STATISTICS,
    "affine": AFFINE,
    "eval": STATISTICS | SAME,
    "eval+affine": STATISTICS | AFFINE | SAME,
    "eval+weights, all but the head": STATISTICS | AFFINE | SAME | {"convolutions"},
}
BUT_HEAD = "eval+weights, all but the head"
# The statistics are made those of the new images first. What is trained then, if anything is?
NOT_TRAINED = "recalibrated, not trained"
RECALIBRATED = {
    NOT_TRAINED: STATISTICS | AFFINE | SAME | {"convolutions", "head"},
    "recalibrated, eval+affine": STATISTICS | AFFINE | SAME,
    "recalibrated, all but the head": STATISTICS | AFFINE | SAME | {"convolutions"},
}
BASELINE = "nothing frozen"
METHODS: dict[str, set[str]] = {BASELINE: set(), **RECIPES, **POLICIES, **RECALIBRATED}


def set_up(method: str, model: ResNet, data: TensorDataset) -> Iterator[nn.Parameter]:
    """Freeze in the way named, and give back the parameters for the optimizer."""
    if method in RECALIBRATED:
        bnfreeze.recalibrate(model, DataLoader(data, 50))
        method = "eval+affine" if method.endswith("eval+affine") else BUT_HEAD
    if method == BUT_HEAD:
        bnfreeze.freeze(model, {"**": "eval+weights", "fc": "none"})
    elif method in POLICIES:
        bnfreeze.freeze(model, method)
    elif method == "optimizer gets the head only":
        return model.fc.parameters()
    for bn in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        if method == "requires_grad=False on buffers":
            bn.running_mean.requires_grad = bn.running_var.requires_grad = False
            bn.num_batches_tracked.requires_grad = False
        elif method == "track_running_stats=False":
            bn.track_running_stats = False
        elif method == "momentum=0, affine fixed":
            bn.momentum = 0
            bn.weight.requires_grad = bn.bias.requires_grad = False
        elif method == "bn.eval() before the loop":
            bn.eval()
    return model.parameters()


@dataclass(frozen=True)
class Outcome:
    """The result of one way to fine-tune. Accuracies are on unseen shifted images."""

    method: str
    unchanged: tuple[str, ...]  # bit for bit; "train = eval": both modes give the same outputs
    broken: tuple[str, ...]  # what should be in `unchanged` and is not
    moved: dict[str, float]  # by kind of tensor, the largest absolute change
    gap: float  # the largest absolute difference between the outputs in the two modes
    train_accuracy: float  # in train mode, in batches as in training
    eval_accuracy: float
    layers: int  # norm layers. What bnfreeze.inspect said about them before the training:
    on_batch: int  # how many normalise with the batch
    updating: int  # how many update their statistics or the count
    findings: tuple[str, ...]  # the codes of its findings


@dataclass(frozen=True)
class Experiment:
    """How the pretrained network does in eval mode, and the outcome of each way to go on."""

    seed: int
    shift: str
    clean_accuracy: float
    shifted_accuracy: float
    layers_shifted: int  # of 9, as bnfreeze.probe judges 400 images without their labels
    advice: str  # what it advises
    advice_recalibrated: str  # what bnfreeze.recalibrate advises next,
    advice_scored: str  # and what it advises if it may look at the labels of these 400 images
    outcomes: tuple[Outcome, ...]


def digits() -> TensorDataset:
    """The 1797 digits in random order, enlarged from 8 x 8 to suit torchvision's stem."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    pixels = F.interpolate(pixels, scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1)
    order = torch.randperm(len(pixels))
    return TensorDataset(pixels[order], torch.tensor(data.target)[order])


def shifted(shift: str, pixels: Tensor, labels: Tensor) -> TensorDataset:
    """The same digits from a bad scanner: with half the contrast, or inverted, and noisy."""
    scale, offset = SHIFTS[shift]
    return TensorDataset(offset + scale * pixels + 0.1 * torch.randn(pixels.shape), labels)


def small_resnet() -> ResNet:
    """Torchvision's ResNet with one block in each stage, without the last stage: 9 norm layers."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(256, 10)
    return model


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: TensorDataset, batch_size: int
) -> None:
    """One epoch, as in almost every training loop: ``model.train()`` comes first."""
    model.train()
    for pixels, labels in DataLoader(data, batch_size, shuffle=True, drop_last=True):
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset, *, training: bool) -> tuple[Tensor, float]:
    """Logits (N, 10) and accuracy, of a copy: running in train mode would move the statistics."""
    model = copy.deepcopy(model).train(training)
    logits = torch.cat([model(pixels) for pixels in data.tensors[0].split(BATCH)])
    return logits, (logits.argmax(1) == data.tensors[1]).float().mean().item()


def tensors_by_kind(model: nn.Module) -> dict[str, Tensor]:
    """All values of the model, copied: one flat tensor for each kind in `Outcome.unchanged`."""
    state = model.state_dict()
    kinds: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        layer, _, key = name.rpartition(".")
        kind = "head" if layer == "fc" else "convolutions"
        if f"{layer}.running_mean" in state:
            kind = "statistics" if key.startswith("running_") else "affine"
        if key == "num_batches_tracked":
            kind = "count"
        kinds.setdefault(kind, []).append(tensor.flatten())
    return {kind: torch.cat(tensors) for kind, tensors in kinds.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def fine_tune(
    pretrained: ResNet, method: str, data: TensorDataset, test: TensorDataset, *, epochs: int
) -> Outcome:
    """Fine-tune a copy of the network in one way, and compare it with what it was."""
    model = copy.deepcopy(pretrained).train()
    optimizer = torch.optim.SGD(set_up(method, model, data), lr=0.002, momentum=0.9)
    before = tensors_by_kind(model)
    inspection = bnfreeze.inspect(model, optimizer=optimizer)
    for _ in range(0 if method == NOT_TRAINED else epochs):
        train_epoch(model, optimizer, data, BATCH)
    after = tensors_by_kind(model)
    in_train, train_accuracy = evaluate(model, test, training=True)
    in_eval, eval_accuracy = evaluate(model, test, training=False)
    unchanged = {kind for kind in before if same_bits(before[kind], after[kind])}
    unchanged |= SAME if same_bits(in_train, in_eval) else set()
    return Outcome(
        method=method,
        unchanged=tuple(sorted(unchanged)),
        broken=tuple(sorted(METHODS[method] - unchanged)),
        moved={kind: (after[kind] - before[kind]).abs().max().item() for kind in before},
        gap=(in_train - in_eval).abs().max().item(),
        train_accuracy=train_accuracy,
        eval_accuracy=eval_accuracy,
        layers=len(inspection.layers),
        on_batch=sum(layer.normalizes_with == "batch" for layer in inspection.layers),
        updating=sum(layer.updates_statistics for layer in inspection.layers),
        findings=tuple(sorted({finding.code for finding in inspection.findings})),
    )


def run(
    *,
    seed: int = 0,
    shift: str = "faded",
    quick: bool = False,
    track: Callable[..., Any] | None = None,
) -> Experiment:
    """Pretrain once, then fine-tune in every way; a seed gives the same outcome each time.

    `quick` does a tenth of the work; the accuracies mean little then. `track` shows progress, as
    `rich.progress.Progress.track` does. Torch's global random generator is seeded.
    """
    track = track or (lambda steps, **_: steps)
    torch.manual_seed(seed)
    data = digits()
    clean, new, test = TensorDataset(*data[:900]), shifted(shift, *data[900:1300]), data[1300:]
    if quick:
        new, test = TensorDataset(*new[:40]), data[1300:1360]
    shifted_test = shifted(shift, *test)
    model = small_resnet()
    epochs = 3 if quick else 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=epochs)
    for _ in track(range(epochs), description="Pretraining"):
        train_epoch(model, optimizer, clean, batch_size=32)
        schedule.step()
    loader = DataLoader(new, BATCH)
    probed = bnfreeze.probe(model, loader)
    advice = [
        bnfreeze.recalibrate(copy.deepcopy(model), DataLoader(new, 50), score=score).advice
        for score in (None, lambda other: evaluate(other, new, training=False)[1])
    ]
    outcomes = []
    for method in track(list(METHODS), description="Fine-tuning"):
        torch.manual_seed(seed)  # the same batches each time
        outcomes.append(fine_tune(model, method, new, shifted_test, epochs=1 if quick else 2))
    _, clean_accuracy = evaluate(model, TensorDataset(*test), training=False)
    _, shifted_accuracy = evaluate(model, shifted_test, training=False)
    return Experiment(
        seed=seed,
        shift=shift,
        clean_accuracy=clean_accuracy,
        shifted_accuracy=shifted_accuracy,
        layers_shifted=sum(layer.verdict == "shifted" for layer in probed.layers),
        advice=probed.advice,
        advice_recalibrated=advice[0],
        advice_scored=advice[1],
        outcomes=tuple(outcomes),
    )


def conclusion(experiment: Experiment) -> str:
    """What the numbers say. Nothing here is written in advance."""
    recipes = [o for o in experiment.outcomes if o.method in RECIPES]
    policies = [o for o in experiment.outcomes if o.method in POLICIES]
    broken = [o for o in recipes if o.broken]
    moving = sum("statistics" in o.broken for o in broken)
    kept = sum(not o.broken for o in policies)
    same = sum("train = eval" in o.unchanged for o in policies)
    accuracy = {o.method: o.eval_accuracy for o in experiment.outcomes}
    best = max(accuracy, key=accuracy.__getitem__)
    frozen = max((p for p in POLICIES if "statistics" in POLICIES[p]), key=accuracy.__getitem__)
    then = max(list(RECALIBRATED)[1:], key=accuracy.__getitem__)
    plain = accuracy[BASELINE]
    return (
        f"{len(broken)} of {len(recipes)} popular recipes do not freeze: with {moving} the running "
        f"statistics move, with {len(broken) - moving} they stay but the output in eval mode "
        f"differs from train mode. {kept} of {len(policies)} policies keep their promise bit for "
        f"bit, and with {same} of them both modes give the same output. Does freezing help here, "
        f"in eval mode? With the old statistics, {_against(accuracy[frozen], plain)}: at best "
        f"{accuracy[frozen]:.1%} (“{frozen}”), and {plain:.1%} with {BASELINE}. Recalibrated "
        f"first, {_against(accuracy[then], plain)}: {accuracy[then]:.1%} (“{then}”), and "
        f"{accuracy[NOT_TRAINED]:.1%} with nothing trained. Best of all: “{best}” "
        f"({accuracy[best]:.1%})."
    )


def _against(accuracy: float, plain: float) -> str:
    if abs(accuracy - plain) < 0.005:
        return "it makes no difference"
    return "it helps" if accuracy > plain else "it harms"


def verdict(experiment: Experiment) -> Table:
    """What bnfreeze said before anything was trained."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(style="cyan")
    table.add_row("probe", experiment.advice)
    table.add_row("recalibrate", experiment.advice_recalibrated)
    table.add_row("with score=", experiment.advice_scored)
    return table


def picture(experiment: Experiment, width: int = 100) -> Group:
    """The outcomes as a table, and the conclusion.

    Below 100 columns, the columns in `least` are left out; the rest fits into 70.
    """
    least = () if width >= 100 else ("batches\ncounted", "\naffine", "inspect said:\nnorm, stats")
    table = Table(
        title=f"Pretrained on digits ({experiment.clean_accuracy:.1%}), fine-tuned on "
        f"{experiment.shift} ones ({experiment.shifted_accuracy:.1%} before) in batches of {BATCH}",
        caption="✓ ✗  whether all that should be frozen stayed the same, bit for bit",
        title_style="bold",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    headers = (
        *("", "\nway to freeze", "train\nacc.", "eval\nacc.", "running\nstats", "batches\ncounted"),
        *("\naffine", "modes\ndiffer", "inspect said:\nnorm, stats"),
    )
    for header in headers:
        if header not in least:
            text = header in ("", "\nway to freeze", "inspect said:\nnorm, stats")
            table.add_column(header, justify="left" if text else "right", no_wrap=True)
    headings = {
        next(iter(RECIPES)): "popular recipes",
        next(iter(POLICIES)): "bnfreeze policies",
        NOT_TRAINED: "bnfreeze, recalibrated first",
    }
    for outcome in experiment.outcomes:
        if outcome.method in headings:
            table.add_section()
            table.add_row("", Text(headings[outcome.method], style="bold"))
        cells = zip(headers, _cells(outcome), strict=True)
        table.add_row(*(cell for header, cell in cells if header not in least))
    return Group(
        Padding(verdict(experiment), (0, 0, 1, 0)),
        table,
        Padding(Text(conclusion(experiment)), (1, 0)),
    )


def _cells(outcome: Outcome) -> Iterator[Text]:
    mark = Text("✗", "bold red") if outcome.broken else Text("✓", "bold green")
    yield mark if METHODS[outcome.method] else Text()
    yield Text(outcome.method)
    for accuracy in (outcome.train_accuracy, outcome.eval_accuracy):
        yield Text(f"{accuracy:.1%}".replace("100.0", "100"))
    for kind, form in (("statistics", ".2f"), ("count", "+.0f"), ("affine", ".3f")):
        unchanged = kind in outcome.unchanged
        text = "same" if unchanged else format(outcome.moved[kind], form)
        yield Text(text, "green" if unchanged else "yellow")
    same = "train = eval" in outcome.unchanged
    yield Text("no" if same else f"{outcome.gap:.2g}", "green" if same else "yellow")
    said = "batch" if outcome.on_batch else "running"
    said += ", update" if outcome.updating else ", still"
    yield Text(said, "green" if said == "running, still" else "yellow")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--shift", choices=SHIFTS, default="faded", help="how the images change")
    parser.add_argument("--svg", metavar="FILE", help="save the table as a picture")
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    options = parser.parse_args(arguments)
    # A network this small gains little from threads, and with one thread sums are reproducible.
    torch.set_num_threads(1)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        experiment = run(
            seed=options.seed, shift=options.shift, quick=options.quick, track=progress.track
        )
    if options.svg:
        recorder = Console(file=io.StringIO(), record=True, width=100, force_terminal=True)
        recorder.print(picture(experiment))
        recorder.save_svg(options.svg, title="examples/finetune_digits.py")
    if options.json:
        print(json.dumps({**asdict(experiment), "conclusion": conclusion(experiment)}, indent=2))
    else:
        console = Console()
        console.print(picture(experiment, console.width))


if __name__ == "__main__":
    main()
