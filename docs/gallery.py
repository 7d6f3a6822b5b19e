"""Makes the figures of ``docs/gallery.md`` again, by the commands that stand there.

    python docs/gallery.py                       # all; several minutes on one core
    python docs/gallery.py --only attention_map  # one, by the name of its file
    python docs/gallery.py --keep runs           # keep what the commands wrote, and do not repeat what is there

In the page, before a block of commands, comments name the figures and the files that the last command writes::

    <!-- figure: figures/NAME.png from PATH -->

A ``PATH#2`` is the second picture inside an HTML file, a pattern like ``FOLDER/0?.png`` several pictures in rows of
four. ``REGION.svs`` and ``REGION.h5`` in a command are the embedded slide region and its features. Pictures are brought
to a width and to few colours, so that the repository stays small.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lightning_entropy import cli
from lightning_entropy.data import slide_region
from lightning_entropy.files import atomic_write

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "gallery.md"
MOST_BYTES = 150_000
WIDTHS = (1000, 800, 640, 480)
SECTION = re.compile(r"^((?:<!-- figure: .* -->\n)+)```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"<!-- figure: figures/(\w+)\.png from ([^ #]+)(?:#(\d+))? -->")
INSIDE = re.compile(rb"data:image/png;base64,([A-Za-z0-9+/=]+)")


class Figure(NamedTuple):
    """A figure of the page.

    Attributes:
        name: of its file in ``docs/figures``, without the ending.
        source: the file that the commands write.
        number: which picture of an HTML file; None for a file that is a picture.
        commands: arguments of ``lightning-entropy``.
    """

    name: str
    source: str
    number: int | None
    commands: list[list[str]]


def figures(page: Path = PAGE) -> list[Figure]:
    """The figures of the page, in its order."""
    found = []
    for comments, block in SECTION.findall(page.read_text(encoding="utf-8")):
        lines = re.findall(r"^\$ lightning-entropy (.*)$", block, re.MULTILINE)
        for name, source, number in NAMED.findall(comments):
            commands = [shlex.split(line) for line in lines]
            found.append(Figure(name, source, int(number) if number else None, commands))
    return found


def picture(file: Path, number: int | None) -> Image.Image:
    """The picture in a PNG file, or the picture of a number in an HTML file.

    Raises:
        ValueError: if the HTML file has fewer.
    """
    if number is None:
        with Image.open(file) as image:
            return image.copy()
    inside = INSIDE.findall(file.read_bytes())
    if len(inside) < number:
        raise ValueError(f"{file} holds {len(inside)} pictures, not {number}")
    return Image.open(io.BytesIO(base64.b64decode(inside[number - 1])))


def sheet(files: list[Path], columns: int = 4) -> Image.Image:
    """Pictures in rows, in fields of the size of the first."""
    width, height = picture(files[0], None).size
    whole = Image.new("RGB", (width * min(columns, len(files)), height * -(-len(files) // columns)), "white")
    for i, file in enumerate(files):
        with Image.open(file) as image:
            whole.paste(image.convert("RGB"), (width * (i % columns), height * (i // columns)))
    return whole


def small(image: Image.Image) -> bytes:
    """The picture as PNG, as wide and in as many colours as :data:`MOST_BYTES` allow.

    Raises:
        ValueError: if it does not get small enough.
    """
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
    for width in WIDTHS:
        sized = flat
        if flat.width > width:
            sized = flat.resize((width, round(flat.height * width / flat.width)), Image.Resampling.LANCZOS)
        for colours in (128, 48):
            written = io.BytesIO()
            sized.quantize(colours).save(written, "PNG", optimize=True)
            if written.tell() < MOST_BYTES:
                return written.getvalue()
    raise ValueError(f"a picture of {image.size} is larger than {MOST_BYTES:,} bytes in every size")


def make(figure: Figure, folder: Path) -> Path:
    """Run the commands of a figure in a folder, unless its file is there, and put it into ``docs/figures``.

    Raises:
        RuntimeError: if a command fails or does not write the file.
    """
    region = slide_region()
    words = {"REGION.svs": str(region.svs), "REGION.h5": str(region.features)}
    folder.mkdir(parents=True, exist_ok=True)
    written = sorted(folder.glob(figure.source))
    if not written:
        before = Path.cwd()
        os.chdir(folder)
        try:
            for command in figure.commands:
                if cli.main([words.get(word, word) for word in command]):
                    raise RuntimeError(f"failed: lightning-entropy {shlex.join(command)}")
        finally:
            os.chdir(before)
        written = sorted(folder.glob(figure.source))
    if not written:
        raise RuntimeError(f"the commands of {figure.name} did not write {figure.source}")
    target = DOCS / "figures" / f"{figure.name}.png"
    with atomic_write(target) as temporary:
        temporary.write_bytes(small(sheet(written) if len(written) > 1 else picture(written[0], figure.number)))
    return target


def main(arguments: list[str] | None = None) -> int:
    """Make the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="figures to make (default: all)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder for what the commands write")
    options = parser.parse_args(arguments)
    known = {figure.name: figure for figure in figures()}
    unknown = sorted(set(options.only or []) - set(known))
    if unknown:
        parser.error(f"there is no figure {', '.join(unknown)}; there are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        for name in options.only or known:
            target = make(known[name], folder)
            print(f"written: {target.relative_to(DOCS.parent)} ({target.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
