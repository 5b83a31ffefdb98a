"""The look of the figures: no background, and colors that read on a white and on a dark page.

All text in a picture is also stored in its file, as the PNG text `Description`, so that a test can read it.
"""
from files import atomic_file

# Each has a contrast ratio of about 4 against white and against GitHub's dark background, #0d1117.
INK, FAINT = "#7a7f87", "#7a7f8755"     # FAINT is partly transparent, for grids and minor areas
BLUE, ORANGE, GREEN, PURPLE, RED = "#2b7de0", "#be6700", "#238a4b", "#a35bd0", "#d6504b"
STYLE = {
    "font.size": 11, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "legend.labelcolor": INK, "legend.frameon": False, "axes.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "lines.linewidth": 2, "grid.color": FAINT,
    "figure.constrained_layout.use": True,
}
WIDTH, DPI = 8, 200     # inches; a README shows about 900 pixels, and high-resolution screens show twice as many


def draw(make_figure, path):
    """Write the figure that make_figure(pyplot) returns. Raises UserError if the file cannot be written."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.text import Text

    with matplotlib.rc_context(STYLE):
        figure = make_figure(pyplot)
        save(figure, path, "\n".join(sorted({text.get_text() for text in figure.findobj(Text)})))
        pyplot.close(figure)


def save(figure, path, description):
    """Write a Matplotlib figure as a PNG of 256 colors, which look the same and make the file three times smaller."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image, PngImagePlugin  # Matplotlib depends on it
    figure.set_dpi(DPI)
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    image = image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    information = PngImagePlugin.PngInfo()
    information.add_text("Description", description, zip=True)
    with atomic_file(path) as file:
        image.save(file, "png", optimize=True, pnginfo=information)
    print(f"wrote {path}", flush=True)
