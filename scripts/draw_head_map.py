"""Draws docs/head_map.svg: which K and V head each q head of Sigma-1.5B reads, and what a token costs in the cache.

    python scripts/draw_head_map.py [FILE]     # default: docs/head_map.svg

The picture is plain SVG text, so that it needs nothing but Python and a change of it can be read in a diff.
"""

import sys
from math import gcd
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "docs" / "head_map.svg"
N_Q, N_K, N_V, D = 32, 4, 16, 64  # a layer of Sigma-1.5B
GQA = 16  # K and V heads of the layer beside it
BYTES = 2  # of a number in bfloat16
EXAMPLE = 13  # the q head whose two heads are marked

# Colours of Okabe and Ito, which colour-blind readers can tell apart. Texts and cards follow the reader's theme.
Q, K, V = "#56b4e9", "#e69f00", "#009e73"
STYLE = f"""
  text {{ font-family: -apple-system, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif; font-size: 13px; }}
  text {{ fill: #1f2328; }}
  .title {{ font-size: 17px; font-weight: 600; }}
  .name {{ font-size: 15px; font-weight: 600; }}
  .soft {{ fill: #59636e; }}
  .number {{ fill: #0b1b26; font-size: 11px; text-anchor: middle; }}
  .size {{ fill: #0b1b26; text-anchor: middle; }}
  .middle {{ text-anchor: middle; }}
  .card {{ fill: #f3f5f7; stroke: #d5dae0; }}
  .q {{ fill: {Q}; }} .k {{ fill: {K}; }} .v {{ fill: {V}; }}
  .marked {{ stroke: #1f2328; stroke-width: 2.5; }}
  .way {{ stroke: #1f2328; stroke-width: 2; fill: none; }}
  .gone {{ fill: none; stroke: #8b949e; stroke-dasharray: 4 3; }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #f0f6fc; }}
    .soft {{ fill: #9198a1; }}
    .number, .size {{ fill: #0b1b26; }}
    .card {{ fill: #161b22; stroke: #30363d; }}
    .marked, .way {{ stroke: #f0f6fc; }}
  }}
"""

WIDTH, HEIGHT = 1016, 474
LEFT = 152  # of the heads; what they are called stands before it
BOX, GAP, CARD_GAP, CARD_PADDING = 21, 3, 12, 6  # of a q head, between heads, between KV groups
BAR = 700  # length of the longest in the lower part
GROUPS = gcd(N_K, N_V)
ROWS = {"q": (92, 30), "k": (158, 34), "v": (228, 34)}  # top and height
HEADS = {"q": N_Q, "k": N_K, "v": N_V}


def column(q_head: int) -> float:
    """Where the box of a q head begins."""
    group = q_head // (N_Q // GROUPS)
    return LEFT + CARD_PADDING + q_head * (BOX + GAP) + group * (2 * CARD_PADDING - GAP + CARD_GAP)


def text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"' + (f' class="{style}"' if style else "") + f">{words}</text>"


def box(x: float, y: float, width: float, height: float, style: str, radius: float = 4) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" class="{style}"/>'


def span(kind: str, head: int) -> tuple[float, float]:
    """Left and right of a head: those of the q heads that read it."""
    readers = N_Q // HEADS[kind]
    return column(head * readers), column((head + 1) * readers - 1) + BOX


def heads() -> list[str]:
    lines = [
        text(
            24,
            36,
            "Which heads work together in Sigma-1.5B: a q head reads the K head and the V head below it",
            "title",
        )
    ]
    for group in range(GROUPS):
        begin = column(group * N_Q // GROUPS) - CARD_PADDING
        end = column((group + 1) * N_Q // GROUPS - 1) + BOX + CARD_PADDING
        lines.append(box(begin, 58, end - begin, 216, "card", 8))
        lines.append(text((begin + end) / 2, 79, f"KV group {group}", "soft middle"))
    names = {
        "q": (f"{N_Q} q heads", "never cached"),
        "k": (f"{N_K} K heads", f"each for {N_Q // N_K} q heads"),
        "v": (f"{N_V} V heads", f"each for {N_Q // N_V} q heads"),
    }
    read = {kind: EXAMPLE * n // N_Q for kind, n in HEADS.items()}  # eq. 16 and 17
    x = column(EXAMPLE) + BOX / 2
    for kind, (top, height) in ROWS.items():
        lines.append(text(24, top + 14, names[kind][0], "name"))
        lines.append(text(24, top + 31, names[kind][1], "soft"))
        for head in range(HEADS[kind]):
            left, right = span(kind, head)
            style = kind + (" marked" if head == read[kind] else "")
            lines.append(box(left, top, right - left, height, style))
            lines.append(text((left + right) / 2, top + height / 2 + 4, str(head), "number"))
    (q_top, q_height), (k_top, k_height), (v_top, _) = ROWS.values()
    way = f"M{x:g} {q_top + q_height + 1}V{k_top - 1}M{x:g} {k_top + k_height + 1}V{v_top - 1}"
    lines.append(f'<path d="{way}" class="way"/>')
    words = f"q head {EXAMPLE} reads K head {read['k']} and V head {read['v']}, both of its own KV group"
    lines.append(text(LEFT, 298, words, "soft"))
    return lines


def cache() -> list[str]:
    """The bytes that a token takes in one layer's cache."""
    lines = [text(24, 348, "What a token costs in the cache: bytes per layer in bfloat16", "title")]
    whole = 2 * GQA * D * BYTES
    for top, name, n_k, n_v in ((368, "Sigma", N_K, N_V), (420, f"GQA-{GQA}", GQA, GQA)):
        lines.append(text(24, top + 15, name, "name"))
        lines.append(text(24, top + 32, f"heads {N_Q}/{n_k}/{n_v}", "soft"))
        k, v = n_k * D * BYTES, n_v * D * BYTES
        parts = [(k, f"K {k:,}", "k", "size"), (v, f"V {v:,}", "v", "size")]
        if left_out := whole - k - v:
            parts.append((left_out, f"{100 * left_out / whole:g} % less", "gone", "soft middle"))
        x = float(LEFT)
        for size, label, kind, style in parts:
            width = BAR * size / whole
            lines.append(box(x + 1, top, width - 2, 36, kind))
            lines.append(text(x + width / 2, top + 23, label, style))
            x += width
        lines.append(text(LEFT + BAR + 16, top + 23, f"{k + v:,} bytes", "name"))
    return lines


def picture() -> str:
    title = "The head map of Sigma-1.5B, and the bytes of a token in its cache beside those of GQA-16"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        *heads(),
        *cache(),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    file.write_text(picture())
