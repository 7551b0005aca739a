import sys
from pathlib import Path

# So that the tests here share modules, and those of the tests above.
sys.path[:0] = [str(Path(__file__).parents[1])]
