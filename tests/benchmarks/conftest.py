"""Benchmarks are scripts: their folder stands on the path when one is started, and here."""

import sys

from tests.sources import ROOT

sys.path.append(str(ROOT / "benchmarks"))
