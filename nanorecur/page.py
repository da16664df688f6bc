"""
The page that analyze.py writes: one HTML file that needs no other, and each picture's numbers.

    page = Page(Path("analysis"), "Analysis of out")
    page.append("p", "said before any picture")
    page.part = page.main  # page.top, page.main, or page.more, which a reader has to open
    page.picture("sweep", plots.draw_sweep(data), data)
    page.write()
"""

import base64
import csv
import io
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from nanorecur.files import write_atomically
from nanorecur.plots import CAPTIONS, shade

MOST_SHOWN = 10  # pictures before those that a reader has to open
DPI, WIDTH_OF_INCH = 150, 96  # dots of a stored inch, and its width on the page in CSS pixels
LEAST_SHARE = 0.7  # of its width, to which a small screen shrinks a picture; then its box scrolls


class Page:
    """An HTML page that needs no other file. It is built of elements, which escape every text."""

    def __init__(self, folder: Path, title: str, refresh: int = 0):
        """refresh: seconds after which a browser loads the page again; 0: never."""
        self.folder, self.n_pictures, self.n_shown = folder, 0, 0
        self.html = ET.Element("html", lang="en")
        head = ET.SubElement(self.html, "head")
        ET.SubElement(head, "meta", charset="utf-8")
        viewport = "width=device-width, initial-scale=1"
        ET.SubElement(head, "meta", name="viewport", content=viewport)
        ET.SubElement(head, "meta", name="color-scheme", content="light dark")
        if refresh:
            ET.SubElement(head, "meta", {"http-equiv": "refresh"}, content=str(refresh))
        self.add(head, "title", title)
        css = Path(__file__).parents[1] / "assets" / "page.css"
        self.add(head, "style", css.read_text("utf-8"))
        self.body = ET.SubElement(self.html, "body")
        self.top, self.main = ET.SubElement(self.body, "header"), ET.SubElement(self.body, "main")
        self.more, self.footer = ET.Element("details"), ET.Element("footer")
        self.add(self.more, "summary", "More pictures")
        self.part = self.top
        self.append("h1", title)

    def add(self, parent: ET.Element, tag: str, text: str = "", **attributes: str) -> ET.Element:
        element = ET.SubElement(parent, tag, attributes)
        element.text = text
        return element

    def append(self, tag: str, text: str = "", kind: str = "") -> ET.Element:
        """Add an element with a text to the page's part. kind: its class in page.css."""
        attributes = {"class": kind} if kind else {}
        return self.add(self.part, tag, text, **attributes)

    def picture(self, name: str, figure: Figure, data: dict, more: str = "") -> None:
        """Add a picture, and write name.png and name.npz, whose arrays are named "run:array".

        name: one of plots.CAPTIONS, and maybe _number. data: {run: arrays}, which the figure shows.
        more: the end of its caption. Pictures after the first MOST_SHOWN go to page.more.
        """
        caption = CAPTIONS[name.split("_")[0]]
        drawn = f"{caption.drawn}{more}"
        png, npz = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        arrays = {f"{run}:{key}": data[run][key] for run in data for key in data[run]}
        np.savez(npz, **arrays)
        write_atomically(self.folder / f"{name}.png", png.getvalue())
        write_atomically(self.folder / f"{name}.npz", npz.getvalue())
        self.n_pictures += 1
        part = self.part if self.n_shown < MOST_SHOWN else self.more
        self.n_shown += part is not self.more
        block = ET.SubElement(part, "figure")
        encoded = base64.b64encode(png.getvalue()).decode()
        width = round(WIDTH_OF_INCH * figure.get_figwidth())
        size = f"width: {width}px; min-width: {round(LEAST_SHARE * width)}px"
        card = self.add(block, "div", **{"class": "wide card"})
        self.add(card, "img", src=f"data:image/png;base64,{encoded}", alt=drawn, style=size)
        words = self.add(block, "figcaption", f"{drawn} Numbers: {name}.npz")
        self.add(words, "p", f"Healthy: {caption.healthy}", **{"class": "healthy"})

    def table(
        self, names: list[str], rows: list, shares: list | None = None, kind: str = "rows"
    ) -> None:
        """Add a table of texts. shares: for each cell None, or from 0 to 1 what colors it.

        kind: its class in page.css: rows, or facts, whose cells may be long.
        """
        table = self.add(self.append("div", kind=f"wide {kind}"), "table")
        line = self.add(table, "tr")
        for name in names:
            self.add(line, "th", name)
        for i, row in enumerate(rows):
            line = self.add(table, "tr")
            for j, text in enumerate(row):
                cell = self.add(line, "td", text)
                if shares and shares[i][j] is not None:
                    cell.set("style", colors(shares[i][j]))

    def write_csv(self, name: str, rows: list) -> None:
        """Write a file of numbers beside the page."""
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        write_atomically(self.folder / name, text.getvalue().encode("utf-8"))

    def write(self) -> Path:
        """Write the page, with page.more if there is something in it, and return its path."""
        if len(self.more) > 1:
            self.body.append(self.more)
        self.body.append(self.footer)
        text = ET.tostring(self.html, encoding="unicode", method="html")
        path = self.folder / "index.html"
        data = f"<!DOCTYPE html>\n{text}".encode("utf-8", "surrogateescape")
        write_atomically(path, data)
        return path


def colors(share: float) -> str:
    """Return a background and a color of text for a share, as CSS."""
    background, ink = shade(share)
    return f"background: {background}; color: {ink}"
