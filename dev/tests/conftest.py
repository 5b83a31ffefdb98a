"""Lets the tests import the program, which stands at the top level of the checkout, from any working directory."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
