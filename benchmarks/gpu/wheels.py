"""Wheels for a GPU machine without a network, in bundles of limited size.

`python -m benchmarks.gpu.wheels pack` here: downloads the wheels of `requirements.txt` with all that they need, except
what is on the GPU machine already, and writes them to `.whl/1`, `.whl/2`, ... of at most `--mib` each.
`python -m benchmarks.gpu.wheels install` there, after each transfer: installs the bundles that have arrived into
`--target`, to be named in PYTHONPATH. It imports no third-party package.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / ".whl"
THERE = """
    certifi charset-normalizer click cuda-bindings cuda-pathfinder cuda-toolkit einops filelock fsspec hf-xet httpcore
    httpx huggingface-hub idna jinja2 markupsafe mpmath msgpack networkx ninja numpy packaging pillow psutil
    py-cpuinfo pyyaml regex requests safetensors setuptools sympy timm torch torchvision tqdm triton typing-extensions
    urllib3 anyio h11 tokenizers transformers zipp
"""
"""Packages of the GPU machine, by their normalized names."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pack(max_mib: float) -> None:
    """Download the wheels for Python 3.12 and sort them into bundles. deepspeed, which has no wheel, is built."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for requirement in _needed():
            _pip("wheel", "--no-deps", "-w", name, requirement) if requirement.startswith(BUILT) else _download(
                name, requirement
            )
        wheels = sorted(folder.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
        shutil.rmtree(FOLDER, ignore_errors=True)
        for number, bundle in enumerate(bundles([(wheel, wheel.stat().st_size) for wheel in wheels], max_mib), 1):
            (FOLDER / str(number)).mkdir(parents=True)
            for wheel in bundle:
                shutil.move(wheel, FOLDER / str(number) / wheel.name)
            mib = sum(file.stat().st_size for file in (FOLDER / str(number)).iterdir()) / 2**20
            print(f"{FOLDER.name}/{number}: {mib:.1f} MiB, {', '.join(wheel.name for wheel in bundle)}")


BUILT = ("deepspeed", "hjson")
"""Packages of pure Python that may come as source."""


def bundles(files: list[tuple[Path, int]], max_mib: float) -> list[list[Path]]:
    """Files, largest first, each in the first bundle that has room. Raises SystemExit for a file that fits in none."""
    filled: list[tuple[list[Path], int]] = []
    for file, size in files:
        if size > max_mib * 2**20:
            raise SystemExit(f"{file.name} has {size / 2**20:.1f} MiB, more than --mib {max_mib:g}")
        fitting = [number for number, (_, used) in enumerate(filled) if used + size <= max_mib * 2**20]
        if fitting:
            names, used = filled[fitting[0]]
            filled[fitting[0]] = ([*names, file], used + size)
        else:
            filled.append(([file], size))
    return [names for names, _ in filled]


def install(target: Path) -> None:
    """Install the wheels of all bundles, without a network and without looking at what they require."""
    wheels = sorted(str(wheel) for wheel in FOLDER.glob("*/*.whl"))
    if not wheels:
        raise SystemExit(f"{FOLDER} has no wheels: run 'python -m benchmarks.gpu.wheels pack' and transfer its folders")
    options = ("--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target))
    _pip("install", *options, *wheels)
    print(f"installed {len(wheels)} wheels. export PYTHONPATH={target}")


def _needed() -> list[str]:
    """`name==version` of the requirements and what they require, without the packages in THERE."""
    import json

    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.json"
        options = ("--dry-run", "--ignore-installed", "--report", str(report), "-r", str(HERE / "requirements.txt"))
        _pip("install", *options)
        packages = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    there = set(THERE.split())
    names = {package["name"].lower().replace("_", "-").replace(".", "-"): package["version"] for package in packages}
    return [
        f"{name}=={version}"
        for name, version in sorted(names.items())
        if name not in there and not name.startswith("nvidia-")
    ]


def _download(folder: str, requirement: str) -> None:
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    options = ("--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:", "--no-deps", "-d", folder)
    _pip("download", *options, *platforms, requirement)


def _pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__)
    parser.add_argument("action", choices=("pack", "install"))
    parser.add_argument("--mib", type=float, default=54, help="largest bundle; the working tree travels with it")
    parser.add_argument("--target", type=Path, default=Path(tempfile.gettempdir()) / "gpu-packages")
    options = parser.parse_args()
    if options.action == "pack":
        pack(options.mib)
    else:
        install(options.target)


if __name__ == "__main__":
    main()
