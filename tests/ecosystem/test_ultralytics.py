"""Ultralytics' YOLO, trained on eight synthetic images."""

import contextlib
import io
import json
import shutil
import zipfile

import pytest

pytest.importorskip("ultralytics")
import numpy
import torch
from PIL import Image
from torch import nn
from ultralytics import YOLO

import bnfreeze
from bnfreeze import DriftError, PolicyError, cli
from bnfreeze.integrations.ultralytics import freeze_batch_norm
from tests.helpers import bits, state

# Ultralytics' own warnings: torch's deprecations, unused labels.
pytestmark = pytest.mark.filterwarnings("ignore", "error::bnfreeze.BnfreezeWarning")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with eight images of two classes, for detection and for classification."""
    root, random = tmp_path_factory.mktemp("data"), numpy.random.default_rng(0)
    for index in range(8):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
        for part in ("train", "val"):
            name = f"{part}/{index % 2}/{index}.png"
            (root / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "classes" / name)
        for folder in ("images", "labels"):
            (root / "boxes" / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "boxes" / "images" / f"{index}.png")
        label = root / "boxes" / "labels" / f"{index}.txt"
        label.write_text(f"{index % 2} 0.5 0.5 0.4 0.4\n", encoding="utf-8")
    yaml = f"path: {root / 'boxes'}\ntrain: images\nval: images\nnames: [a, b]\n"
    (root / "boxes.yaml").write_text(yaml, encoding="utf-8")
    return root


@pytest.fixture
def options(pictures, tmp_path):
    """Two short epochs on the CPU."""

    def options(yolo, **more):
        data = pictures / ("classes" if yolo.task == "classify" else "boxes.yaml")
        return {
            "data": str(data),
            "epochs": 2,
            "batch": 4,
            "nbs": 4,
            "imgsz": 32,
            "device": "cpu",
            "amp": False,
            "plots": False,
            "project": str(tmp_path),
            "name": "run",
            "optimizer": "AdamW",
            "verbose": False,
        } | more

    return options


def with_real_statistics(trainer):
    """A callback: statistics that fp16 does not have, in the model and in its average."""
    for model in (trainer.model, trainer.ema.ema):
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)


class Look:
    """A callback: keeps the trainer's model and its average."""

    def __call__(self, trainer):
        self.model, self.average = trainer.model, trainer.ema.ema
        self.live, self.copy = state(self.model), state(self.average)

    def frozen(self):
        return set(bnfreeze.snapshot(self.model).names)


def train(yolo, options, **more):
    """Train; return what there was when the last epoch ended."""
    look = Look()
    yolo.add_callback("on_model_save", look)
    yolo.train(**options(yolo, **more))
    return look


def changed(before, after):
    """The names of the tensors whose bytes differ."""
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def stored(file):
    """The bytes that Ultralytics loads; the file must name no module of bnfreeze."""
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        assert b"bnfreeze." not in archive.read(pickled)
    return state(YOLO(file).model)


