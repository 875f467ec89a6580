"""What all figures and tables share: matplotlib without a screen, names shown as they are, a failure that costs a figure only."""

import logging
import warnings
from collections.abc import Callable

from dzhpc.errors import message_of

log = logging.getLogger("dzhpc")


def pyplot():
    """matplotlib.pyplot, drawing into files. TeX is never called, whatever the user's matplotlibrc says."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.usetex"] = False
    from matplotlib import pyplot

    return pyplot


def plain(name: str) -> str:
    """A name as matplotlib shows it unaltered: ``$`` begins no formula, and ``_`` hides no entry of a legend."""
    text = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def cell(name: str) -> str:
    """A name as a cell of a Markdown table."""
    return " ".join(name.split()).replace("|", r"\|")


def drawn(draw: Callable[[], object]) -> bool:
    """Draw; whether that went well. Fonts, colours and backends may raise anything, which is a warning. Raises OSError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # glyphs that a font lacks
            draw()
    except OSError:
        raise
    except Exception as error:
        log.warning("no figure: %s", message_of(error))
        return False
    return True
