"""What ddray needs beside torch, as wheels: fetched where there is a network, unpacked where there is none.

A machine whose python3 has torch, torchvision and numpy may lack these. Each is unpacked only where the
machine has none, or one that is too old. The digits travel as arrays: scikit-learn and SciPy would be too
large. Standard library only, except where the digits are read.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "wheels"
DIGITS = "digits.npz"
_LARGEST = 60 * 2**20
_PLATFORMS = tuple(f"manylinux{version}_x86_64" for version in ("_2_28", "_2_27", "_2_17", "2014"))
# constraints.txt decides the versions; what needs a package stands behind it.
WHEELS = (
    "pydantic>=2.12",  # every setting
    "pydantic-core>=2.41",
    "annotated-types>=0.7",
    "typing-inspection>=0.4",
    "typing-extensions>=4.14",
    "pyyaml>=6.0",  # shipped settings
    "safetensors>=0.5",  # networks of the pool: DSDM, SRe2L, RDED
    "pillow>=11",
    "kornia>=0.8",  # the self-supervised teacher
    "kornia-rs>=0.1.9",
    "diffusers>=0.42",  # D3HR, and what it imports
    "huggingface-hub>=1.32",
    "httpx2>=2.0",
    "httpcore2>=2.0",
    "h11>=0.16",
    "anyio>=4.0",
    "truststore>=0.10",
    "requests>=2.32",
    "urllib3>=2.2",
    "idna>=3.7",
    "certifi>=2024.8",
    "charset-normalizer>=3.3",
    "packaging>=24.0",
    "tqdm>=4.66",
)


def fetch(folder: Path = FOLDER) -> int:
    """Download the wheels for CPython 3.12 on Linux, write the digits beside them, and return their bytes.

    Raises:
        CalledProcessError: pip failed, with what it printed.
        ValueError: they are larger than what can be carried.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):  # two versions of one package would both be unpacked
        old.unlink()
    target = ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:", "--no-deps"]
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    versions = ["--constraint", str(ROOT / "constraints.txt")]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *target, *platforms, *versions, "--dest", str(folder), *WHEELS], check=True)
    write_digits(folder / DIGITS)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > _LARGEST:
        raise ValueError(f"{folder} has {size / 2**20:.0f} MiB, more than {_LARGEST / 2**20:.0f}")
    return size


def write_digits(path: Path) -> None:
    """Write the bundled digits, as ddray reads them, to an .npz file."""
    import numpy as np

    from ddray.data import open_dataset

    digits = open_dataset("digits")
    arrays = {
        f"{name}_{kind}": getattr(split, kind).numpy()
        for name, split in (("train", digits.train()), ("test", digits.test()))
        for kind in ("images", "labels")
    }
    np.savez_compressed(path, mean=digits.mean, std=digits.std, **arrays)


def unpack(target: Path, folder: Path = FOLDER) -> list[str]:
    """Unpack the wheels that this Python lacks into `target`; return their names."""
    least = dict(line.split(">=") for line in WHEELS)
    unpacked = []
    for wheel in sorted(folder.glob("*.whl")):
        name = wheel.name.split("-")[0].replace("_", "-").lower()
        if _numbers(_installed(name)) >= _numbers(least.get(name, "")) > ():
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        unpacked.append(name)
    return unpacked


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers; none of one that is not there, which is older than every other."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in numbers[0].split(".")) if numbers else ()