def rounded(model):
    """The state_dict in fp16, as Ultralytics saves it and loads it."""
    return {
        name: bits(value.half().float() if value.is_floating_point() else value)
        for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("yolov8n.yaml", "eval+affine"),
        ("yolo11n.yaml", {"model.?": "fused-act"}),
        ("yolo11n-cls.yaml", "stats"),
    ],
)
def test_the_average_and_the_files_have_the_frozen_values(name, policy, options, tmp_path):
    yolo = YOLO(name)
    yolo.add_callback("on_pretrain_routine_end", with_real_statistics)
    callback = freeze_batch_norm(yolo, policy)
    look = train(yolo, options)
    frozen = look.frozen()
    assert len(callback.report.layers) > 20
    assert not frozen & changed(look.live, look.copy)
    assert changed(look.live, look.copy)

    best, last = (tmp_path / "run" / "weights" / name for name in ("best.pt", "last.pt"))
    for file in (best, last):
        assert not frozen & changed(rounded(look.model), stored(file))

    with contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main(["inspect", str(best), "--json"])
    (seen,) = json.loads(out.getvalue())["files"]
    norms = [n for n, m in look.average.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert [layer["name"] for layer in seen["layers"]] == norms


def test_a_late_start_freezes_what_was_trained(options):
    """Also in the average; and the optimizer keeps no momentum for it."""
    yolo = YOLO("yolo11n-cls.yaml")
    callback = freeze_batch_norm(yolo, "eval+affine", start_epoch=1)
    fresh, kept = {}, set()
    yolo.add_callback("on_train_start", lambda trainer: fresh.update(state(trainer.model)))
    yolo.add_callback("on_train_epoch_end", lambda trainer: kept.update(trainer.optimizer.state))
    look = train(yolo, options)
    assert look.frozen() <= changed(fresh, look.live)
    assert not look.frozen() & changed(look.live, look.copy)
    parameters = dict(look.model.named_parameters())
    assert {name for name, p in parameters.items() if p in kept} == parameters.keys()
    now = yolo.trainer.optimizer.state
    assert {name for name, p in parameters.items() if p in now} == parameters.keys() - look.frozen()
    assert callback.report is not None


def test_a_resumed_run_stays_frozen(options, tmp_path):
    yolo = YOLO("yolo11n-cls.yaml")
    yolo.add_callback("on_pretrain_routine_end", with_real_statistics)
    freeze_batch_norm(yolo)
    copy = tmp_path / "interrupted.pt"  # Ultralytics itself has no more to resume at the end

    def keep(trainer):
        if trainer.epoch == 0:
            shutil.copy(trainer.last, copy)

    yolo.add_callback("on_model_save", keep)
    first = train(yolo, options)

    yolo = YOLO(copy)
    freeze_batch_norm(yolo)
    second = Look()
    yolo.add_callback("on_model_save", second)
    yolo.train(resume=True)
    assert second.frozen() == first.frozen()
    assert not first.frozen() & changed(rounded(first.model), second.live)
    assert not first.frozen() & changed(second.live, second.copy)


def test_a_recovery_from_nan_keeps_the_frozen_values(options, tmp_path):
    yolo = YOLO("yolo11n-cls.yaml")
    yolo.add_callback("on_pretrain_routine_end", with_real_statistics)
    freeze_batch_norm(yolo)
    averages, values = [], {}

    def spoil(trainer):
        averages.append(trainer.ema)
        values.setdefault("first", state(trainer.model))
        if len(averages) == 2:
            trainer.loss = trainer.loss * float("nan")

    yolo.add_callback("on_train_epoch_end", spoil)
    look = train(yolo, options)
    assert [average is averages[0] for average in averages] == [True, True, False]
    assert not look.frozen() & changed(values["first"], look.live)
    assert not look.frozen() & changed(look.live, look.copy)
    stored(tmp_path / "run" / "weights" / "best.pt")


def test_a_drift_ends_the_training_after_its_step(options):
    yolo = YOLO("yolo11n-cls.yaml")
    freeze_batch_norm(yolo, "fused")
    freeze_batch_norm(yolo, "eval")  # instead of the first

    def meddle(trainer):
        trainer.model.model[0].bn.running_mean += 1

    yolo.add_callback("on_train_batch_end", meddle)
    with pytest.raises(DriftError, match=r"model.0.bn.running_mean.* step 2"):
        yolo.train(**options(yolo))
    assert {layer.policy for layer in bnfreeze.inspect(yolo.trainer.model).layers} == {"eval"}


def test_what_is_impossible_is_an_error_before_the_first_step(options):
    yolo = YOLO("yolo11n-cls.yaml")
    with pytest.raises(PolicyError, match="evil"):
        freeze_batch_norm(yolo, "evil")
    freeze_batch_norm(yolo, {"backbone": "eval"}, start_epoch=1)
    with pytest.raises(PolicyError, match="backbone"):
        yolo.train(**options(yolo))
    assert yolo.trainer.ema.updates == 0
