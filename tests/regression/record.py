"""Stores the bits of cases.py as they are on this processor: ``python tests/regression/record.py [--only NAME ...]``.

For what bits change on purpose alone. With ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 before it, those of a processor
without AVX-512 are stored.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from footprint import STORED, key, runnable, set_up, stored, take


def main() -> int:
    """Run the cases and merge what they leave into hashes.json; the exit code."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", nargs="+", metavar="NAME", help="these cases (default: all)")
    p.add_argument("--values", action="store_true", help="store anew the numbers that hold on any processor, too")
    p.add_argument("--merge", type=Path, metavar="FILE", help="take what the test wrote on an unknown processor; nothing is run")
    args = p.parse_args()
    all_stored = stored() if STORED.exists() else {"values": {}, "hashes": {}}
    if args.merge:
        for name, hashes in json.loads(args.merge.read_text()).items():
            all_stored["hashes"].setdefault(name, {}).update(hashes)
        return write(all_stored)
    cases = {name: case for name, case in runnable().items() if args.only is None or name in args.only}
    if not cases:
        sys.exit(f"no such case: {' '.join(args.only)}")
    with tempfile.TemporaryDirectory() as place:
        set_up(Path(place))
        found = take(Path(place), cases)
    for name, footprint in found.items():
        if footprint.failure:
            print(f"{name}: {footprint.failure}", file=sys.stderr)
            continue
        old = all_stored["hashes"].setdefault(key(), {}).get(name)
        changed = [group for group, value in footprint.hashes.items() if old and old.get(group) != value]
        print(f"{name}: {'new' if old is None else ', '.join(changed) or 'as before'}")
        all_stored["hashes"][key()][name] = footprint.hashes
        if args.values or name not in all_stored["values"]:
            all_stored["values"][name] = footprint.values
    write(all_stored)
    return int(any(footprint.failure for footprint in found.values()))


def write(everything: dict) -> int:
    """A line a case, sorted."""
    lines = lambda table: ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table.items()))  # noqa: E731
    hashes = ",\n".join(f" {json.dumps(name)}: {{\n{lines(table)}\n }}" for name, table in sorted(everything["hashes"].items()))
    STORED.write_text(f'{{\n"values": {{\n{lines(everything["values"])}\n}},\n"hashes": {{\n{hashes}\n}}\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
