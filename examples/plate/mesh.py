"""Writes case/mesh.inp: 8 x 6 quadratic bricks (C3D20R) of a plate. ``python examples/plate/mesh.py``"""

import itertools
from pathlib import Path

CELLS, SIZE = (8, 6, 1), (0.3, 0.2, 0.002)  # m
CORNERS = [(0, 0, 0), (2, 0, 0), (2, 2, 0), (0, 2, 0), (0, 0, 2), (2, 0, 2), (2, 2, 2), (0, 2, 2)]
EDGES = [(1, 0, 0), (2, 1, 0), (1, 2, 0), (0, 1, 0), (1, 0, 2), (2, 1, 2), (1, 2, 2), (0, 1, 2),
         (0, 0, 1), (2, 0, 1), (2, 2, 1), (0, 2, 1)]  # fmt: skip

places = [p for p in itertools.product(*(range(2 * n + 1) for n in CELLS)) if sum(k % 2 for k in p) < 2]
number = {place: k + 1 for k, place in enumerate(places)}
lines = ["*NODE"]
lines += [f"{number[p]}, " + ", ".join(f"{s * k / (2 * n):.6g}" for k, n, s in zip(p, CELLS, SIZE, strict=True)) for p in places]
lines += ["*ELEMENT, TYPE=C3D20R, ELSET=plate"]
for e, cell in enumerate(itertools.product(*map(range, CELLS))):
    nodes = [number[tuple(2 * c + k for c, k in zip(cell, place, strict=True))] for place in (*CORNERS, *EDGES)]
    lines += [f"{e + 1}, {', '.join(map(str, nodes[:10]))},", ", ".join(map(str, nodes[10:]))]
lines += ["*NSET, NSET=clamped", *(f"{number[p]}," for p in places if p[0] == 0)]
(Path(__file__).parent / "case" / "mesh.inp").write_text("\n".join(lines) + "\n")
