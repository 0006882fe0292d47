"""Take the pictures of docs/reports.md: `python docs/make_screenshots.py`; needs Chromium."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torchvision
from PIL import Image

import bnfreeze

HERE = Path(__file__).parent
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync "
    "--disable-component-update --no-first-run --disable-quic --hide-scrollbars"
)
# A window of Chromium is at least 500 pixels wide, so the phone is a frame.
PHONE = '<body style="margin:0"><iframe src="page.html" style="border:0;width:390px;height:700px">'


def checkpoint(path: str) -> None:
    """Save a ResNet-50 whose statistics come from noise, and two layers with something wrong."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.2, 1.5)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(4, 3, 64, 64))
    model.layer3[2].bn2.running_var[:5] = 1e-9
    model.layer4[0].bn1.running_var[3] = -0.1
    torch.save(model.state_dict(), path)


def take(page: str, name: str, size: tuple[int, int], *flags: str) -> None:
    """Take a picture of a page, in 256 colours."""
    program = shutil.which("chromium") or "google-chrome"
    command = [program, *FLAGS.split(), f"--user-data-dir={Path('profile').absolute()}", *flags]
    command += ["--window-size=900,700", "--screenshot=shot.png", Path(page).absolute().as_uri()]
    subprocess.run(command, check=True)
    Image.open("shot.png").convert("RGB").crop((0, 0, *size)).quantize(
        256, Image.Quantize.FASTOCTREE
    ).save(HERE / f"reports-{name}.png", optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        checkpoint("resnet50.pth")
        bnfreeze.inspect("resnet50.pth").save_html("page.html")
        Path("phone.html").write_text(PHONE)
        take("page.html", "light", (900, 700))
        take("page.html", "dark", (900, 700), "--blink-settings=preferredColorScheme=0")
        take("phone.html", "phone", (390, 700))
